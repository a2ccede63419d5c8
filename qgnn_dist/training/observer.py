# SPDX-License-Identifier: Apache-2.0
"""Who watches a run from the controller's side: status file, TensorBoard, Ray's metrics, log records."""
from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .. import logs
from ..errors import DivergedError
from .stop import StoppedError

__all__ = ["EpochLog", "Observer", "Observers", "ended", "told_its_end"]

_LOG = logging.getLogger(__name__)


class Observer:
    """Is told what happens to a run, in this order; does nothing by itself."""

    def workers(self, workers: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]], epochs: int) -> None:
        """New workers begin; again after a restart.

        Args: workers: what `TrainWorker.load` returned, by rank. records: the epochs that are kept, as in
            metrics.jsonl. epochs: of the run, at most.
        """

    def epoch(self, record: dict[str, Any], reports: Sequence[dict[str, Any]]) -> None:
        """An epoch is finished.

        Args: record: its line in metrics.jsonl. reports: what `TrainWorker.train_epoch` returned, by rank.
        """

    def stall(self, epoch: int) -> None:
        """No worker comes further in `epoch`."""

    def restart(self, restart: dict[str, Any]) -> None:
        """The run goes on after a failure, with new workers soon (cluster.recovery.Restart.to_dict)."""

    def end(self, state: str, reason: str, message: str) -> None:
        """The command ends.

        Args: state: finished, stopped or failed. reason: finished, stopped, diverged, or an error's type. message: of
            the error, or empty.
        """


def ended(error: BaseException | None) -> tuple[str, str, str]:
    """State, reason and message for `Observer.end`, of what a command ended with."""
    if error is None:
        return "finished", "finished", ""
    if isinstance(error, (StoppedError, KeyboardInterrupt)):
        return "stopped", "stopped", str(error)
    reason = "diverged" if isinstance(error, DivergedError) else type(error).__name__
    return "failed", reason, str(error) or reason


@contextmanager
def told_its_end(observer: Observer) -> Iterator[None]:
    """Around what is observed: the observer is told how it ended."""
    try:
        yield
    except BaseException as error:
        observer.end(*ended(error))
        raise
    observer.end(*ended(None))


class Observers(Observer):
    """Passes all on to several."""

    def __init__(self, all_of_them: Sequence[Observer]) -> None:
        self._all = list(all_of_them)

    def workers(self, workers: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]], epochs: int) -> None:
        for one in self._all:
            one.workers(workers, records, epochs)

    def epoch(self, record: dict[str, Any], reports: Sequence[dict[str, Any]]) -> None:
        for one in self._all:
            one.epoch(record, reports)

    def stall(self, epoch: int) -> None:
        for one in self._all:
            one.stall(epoch)

    def restart(self, restart: dict[str, Any]) -> None:
        for one in self._all:
            one.restart(restart)

    def end(self, state: str, reason: str, message: str) -> None:
        for one in self._all:
            one.end(state, reason, message)


class EpochLog(Observer):
    """A record of the log for each epoch, with those of the workers before it; people see a bar instead."""

    def workers(self, workers: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]], epochs: int) -> None:
        logs.place(epoch=len(records))
        hosts = ", ".join(sorted({w["host"] for w in workers}))
        _LOG.info("%d workers on %s, after epoch %d of %d", len(workers), hosts, len(records), epochs)

    def epoch(self, record: dict[str, Any], reports: Sequence[dict[str, Any]]) -> None:
        logs.place(epoch=record["epoch"])
        for report in reports:
            logs.pass_on(report.get("log", ()))
        valid = f", valid accuracy {record['accuracy']['valid']:.4f}" if "accuracy" in record else ""
        _LOG.info("loss %.6g%s, %.4g s, %d bytes", record["loss"], valid, record["epoch_s"],
                  sum(record["wire_bytes"].values()))

    def end(self, state: str, reason: str, message: str) -> None:
        level = logging.INFO if state == "finished" else logging.WARNING
        _LOG.log(level, "%s%s", state, f": {message}" if message else "")
