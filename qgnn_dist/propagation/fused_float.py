# SPDX-License-Identifier: Apache-2.0
"""Layers of float messages, one pass over the rows a round: the float model, and every backward that clips nothing.

The same numbers as smp.Propagation over a messages.FloatMessenger, to the last bit; that pair shows each step.
n local rows, H halo rows, C columns.
"""
from __future__ import annotations

import numpy as np

from .. import kernels
from ..comm.exchange import Exchange
from ..comm.trace import COMPUTE, span
from ..quant.ranges import moments_of
from .neighbourhood import Neighbourhood
from .smp import Multipliers, Propagation

__all__ = ["FusedFloatLayers"]

NOTE_ROWS = 4096
"""Rows whose change is looked at at a time."""


class FusedFloatLayers:
    """One forward or backward over one part's rows; all workers run it together.

    Args:
        record: collect, in `moments`, what a coder without error would have to code in every round, the last one too:
            the change of y since the round before (`innovation`), or y itself; see FloatMessenger.
    """

    def __init__(self, spec: Propagation, graph: Neighbourhood, exchange: Exchange, direction: str, *,
                 record: bool = False, innovation: bool = True) -> None:
        self._spec, self._graph, self._exchange, self._direction = spec, graph, exchange, direction
        self._record, self._innovation = record, innovation
        self.moments: dict[str, list[float]] = {}

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
        now, then = (np.empty((n + g.num_halo, columns), np.float32) for _ in range(2))
        kernels.scale_rows(state, g.inv_sqrt_degree, 0, n, now)
        mu, eta = spec.mu, spec.eta
        a, b, c = (np.float32(v) for v in (1.0 - (1.0 + mu) * eta, mu * eta, eta))
        for number in range(spec.num_rounds):
            layer, second = (number // 2, number % 2 == 1) if two else (number, False)
            last, closes = number == spec.num_rounds - 1, second or not two
            if two and last and multipliers.value(layer) == 0.0 and not self._record:
                return other
            if self._record:
                self._note(number, now[:n], then[:n] if number and self._innovation else None)
            self._exchange.begin(now.view(np.uint8), 32, columns, self._direction, layer, number)
            # Asked for while rows are on the wire: the answer to the layer before may still be on its way, too.
            value = multipliers.value(layer) if closes else 0.0
            h, before = (other, state) if second else (state, other if live and not two else None)
            for interior in (True, False):
                begin, end = (g.num_boundary, n) if interior else (0, g.num_boundary)
                what = "interior rows" if interior else "boundary rows"
                with span(self._exchange.trace, COMPUTE, what, layer, number):
                    kernels.layer_float(g.indptr, g.indices, now, g.inv_sqrt_degree, residual, h, before, other, p,
                                        layer == 0 and not second, second, np.float32(2.0 * eta * value), a, b, c,
                                        None if last else then, dots if closes else None, begin, end)
                if interior:
                    self._exchange.finish()
            if dots is not None and closes and layer < spec.layers - 1:
                multipliers.post(layer, float(dots.sum()))
            now, then = then, now
            if closes:
                state, other = other, state
        return state

    def _note(self, number: int, y: np.ndarray, before: np.ndarray | None) -> None:
        rows = np.empty((len(y), 3), np.float64)
        for begin in range(0, len(y), NOTE_ROWS):
            some = slice(begin, begin + NOTE_ROWS)
            kernels.row_moments(y[some] if before is None else y[some] - before[some], rows[some])
        self.moments[f"news/{number}"] = [*moments_of(rows), float(y.size)]
