# SPDX-License-Identifier: Apache-2.0
"""Accuracy by degree and reliability, as figures: a panel a dataset, and beneath it of how many nodes that is."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .groups import LEAST_NODES, bucket_name
from .pictures import SPREAD, line_styles, write_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["GROUP_PICTURES", "draw_degrees", "draw_reliability", "write_group_pictures"]

Style = dict[str, Any]
_GREY, _LINE = "#c9c9c9", "#e4e4e4"


def draw_degrees(rows: Sequence[dict[str, Any]]) -> Figure | None:
    """Test accuracy in every bucket of degree, ± deviation over seeds, and the number of test nodes.

    Args: rows: of table.json; of every dataset the first method's, at its first depth. None where none has groups.
        Points of fewer than LEAST_NODES nodes are left out.
    """
    return _draw(rows, _degrees, "mean over seeds ± standard deviation; beneath: test nodes in each bucket of degree")


def draw_reliability(rows: Sequence[dict[str, Any]]) -> Figure | None:
    """Accuracy by confidence, and how many nodes have it, all seeds together; as `draw_degrees`."""
    return _draw(rows, _reliability, "above the line: right more often than sure; beneath: share of the test nodes")


GROUP_PICTURES: dict[str, Callable[[Sequence[dict[str, Any]]], Figure | None]] = {
    "accuracy_by_degree": draw_degrees, "reliability": draw_reliability}


def write_group_pictures(rows: Sequence[dict[str, Any]], out: Path) -> list[Path]:
    """Draw what the table's rows allow as .svg and .png in `out`; an older picture that no longer applies goes."""
    return [file for name, draw in GROUP_PICTURES.items() for file in write_picture(draw(rows), out / name)]


def _draw(rows: Sequence[dict[str, Any]], panel: Callable[[Axes, Axes, list[dict[str, Any]], dict[str, Style]], None],
          caption: str) -> Figure | None:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    chosen: dict[str, list[dict[str, Any]]] = {}
    for row in (row for row in rows if row["ece"]):
        same = chosen.setdefault(row["shape"], [])
        if not same or (row["method"], row["layers"]) == (same[0]["method"], same[0]["layers"]):
            same.append(row)
    if not chosen:
        return None
    found = line_styles([{**row, "method": ""} for some in chosen.values() for row in some], "width")
    styles = {width: style for (_, width), style in found.items()}
    columns = min(2, len(chosen))
    lines = math.ceil(len(chosen) / columns)
    figure = Figure(figsize=(4.9 * columns + 0.4, 4.4 * lines + 0.3),
                    layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.05))
    panels = figure.subplots(2 * lines, columns, squeeze=False, height_ratios=[3, 1] * lines)
    for axes in panels.ravel():
        axes.set_visible(False)
    for number, (name, some) in enumerate(chosen.items()):
        upper, lower = panels[2 * (number // columns):, number % columns][:2]
        for axes in (upper, lower):
            axes.set_visible(True)
            axes.grid(axis="y", color=_LINE, linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=8)
        panel(upper, lower, some, styles)
        upper.set_title(f"{name}  ({some[0]['method']}, K = {some[0]['layers']})", fontsize=10, loc="left")
        upper.legend(frameon=False, fontsize=8, loc="best")
    figure.supxlabel(caption, fontsize=8, color="#555555")
    return figure


def _degrees(upper: Axes, lower: Axes, rows: list[dict[str, Any]], styles: dict[str, Style]) -> None:
    buckets = rows[0]["by_degree"]
    for number, row in enumerate(rows):
        shift = SPREAD * ((number + 0.5) / len(rows) - 0.5)
        points = [(place + shift, g) for place, g in enumerate(row["by_degree"]) if g["nodes"] >= LEAST_NODES]
        upper.errorbar([place for place, _ in points], [100 * g["mean"] for _, g in points],
                       yerr=[100 * (g["sd"] or 0.0) for _, g in points], markersize=4.5, linewidth=0.9,
                       elinewidth=1.1, capsize=2.0, **styles[row["width"]])
    upper.set_ylabel("test accuracy, %", fontsize=9)
    bars = lower.bar(range(len(buckets)), [g["nodes"] for g in buckets], 0.7, color=_GREY)
    lower.bar_label(bars, fontsize=7, color="#555555")
    lower.margins(y=0.25)
    lower.set_ylabel("nodes", fontsize=9)
    lower.set_xlabel("degree", fontsize=9)
    many = len(buckets) > 8
    lower.set_xticks(range(len(buckets)), [bucket_name(g["from"], g["to"]) for g in buckets],
                     rotation=35 if many else 0, ha="right" if many else "center")
    upper.set_xticks(range(len(buckets)), [""] * len(buckets))
    for axes in (upper, lower):
        axes.set_xlim(-0.5, len(buckets) - 0.5)


def _reliability(upper: Axes, lower: Axes, rows: list[dict[str, Any]], styles: dict[str, Style]) -> None:
    upper.plot([0, 100], [0, 100], color="#999999", linewidth=0.8)
    for row in rows:
        bins, style = row["reliability"], styles[row["width"]]
        drawn = [i for i, nodes in enumerate(bins["nodes"]) if nodes >= LEAST_NODES]
        upper.plot([100 * bins["confidence"][i] for i in drawn], [100 * bins["accuracy"][i] for i in drawn],
                   markersize=4.5, linewidth=0.9,
                   **{**style, "label": f"{row['width']}: ECE {100 * row['ece']['mean']:.1f}"})
        edges = [100 * i / len(bins["nodes"]) for i in range(len(bins["nodes"]) + 1)]
        lower.stairs([100 * nodes / sum(bins["nodes"]) for nodes in bins["nodes"]], edges, color=style["color"],
                     linestyle=style["linestyle"], linewidth=1.1)
    upper.set_ylabel("test accuracy, %", fontsize=9)
    lower.set_ylabel("nodes, %", fontsize=9)
    lower.set_xlabel("confidence, %", fontsize=9)
    upper.set_ylim(0, 100)
    for axes in (upper, lower):
        axes.set_xlim(0, 100)
