# SPDX-License-Identifier: Apache-2.0
"""Gauges and counters of a run, for the Prometheus endpoint that Ray has on every host.

METRICS is the one list of them; dashboard, alerts and docs are checked against it. Ray puts `ray_` before a name and
`_total` behind a counter's, and labels of its own beside ours (WorkerId, NodeAddress, …). It drops a gauge that was not
set for two of its report intervals, so that a thread sets all of them again each second, also during a long epoch; a
counter's last value stays until the host's Ray ends, also when its process has ended.
"""
from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..training.observer import Observer

__all__ = ["METRICS", "Metric", "RunMetrics", "WorkerMetrics"]

REFRESH_S = 1.0
MOST_LAYERS = 64
"""Layers whose multiplier is exported; of deeper networks so many, evenly spread, first and last among them."""
RUN, WORKER = ("run", "host"), ("run", "host", "rank")


@dataclass(frozen=True)
class Metric:
    """One metric. Attributes: kind: gauge or counter. labels: ours. doc: one line of ASCII, all that Ray takes."""

    name: str
    kind: str
    unit: str
    labels: tuple[str, ...]
    doc: str

    @property
    def exported(self) -> str:
        """Its name at Ray's endpoint."""
        return f"ray_{self.name}" + ("_total" if self.kind == "counter" else "")


METRICS = {metric.name: metric for metric in (
    Metric("qgnn_epoch", "gauge", "epochs", RUN, "the last epoch that is finished"),
    Metric("qgnn_epochs_planned", "gauge", "epochs", RUN, "train.epochs"),
    Metric("qgnn_workers", "gauge", "workers", RUN, "workers of the run; 0 between a loss and the next start"),
    Metric("qgnn_loss", "gauge", "nats", RUN, "training loss of the last epoch"),
    Metric("qgnn_valid_loss", "gauge", "nats", RUN, "validation loss at the last evaluation"),
    Metric("qgnn_accuracy", "gauge", "share", (*RUN, "split"), "accuracy of a split at the last evaluation"),
    Metric("qgnn_multiplier", "gauge", "1", (*RUN, "layer"), "the constraint's multiplier (lambda) of a layer"),
    Metric("qgnn_clipped", "gauge", "share", (*RUN, "stage"),
           "values outside their stage's grid, of a sample of rows, when they were last counted"),
    Metric("qgnn_epoch_seconds", "gauge", "seconds", RUN, "the last epoch, evaluation and its figures too"),
    Metric("qgnn_epochs", "counter", "epochs", RUN, "epochs that this command finished"),
    Metric("qgnn_multiplier_clamps", "counter", "layers", RUN, "multipliers that were clamped to stay stable"),
    Metric("qgnn_restarts", "counter", "restarts", RUN, "times that the run went on after a failure"),
    Metric("qgnn_stalls", "counter", "stalls", RUN, "times that no worker came further for timeouts.stall_s"),
    Metric("qgnn_stops", "counter", "commands", (*RUN, "reason"),
           "ends of the command: finished, stopped, diverged (NaN), or an error's type"),
    Metric("qgnn_worker_epoch", "gauge", "epochs", WORKER, "the last epoch that a worker has finished"),
    Metric("qgnn_wire_bytes", "counter", "bytes", (*WORKER, "direction"),
           "sent in epochs: forward, backward, evaluation, control"),
    Metric("qgnn_compute_seconds", "counter", "seconds", WORKER, "training without its waits"),
    Metric("qgnn_wait_seconds", "counter", "seconds", (*WORKER, "reason"),
           "waits in training: exchange (messages), reduce (gradients), server (multipliers)"),
    Metric("qgnn_evaluation_seconds", "counter", "seconds", WORKER, "evaluations, waits in them too"),
    Metric("qgnn_memory_anon_bytes", "gauge", "bytes", WORKER, "anonymous memory of the worker's process"),
    Metric("qgnn_memory_rss_bytes", "gauge", "bytes", WORKER, "resident memory of the worker's process"),
    Metric("qgnn_memory_available_bytes", "gauge", "bytes", WORKER,
           "what the process may still take: of its control group or host, the less"),
)}


class _Exported:
    """The metrics of one process, with the labels that all of its figures share."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._labels = dict(labels)
        self._made: dict[str, Any] = {}
        self._gauges: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._lock, self._over = threading.Lock(), threading.Event()
        threading.Thread(target=self._refresh, name="qgnn-metrics", daemon=True).start()

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        with self._lock:
            self._gauges[name, tuple(labels.items())] = float(value)
            self._metric(name).set(float(value), labels or None)

    def add(self, name: str, value: float, **labels: str) -> None:
        """Add to a counter; Ray's take no zero."""
        if value > 0:
            with self._lock:
                self._metric(name).inc(float(value), labels or None)

    def close(self) -> None:
        """Gauges go from now on."""
        self._over.set()

    def _metric(self, name: str) -> Any:
        if name not in self._made:
            from ray.util import metrics

            wanted = METRICS[name]
            kind = metrics.Gauge if wanted.kind == "gauge" else metrics.Counter
            self._made[name] = kind(name, f"{wanted.doc} [{wanted.unit}]", wanted.labels)
            self._made[name].set_default_tags(self._labels)
        return self._made[name]

    def _refresh(self) -> None:
        while not self._over.wait(REFRESH_S):
            with self._lock:
                for (name, labels), value in self._gauges.items():
                    self._metric(name).set(value, dict(labels) or None)


class WorkerMetrics:
    """Of one worker, in its process."""

    def __init__(self, run: str, host: str, rank: int) -> None:
        self._out = _Exported({"run": run, "host": host, "rank": str(rank)})

    def epoch(self, epoch: int, report: Mapping[str, Any]) -> None:
        """Export what `TrainWorker.train_epoch` returned."""
        out, waits = self._out, report["wait_s"]
        out.set("qgnn_worker_epoch", epoch)
        for direction, count in report["wire_bytes"].items():
            out.add("qgnn_wire_bytes", count, direction=direction)
        for reason, seconds in waits.items():
            out.add("qgnn_wait_seconds", seconds, reason=reason)
        out.add("qgnn_compute_seconds", report["train_s"] - sum(waits.values()))
        out.add("qgnn_evaluation_seconds", report.get("evaluation_s", 0.0))
        for name, count in report["memory"].items():
            out.set(f"qgnn_memory_{name}", count)


class RunMetrics(Observer):
    """Of the run as a whole, in the controller's process, which is connected to Ray when it is told of workers."""

    def __init__(self, run: str, host: str) -> None:
        self._labels = {"run": run, "host": host}

    @functools.cached_property
    def _out(self) -> _Exported:
        return _Exported(self._labels)

    def workers(self, workers: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]], epochs: int) -> None:
        self._out.set("qgnn_epochs_planned", epochs)
        self._out.set("qgnn_workers", len(workers))
        self._out.set("qgnn_epoch", records[-1]["epoch"] if records else 0)

    def epoch(self, record: dict[str, Any], reports: Sequence[dict[str, Any]]) -> None:
        out = self._out
        out.set("qgnn_epoch", record["epoch"])
        out.set("qgnn_loss", record["loss"])
        if "accuracy" in record:
            out.set("qgnn_valid_loss", record["valid_loss"])
            for split, share in record["accuracy"].items():
                if share is not None:  # a graph without test nodes
                    out.set("qgnn_accuracy", share, split=split)
        for stage, share in record.get("clipped", {}).items():
            out.set("qgnn_clipped", share, stage=stage)
        multipliers = record["multipliers"]
        for layer in spread(len(multipliers), MOST_LAYERS):
            out.set("qgnn_multiplier", multipliers[layer], layer=str(layer))
        out.set("qgnn_epoch_seconds", record["epoch_s"])
        out.add("qgnn_multiplier_clamps", record["clamps"])
        out.add("qgnn_epochs", 1)

    def stall(self, epoch: int) -> None:
        self._out.add("qgnn_stalls", 1)

    def restart(self, restart: dict[str, Any]) -> None:
        self._out.set("qgnn_workers", 0)
        self._out.add("qgnn_restarts", 1)

    def end(self, state: str, reason: str, message: str) -> None:
        self._out.add("qgnn_stops", 1, reason=reason)
        self._out.close()


def spread(count: int, most: int) -> list[int]:
    """At most so many of the numbers below `count`, evenly spread, the first and the last among them.

    >>> spread(3, 64), spread(100, 4)
    ([0, 1, 2], [0, 33, 66, 99])
    """
    if count <= most:
        return list(range(count))
    return [round(number * (count - 1) / (most - 1)) for number in range(most)]
