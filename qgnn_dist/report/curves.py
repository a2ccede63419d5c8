# SPDX-License-Identifier: Apache-2.0
"""What a report plots, as plain values: each series says which file and which field of it it was read from.

The page carries them as JSON, too; tests compare both with the run's files. Figures are taken as they stand there,
never smoothed; of a long run every n-th epoch is plotted, and the last and the best one.
"""
from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .runs import DIVERGED, RunData

__all__ = ["MOST_EPOCHS", "Chart", "Heat", "Series", "WorkerSeconds", "constraint_charts", "curve_charts",
           "lambda_heat", "plotted_epochs", "worker_seconds"]

MOST_EPOCHS, MOST_COLUMNS = 1000, 48
"""Epochs of a curve, and columns of a map over epochs."""
METRICS = "metrics.jsonl"
SPLITS = (("test", 0), ("valid", 1), ("train", 2))
NAMES = {"accuracy": "Accuracy", "roc_auc": "ROC-AUC", "macro_f1": "Macro F1"}


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        source, key: the file, and the way to the value in it: in an epoch's line of metrics.jsonl, or, where `epoch` is
            not None, to a list in that epoch's line, of which x are the places. run: place among the report's runs.
        x: epochs, layers or rounds, rising. y: None where there is no figure. colour, dash: of the page's styles.
    """

    name: str
    run: int
    source: str
    key: tuple[str | int, ...]
    x: list[float]
    y: list[float | None]
    epoch: int | None = None
    colour: int = 0
    dash: int = 0


@dataclass(frozen=True)
class Chart:
    """Lines over one axis.

    Attributes: unit: share, seconds, bytes or number. best: an epoch to mark, 0 for none. note: what to know of it.
        log: whether y is shown on a logarithmic scale. dots: whether points are marked. whole: whether x are counts.
    """

    id: str
    title: str
    x_name: str
    unit: str
    series: list[Series]
    note: str = ""
    best: int = 0
    log: bool = False
    dots: bool = False
    whole: bool = True

    def to_json(self) -> dict[str, Any]:
        """For the page's script and the tests."""
        return asdict(self)


@dataclass(frozen=True)
class Heat:
    """A map of values, a row each of `rows` and a column each of `columns`.

    Attributes: values[row][column]. source, key: as of Series; columns are epochs, and rows places of the list, where
        the source is metrics.jsonl.
    """

    id: str
    title: str
    x_name: str
    y_name: str
    unit: str
    rows: list[str]
    columns: list[int]
    values: list[list[float]]
    run: int
    source: str
    key: tuple[str | int, ...]
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """For the page's script and the tests."""
        return asdict(self)


@dataclass(frozen=True)
class WorkerSeconds:
    """Medians over the epochs of one worker's training: `wire` waits for messages, `wait` for sums and the server."""

    rank: int
    compute: float
    wire: float | None
    wait: float | None


@dataclass(frozen=True)
class _Curve:
    """A series to be read from every epoch: its name, way, and whether it stays where runs are compared."""

    name: str
    key: tuple[str | int, ...]
    colour: int
    compared: bool = True


@dataclass(frozen=True)
class _Group:
    id: str
    title: str
    unit: str
    curves: list[_Curve] = field(default_factory=list)


def plotted_epochs(records: Sequence[dict[str, Any]], best: int, most: int = MOST_EPOCHS) -> list[dict[str, Any]]:
    """All lines, or every n-th of them with the last and the best epoch.

    >>> [r["epoch"] for r in plotted_epochs([{"epoch": e} for e in range(1, 11)], best=4, most=4)]
    [1, 4, 7, 10]
    """
    step = -(-len(records) // most)
    last = records[-1]["epoch"]
    return [one for at, one in enumerate(records) if at % step == 0 or one["epoch"] in (best, last)]


def _groups(runs: Sequence[RunData]) -> list[_Group]:
    metrics = sorted({"accuracy", *(run.config.train.metric for run in runs)}, key=list(NAMES).index)
    shares = [_Group(name, NAMES[name], "share",
                     [_Curve(split, (name, split), colour, split != "train") for split, colour in SPLITS])
              for name in metrics]
    return [
        _Group("loss", "Loss", "number", [_Curve("training", ("loss",), 2), _Curve("validation", ("valid_loss",), 1)]),
        *shares,
        _Group("seconds", "Seconds an epoch", "seconds", [
            _Curve("whole", ("epoch_s",), 0), _Curve("training", ("train_s",), 2, False),
            _Curve("evaluation", ("evaluation_s",), 1, False)]),
        _Group("bytes", "Bytes sent an epoch", "bytes", [
            _Curve(kind, ("wire_bytes", kind), colour, kind in ("forward", "backward"))
            for colour, kind in enumerate(("forward", "backward", "evaluation", "control"))])]


def curve_charts(runs: Sequence[RunData]) -> list[Chart]:
    """Curves over the epochs: of one run its splits and kinds together, of several a chart each with all runs.

    Curves that are nothing but zeros, as bytes are of one part, are left out, and charts without any curve.
    """
    found = []
    for group in _groups(runs):
        if len(runs) == 1:
            series = [_over_epochs(runs[0], 0, curve.name, curve.key, curve.colour, colour_dash(curve.name))
                      for curve in group.curves]
            found.append(_chart(group.id, group.title, group.unit, series, runs))
            continue
        for curve in group.curves:
            if curve.compared:
                series = [_over_epochs(run, at, run.name, curve.key, at, 0) for at, run in enumerate(runs)]
                title = f"{group.title}, {curve.name}"
                found.append(_chart(f"{group.id}-{curve.name}", title, group.unit, series, runs))
    return [chart for chart in found if chart.series]


def colour_dash(name: str) -> int:
    """Training is drawn thin and dashed: it is not what counts."""
    return 1 if name in ("train", "training") else 0


def _chart(id: str, title: str, unit: str, series: list[Series], runs: Sequence[RunData]) -> Chart:
    kept = [one for one in series if any(one.y)]
    notes = []
    if any(None in one.y for one in kept):
        notes.append("gaps: the loss was no finite number")
    thinned = [run for run in runs if len(run.records) > MOST_EPOCHS]
    if thinned:
        notes.append(f"one epoch in {-(-len(thinned[0].records) // MOST_EPOCHS)} of {thinned[0].name}, and the best "
                     "and the last one")
    return Chart(id, title, "epoch", unit, kept, "; ".join(notes), runs[0].best_epoch if len(runs) == 1 else 0)


def _over_epochs(run: RunData, number: int, name: str, key: tuple[str | int, ...], colour: int, dash: int) -> Series:
    """Of the epochs that have the field: evaluations may be rarer than epochs."""
    x, y = list[float](), list[float | None]()
    for record in plotted_epochs(run.records, run.best_epoch):
        value = _at(record, key)
        if value is not None and (key[0] != "evaluation_s" or "accuracy" in record):
            x.append(record["epoch"])
            y.append(value if abs(value) < DIVERGED else None)
    return Series(name, number, METRICS, key, x, y, None, colour, dash)


def _at(value: Any, key: Iterable[str | int]) -> Any:
    for step in key:
        if isinstance(value, dict) and step not in value:
            return None
        value = value[step]
    return value


def constraint_charts(runs: Sequence[RunData]) -> list[Chart]:
    """λ and the constraint's residual by layer, at the best epoch (the last one where nothing was evaluated)."""
    charts = []
    for id, title, key, note in (
            ("lambda", "Multiplier λ by layer", "multipliers", "0: the layer changed less than its threshold"),
            ("residual", "Constraint's residual by layer", "residuals", "below 0 the constraint is violated")):
        series = []
        for at, run in enumerate(runs):
            record = run.best_record or run.records[-1]
            values = record[key]
            if any(values):
                name = run.name if len(runs) > 1 else f"epoch {record['epoch']}"
                series.append(Series(name, at, METRICS, (key,), list(range(len(values))), list(values),
                                     record["epoch"], at))
        if series:
            charts.append(Chart(id, title, "layer k", "number", series, note, dots=True))
    return charts


def lambda_heat(run: RunData, number: int) -> Heat | None:
    """λ of all layers over the epochs; None where there is none but 0."""
    records = plotted_epochs(run.records, run.best_epoch, MOST_COLUMNS)
    layers = len(records[0]["multipliers"])
    if not any(any(record["multipliers"]) for record in records) or any(
            len(record["multipliers"]) != layers for record in records):
        return None
    values = [[record["multipliers"][layer] for record in records] for layer in range(layers)]
    note = "" if len(records) == len(run.records) else f"{len(records)} of {len(run.records)} epochs"
    epochs = [record["epoch"] for record in records]
    return Heat(f"lambda-epochs-{number}", "λ over the epochs", "epoch", "layer k", "number",
                [str(layer) for layer in range(layers)], epochs, values, number, METRICS, ("multipliers",), note)


def worker_seconds(run: RunData) -> list[WorkerSeconds]:
    """By rank; waits are None in runs of programs that did not keep them."""
    kept = [record for record in run.records if "wait_s" in record]

    def median(values: Callable[[dict[str, Any]], float]) -> float | None:
        return statistics.median(map(values, kept)) if kept else None

    return [WorkerSeconds(
        rank, statistics.median(record["compute_s"][rank] for record in run.records),
        median(lambda record, rank=rank: record["wait_s"]["exchange"][rank]),  # type: ignore[misc]
        median(lambda record, rank=rank: sum(w[rank] for what, w in record["wait_s"].items()  # type: ignore[misc]
                                             if what != "exchange")))
        for rank in range(run.workers)]
