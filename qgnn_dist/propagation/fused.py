# SPDX-License-Identifier: Apache-2.0
"""Merged rounds of coded messages, one pass over the rows a layer: what prediction and evaluation run.

The same numbers as smp.Propagation over a messages.CodedMessenger, to the last bit; that pair shows each step, and is
what training and the diagnosis take. n local rows, H halo rows, C columns.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .. import kernels
from ..comm.exchange import Exchange
from ..quant.packed import row_bytes
from ..quant.ranges import moments_of
from .neighbourhood import Neighbourhood
from .smp import Propagation

__all__ = ["FusedLayers"]


class FusedLayers:
    """One forward over one part's rows; all workers run it together.

    Args:
        spec: of kind appnp, or smp with merged rounds. steps: of each round, 0 where nothing is sent.
        multipliers: λ_0 …, 0 past the end. record: collect the moments of what is coded in `moments`.
    """

    def __init__(self, spec: Propagation, graph: Neighbourhood, exchange: Exchange, direction: str, *, bits: int,
                 steps: Sequence[float], innovation: bool, multipliers: Sequence[float], record: bool) -> None:
        self._spec, self._graph, self._exchange, self._direction = spec, graph, exchange, direction
        self._bits, self._steps, self._innovation, self._record = bits, list(steps), innovation, record
        self._multipliers = [*multipliers, *[0.0] * spec.layers][:spec.layers]
        self.moments: dict[str, list[float]] = {}

    @staticmethod
    def can_run(spec: Propagation, columns: int) -> bool:
        """Whether this is a schedule, and a width, that the kernel knows."""
        schedule = spec.kind == "appnp" or (spec.kind == "smp" and spec.rounds == "merged")
        return schedule and columns <= kernels.LAYER_COLUMNS

    def run(self, h0: np.ndarray, residual: np.ndarray) -> np.ndarray:
        """H^K of the local rows, see Propagation.run."""
        g, spec, columns = self._graph, self._spec, h0.shape[1]
        n = g.num_local
        state, r = h0.copy(), np.zeros_like(h0)
        believed = np.zeros_like(h0) if self._innovation else None
        p = np.empty_like(h0) if any(self._multipliers) else None
        rows = np.zeros((n, 3), np.float64) if self._record else None
        now, then = (np.zeros((n + g.num_halo, row_bytes(columns, self._bits)), np.uint8) for _ in range(2))
        mu, eta = spec.mu, spec.eta
        a, b, c = (np.float32(v) for v in (1.0 - (1.0 + mu) * eta, mu * eta, eta))
        kernels.code_news(state, g.inv_sqrt_degree, believed, self._steps[0], self._bits, 0, n, now[:n], rows)
        for layer in range(spec.layers):
            step = self._steps[layer]
            following = self._steps[layer + 1] if layer + 1 < spec.layers else 0.0
            coefficient = np.float32(2.0 * eta * self._multipliers[layer])
            self._note(layer, step, rows, h0.size)
            if step != 0.0:
                self._exchange.begin(now, self._bits, columns, self._direction, layer, layer)
            for interior in (True, False):
                begin, end = (g.num_boundary, n) if interior else (0, g.num_boundary)
                kernels.layer(g.indptr, g.indices, now, self._bits, step, g.degree, g.inv_sqrt_degree, residual, r,
                              state, p, layer == 0, coefficient, a, b, c, believed, following, then[:n], rows, begin,
                              end)
                if interior and step != 0.0:
                    self._exchange.finish()
            if following != 0.0:
                now, then = then, now
        return state

    def _note(self, number: int, step: float, rows: np.ndarray | None, count: int) -> None:
        if rows is not None and step != 0.0:
            self.moments[f"news/{number}"] = [*moments_of(rows), float(count)]
