# SPDX-License-Identifier: Apache-2.0
"""What a worker can go back to while an epoch is under way: all as it was when the one before was finished."""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..errors import WorkerError
from ..quant.ranges import Range
from .state import checkpointed, tensors_of

if TYPE_CHECKING:
    from ..model.packed import PackedModel

__all__ = ["FinishedEpoch"]


@dataclasses.dataclass(frozen=True)
class _Begun:
    """What the epoch in hand began with."""

    epoch: int
    multipliers: Sequence[float]
    ranges: Mapping[str, Range]
    best: PackedModel | None


class FinishedEpoch:
    """The last finished epoch of one worker. Its own thread writes, another one may read while the first one hangs in
    the epoch in hand, say waiting for a worker that is gone."""

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._network, self._optimizer = network, optimizer
        self._begun: _Begun | None = None
        self._before: dict[str, np.ndarray] | None = None

    def begin(self, epoch: int, multipliers: Sequence[float], ranges: Mapping[str, Range],
              best: PackedModel | None) -> None:
        """The one before `epoch` is finished; these are replaced, and not changed, until the next call."""
        self._begun, self._before = _Begun(epoch, multipliers, ranges, best), None

    def before_step(self) -> None:
        """The optimiser is about to change what the network holds: a copy stays until the next epoch."""
        self._before = tensors_of(self._network, self._optimizer)

    def state(self, epoch: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """A checkpoint's tensors and the multiplier server's state, as they were after `epoch`.

        Raises: WorkerError: this worker is in another epoch than the one that follows.
        """
        begun = self._begun
        if begun is None or begun.epoch != epoch + 1:
            raise WorkerError(f"this worker is in epoch {begun.epoch if begun else None}, expected {epoch + 1}")
        tensors = tensors_of(self._network, self._optimizer)
        if self._before is not None:  # looked at last: it is there before a step changes what was copied
            tensors = self._before
        server = {"ranges": {name: dataclasses.asdict(figures) for name, figures in begun.ranges.items()}}
        return checkpointed(tensors, begun.multipliers, begun.best), server
