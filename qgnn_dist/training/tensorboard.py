# SPDX-License-Identifier: Apache-2.0
"""RUN/tensorboard: the figures of metrics.jsonl as TensorBoard's events, in double precision."""
from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import InputError
from .observer import Observer
from .run_folder import RunFolder

__all__ = ["TensorBoard", "scalars"]

FLUSH_S = 5


def scalars(record: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    """Tag and value of every figure of an epoch's record: `accuracy/valid`, `multipliers/0`, …; words have none.

    >>> list(scalars({"epoch": 3, "loss": 0.5, "accuracy": {"valid": 1.0}, "compute_s": [2.0], "slow_workers": ["x"]}))
    [('loss', 0.5), ('accuracy/valid', 1.0), ('compute_s/0', 2.0)]
    """
    for name, value in record.items():
        tag = f"{above}{name}"
        if isinstance(value, (list, tuple)):
            value = {str(number): one for number, one in enumerate(value)}
        if isinstance(value, Mapping):
            yield from scalars(value, f"{tag}/")
        elif isinstance(value, (int, float)) and tag != "epoch":
            yield tag, float(value)


class TensorBoard(Observer):
    """Writes events. A run that goes on writes its kept epochs again, so that the events are what metrics.jsonl has.

    Raises: InputError: the package `tensorboard` is not installed.
    """

    def __init__(self, run: RunFolder) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(f"log.tensorboard=on: the package tensorboard cannot be imported ({error}); pip install "
                             "'qgnn-dist[tensorboard]', or leave the option out") from None
        self._run, self._kind = run, SummaryWriter
        self._writer: Any = None

    def workers(self, workers: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]], epochs: int) -> None:
        self._close()
        shutil.rmtree(self._run.tensorboard, ignore_errors=True)
        self._writer = self._kind(log_dir=str(self._run.tensorboard), flush_secs=FLUSH_S)
        for record in records:
            self.epoch(record, ())

    def epoch(self, record: dict[str, Any], reports: Sequence[dict[str, Any]]) -> None:
        for tag, value in scalars(record):
            self._writer.add_scalar(tag, value, record["epoch"], new_style=True, double_precision=True)

    def end(self, state: str, reason: str, message: str) -> None:
        self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
