# SPDX-License-Identifier: Apache-2.0
"""What a round of messages carries: float rows, packed codes of the state or of its change, or coded gradients.

A messenger turns the states of all workers into the neighbours' sums R = A·y of its own rows, with y = D̃^-½·h folded,
so that coded sums are sums of whole numbers. n local rows, H halo rows, C columns, P packed bytes a row.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .. import kernels
from ..comm.exchange import Exchange
from ..comm.wire import frame_row_bytes
from ..quant.packed import row_bytes
from ..quant.ranges import moments_of
from .neighbourhood import Neighbourhood

__all__ = [
    "CodedMessenger",
    "FloatMessenger",
    "GradientCoding",
    "GradientMessenger",
    "Messenger",
    "gradient_messenger",
    "value_moments",
]

STAGE_GRADIENTS = 4
"""Stage number of the random-number key; dropout has 1 and 2, degree_quant 3."""


class Messenger(Protocol):
    """One forward's (or backward's) rounds of messages, in order; a new one starts from nothing."""

    def gather(self, h: np.ndarray, layer: int) -> np.ndarray:
        """Send D̃^-½·h to the peers and return R, float32 (n, C): the sum of what the neighbours hold.

        Every worker must call it the same number of times. The result is overwritten by the next call.
        """


class FloatMessenger:
    """Float32 messages: training at `quant.messages=32`, gradients at `quant.gradients=32`, the calibration forward.

    Args:
        record: collect, in `moments`, what an error-free coder would have to code: the change of y since the round
            before (`innovation`), or y itself. keep: also keep those values, in `news`.
    """

    def __init__(self, graph: Neighbourhood, exchange: Exchange, columns: int, direction: str, *,
                 record: bool = False, innovation: bool = True, keep: bool = False) -> None:
        self._graph, self._exchange, self._direction = graph, exchange, direction
        self._rows = np.zeros((graph.num_local + graph.num_halo, columns), np.float32)
        self._sums = np.empty((graph.num_local, columns), np.float32)
        self._before = np.zeros((graph.num_local, columns), np.float32) if record else None
        self._innovation, self._keep = innovation, keep
        self._round = 0
        self.moments: dict[str, list[float]] = {}
        self.news: dict[str, np.ndarray] = {}

    def gather(self, h: np.ndarray, layer: int) -> np.ndarray:
        """See Messenger."""
        g, rows, columns = self._graph, self._rows, self._rows.shape[1]
        n = g.num_local
        kernels.scale_rows(h, g.inv_sqrt_degree, 0, n, rows)
        self._exchange.begin(rows.view(np.uint8), 32, columns, self._direction, layer, self._round)
        kernels.aggregate_float(g.indptr, g.indices, rows, g.num_boundary, n, self._sums)
        if self._before is not None:
            self._record(rows[:n], self._before)
        self._exchange.finish()
        kernels.aggregate_float(g.indptr, g.indices, rows, 0, g.num_boundary, self._sums)
        self._round += 1
        return self._sums

    def _record(self, y: np.ndarray, before: np.ndarray) -> None:
        news = y - before
        self.moments[f"news/{self._round}"] = value_moments(news)
        if self._keep:
            self.news[f"news/{self._round}"] = news
        if self._innovation:
            before[:] = y


class CodedMessenger:
    """Packed mid-rise codes of 1, 2, 4 or 8 bits, added up as whole numbers.

    `innovation` sends the change against what the neighbours believe (Ŷ) and adds it to R; what a round misses is still
    in the next round's change. `direct` codes every state afresh.

    Args:
        steps: the step of each round, fixed for this forward. 0: nothing is sent, and the neighbours go on believing
            what they do (innovation only); the next round's change holds this one's too.
        record: collect the moments of what is coded in `moments`, for the running ranges.
    """

    def __init__(self, graph: Neighbourhood, exchange: Exchange, columns: int, direction: str, *, bits: int,
                 steps: Sequence[float], innovation: bool, record: bool) -> None:
        n = graph.num_local
        self._graph, self._exchange, self._direction = graph, exchange, direction
        self._bits, self._steps, self._innovation = bits, steps, innovation
        self._payload = np.zeros((n + graph.num_halo, row_bytes(columns, bits)), np.uint8)
        self._code_sums = np.empty((n, columns), np.int32)
        self._sums = np.zeros((n, columns), np.float32)
        self._believed = np.zeros((n, columns), np.float32) if innovation else None
        self._row_moments = np.zeros((n, 3), np.float64) if record else None
        self._round = 0
        self.moments: dict[str, list[float]] = {}

    def gather(self, h: np.ndarray, layer: int) -> np.ndarray:
        """See Messenger."""
        g, n, columns = self._graph, self._graph.num_local, self._sums.shape[1]
        step = self._steps[self._round]
        if step == 0.0:
            self._round += 1
            return self._sums
        kernels.code_news(h, g.inv_sqrt_degree, self._believed, step, self._bits, 0, n, self._payload[:n],
                          self._row_moments)
        self._exchange.begin(self._payload, self._bits, columns, self._direction, layer, self._round)
        self._add(g.num_boundary, n, step)
        if self._row_moments is not None:
            self.moments[f"news/{self._round}"] = [*moments_of(self._row_moments), float(h.size)]
        self._exchange.finish()
        self._add(0, g.num_boundary, step)
        self._round += 1
        return self._sums

    @property
    def believed(self) -> np.ndarray | None:
        """Ŷ, float32 (n, C): what the neighbours believe of the local rows; None for `direct`. To be looked at only."""
        return self._believed

    @property
    def sent(self) -> np.ndarray:
        """The local rows' codes of the last round, packed, uint8 (n, P). To be looked at only."""
        return self._payload[:self._graph.num_local]

    def _add(self, begin: int, end: int, step: float) -> None:
        g = self._graph
        kernels.aggregate_codes(g.indptr, g.indices, self._payload, self._bits, begin, end, self._code_sums)
        kernels.add_news(self._code_sums, g.degree, step, self._bits, self._innovation, begin, end, self._sums)


@dataclass(frozen=True)
class GradientCoding:
    """How a backward's messages are coded: `bits` of 2, 4 or 8, rounded at random by the run's seed and the epoch.

    Attributes: rows: int64 (n,), each local row's place in the source, so that no number depends on the cut.
    """

    bits: int
    seed: int
    epoch: int
    rows: np.ndarray

    def key(self, layer: int, second: bool) -> tuple[int, int, int, int, int]:
        """Seed, epoch, stage, layer and round of the random numbers of one round."""
        return self.seed, self.epoch, STAGE_GRADIENTS, layer, int(second)


class GradientMessenger:
    """Rows of packed codes with a scale each, rounded up or down at random: R is right on average.

    Every row that is read, a local one too, is read as codes, so that nothing depends on the cut.
    """

    def __init__(self, graph: Neighbourhood, exchange: Exchange, columns: int, coding: GradientCoding) -> None:
        n = graph.num_local
        self._graph, self._exchange, self._columns, self._coding = graph, exchange, columns, coding
        self._payload = np.zeros((n + graph.num_halo, frame_row_bytes(columns, coding.bits, "backward")), np.uint8)
        self._sums = np.empty((n, columns), np.float32)
        self._round, self._layer = 0, -1

    def gather(self, h: np.ndarray, layer: int) -> np.ndarray:
        """See Messenger. A layer's second call is its second round."""
        g, n, coding = self._graph, self._graph.num_local, self._coding
        kernels.code_gradients(h, g.inv_sqrt_degree, coding.bits, *coding.key(layer, layer == self._layer), coding.rows,
                               0, n, self._payload)
        self._exchange.begin(self._payload, coding.bits, self._columns, "backward", layer, self._round)
        kernels.aggregate_scaled(g.indptr, g.indices, self._payload, coding.bits, g.num_boundary, n, self._sums)
        self._exchange.finish()
        kernels.aggregate_scaled(g.indptr, g.indices, self._payload, coding.bits, 0, g.num_boundary, self._sums)
        self._round, self._layer = self._round + 1, layer
        return self._sums


def gradient_messenger(graph: Neighbourhood, exchange: Exchange, columns: int, coding: GradientCoding | None
                       ) -> FloatMessenger | GradientMessenger:
    """Of one backward, round by round. coding: None for float rows."""
    if coding is None:
        return FloatMessenger(graph, exchange, columns, "backward")
    return GradientMessenger(graph, exchange, columns, coding)


def value_moments(x: np.ndarray) -> list[float]:
    """The four moments of float32 (N, C) values, added in double, row by row in the kernel's order."""
    rows = np.empty((len(x), 3), np.float64)
    kernels.row_moments(np.ascontiguousarray(x), rows)
    return [*moments_of(rows), float(x.size)]
