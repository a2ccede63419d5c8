# SPDX-License-Identifier: Apache-2.0
"""Running figures of a module's stages: what its grids follow, in training and in evaluation."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, fields

import torch
from torch import Tensor

from ..errors import InputError
from ..quant.ranges import EVALUATION_MOMENTUM, Range, follow

__all__ = ["Figures", "join_state", "split_state"]

WIDTH = len(fields(Range))


class Figures:
    """Ranges of named stages.

    Training forwards move `training`. Without dropout values are smaller, so that evaluations have figures of their
    own: the first evaluation after a training forward leaves its figures in `coming`, and the next training forward
    takes them over. Between two training forwards equal inputs are evaluated to equal outputs, however often.
    Where training went on without an evaluation, those figures are `stale`: the next one has to look first.

    Attributes: behind: training forwards since the last evaluation.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.forget()

    def forget(self) -> None:
        """As new."""
        self.training: dict[str, Range] = {}
        self.evaluation: dict[str, Range] = {}
        self.coming: dict[str, Range] = {}
        self.behind = 0

    @property
    def listening(self) -> bool:
        """Whether the next evaluation is to be noted."""
        return self.behind > 0

    @property
    def stale(self) -> bool:
        """Whether the next evaluation has to look before it codes anything."""
        return self.behind > 1

    @property
    def known(self) -> bool:
        """Whether every stage has figures."""
        return len(self.training) == len(self.names)

    @property
    def frozen(self) -> dict[str, Range]:
        """What evaluation and a packed model take: figures of evaluations, of training where there are none."""
        return {**self.training, **self.evaluation}

    def begin(self) -> None:
        """A training forward begins."""
        self.evaluation, self.coming = {**self.evaluation, **self.coming}, {}
        self.behind += 1

    def follow(self, moments: Mapping[str, Sequence[float]]) -> None:
        """A training forward, or the calibration before the first one, had these moments."""
        for name in self.names:
            running = follow(self.training.get(name), moments[name]) if name in moments else None
            if running is not None:
                self.training[name] = running

    def note(self, moments: Mapping[str, Sequence[float]]) -> None:
        """An evaluation had these moments; only the first one since the last training forward counts."""
        if self.listening:
            for name in self.names:
                if name in moments:
                    running = follow(self.evaluation.get(name), moments[name], EVALUATION_MOMENTUM)
                    if running is not None:
                        self.coming[name] = running
        self.behind = 0

    def adopt(self, moments: Mapping[str, Sequence[float]]) -> None:
        """A look at the input of an evaluation had these moments: they are in use from now on."""
        for name in self.names:
            running = follow(None, moments[name]) if name in moments else None
            if running is not None:
                self.evaluation[name] = running
        self.behind = 1

    def to_list(self) -> list[float]:
        """All of it as numbers, NaN where nothing is known yet."""
        none = (math.nan,) * WIDTH
        values = [float(self.behind)]
        for kind in (self.training, self.evaluation, self.coming):
            for name in self.names:
                values += astuple(kind[name]) if name in kind else none
        return values

    @property
    def size(self) -> int:
        """Of `to_list`."""
        return 1 + 3 * len(self.names) * WIDTH

    def from_list(self, values: Sequence[float]) -> None:
        """The other way round."""
        self.forget()
        self.behind = int(values[0])
        at = 1
        for kind in (self.training, self.evaluation, self.coming):
            for name in self.names:
                some = values[at:at + WIDTH]
                at += WIDTH
                if not math.isnan(some[0]):
                    kind[name] = Range(*some)


def join_state(*pieces: Sequence[float]) -> Tensor:
    """Numbers as one float64 tensor, for a state_dict that holds tensors alone."""
    return torch.tensor([value for piece in pieces for value in piece], dtype=torch.float64)


def split_state(state: Tensor, sizes: Sequence[int], what: str) -> list[list[float]]:
    """The pieces again. Raises: InputError: `what`'s state of another shape."""
    if not isinstance(state, Tensor) or state.shape != (sum(sizes),):
        got = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
        raise InputError(f"{what}: its extra state is {got}, expected ({sum(sizes)},); load the state_dict of a module "
                         "with the same layers, rounds and method")
    values, pieces = state.tolist(), []
    for size in sizes:
        pieces.append(values[:size])
        values = values[size:]
    return pieces
