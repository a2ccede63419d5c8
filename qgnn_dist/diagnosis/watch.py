# SPDX-License-Identifier: Apache-2.0
"""Looks at one part's propagation while it runs, beside its float twin.

Legend: n local rows, H halo rows, C columns; y = D̃^-½·H, Ŷ what neighbours believe of it, e = y − Ŷ a round's news.
The twin is the same propagation of the same H⁰ with float messages and float residual: what differs is the error of
the messages and of the residual, and nothing of the perceptron.
"""
from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .. import kernels
from ..comm.exchange import Exchange
from ..model.packed import ModelInfo
from ..propagation.affine import AffineMessenger
from ..propagation.messages import CodedMessenger, FloatMessenger, Messenger
from ..propagation.neighbourhood import Neighbourhood
from ..propagation.smp import FrozenMultipliers
from ..quant.clipped import Grid
from .layers import HaloRows, cosine_distances, dirichlet_sum
from .stages import Tally

__all__ = ["LayerSums", "PropagationWatch", "RoundSums", "twin_states"]

DIRECTION = "evaluation"


@dataclass
class LayerSums:
    """A part's sums about H^k; those of all parts add up. The last two are about the step from it to H^{k+1}.

    Attributes:
        squares: ‖H^k‖². twin_squares: ‖H^k_float‖². errors: ‖H^k − H^k_float‖². dirichlet: of tr(HᵀL̃H).
        distances, neighboured: summed mean cosine distances, and of how many nodes.
        change: ‖Δ‖². constraint: of ⟨Δ,G⟩ = tr(ΔᵀL̃Δ).
    """

    squares: float = 0.0
    twin_squares: float = 0.0
    errors: float = 0.0
    dirichlet: float = 0.0
    distances: float = 0.0
    neighboured: int = 0
    change: float = 0.0
    constraint: float = 0.0


@dataclass
class RoundSums:
    """A part's sums about one round of coded messages.

    Attributes:
        number, layer, step: of the round. news: tally of e (of y where states are coded afresh).
        states: ‖y‖². misbelieved: ‖y − Ŷ‖² after the round; None where states are coded afresh.
    """

    number: int
    layer: int
    step: float
    news: Tally
    states: float
    misbelieved: float | None


class _MeasuringMessenger:
    """Another messenger, with what it codes and what its neighbours then believe measured on the way."""

    def __init__(self, inner: CodedMessenger | AffineMessenger, graph: Neighbourhood, grids: list[Grid | None]) -> None:
        self._inner, self._graph, self._grids, self._round = inner, graph, grids, 0
        self.rounds: list[RoundSums] = []

    def gather(self, h: np.ndarray, layer: int) -> np.ndarray:
        """See Messenger."""
        grid = self._grids[self._round]
        self._round += 1
        if grid is None:
            return self._inner.gather(h, layer)
        # As the coder computes it: float32, one rounding an operation.
        y = self._graph.inv_sqrt_degree[:, None] * h
        news = y if self._inner.believed is None else y - self._inner.believed
        sums = self._inner.gather(h, layer)
        codes = np.empty(h.shape, np.uint8)
        kernels.unpack(np.ascontiguousarray(self._inner.sent), grid.bits, codes)
        tally = Tally(grid.bits)
        tally.add(news, codes, grid)
        misbelieved = None
        if self._inner.believed is not None:
            misbelieved = _squares(y.astype(np.float64) - self._inner.believed)
        self.rounds.append(RoundSums(self._round - 1, layer, grid.step, tally, _squares(y), misbelieved))
        return sums


@dataclass
class PropagationWatch:
    """The observer that PackedForward takes (model.forward.Observer); all workers watch together.

    The twin runs to its end first and keeps its states, (K+1)·n·C·4 bytes; each layer then exchanges its float rows.
    """

    info: ModelInfo
    graph: Neighbourhood
    exchange: Exchange
    layers: list[LayerSums] = field(default_factory=list)
    rounds: list[RoundSums] = field(default_factory=list)
    residual: Tally = field(default_factory=lambda: Tally(32))
    residual_step: float = 1.0

    def start(self, h0: np.ndarray, residual: np.ndarray, gain: int, messenger: Messenger) -> Messenger:
        """See Observer."""
        bits = self.info.bits["residual"]
        self.residual, self.residual_step = Tally(bits), float(np.ldexp(np.float32(self.info.residual_step), gain))
        codes, grid = None, None
        affine = self.info.grid("residual")
        if affine is not None:
            grid = Grid.affine(bits, affine.shifted(gain))
            codes = affine.shifted(gain).codes(h0, bits)
        elif bits < 32:
            grid = Grid.midrise(bits, self.residual_step)
            codes = np.rint((residual.astype(np.float64) - grid.lowest) / grid.step).astype(np.uint8)
        self.residual.add(h0, codes, grid)
        self.twins = twin_states(self.info, self.graph, self.exchange, h0)
        self._halo = HaloRows(self.graph, self.exchange, DIRECTION)
        if not isinstance(messenger, (CodedMessenger, AffineMessenger)):
            return messenger
        measuring = _MeasuringMessenger(messenger, self.graph, self._message_grids(gain))
        self.rounds = measuring.rounds
        return measuring

    def _message_grids(self, gain: int) -> list[Grid | None]:
        """Of every round; None where nothing is sent."""
        bits, found = self.info.bits["messages"], list[Grid | None]()
        for number, step in enumerate(self.info.message_steps):
            affine = self.info.grid(f"news/{number}")
            found.append(Grid.affine(bits, affine.shifted(gain)) if affine is not None else None if step == 0 else
                         Grid.midrise(bits, float(np.ldexp(np.float32(step), gain))))
        return found

    def layer(self, layer: int, state: np.ndarray, half: np.ndarray) -> None:
        """See Observer."""
        columns = state.shape[1]
        rows = self._halo.fetch(np.concatenate([state, half], 1), layer)
        sums = self._state(layer, state, np.ascontiguousarray(rows[:, :columns]))
        delta = rows[:, columns:].astype(np.float64) - rows[:, :columns]
        sums.change = _squares(delta[:len(state)])
        sums.constraint = dirichlet_sum(self.graph, self._halo.degrees, delta)
        self.layers.append(sums)

    def finish(self, scores: np.ndarray) -> None:
        """Take H^K, after the run."""
        number = len(self.layers)
        self.layers.append(self._state(number, scores, self._halo.fetch(scores, number)))

    def _state(self, layer: int, state: np.ndarray, rows: np.ndarray) -> LayerSums:
        twin = self.twins[layer].astype(np.float64)
        distances, neighboured = cosine_distances(self.graph, rows)
        return LayerSums(_squares(state), _squares(twin), _squares(state - twin),
                         dirichlet_sum(self.graph, self._halo.degrees, rows), distances, neighboured)


def twin_states(info: ModelInfo, graph: Neighbourhood, exchange: Exchange, h0: np.ndarray) -> list[np.ndarray]:
    """H^0 … H^K of the float twin, float32 (n, C) each; all workers together."""
    states: list[np.ndarray] = []
    last = info.propagation.run(graph, h0, h0, FloatMessenger(graph, exchange, h0.shape[1], DIRECTION),
                           FrozenMultipliers(info.multipliers),
                           observe=lambda _, state, __: states.append(state.copy()))
    return [*states, last]


def _squares(x: np.ndarray) -> float:
    """Σx² in float64."""
    exact = x.astype(np.float64)
    return float((exact * exact).sum())
