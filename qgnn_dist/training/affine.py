# SPDX-License-Identifier: Apache-2.0
"""What the methods with affine grids (qlr, bt, bt_star, percentile, degree_quant) add to a training worker.

Their grids follow running ranges times learned factors (quant.learned); clipped elements pass no gradient where
messages are `direct`. Under `innovation` every message passes its gradient, since what a round clips is sent by a later
one, and the factors of the message ranges stay where the search put them. Legend: n local rows, C columns.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from .. import kernels
from ..comm.exchange import Exchange
from ..comm.group import Group
from ..config import RunConfig
from ..model.perceptron import AffineHidden
from ..propagation.affine import AffineMessenger, Clipped
from ..propagation.elastic import Projected
from ..propagation.messages import GradientCoding, gradient_messenger
from ..propagation.neighbourhood import Neighbourhood
from ..propagation.reverse import Reverse
from ..propagation.smp import Propagation
from ..quant.grids import LEARNED_METHODS, PERCENTILE_METHODS, AffineGrid
from ..quant.learned import StageRanges, bound_gradients, gradient_share, shrink_errors
from ..quant.ranges import Range, wide_moments

__all__ = ["AffineTraining", "protection"]

STAGE_PROTECT = 3
"""Stage number of the random-number key; dropout has 1 and 2."""
PROTECT_MOST = 0.1
"""Chance of the node of highest degree to be protected; that of the lowest is 0 (Tailor et al.'s p_max and p_min)."""


@dataclass
class _Forward:
    """What one training forward keeps for its backward."""

    residual: Clipped | None = None
    rounds: list[Clipped] = field(default_factory=list)


class AffineTraining:
    """Grids, messengers and the backward of one worker.

    Args:
        stages: the factors of hidden, residual and messages.
        num_nodes: of the whole graph; gradient scales and random masks do not depend on the cut.
    """

    def __init__(self, config: RunConfig, stages: StageRanges, graph: Neighbourhood, exchange: Exchange,
                 group: Group | None, *, source_index: np.ndarray, num_nodes: int) -> None:
        self._config, self._graph, self._exchange, self._group = config, graph, exchange, group
        self._stages = stages
        self._source_index, self._num_nodes = np.ascontiguousarray(source_index, np.int64), num_nodes
        self._propagation = Propagation.of(config)
        self._method, self._bits = config.quant.method, config.quant.stages()
        self._innovation = config.messages.coding == "innovation"
        self._forward = _Forward()
        self._chance = protection(graph.degree) if self._method == "degree_quant" else None

    def moments(self, values: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
        """Wide moments of stages' values."""
        return {name: wide_moments(x, percentiles=self._method in PERCENTILE_METHODS) for name, x in values.items()}

    def start(self, values: Mapping[str, np.ndarray], ranges: Mapping[str, Range]) -> None:
        """Search the factors on the calibration forward's values, all workers' errors together."""
        if self._method not in LEARNED_METHODS:
            return
        for name in self._stages.names:
            figures = ranges[name]
            errors = shrink_errors(np.ascontiguousarray(values[name]), self._stages.ends(name, figures),
                                   self._stages.bits[name], self._method, figures.skewness)
            if self._group is not None:
                self._group.all_reduce_sum(errors)
            self._stages.start(name, errors)

    def grids(self, ranges: Mapping[str, Range]) -> dict[str, AffineGrid]:
        """Stage → grid, at these running ranges and the factors as they are now."""
        return {name: self._stages.grid(name, ranges[name]) for name in self._stages.names}

    def protected(self, epoch: int) -> np.ndarray | None:
        """Rows that this epoch's training forward keeps at full precision, bool (n,); None for other methods."""
        if self._chance is None:
            return None
        words = np.empty((len(self._chance), 1), np.uint32)
        kernels.keyed_bits(self._config.seed, epoch, STAGE_PROTECT, 0, 0, self._source_index, 1, words)
        return words[:, 0] < self._chance * 2.0**32

    def hidden(self, ranges: Mapping[str, Range], protected: np.ndarray | None) -> AffineHidden | None:
        """The hidden stage's grid; None where it is float."""
        if self._bits["hidden"] == 32:
            return None
        share = gradient_share(self._num_nodes * self._config.model.hidden, self._bits["hidden"])
        figures = ranges["hidden"]
        return AffineHidden(self._stages.grid("hidden", figures), self._stages.ends("hidden", figures), share,
                            protected)

    def residual(self, state: np.ndarray, grids: Mapping[str, AffineGrid], *, train: bool) -> np.ndarray:
        """The H⁰ term as it is coded, float32 (n, C)."""
        if "residual" not in grids:
            return state
        grid, bits = grids["residual"], self._bits["residual"]
        codes = grid.codes(state, bits)
        self._forward = _Forward(Clipped.of(grid, bits, state, codes) if train else None)
        return grid.values(codes)

    def messenger(self, columns: int, grids: Mapping[str, AffineGrid], *, train: bool,
                  protected: np.ndarray | None) -> AffineMessenger:
        """Messages of one forward; a training one records moments, and what `backward` needs."""
        rounds = [grids[f"news/{k}"] for k in range(self._propagation.num_rounds)]
        messenger = AffineMessenger(
            self._graph, self._exchange, columns, "forward", bits=self._bits["messages"], grids=rounds,
            innovation=self._innovation, record=train, percentiles=self._method in PERCENTILE_METHODS,
            keep=train and not self._innovation, protected=protected)
        if train:
            self._forward.rounds = messenger.clipped
        return messenger

    def backward(self, grad: np.ndarray, multipliers: list[float], ranges: Mapping[str, Range],
                 grids: Mapping[str, AffineGrid],
                 coding: GradientCoding | None = None,
                 projected: list[Projected] | None = None) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """Through the layers of the last training forward.

        Args: coding: of the gradient messages; None: float rows. projected: of an elastic forward, used up.
        Returns:
            ∂L/∂H⁰, float32 (n, C), and this worker's share of the gradients of a_l and a_u of all stages (add them
            where `StageRanges` has the parameters; hidden's comes by autograd).
        """
        messenger = gradient_messenger(self._graph, self._exchange, grad.shape[1], coding)
        reverse = Reverse(self._propagation, self._graph, messenger, multipliers, self._forward.rounds, projected)
        first = reverse.run(grad)
        low, high = np.zeros(len(self._stages.names)), np.zeros(len(self._stages.names))

        def add(name: str, value: np.ndarray, clipped: Clipped) -> None:
            bits, at = self._stages.bits[name], self._stages.names.index(name)
            share = gradient_share(self._num_nodes * value.shape[1], bits)
            figures = bound_gradients(value, clipped.error, clipped.sides, grids[name].step * (2**bits - 1),
                                      self._stages.ends(name, ranges[name]))
            low[at], high[at] = figures[0] * share, figures[1] * share

        learned = self._method in LEARNED_METHODS
        if learned:
            for k, value in reverse.delivered.items():
                add(f"news/{k}", value, self._forward.rounds[k])
        residual, clipped = reverse.residual, self._forward.residual
        if clipped is not None:
            if learned:
                add("residual", residual, clipped)
            residual = np.where(clipped.sides == 0, residual, np.float32(0))
        self._forward = _Forward()
        return first + residual, (low, high)

    def add_gradients(self, factors: tuple[np.ndarray, np.ndarray]) -> None:
        """Put `backward`'s share where the optimiser looks."""
        for parameter, value in zip((self._stages.low, self._stages.high), factors):
            if parameter.requires_grad and parameter.numel():
                more = torch.from_numpy(value.astype(np.float32))
                parameter.grad = more if parameter.grad is None else parameter.grad + more


def protection(degree: np.ndarray) -> np.ndarray:
    """Chance of every node to be protected, float64 (n,): from 0 to PROTECT_MOST by the rank of its degree.

    Nodes of equal degree share their mean rank, so that the numbering of the nodes says nothing.
    """
    ordered = np.sort(degree)
    rank = (np.searchsorted(ordered, degree, "left") + np.searchsorted(ordered, degree, "right") - 1) / 2
    return PROTECT_MOST * rank / max(len(degree) - 1, 1)
