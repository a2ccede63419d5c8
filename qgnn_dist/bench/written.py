# SPDX-License-Identifier: Apache-2.0
"""Writing a bench's tables: table.json for machines, table.md for people, a picture."""
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .machine import envelope

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Tables", "figure_of", "markdown", "write_bench"]

Tables = list[tuple[str, list[str], list[list[str]]]]
"""Title, columns and lines of each table."""


def write_bench(bench: str, out: Path, rows: list[dict[str, Any]], title: str, intro: str, tables: Tables,
                figure: Figure | None, **more: Any) -> dict[str, Any]:
    """Write table.json, table.md and, where there is one, the picture; returns the table with `files`.

    Args: title, intro: of table.md. more: what stands beside the rows.
    """
    from ..files.write import write_atomically

    result = {"schema": 1, "bench": bench, **more, **envelope(rows)}
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "table.json", (json.dumps(result, indent=2) + "\n").encode())
    write_atomically(out / "table.md", markdown(result, title, intro, tables).encode())
    files = [out / "table.md", out / "table.json"]
    if figure is not None:
        from .pictures import save_figure

        files += save_figure(figure, out / bench)
    return {**result, "files": [str(file) for file in files]}


def markdown(result: dict[str, Any], title: str, intro: str, tables: Tables) -> str:
    """table.md."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    out = [f"# {title}", "", intro, "", f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']:g} GiB; "
           f"commit {result['commit'] or 'unknown'}; {versions}."]
    for name, columns, lines in tables:
        rule = [":---", *["---:"] * (len(columns) - 1)]
        out += ["", f"## {name}", "", *(f"| {' | '.join(words)} |" for words in (columns, rule, *lines))]
    return "\n".join(out) + "\n"


def figure_of(panels: int, width: float = 4.6, height: float = 3.4) -> tuple[Figure, Sequence[Any]]:
    """A figure and its panels, side by side."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width * panels + 0.6, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06))
    axes = list(figure.subplots(1, panels, squeeze=False).ravel())
    for one in axes:
        one.grid(color="#e4e4e4", linewidth=0.8)
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=8)
    return figure, axes
