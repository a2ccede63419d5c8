# SPDX-License-Identifier: Apache-2.0
"""Messages on affine grids (quant.grids): what the paper's quantisers send, and what their backward needs of it.

Legend: n local rows, C columns, P packed bytes a row.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .. import kernels
from ..comm.exchange import Exchange
from ..quant.grids import AffineGrid
from ..quant.packed import row_bytes
from ..quant.ranges import wide_moments
from .neighbourhood import Neighbourhood

__all__ = ["AffineMessenger", "Clipped"]


@dataclass(frozen=True)
class Clipped:
    """What the straight-through rule needs of one round (or of the residual).

    Attributes:
        error: float32 (n, C), x̂ − x. sides: int8 (n, C), −1 below the range, 1 above it, 0 inside.
    """

    error: np.ndarray
    sides: np.ndarray

    @classmethod
    def of(cls, grid: AffineGrid, bits: int, x: np.ndarray, codes: np.ndarray) -> Clipped:
        """Of values and their codes."""
        return cls(grid.values(codes) - x, grid.sides(x, bits))


class AffineMessenger:
    """Packed codes of affine grids, added up as whole numbers: a neighbour sum is low·degree + step·Σ codes.

    `innovation` and `direct` are as in CodedMessenger. R is float32 in a fixed order by row: the sums are whole numbers
    and the rest is elementwise, so that nothing depends on the cut.

    Args:
        grids: one a round, fixed for this forward.
        record: collect wide moments of what is coded in `moments`; `percentiles` with their percentiles.
        keep: keep `clipped` of every round, for the backward: 5 bytes a value and round, so memory grows with depth.
        protected: bool (n,), rows that stay at full precision (degree_quant's training); without peers only, since a
            round has one width on the wire.
    """

    def __init__(self, graph: Neighbourhood, exchange: Exchange, columns: int, direction: str, *, bits: int,
                 grids: Sequence[AffineGrid], innovation: bool, record: bool = False, percentiles: bool = False,
                 keep: bool = False, protected: np.ndarray | None = None) -> None:
        if protected is not None and graph.num_halo:
            raise ValueError(f"AffineMessenger: protected rows need a graph in one part, this one reads "
                             f"{graph.num_halo} remote rows")
        n = graph.num_local
        self._graph, self._exchange, self._direction = graph, exchange, direction
        self._bits, self._grids, self._innovation = bits, list(grids), innovation
        self._record, self._percentiles, self._keep, self._protected = record, percentiles, keep, protected
        self._codes = np.empty((n, columns), np.uint8)
        self._payload = np.zeros((n + graph.num_halo, row_bytes(columns, bits)), np.uint8)
        self._code_sums = np.empty((n, columns), np.int32)
        self._sums = np.zeros((n, columns), np.float32)
        self._believed = np.zeros((n, columns), np.float32) if innovation else None
        self._round = 0
        self.moments: dict[str, list[float]] = {}
        self.clipped: list[Clipped] = []

    def gather(self, h: np.ndarray, layer: int) -> np.ndarray:
        """See Messenger."""
        g, n, columns, grid = self._graph, self._graph.num_local, self._sums.shape[1], self._grids[self._round]
        looked_at = self._record or self._keep or self._protected is not None
        news = self._news(h) if looked_at else None
        kernels.affine_codes(h, g.inv_sqrt_degree, self._believed, grid.low, grid.step, grid.scale, grid.bias,
                             self._bits, 0, n, self._codes)
        kernels.pack(self._codes, self._bits, self._payload[:n])
        self._exchange.begin(self._payload, self._bits, columns, self._direction, layer, self._round)
        self._add(g.num_boundary, n, grid)
        if news is not None:
            self._look(news, grid)
        self._exchange.finish()
        self._add(0, g.num_boundary, grid)
        if self._protected is not None and news is not None:
            self._add_protected(h, grid)
        self._round += 1
        return self._sums

    @property
    def believed(self) -> np.ndarray | None:
        """See CodedMessenger."""
        return self._believed

    @property
    def sent(self) -> np.ndarray:
        """See CodedMessenger."""
        return self._payload[:self._graph.num_local]

    def _news(self, h: np.ndarray) -> np.ndarray:
        y = self._graph.inv_sqrt_degree[:, None] * h
        news: np.ndarray = y if self._believed is None else y - self._believed
        return news

    def _look(self, news: np.ndarray, grid: AffineGrid) -> None:
        if self._record:
            self.moments[f"news/{self._round}"] = wide_moments(news, percentiles=self._percentiles)
        if self._keep:
            one = Clipped.of(grid, self._bits, news, self._codes)
            if self._protected is not None:
                one.error[self._protected], one.sides[self._protected] = 0, 0
            self.clipped.append(one)

    def _add(self, begin: int, end: int, grid: AffineGrid) -> None:
        g = self._graph
        kernels.aggregate_codes(g.indptr, g.indices, self._payload, self._bits, begin, end, self._code_sums)
        kernels.add_affine(self._code_sums, g.degree, grid.low, grid.step, self._innovation, begin, end, self._sums)

    def _add_protected(self, h: np.ndarray, grid: AffineGrid) -> None:
        """The sums again, with full precision in the protected rows."""
        g, protected = self._graph, self._protected
        rows = self._believed if self._believed is not None else grid.values(self._codes)
        rows[protected] = (g.inv_sqrt_degree[:, None] * h)[protected]
        kernels.aggregate_float(g.indptr, g.indices, rows, 0, g.num_local, self._sums)
