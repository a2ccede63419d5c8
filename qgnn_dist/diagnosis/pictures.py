# SPDX-License-Identifier: Apache-2.0
"""Pictures of a diagnosis and of a run's multipliers, as SVG and PNG.

matplotlib is loaded when a picture is asked for, never before, and draws without a display. Colours are Okabe and Ito's
and the map `cividis`: both are told apart with every kind of colour blindness, and in grey.
"""
from __future__ import annotations

import functools
import importlib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np

from ..errors import EXISTS, InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["MODEL_PICTURES", "RUN_PICTURES", "check_pictures", "draw_diagnosis", "draw_run", "layer_figure",
           "multiplier_figure", "stage_figure"]

P = ParamSpec("P")
T = TypeVar("T")
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
FORMATS = ("svg", "png")
MODEL_PICTURES, RUN_PICTURES = ("layers", "stages"), ("multipliers",)
OFF_AXIS = 100.0
STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.titlesize": 10, "figure.titlesize": 12, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.25, "svg.fonttype": "none", "svg.hashsalt": "qgnn"}


def _styled(function: Callable[P, T]) -> Callable[P, T]:
    """Draw in STYLE, and leave the process's own settings alone."""
    @functools.wraps(function)
    def styled(*args: P.args, **kwargs: P.kwargs) -> T:
        from matplotlib import rc_context

        with rc_context(STYLE):
            return function(*args, **kwargs)
    return styled


def check_pictures(folder: str | Path, names: Sequence[str], overwrite: bool) -> None:
    """Refuse, before anything runs, what could not be drawn in the end.

    Args:
        names: of the pictures, without their ending.
    Raises:
        InputError: matplotlib is missing, `folder` is no folder, or a picture exists and `overwrite` is not set.
    """
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        raise InputError("pictures need matplotlib; pip install qgnn-dist[report]") from None
    place = Path(folder)
    if place.exists() and not place.is_dir():
        raise InputError("--pictures: not a folder", file=str(place))
    for name in names:
        for ending in FORMATS:
            if (place / f"{name}.{ending}").exists() and not overwrite:
                raise InputError(EXISTS, file=str(place / f"{name}.{ending}"))


def draw_diagnosis(diagnosis: Mapping[str, Any], folder: str | Path) -> list[str]:
    """Write layers.svg/png and stages.svg/png of `report.diagnose`'s figures; returns the files' paths."""
    return [*_save(layer_figure(diagnosis), folder, "layers"), *_save(stage_figure(diagnosis), folder, "stages")]


def draw_run(records: Sequence[Mapping[str, Any]], best_epoch: int, folder: str | Path) -> list[str]:
    """Write multipliers.svg/png of a run's metrics.jsonl; returns the files' paths."""
    return _save(multiplier_figure(records, best_epoch), folder, "multipliers")


@_styled
def layer_figure(diagnosis: Mapping[str, Any]) -> Figure:
    """Six axes over the layers: λ_k, the constraint's value, the change; Dirichlet energy, MAD, error."""
    panels = (("multiplier", "multiplier λ", BLUE, False),
              ("constraint", "constraint ⟨Δ,G⟩ / ‖H⁰‖²", ORANGE, True),
              ("change", "change ‖Δ‖ / ‖H⁰‖", GREEN, True),
              ("dirichlet", "Dirichlet energy tr(HᵀL̃H) / ‖H‖²", BLUE, True),
              ("mad", "mean average distance", ORANGE, True),
              ("error", "error against float ‖H − Hᶠ‖ / ‖Hᶠ‖", GREEN, False))
    figure, axes = _figure(2, 3, (11, 6))
    for ax, (key, title, colour, logarithmic) in zip(axes, panels):
        points = [(e["layer"], e[key]) for e in diagnosis["layers"] if e[key] is not None]
        _line(ax, points, colour, logarithmic)
        ax.set_title(title)
        ax.set_xlabel("layer k")
    figure.suptitle(f"{diagnosis['graph']}: layers of the packed model")
    return figure


@_styled
def stage_figure(diagnosis: Mapping[str, Any]) -> Figure:
    """Eight axes: histograms of the five local stages' codes and of every round's; signal over noise; clipped share."""
    figure, axes = _figure(2, 4, (14, 6.5))
    for ax, (name, stage) in zip(axes, diagnosis["stages"].items()):
        _histogram(ax, name, stage)
    _round_histograms(axes[5], diagnosis["messages"])
    _by_stage(axes[6], diagnosis, "snr_db", "signal over noise, dB", 1.0)
    _by_stage(axes[7], diagnosis, "clipped", "clipped values, %", 100.0)
    figure.suptitle(f"{diagnosis['graph']}: codes of the packed model")
    return figure


@_styled
def multiplier_figure(records: Sequence[Mapping[str, Any]], best_epoch: int) -> Figure:
    """Three axes: λ_k by layer at the best epoch, over all epochs, and the constraint's residual by layer.

    Args:
        records: lines of metrics.jsonl, with `epoch`, `multipliers`, `residuals`. best_epoch: one of theirs.
    """
    best = next((r for r in records if r["epoch"] == best_epoch), records[-1])
    figure, axes = _figure(1, 3, (13, 3.8))
    _line(axes[0], list(enumerate(best["multipliers"])), BLUE, False)
    axes[0].set_title(f"multiplier λ at the best epoch ({best['epoch']})")
    _over_epochs(figure, axes[1], records, best["epoch"])
    _line(axes[2], list(enumerate(best["residuals"])), ORANGE, False)
    axes[2].axhline(0, color=GREY, linewidth=0.8)
    axes[2].set_title(f"constraint's residual at epoch {best['epoch']}")
    axes[2].set_ylabel("violated below 0")
    for ax in (axes[0], axes[2]):
        ax.set_xlabel("layer k")
    return figure


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, list(np.asarray(figure.subplots(rows, columns)).ravel())


@_styled
def _save(figure: Figure, folder: str | Path, name: str) -> list[str]:
    """Both files, each written whole or not at all; equal figures give equal bytes."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    written = []
    for ending in FORMATS:
        buffer, path = io.BytesIO(), place / f"{name}.{ending}"
        figure.savefig(buffer, format=ending, dpi=150, metadata={"Date": None} if ending == "svg" else None)
        temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temp.write_bytes(buffer.getvalue())
            os.replace(temp, path)
        finally:
            temp.unlink(missing_ok=True)
        written.append(str(path))
    return written


def _line(ax: Axes, points: Sequence[tuple[int, float]], colour: str, logarithmic: bool) -> None:
    """Points over whole numbers; a logarithmic axis where all of them are positive."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if not points:
        _say(ax, "none")
        return
    x, y = zip(*points)
    ax.plot(x, y, color=colour, marker="o", markersize=3.5, linewidth=1.4)
    if logarithmic and min(y) > 0:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(y) < 1e3 * min(y) else (1,)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _histogram(ax: Axes, name: str, stage: Mapping[str, Any]) -> None:
    ax.set_title(f"{name}, {stage['bits']} bits")
    if stage["histogram"] is None:
        _say(ax, "float")
        return
    counts = np.asarray(stage["histogram"], np.float64)
    ax.bar(np.arange(len(counts)), 100 * counts / max(counts.sum(), 1), width=0.85 if len(counts) < 64 else 1.0,
           color=BLUE)
    if len(counts) <= 4:
        ax.set_xticks(range(len(counts)))
    ax.set_xlabel("code")
    ax.set_ylabel("share, %")


def _round_histograms(ax: Axes, rounds: Sequence[Mapping[str, Any]]) -> None:
    """Shares of the codes as a map: a row a code, a column a round."""
    from matplotlib.ticker import MaxNLocator

    if not rounds:
        ax.set_title("messages")
        _say(ax, "float")
        return
    shares = np.array([r["histogram"] for r in rounds], np.float64).T
    shares = 100 * shares / np.maximum(shares.sum(0), 1)
    image = ax.imshow(shares, aspect="auto", origin="lower", cmap="cividis", vmin=0, interpolation="nearest")
    ax.figure.colorbar(image, ax=ax, label="share, %")
    ax.grid(False)
    ax.set_title(f"messages, {rounds[0]['bits']} bits")
    ax.set_xlabel("round")
    ax.set_ylabel("code")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))


def _by_stage(ax: Axes, diagnosis: Mapping[str, Any], key: str, title: str, factor: float) -> None:
    """A figure of every round as a line, and of the local stages that have it as level lines with names.

    Figures above OFF_AXIS (stages that are all but exact, in dB) stand in the legend alone: the others stay legible.
    """
    from matplotlib.ticker import MaxNLocator

    ax.set_title(title)
    rounds = [(r["round"], factor * r[key]) for r in diagnosis["messages"] if r[key] is not None]
    stages = [(name, factor * s[key]) for name, s in diagnosis["stages"].items() if s[key] is not None]
    if rounds:
        x, y = zip(*rounds)
        ax.plot(x, y, color=BLUE, marker="o", markersize=3.5, linewidth=1.4, label="messages")
    for (name, level), style, colour in zip(stages, ("-", "--", ":", "-.", "--"), (ORANGE, GREEN, GREY, "black", BLUE)):
        if level > OFF_AXIS:
            ax.plot([], [], linestyle="none", label=f"{name}: {level:.0f}, off the axis")
        else:
            ax.axhline(level, color=colour, linestyle=style, linewidth=1.3, label=name)
    if not rounds and not stages:
        _say(ax, "none")
        return
    ax.set_xlabel("round")
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, 0), 1.3 * high)  # room for the legend
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(frameon=False, fontsize=8)


def _over_epochs(figure: Figure, ax: Axes, records: Sequence[Mapping[str, Any]], best_epoch: int) -> None:
    """λ as a map: a row a layer, a column an epoch; the best epoch is marked."""
    from matplotlib.ticker import MaxNLocator

    ax.set_title("multiplier λ over the epochs")
    depth = max((len(r["multipliers"]) for r in records), default=0)
    if depth == 0:
        _say(ax, "none")
        return
    values = np.full((depth, len(records)), np.nan)
    for column, record in enumerate(records):
        values[:len(record["multipliers"]), column] = record["multipliers"]
    first, last = records[0]["epoch"], records[-1]["epoch"]
    image = ax.imshow(values, aspect="auto", origin="lower", cmap="cividis", interpolation="nearest",
                      extent=(first - 0.5, last + 0.5, -0.5, depth - 0.5))
    figure.colorbar(image, ax=ax, label="λ")
    ax.axvline(best_epoch, color=ORANGE, linewidth=1.2, label="best epoch")
    ax.legend(loc="upper right", fontsize=8)
    ax.grid(False)
    ax.set_xlabel("epoch")
    ax.set_ylabel("layer k")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))


def _say(ax: Axes, text: str) -> None:
    """A word in the middle of axes that have nothing to show."""
    ax.text(0.5, 0.5, text, ha="center", va="center", color=GREY, transform=ax.transAxes)
    ax.set_xticks([])
    ax.set_yticks([])
