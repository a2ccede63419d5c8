# SPDX-License-Identifier: Apache-2.0
"""Accuracy by width and by depth, as figures: one panel a dataset, points with ± one standard deviation over seeds."""
from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .table import METRIC_NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["PICTURES", "SPREAD", "check_pictures", "draw", "line_styles", "save_figure", "write_picture",
           "write_pictures"]

PICTURES = {"accuracy_by_bits": ("width", "layers"), "accuracy_by_depth": ("layers", "width")}
"""File → what stands on the x axis, and what tells lines of one method apart."""
# Okabe and Ito's colours, told apart by colour-blind readers; their yellow is left out, it is lost on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)))
_ENDINGS = ("svg", "png")
SPREAD = 0.64
"""Share of a category's width over which the points of different lines are set apart."""


def check_pictures() -> None:
    """Refuse before hours of training what would fail after them.

    Raises: InputError: matplotlib is not there.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("pictures need matplotlib: pip install 'qgnn-dist[report]', or add --no-pictures")


def write_pictures(rows: Sequence[dict[str, Any]], out: Path) -> list[Path]:
    """Draw what the table's rows allow as .svg and .png in `out`; an older picture that no longer applies goes."""
    return [file for name, (across, apart) in PICTURES.items()
            for file in write_picture(draw(rows, across, apart), out / name)]


def write_picture(figure: Figure | None, file: Path) -> list[Path]:
    """`save_figure`; of no figure, remove what an earlier one left."""
    if figure is not None:
        return save_figure(figure, file)
    for ending in _ENDINGS:
        file.with_name(f"{file.name}.{ending}").unlink(missing_ok=True)
    return []


def save_figure(figure: Figure, file: Path) -> list[Path]:
    """Write `file`.svg and `file`.png; equal figures give equal files."""
    import matplotlib

    written = []
    for ending in _ENDINGS:
        written.append(file.with_name(f"{file.name}.{ending}"))
        with matplotlib.rc_context({"svg.hashsalt": "qgnn", "svg.fonttype": "none"}):
            figure.savefig(written[-1], dpi=150, metadata={"Date": None} if ending == "svg" else None)
    return written


def draw(rows: Sequence[dict[str, Any]], across: str, apart: str) -> Figure | None:
    """A figure with a panel for each dataset of which a method has several values of `across`; None where none has.

    Args:
        rows: of table.json. across: key on the x axis. apart: key that tells lines of one method apart.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = [row for row in rows if row["test_mean"] is not None]
    datasets = [name for name in dict.fromkeys(row["shape"] for row in rows)
                if any(len({row[across] for row in rows if (row["shape"], row["method"]) == (name, method)}) > 1
                       for method in dict.fromkeys(row["method"] for row in rows))]
    rows = [row for row in rows if row["shape"] in datasets]
    if not rows:
        return None
    styles = line_styles(rows, apart)
    columns = min(2, len(datasets))
    lines = math.ceil(len(datasets) / columns)
    widest = max(len({row[across] for row in rows if row["shape"] == name}) for name in datasets)
    panel = max(4.6, 1.0 + 0.9 * widest, 0.14 * widest * len(styles))
    figure = Figure(figsize=(panel * columns + 1.7, 3.5 * lines + 0.5),
                    layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06))
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in panels[len(datasets):]:
        axes.set_visible(False)
    for axes, name in zip(panels, datasets):
        _panel(axes, name, [row for row in rows if row["shape"] == name], across, apart, styles)
    handles: dict[str, Any] = {}
    for axes in panels[:len(datasets)]:
        handles.update({str(label): handle for handle, label in zip(*axes.get_legend_handles_labels())})
    ordered = [style["label"] for style in styles.values()]
    figure.legend([handles[label] for label in ordered], ordered, loc="outside right upper", frameon=False, fontsize=9)
    figure.supxlabel("mean over seeds ± standard deviation; epoch chosen on validation", fontsize=8, color="#555555")
    return figure


def line_styles(rows: Sequence[dict[str, Any]], apart: str) -> dict[tuple[str, Any], dict[str, Any]]:
    """(method, value of `apart`) → how its line looks, the same in every panel."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    others = list(dict.fromkeys(row[apart] for row in rows))
    present = {(row["method"], row[apart]) for row in rows}
    styles = {}
    for first, method in enumerate(methods):
        for second, other in enumerate(others):
            if (method, other) not in present:
                continue
            # One method alone: colours tell the other values apart.
            colour = first if len(methods) > 1 else second
            dash = second + len(others) * (first // len(_COLOURS))
            mark = first if len(others) == 1 else dash
            told = f"K = {other}" if apart == "layers" else str(other)
            label = method if len(others) == 1 else told if len(methods) == 1 else f"{method}, {told}"
            styles[method, other] = {"color": _COLOURS[colour % len(_COLOURS)], "label": label,
                                     "marker": _MARKERS[mark % len(_MARKERS)],
                                     "linestyle": _DASHES[dash % len(_DASHES)]}
    return styles


def _panel(axes: Axes, name: str, rows: Sequence[dict[str, Any]], across: str, apart: str,
           styles: dict[tuple[str, Any], dict[str, Any]]) -> None:
    values = list(dict.fromkeys(row[across] for row in rows))
    values = sorted(values) if across == "layers" else values
    here = [key for key in styles if any((row["method"], row[apart]) == key for row in rows)]
    for number, key in enumerate(here):
        points = sorted((values.index(row[across]), row) for row in rows if (row["method"], row[apart]) == key)
        shift = SPREAD * ((number + 0.5) / len(here) - 0.5) if len(here) > 1 else 0.0
        axes.errorbar([place + shift for place, _ in points], [100 * row["test_mean"] for _, row in points],
                      yerr=[100 * (row["test_sd"] or 0.0) for _, row in points], markersize=4.5, linewidth=0.9,
                      elinewidth=1.1, capsize=2.0, **styles[key])
    long = sum(len(str(value)) + 2 for value in values) > 11 * len(values) or len(values) > 7
    axes.set_xticks(range(len(values)), [str(value) for value in values], rotation=25 if long else 0,
                    ha="right" if long else "center", fontsize=9)
    axes.set_xlim(-0.5, len(values) - 0.5)
    for edge in range(1, len(values)):
        axes.axvline(edge - 0.5, color="#e4e4e4", linewidth=0.8, zorder=0)
    axes.set_xlabel("depth K" if across == "layers" else "width", fontsize=9)
    axes.set_ylabel(f"test {METRIC_NAMES[rows[0]['metric']]}", fontsize=9)
    counts = {row["repeats"] for row in rows}
    seeds = str(min(counts)) if len(counts) == 1 else f"{min(counts)}–{max(counts)}"
    axes.set_title(f"{name}  ({seeds} seed{'' if seeds == '1' else 's'})", fontsize=10, loc="left")
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", labelsize=9)
