# SPDX-License-Identifier: Apache-2.0
"""What a worker's process tells besides its results: metrics, and log records that go to the controller's log too."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .. import logs
from ..config import LogConfig

__all__ = ["Telemetry", "WorkerTelemetry"]


@dataclass(frozen=True)
class Telemetry:
    """What the workers of a run are to tell. Attributes: run: its folder, absolute, which labels all of it."""

    run: str
    log: LogConfig


class WorkerTelemetry:
    """Of one worker, in its process; looks at what its calls return."""

    def __init__(self, told: Telemetry | None, host: str, rank: int) -> None:
        self._metrics = None
        if told is None:
            return
        logs.start(told.log.format, keep=True)
        logs.place(run=told.run, host=host, rank=rank)
        if told.log.metrics == "on":
            from .metrics import WorkerMetrics

            self._metrics = WorkerMetrics(told.run, host, rank)

    def before(self, method: str, args: tuple[Any, ...]) -> None:
        """A call begins."""
        if method == "train_epoch":
            logs.place(epoch=args[0])

    def after(self, method: str, args: tuple[Any, ...], result: Any) -> Any:
        """A call returned `result`; what is to go back in its place: an epoch's report takes log records along."""
        if method != "train_epoch" or not isinstance(result, dict):
            return result
        if self._metrics is not None:
            self._metrics.epoch(args[0], result)
        return {**result, "log": logs.collect()} if logs.is_json() else result
