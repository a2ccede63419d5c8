# SPDX-License-Identifier: Apache-2.0
"""Times of the systems beside each other: a panel a kind of propagation, a bar a system."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .beside import is_ours
from .pictures import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_bars", "write_bars"]

_OURS, _STOCK, _FASTEST = "#0072B2", "#b8b8b8", "#E69F00"


def write_bars(rows: Sequence[dict[str, Any]], out: Path) -> list[Path]:
    """Write times.svg and times.png of what was measured."""
    return save_figure(draw_bars(rows), out / "times")


def draw_bars(rows: Sequence[dict[str, Any]]) -> Figure:
    """Median ms with the 10 % and 90 % quantiles, on an axis with logarithmic scale; rows without a time are named."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    most = max(sum(row["kind"] == kind for row in rows) for kind in kinds)
    figure = Figure(figsize=(4.3 * len(kinds) + 0.6, 0.34 * most + 1.5),
                    layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06))
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False, sharex=True).ravel(), kinds):
        _panel(axes, [row for row in rows if row["kind"] == kind])
        axes.set_title(kind, fontsize=10, loc="left")
    figure.supxlabel(f"{rows[0]['shape']}, {rows[0]['threads']} threads: ms, median and 10-90 %; × the fastest stock "
                     "system (orange)", fontsize=8, color="#555555")
    return figure


def _panel(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    axes.set_xscale("log")
    for place, row in enumerate(rows):
        middle = row["ms_median"]
        if middle is None:
            axes.text(0.01, place, row["why"].partition(":")[0], transform=axes.get_yaxis_transform(), va="center",
                      fontsize=8, color="#888888")
            continue
        colour = _OURS if is_ours(row["system"]) else _FASTEST if row["system"] == row.get("stock") else _STOCK
        axes.barh(place, middle, color=colour, height=0.66,
                  xerr=[[middle - row["ms_p10"]], [row["ms_p90"] - middle]], error_kw={"elinewidth": 0.9, "capsize": 2})
        text = f"  {row['speedup']:.2f}×" if "speedup" in row else ""
        axes.text(row["ms_p90"], place, text, va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row["system"] for row in rows], fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
