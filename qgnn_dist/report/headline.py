# SPDX-License-Identifier: Apache-2.0
"""The figures that come first, and what they are compared with."""
from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..comm.wire import HEADER_BYTES
from ..propagation.smp import Propagation
from ..quant.packed import row_bytes
from ..training.chance import doubt
from .blocks import Card, Table
from .curves import NAMES
from .draw import figure
from .measure import Looks
from .runs import RunData

__all__ = ["Headline", "cards", "comparison", "doubts", "headline", "state"]

LOCAL = ("forward", "backward", "evaluation")
"""What float messages would make larger; `control`, the gradients' sums, is float in all runs."""


@dataclass(frozen=True)
class Headline:
    """Of one run. Sizes in bytes; None where not known (nothing was evaluated, no checkpoint, an older program's run).

    Attributes: metric, test, valid: at the best epoch. wire: bytes of a mean epoch, by all workers. float_wire: what
        forward, backward and evaluations would have sent with float messages. coded_wire: what they sent.
    """

    metric: str
    test: float | None
    valid: float | None
    best_epoch: int
    epochs: int
    planned: int
    median_s: float
    p90_s: float
    wire: float
    coded_wire: float
    float_wire: float | None
    model_bytes: int | None
    float_bytes: int | None


def headline(run: RunData, looks: Looks) -> Headline:
    """The figures of one run."""
    times = [record["epoch_s"] for record in run.records]
    coded = statistics.fmean(sum(record["wire_bytes"][kind] for kind in LOCAL) for record in run.records)
    wire = statistics.fmean(sum(record["wire_bytes"].values()) for record in run.records)
    metric, model = run.best.best_metric, run.model
    weights = (model.weight1, model.weight2, model.bias1, model.bias2) if model else ()
    return Headline(
        metric=run.config.train.metric, test=metric.get("test"), valid=metric.get("valid"), best_epoch=run.best_epoch,
        epochs=run.records[-1]["epoch"], planned=run.config.train.epochs, median_s=statistics.median(times),
        p90_s=float(np.quantile(times, 0.9)), wire=wire, coded_wire=coded, float_wire=_float_wire(run, looks),
        model_bytes=run.model_bytes if model else None,
        float_bytes=sum(4 * one.size for one in weights) if model else None)


def _float_wire(run: RunData, looks: Looks) -> float | None:
    """By law 5's formula: Σ rows × 4·C bytes, and a header a peer and round, both ways and in evaluations."""
    if looks.sent_rows is None or run.model is None:
        return None
    rows = sum(map(sum, looks.sent_rows))
    frames = sum(count > 0 for row in looks.sent_rows for count in row)
    a_round = rows * row_bytes(run.model.info.num_classes, 32) + frames * HEADER_BYTES
    evaluated = sum("accuracy" in record for record in run.records) / len(run.records)
    return (2 + evaluated) * Propagation.of(run.config).num_rounds * a_round


def state(run: RunData) -> str:
    """How far the run is, in words."""
    if run.summary is not None:
        done, planned = run.records[-1]["epoch"], run.config.train.epochs
        return "finished" if done >= planned else f"finished early: no better epoch for {run.config.train.patience}"
    told = str(run.status.get("state", ""))
    return {"stopped": "stopped, not finished", "failed": "failed, not finished"}.get(told, "not finished")


def doubts(runs: Sequence[RunData], looks: Sequence[Looks]) -> list[str]:
    """What stands above all figures: why a run should be looked at, by training.chance."""
    found = []
    for run, one in zip(runs, looks):
        classes = one.splits["valid"]["by_class"]["nodes"] if "valid" in one.splits else None
        if run.model is not None:
            text = doubt(run.records, run.model.info.num_classes, run.config.train.metric,
                         run.best.best_accuracy.get("valid"), classes)
            name = run.name.replace("`", "'")  # between two of them stands a command
            found += [f"{name}: {text}" if len(runs) > 1 else text[:1].upper() + text[1:]] * bool(text)
    return found


def cards(run: RunData, head: Headline) -> list[Card]:
    """The headline of one run."""
    bits = run.config.quant.stages()
    name = _metric(head)
    return [
        Card(f"Test {name}", figure(head.test, "share"),
             f"validation {figure(head.valid, 'share')}, at the best epoch" if head.best_epoch else
             "nothing was evaluated yet"),
        Card("Width", run.width, f"messages {_bits(bits['messages'])}, gradients {_bits(bits['gradients'])}, "
                                 f"local term {_bits(bits['residual'])}"),
        Card("Epochs", f"{head.epochs:,}", f"of {head.planned:,} planned; best {head.best_epoch or '–'}"),
        Card("An epoch", figure(head.median_s, "seconds"), f"median; 90 % within {figure(head.p90_s, 'seconds')}"),
        Card("Sent an epoch", figure(head.wire, "bytes") if head.wire else "nothing", _sent_note(run, head)),
        Card("Model", figure(head.model_bytes, "bytes"), _model_note(head)),
    ]


def _metric(head: Headline) -> str:
    """Its name inside a line: what is an abbreviation keeps its capitals."""
    name = NAMES[head.metric]
    return name if name.isupper() else name.lower()


def _bits(count: int) -> str:
    return "float" if count == 32 else f"{count} bit{'s' * (count > 1)}"


def _sent_note(run: RunData, head: Headline) -> str:
    if run.workers == 1:
        return "one part: no messages"
    messages = f"messages {figure(head.coded_wire, 'bytes')} of it"
    if head.float_wire and head.coded_wire:
        return (f"{messages}, {_times(head.float_wire / head.coded_wire)} smaller than "
                f"{figure(head.float_wire, 'bytes')} in float; the rest is sums of gradients, float in every run")
    return f"{messages}; by {run.workers} workers together"


def _model_note(head: Headline) -> str:
    if head.model_bytes is None or head.float_bytes is None:
        return "no checkpoint holds a model yet"
    return f"{_times(head.float_bytes / head.model_bytes)} smaller than its float weights" \
        if head.float_bytes > head.model_bytes else "float weights"


def _times(ratio: float) -> str:
    return f"{ratio:.1f} times"


def comparison(runs: Sequence[RunData], heads: Sequence[Headline]) -> Table:
    """The headline of several runs, a column each; test figures against the first run's, in points."""
    def tested(head: Headline) -> str:
        first, test = heads[0], figure(head.test, "share")
        if head is first or head.test is None or first.test is None or head.metric != first.metric:
            return test
        return f"{test} ({100 * (head.test - first.test):+.2f})"

    def smaller(head: Headline) -> str:
        return f"{head.float_wire / head.coded_wire:.1f} times" if head.float_wire and head.coded_wire else "–"

    metrics = " or ".join(dict.fromkeys(map(_metric, heads)))
    rows = [
        ("state", [state(run) for run in runs]),
        (f"test {metrics} (against the first)", [tested(head) for head in heads]),
        ("validation", [figure(head.valid, "share") for head in heads]),
        ("width", [run.width for run in runs]),
        ("epochs (best)", [f"{head.epochs:,} ({head.best_epoch or '–'})" for head in heads]),
        ("seconds an epoch, median", [figure(head.median_s, "seconds") for head in heads]),
        ("sent an epoch", [figure(head.wire, "bytes") for head in heads]),
        ("messages of it", [figure(head.coded_wire, "bytes") for head in heads]),
        ("messages smaller than in float", [smaller(head) for head in heads]),
        ("model", [figure(head.model_bytes, "bytes") for head in heads])]
    return Table("", ["", *(run.name for run in runs)], [[name, *values] for name, values in rows])
