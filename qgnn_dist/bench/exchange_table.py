# SPDX-License-Identifier: Apache-2.0
"""What `qgnn bench exchange` shows of its rows: a table and a panel for each cut and rate."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .written import Tables, figure_of, write_bench

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw", "finish", "tables"]

_INTRO = (
    "Workers are processes in network namespaces of one machine, whose cores they share; every one has a link of "
    "the given rate in each direction to a switch. An epoch is a forward, a backward and a step, without "
    "evaluation unless said so, timed where all workers are driven from: median and 10-90 % of turns in which "
    "every cell ran once, after one that warms up. x float: the median over turns of float's epoch over this "
    "one's, same rounds, same link. MB: sent by a worker in an epoch, mean. Formula: whether every worker's bytes"
    " of every kind are what rows, widths, scales and headers say. Interfaces: their counters over our bytes. "
    "Link use: bytes over what the links could carry from when the last worker has begun a round until the last "
    "one has all; above 100 where a part of it passed while slower workers still computed. Waiting: seconds that "
    "a worker waits in an epoch for peers' messages, in the all-reduce of the gradients, and for the multiplier "
    "server, means. CPU: seconds of all workers together over the machine's cores, below which no epoch can be "
    "here.")
_COLOURS = {32: "#b8b8b8", 8: "#56B4E9", 4: "#0072B2", 2: "#D55E00"}


def finish(out: Path, rows: list[dict[str, Any]], *, pictures: bool) -> dict[str, Any]:
    """Write the tables, and the picture."""
    measured = any("epoch_s" in row for row in rows)
    return write_bench("exchange", out, rows, "Training over shaped links", _INTRO, tables(rows),
                       draw(rows) if pictures and measured else None)


def name_of(bits: int) -> str:
    """A width as a word."""
    return "float" if bits == 32 else f"INT{bits}"


def _groups(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    keys = ("shape", "method", "workers", "rate")
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(found.values())


def _title(row: dict[str, Any]) -> str:
    rate = "unshaped" if row["rate"] == "none" else row["rate"]
    return f"{row['shape']}, {row['workers']} workers, {row['method']} cut, {rate}"


def tables(rows: Sequence[dict[str, Any]]) -> Tables:
    """A table for each cut and rate."""
    columns = ["messages / gradients", "s an epoch", "10-90 %", "x float", "MB forward", "backward", "all-reduce",
               "formula", "interfaces", "link use, %", "waiting: peers", "all-reduce", "server", "CPU"]
    found: Tables = []
    for group in _groups(rows):
        timed = next((row["time_s"] for row in group if "time_s" in row), None)
        more = [] if timed is None else [f"test % after {timed:g} s", "epochs"]
        title = f"{_title(group[0])} ({100 * group[0]['cut_fraction']:.1f} % of the edges cut)"
        found.append((title, [*columns, *more], [_line(row, timed is not None) for row in group]))
    return found


def _line(row: dict[str, Any], timed: bool) -> list[str]:
    name = f"{name_of(row['forward'])} / {name_of(row['gradients'])}" + (", evaluated" if row["evaluation"] else "")
    if "epoch_s" not in row:
        return [name, row["why"], *["–"] * (14 if timed else 12)]
    seconds, sent, waits = row["epoch_s"], row["bytes"], row["wait_s"]
    use, ratio = row.get("link_use"), row.get("interface_ratio")
    words = [name, f"{seconds['median']:.3f}", f"{seconds['p10']:.3f}-{seconds['p90']:.3f}", f"{row['speedup']:.2f}",
             *(f"{sum(sent[kind]) / len(sent[kind]) / 1e6:.2f}" for kind in ("forward", "backward", "control")),
             "equal" if row["bytes_equal"] else "DIFFERS", "–" if ratio is None else f"{ratio:.3f}",
             "–" if use is None else f"{100 * use:.0f}", *(f"{waits[key]:.3f}" for key in
                                                           ("exchange", "reduce", "server")),
             f"{row['cpu_floor_s']:.3f}"]
    if timed:
        accuracy = row.get("test_accuracy")
        words += ["–" if accuracy is None else f"{100 * accuracy:.2f}", str(row.get("epochs_in_time", "–"))]
    return words


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """Seconds an epoch: a panel for each cut and rate, bars of the gradients' widths grouped by the messages'."""
    groups = [group for group in ([row for row in group if "epoch_s" in row and not row["evaluation"]]
                                  for group in _groups(rows)) if group]
    figure, panels = figure_of(len(groups))
    for axes, group in zip(panels, groups):
        forwards = list(dict.fromkeys(row["forward"] for row in group))
        backwards = list(dict.fromkeys(row["gradients"] for row in group))
        width = 0.8 / len(backwards)
        for number, bits in enumerate(backwards):
            own = [row for row in group if row["gradients"] == bits]
            places = [forwards.index(row["forward"]) + (number - (len(backwards) - 1) / 2) * width for row in own]
            axes.bar(places, [row["epoch_s"]["median"] for row in own], width, color=_COLOURS[bits],
                     label=f"gradients {name_of(bits)}")
            for place, row in zip(places, own):
                axes.text(place, row["epoch_s"]["median"], f"{row['speedup']:.1f}×", ha="center", va="bottom",
                          fontsize=6)
        axes.set_yscale("log")
        axes.set_xticks(range(len(forwards)), [name_of(bits) for bits in forwards])
        axes.set_xlabel("messages forward", fontsize=8)
        axes.set_title(_title(group[0]), fontsize=8, loc="left")
        axes.grid(axis="x", visible=False)
    panels[0].set_ylabel("seconds an epoch", fontsize=8)
    panels[-1].legend(frameon=False, fontsize=7)
    return figure
