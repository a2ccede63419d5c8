# SPDX-License-Identifier: Apache-2.0
"""Layers of coded messages, one pass over the rows a round: what prediction, evaluation and training run.

The same numbers as smp.Propagation over a messages.CodedMessenger, to the last bit; that pair shows each step, and is
what the diagnosis takes. n local rows, H halo rows, C columns.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from .. import kernels
from ..comm.exchange import Exchange
from ..comm.trace import COMPUTE, span
from ..quant.clipped import Clipped, Grid
from ..quant.packed import row_bytes
from ..quant.ranges import moments_of
from .neighbourhood import Neighbourhood
from .smp import Multipliers, Propagation

__all__ = ["FusedLayers", "fixed_point"]

LARGEST, LARGEST_BYTE = 2**16 - 1, 2**8 - 1
FAR_SHARE = 0.5
"""Fixed point is given up where more rows than this share would keep R in float32."""


@dataclass(frozen=True)
class _Coding:
    """What stays the same over the rounds of a forward; `weights` are those of H, P and the H⁰ term in a step."""

    graph: Neighbourhood
    bits: int
    first_step: float
    innovation: bool
    residual_bits: int
    residual_step: float
    weights: tuple[float, float, float]


class _Round(NamedTuple):
    """A round of messages, and what its layer does once they are there; see kernels.layer."""

    gradient: bool
    coefficient: float
    last: bool


class FusedLayers:
    """One forward over one part's rows; all workers run it together.

    Args:
        spec: of kind appnp or smp. steps: of each round, 0 where nothing is sent.
        residual_bits, residual_step: grid of the H⁰ term; at 32 bits it is H⁰ itself.
        multipliers: the source of λ. record: collect the moments of what is coded in `moments`. clipped: counts what
            lies outside the grids of the messages.
    """

    def __init__(self, spec: Propagation, graph: Neighbourhood, exchange: Exchange, direction: str, *, bits: int,
                 steps: Sequence[float], innovation: bool, residual_bits: int, residual_step: float,
                 multipliers: Multipliers, record: bool, clipped: Clipped | None = None) -> None:
        self._spec, self._exchange, self._direction, self._record = spec, exchange, direction, record
        self._clipped = clipped
        self._steps, self._multipliers = list(steps), multipliers
        weights = 1.0 - (1.0 + spec.mu) * spec.eta, spec.mu * spec.eta, spec.eta
        self._coding = _Coding(graph, bits, self._steps[0], innovation, residual_bits, residual_step, weights)
        self.moments: dict[str, list[float]] = {}

    @staticmethod
    def can_run(spec: Propagation, columns: int) -> bool:
        """Whether there are rounds at all, of a kind and width that the kernel knows."""
        return spec.kind in ("smp", "appnp") and spec.layers > 0 and columns <= kernels.LAYER_COLUMNS

    def run(self, h0: np.ndarray) -> np.ndarray:
        """H^K of the local rows, float32 (n, C); `h0`, float32 (n, C), is used up."""
        g, bits, columns = self._coding.graph, self._coding.bits, h0.shape[1]
        n = g.num_local
        live = self._multipliers.live
        rows = np.zeros((n, 3), np.float64) if self._record else None
        dots = np.zeros(n, np.float64) if live else None
        now, then = (np.zeros((n + g.num_halo, row_bytes(columns, bits)), np.uint8) for _ in range(2))
        storage = self._storage(h0)
        storage.start(h0, now[:n], rows)
        state, other = h0, np.empty_like(h0) if self._keeps_two else h0
        for number in range(self._spec.num_rounds):
            step, layer, second = self._steps[number], *self._place(number)
            self._note(number, step, rows, h0.size)
            if step != 0.0:
                later = self._next_sent(number)
                self._exchange.begin(now, bits, columns, self._direction, layer, number,
                                     following=None if later is None else (then, self._place(later)[0], later))
                if self._clipped is not None:
                    self._count(self._clipped, storage, state, now, step)
            # λ is asked for while rows are on the wire: the answer to the layer before may be on its way, too.
            current = self._round(number, layer, second)
            following = 0.0 if current.last else self._steps[number + 1]
            compares = self._keeps_two and number > 0 and (self._merged or second)
            before = other if compares else None
            for interior in (True, False):
                begin, end = (g.num_boundary, n) if interior else (0, g.num_boundary)
                what = "interior rows" if interior else "boundary rows"
                with span(self._exchange.trace, COMPUTE, what, layer, number):
                    storage.layer(now, step, state, before, other, current, following, then[:n], rows,
                                  dots if compares else None, begin, end)
                if interior and step != 0.0:
                    self._exchange.finish()
            storage.end_round(step)
            if dots is not None and (self._merged or second) and layer < self._spec.layers - 1:
                self._multipliers.post(layer, float(dots.sum()))
            if following != 0.0:
                now, then = then, now
            state, other = other, state
            if current.last:
                break
        return state

    def _count(self, clipped: Clipped, storage: _Storage, state: np.ndarray, payload: np.ndarray, step: float) -> None:
        """Of a round whose codes are in `payload`: what was new about the sampled rows, and whether it fitted."""
        rows, bits, graph = clipped.rows, self._coding.bits, self._coding.graph
        codes = np.empty((len(rows), state.shape[1]), np.uint8)
        kernels.unpack(payload[rows], bits, codes)
        grid = Grid.midrise(bits, step)
        news = graph.inv_sqrt_degree[rows, None] * state[rows]
        believed = storage.believed(rows, step)
        if believed is not None:
            news = news - (believed - grid.values(codes)).astype(np.float32)
        clipped.add("messages", news, grid)

    @property
    def _merged(self) -> bool:
        return not self._spec.two_rounds

    @property
    def _keeps_two(self) -> bool:
        """Whether a layer looks back at the state before."""
        return not self._merged or self._multipliers.live or self._multipliers.any

    def _place(self, number: int) -> tuple[int, bool]:
        """A round's layer, and whether it is the layer's second."""
        return (number, False) if self._merged else (number // 2, number % 2 == 1)

    def _next_sent(self, number: int) -> int | None:
        """The next round that is sure to be sent, None for none: a λ to come can make the last of two needless."""
        sure = self._spec.num_rounds - (0 if self._merged else 1)
        return next((later for later in range(number + 1, sure) if self._steps[later] != 0.0), None)

    def _round(self, number: int, layer: int, second: bool) -> _Round:
        last = number == self._spec.num_rounds - 1
        if self._merged or second:
            multiplier = self._multipliers.value(layer)
            return _Round(not second, float(np.float32(2.0 * self._spec.eta * multiplier)), last)
        needless = layer == self._spec.layers - 1 and self._multipliers.value(layer) == 0.0
        return _Round(True, 0.0, needless)

    def _storage(self, h0: np.ndarray) -> _Storage:
        c = self._coding
        fixed = fixed_point(self._steps, c.bits, innovation=c.innovation)
        coded = c.residual_bits <= 8 and _is_power_of_two(c.residual_step)
        if fixed is not None and coded:
            far = c.graph.rows_above(fixed.most_neighbours)
            if len(far) <= FAR_SHARE * len(h0):
                return _FixedStorage(c, h0, fixed, far)
        return _FloatStorage(c, h0)

    def _note(self, number: int, step: float, rows: np.ndarray | None, count: int) -> None:
        if rows is not None and step != 0.0:
            self.moments[f"news/{number}"] = [*moments_of(rows), float(count)]


@dataclass(frozen=True)
class FixedPoint:
    """How codes are added up as whole numbers.

    Attributes:
        unit: what 1 means, the least step. most_neighbours: of rows whose sums R fit 16 bits.
        believed_bytes: what a number of Ŷ takes, 1 or 2.
    """

    unit: float
    most_neighbours: int
    believed_bytes: int


def fixed_point(steps: Sequence[float], bits: int, *, innovation: bool) -> FixedPoint | None:
    """How believed states and their sums are whole numbers of 16 bits; None where they aren't, or don't fit.

    Codes 0 to 2^b − 1 are added as they come, times their step, and what stands for 0 is taken off when the sum is
    read. Where steps are powers of two the least one counts all of them, and the sum over rounds bounds them. Ten
    rounds of 2 bits fit a byte however fast their steps fall (`quant.step_floor` 0.75: to 195).

    >>> fixed_point([1.0, 0.5, 0.0, 0.25], 2, innovation=True)
    FixedPoint(unit=0.25, most_neighbours=3120, believed_bytes=1)
    """
    sent = [step for step in steps if step != 0.0]
    if not sent or not all(_is_power_of_two(step) for step in sent):
        return None
    shares = [step / min(sent) for step in sent]
    largest = (2**bits - 1) * (sum(shares) if innovation else max(shares))
    if largest > LARGEST:
        return None
    return FixedPoint(min(sent), int(LARGEST // largest), 1 if largest <= LARGEST_BYTE else 2)


def _is_power_of_two(step: float) -> bool:
    return 2.0**-100 <= step <= 2.0**100 and math.frexp(step)[0] == 0.5


class _Storage(Protocol):
    """Where R, Ŷ and the H⁰ term are kept."""

    def start(self, h0: np.ndarray, payload: np.ndarray, moments: np.ndarray | None) -> None:
        """Code the first round's messages."""

    def layer(self, payload: np.ndarray, step: float, h: np.ndarray, before: np.ndarray | None, out: np.ndarray,
              current: _Round, following: float, following_payload: np.ndarray, moments: np.ndarray | None,
              dots: np.ndarray | None, begin: int, end: int) -> None:
        """See kernels.layer."""

    def end_round(self, step: float) -> None:
        """All rows have what the round of `step` brought."""

    def believed(self, rows: np.ndarray, step: float) -> np.ndarray | None:
        """Ŷ of some rows, float64 (m, C), with the codes of the round of `step` that goes on; None where states are
        coded afresh."""


class _FloatStorage:
    """In float32."""

    def __init__(self, coding: _Coding, h0: np.ndarray) -> None:
        self._coding = coding
        self._r = np.zeros_like(h0)
        self._believed = np.zeros_like(h0) if coding.innovation else None
        self._residual = h0.copy()
        if coding.residual_bits < 32:
            kernels.midrise(h0, np.float32(coding.residual_step), coding.residual_bits, self._residual)

    def start(self, h0: np.ndarray, payload: np.ndarray, moments: np.ndarray | None) -> None:
        c = self._coding
        kernels.code_news(h0, c.graph.inv_sqrt_degree, self._believed, c.first_step, c.bits, 0, len(h0), payload,
                          moments)

    def layer(self, payload: np.ndarray, step: float, h: np.ndarray, before: np.ndarray | None, out: np.ndarray,
              current: _Round, following: float, following_payload: np.ndarray, moments: np.ndarray | None,
              dots: np.ndarray | None, begin: int, end: int) -> None:
        c, g = self._coding, self._coding.graph
        kernels.layer(g.indptr, g.indices, payload, c.bits, step, g.inv_sqrt_degree, self._residual, self._r, h, before,
                      out, current.gradient, current.coefficient, *c.weights, self._believed, following,
                      following_payload, moments, dots, begin, end)

    def end_round(self, step: float) -> None:
        """Nothing: float32 has a sign."""

    def believed(self, rows: np.ndarray, step: float) -> np.ndarray | None:
        return None if self._believed is None else self._believed[rows].astype(np.float64)


class _FixedStorage:
    """R in 16 bits, Ŷ in 8 or 16, the H⁰ term in 8; in float32 R of rows with many neighbours, `far`."""

    def __init__(self, coding: _Coding, h0: np.ndarray, fixed: FixedPoint, far: np.ndarray) -> None:
        self._coding, self._unit, self._middle = coding, fixed.unit, 0.0
        self._columns = h0.shape[1]
        shape = (len(h0), -(-h0.shape[1] // 8) * 8)
        self._r = np.zeros(shape, np.uint16)
        self._believed = None
        if coding.innovation:
            self._believed = np.empty(shape, np.uint8 if fixed.believed_bytes == 1 else np.uint16)
        self._residual = np.empty(shape, np.int8)
        self._far_rows = far if len(far) else None
        self._far = np.zeros((len(far), h0.shape[1]), np.float32) if len(far) else None

    def start(self, h0: np.ndarray, payload: np.ndarray, moments: np.ndarray | None) -> None:
        c = self._coding
        kernels.fixed_start(h0, c.graph.inv_sqrt_degree, c.residual_step, c.residual_bits, self._unit, c.first_step,
                            c.bits, 0, len(h0), self._residual, self._believed, payload, moments)

    def layer(self, payload: np.ndarray, step: float, h: np.ndarray, before: np.ndarray | None, out: np.ndarray,
              current: _Round, following: float, following_payload: np.ndarray, moments: np.ndarray | None,
              dots: np.ndarray | None, begin: int, end: int) -> None:
        c, g = self._coding, self._coding.graph
        kernels.fixed_layer(g.indptr, g.indices, payload, c.bits, step, g.inv_sqrt_degree, self._residual,
                            c.residual_step, self._unit, self._middle, self._r, self._far_rows, self._far, h, before,
                            out, current.gradient, current.coefficient, *c.weights, self._believed, following,
                            following_payload, moments, dots, begin, end)

    def end_round(self, step: float) -> None:
        """Moves what stands for 0 by the half of the highest code."""
        kept = self._middle if self._coding.innovation or step == 0.0 else 0.0
        self._middle = kept + self._half(step)

    def believed(self, rows: np.ndarray, step: float) -> np.ndarray | None:
        if self._believed is None:
            return None
        here = self._believed[rows, :self._columns].astype(np.float64)
        return (here - (self._middle + self._half(step))) * self._unit

    def _half(self, step: float) -> float:
        """By how much a round's codes move the middle."""
        return float((2**self._coding.bits - 1) / 2 * step / self._unit)
