# SPDX-License-Identifier: Apache-2.0
"""Layers of float state, one pass over the rows a round: the float model, and every backward that clips nothing.

Messages are float rows, or coded gradients. The same numbers as smp.Propagation over a messages.FloatMessenger or
GradientMessenger, to the last bit; that pair shows each step. n local rows, H halo rows, C columns.
"""
from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from .. import kernels
from ..comm.exchange import Exchange
from ..comm.trace import COMPUTE, span
from ..comm.wire import frame_row_bytes
from ..quant.ranges import combine_moments, moments_of
from .messages import FloatMessenger, GradientCoding
from .neighbourhood import Neighbourhood
from .smp import FrozenMultipliers, Multipliers, Propagation

__all__ = ["MOMENT_COLUMNS", "FusedFloatLayers", "float_moments"]

NOTE_ROWS = 4096
"""Rows whose change is looked at at a time."""
MOMENT_COLUMNS = 16
"""Columns that `float_moments` sends at a time: with all, their halo rows would be what a run needs most memory for."""


class _Round(NamedTuple):
    """What a layer does once a round's messages are there; see kernels.layer_float. `weights` are a, b, c."""

    first: bool
    second: bool
    coefficient: float
    weights: tuple[float, float, float]


class FusedFloatLayers:
    """One forward or backward over one part's rows; all workers run it together.

    Args:
        record: collect, in `moments`, what a coder without error would have to code in every round, the last one too:
            the change of y since the round before (`innovation`), or y itself; see FloatMessenger.
        coding: of gradient messages, for a backward; None: float rows.
    """

    def __init__(self, spec: Propagation, graph: Neighbourhood, exchange: Exchange, direction: str, *,
                 record: bool = False, innovation: bool = True, coding: GradientCoding | None = None) -> None:
        self._spec, self._graph, self._exchange, self._direction = spec, graph, exchange, direction
        self._record, self._innovation, self._coding = record, innovation, coding
        self.moments: dict[str, list[float]] = {}

    @staticmethod
    def can_run(spec: Propagation) -> bool:
        """Whether the kernel knows the kind."""
        return spec.kind != "elastic"

    def run(self, state: np.ndarray, residual: np.ndarray, multipliers: Multipliers) -> np.ndarray:
        """H^K of the local rows, see Propagation.run; `state` is used up, unless it is `residual` too."""
        if state is residual:
            state = state.copy()
        if self._spec.kind == "none":
            return state
        g, spec, live, two = self._graph, self._spec, multipliers.live, self._spec.two_rounds
        n, columns = state.shape
        p = np.empty_like(state) if two or multipliers.any else None
        other = np.empty_like(state) if two or live else state
        dots = np.zeros(n, np.float64) if live else None
        rows: _Rows = _FloatRows(g, columns) if self._coding is None else _CodedRows(g, columns, self._coding)
        rows.start(state)
        mu, eta = spec.mu, spec.eta
        weights = float(np.float32(1.0 - (1.0 + mu) * eta)), float(np.float32(mu * eta)), float(np.float32(eta))
        for number in range(spec.num_rounds):
            layer, second = self._place(number)
            last, closes = number == spec.num_rounds - 1, second or not two
            if two and last and multipliers.value(layer) == 0.0 and not self._record:
                return other
            if self._record and isinstance(rows, _FloatRows):
                self._note(number, rows.now[:n], rows.then[:n] if number and self._innovation else None)
            following = None if last else self._place(number + 1)
            # The last of two rounds is not sure to come: a λ that is still to come can make it needless.
            sure = following is not None and not (two and number == spec.num_rounds - 2)
            self._exchange.begin(rows.now.view(np.uint8), rows.bits, columns, self._direction, layer, number,
                                 following=(rows.then.view(np.uint8), following[0], number + 1)
                                 if sure and following is not None else None)
            # Asked for while rows are on the wire: the answer to the layer before may still be on its way, too.
            value = multipliers.value(layer) if closes else 0.0
            current = _Round(layer == 0 and not second, second, float(np.float32(2.0 * eta * value)), weights)
            h, before = (other, state) if second else (state, other if live and not two else None)
            for interior in (True, False):
                begin, end = (g.num_boundary, n) if interior else (0, g.num_boundary)
                what = "interior rows" if interior else "boundary rows"
                with span(self._exchange.trace, COMPUTE, what, layer, number):
                    rows.layer(current, residual, h, before, other, p, following, dots if closes else None, begin, end)
                if interior:
                    self._exchange.finish()
            if dots is not None and closes and layer < spec.layers - 1:
                multipliers.post(layer, float(dots.sum()))
            rows.now, rows.then = rows.then, rows.now
            if closes:
                state, other = other, state
        return state

    def _place(self, number: int) -> tuple[int, bool]:
        """A round's layer, and whether it is the layer's second."""
        return (number // 2, number % 2 == 1) if self._spec.two_rounds else (number, False)

    def _note(self, number: int, y: np.ndarray, before: np.ndarray | None) -> None:
        rows = np.empty((len(y), 3), np.float64)
        for begin in range(0, len(y), NOTE_ROWS):
            some = slice(begin, begin + NOTE_ROWS)
            kernels.row_moments(y[some] if before is None else y[some] - before[some], rows[some])
        self.moments[f"news/{number}"] = [*moments_of(rows), float(y.size)]


def float_moments(spec: Propagation, graph: Neighbourhood, exchange: Exchange, state: np.ndarray, *,
                  innovation: bool) -> dict[str, list[float]]:
    """What a coder without error would have to code of float32 (n, C) states, see FusedFloatLayers.

    Some columns after the others: without multipliers none needs another one. The buffers to send are given back.
    """
    if not FusedFloatLayers.can_run(spec):  # elastic's projections look at all columns of an edge
        messenger = FloatMessenger(graph, exchange, state.shape[1], "forward", record=True, innovation=innovation)
        spec.run(graph, state, state, messenger, FrozenMultipliers([]))
        exchange.release()
        return messenger.moments
    found: dict[str, list[list[float]]] = {}
    for first in range(0, state.shape[1], MOMENT_COLUMNS):
        some = np.ascontiguousarray(state[:, first:first + MOMENT_COLUMNS])
        layers = FusedFloatLayers(spec, graph, exchange, "forward", record=True, innovation=innovation)
        layers.run(some, some, FrozenMultipliers([]))
        for name, moments in layers.moments.items():
            found.setdefault(name, []).append(moments)
    exchange.release()
    return {name: combine_moments(parts) for name, parts in found.items()}


class _Rows(Protocol):
    """Messages of this round and of the next one: buffers of n + H rows, of `bits` a value."""

    bits: int
    now: np.ndarray
    then: np.ndarray

    def start(self, state: np.ndarray) -> None:
        """The first round's rows."""

    def layer(self, current: _Round, h0: np.ndarray, h: np.ndarray, before: np.ndarray | None, out: np.ndarray,
              p: np.ndarray | None, following: tuple[int, bool] | None, dots: np.ndarray | None, begin: int,
              end: int) -> None:
        """See kernels.layer_float; `following` is the place of the next round, None after the last."""


class _FloatRows:
    """D̃^-½·H as float32."""

    bits = 32

    def __init__(self, graph: Neighbourhood, columns: int) -> None:
        self._graph = graph
        self.now, self.then = (np.empty((graph.num_local + graph.num_halo, columns), np.float32) for _ in range(2))

    def start(self, state: np.ndarray) -> None:
        kernels.scale_rows(state, self._graph.inv_sqrt_degree, 0, len(state), self.now)

    def layer(self, current: _Round, h0: np.ndarray, h: np.ndarray, before: np.ndarray | None, out: np.ndarray,
              p: np.ndarray | None, following: tuple[int, bool] | None, dots: np.ndarray | None, begin: int,
              end: int) -> None:
        g = self._graph
        kernels.layer_float(g.indptr, g.indices, self.now, g.inv_sqrt_degree, h0, h, before, out, p, current.first,
                            current.second, current.coefficient, *current.weights,
                            None if following is None else self.then, dots, begin, end)


class _CodedRows:
    """D̃^-½·G as packed codes and a scale byte, rounded at random."""

    def __init__(self, graph: Neighbourhood, columns: int, coding: GradientCoding) -> None:
        self._graph, self._coding, self.bits = graph, coding, coding.bits
        shape = graph.num_local + graph.num_halo, frame_row_bytes(columns, coding.bits, "backward")
        self.now, self.then = (np.zeros(shape, np.uint8) for _ in range(2))

    def start(self, state: np.ndarray) -> None:
        coding = self._coding
        kernels.code_gradients(state, self._graph.inv_sqrt_degree, coding.bits, *coding.key(0, False), coding.rows, 0,
                               len(state), self.now)

    def layer(self, current: _Round, h0: np.ndarray, h: np.ndarray, before: np.ndarray | None, out: np.ndarray,
              p: np.ndarray | None, following: tuple[int, bool] | None, dots: np.ndarray | None, begin: int,
              end: int) -> None:
        if dots is not None:
            raise ValueError("coded gradients: the multipliers of a backward are those of its forward, not live ones")
        g, coding = self._graph, self._coding
        kernels.layer_scaled(g.indptr, g.indices, self.now, coding.bits, g.inv_sqrt_degree, h0, h, before, out, p,
                             current.first, current.second, current.coefficient, *current.weights,
                             None if following is None else self.then, *coding.key(*(following or (0, False))),
                             coding.rows, begin, end)
