# SPDX-License-Identifier: Apache-2.0
"""Messages and layers on a device, by torch operations in the kernels' order of roundings.

The twins of propagation/messages.py and smp.py. Sums of codes are exact and all else is elementwise, so that coded
layers give the kernels' bits; float messages are added in the device's order. Legend: n local rows, H halo rows,
C columns.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..comm.device import DeviceExchange
from ..propagation.smp import Multipliers, Propagation
from .codes import DeviceGraph, level, moments, new_payload, pack, row_dot, unpack

__all__ = ["CodedRounds", "FloatRounds", "Rounds", "run_layers"]


class Rounds(Protocol):
    """See propagation.messages.Messenger: R = A·y of the local rows."""

    def gather(self, h: Tensor, layer: int) -> Tensor: ...


class FloatRounds:
    """Float32 messages. Args: record, innovation: see propagation.messages.FloatMessenger."""

    def __init__(self, graph: DeviceGraph, exchange: DeviceExchange, columns: int, direction: str, *,
                 record: bool = False, innovation: bool = True) -> None:
        n = graph.num_local
        self._graph, self._exchange, self._direction = graph, exchange, direction
        self._rows = torch.zeros(n + graph.num_halo, columns, device=graph.device)
        self._sums = torch.zeros(n, columns, device=graph.device)
        self._before = torch.zeros(n, columns, device=graph.device) if record else None
        self._innovation, self._round = innovation, 0
        self.moments: dict[str, list[float]] = {}

    def gather(self, h: Tensor, layer: int) -> Tensor:
        """See Rounds; overwritten by the next call."""
        g, rows = self._graph, self._rows
        y = rows[:g.num_local]
        torch.mul(g.inv_sqrt_degree, h, out=y)
        self._exchange.begin(rows.view(torch.uint8), 32, rows.shape[1], self._direction, layer, self._round)
        g.add_neighbours(rows, True, self._sums)
        if self._before is not None:
            self.moments[f"news/{self._round}"] = moments(y - self._before)
            if self._innovation:
                self._before.copy_(y)
        self._exchange.finish()
        g.add_neighbours(rows, False, self._sums)
        self._round += 1
        return self._sums


class CodedRounds:
    """Packed mid-rise codes. Args: steps, innovation, record: see propagation.messages.CodedMessenger."""

    def __init__(self, graph: DeviceGraph, exchange: DeviceExchange, columns: int, direction: str, *, bits: int,
                 steps: Sequence[float], innovation: bool, record: bool) -> None:
        n, device = graph.num_local, graph.device
        self._graph, self._exchange, self._direction = graph, exchange, direction
        self._bits, self._steps, self._innovation, self._record = bits, steps, innovation, record
        self._payload = new_payload(graph, columns, bits)
        kind = graph.count_type(bits)
        self._codes = torch.zeros(n + graph.num_halo, columns, dtype=kind, device=device)
        self._code_sums = torch.zeros(n, columns, dtype=kind, device=device)
        self._sums = torch.zeros(n, columns, device=device)
        self._believed = torch.zeros(n, columns, device=device) if innovation else None
        self._round = 0
        self.moments: dict[str, list[float]] = {}

    def gather(self, h: Tensor, layer: int) -> Tensor:
        """See Rounds; overwritten by the next call."""
        g, n, step = self._graph, self._graph.num_local, self._steps[self._round]
        if step != 0.0:
            self._code(h, step)
            self._exchange.begin(self._payload, self._bits, h.shape[1], self._direction, layer, self._round)
            unpack(self._payload[:n], self._bits, self._codes[:n])
            g.add_neighbours(self._codes, True, self._code_sums)
            self._exchange.finish()
            unpack(self._payload[n:], self._bits, self._codes[n:])
            g.add_neighbours(self._codes, False, self._code_sums)
            self._add(step)
        self._round += 1
        return self._sums

    def _code(self, h: Tensor, step: float) -> None:
        """The twin of kernels.code_news."""
        news = self._graph.inv_sqrt_degree * h
        if self._believed is not None:
            news -= self._believed
        if self._record:
            self.moments[f"news/{self._round}"] = moments(news)
        levels = level(news, news.new_full((1,), step), self._bits)
        if self._believed is not None:
            self._believed += (levels + 0.5) * step
        pack((levels + 2 ** (self._bits - 1)).to(torch.uint8), self._bits, self._payload[:self._graph.num_local])

    def _add(self, step: float) -> None:
        """The twin of kernels.add_news: whole numbers, rounded to float32 once."""
        offset = ((2**self._bits - 1) * self._graph.degree).to(self._code_sums.dtype)
        news = (2 * self._code_sums - offset).float() * float(np.float32(step) * np.float32(0.5))
        if self._innovation:
            self._sums += news
        else:
            self._sums = news


def run_layers(spec: Propagation, graph: DeviceGraph, h0: Tensor, residual: Tensor, rounds: Rounds,
               multipliers: Multipliers, *, all_rounds: bool = False) -> Tensor:
    """H^K of the local rows, float32 (n, C), a new tensor; see propagation.smp.Propagation.run."""
    if spec.kind == "none":
        return h0.clone()
    return (_two if spec.two_rounds else _merged)(_Step(spec, graph, residual, rounds), h0, multipliers, all_rounds)


class _Step:
    """What the layers of one run are made of."""

    def __init__(self, spec: Propagation, graph: DeviceGraph, residual: Tensor, rounds: Rounds) -> None:
        self.spec, self._graph, self._residual, self._rounds = spec, graph, residual, rounds
        mu, eta = spec.mu, spec.eta
        self._a, self._b, self._c = (float(np.float32(v)) for v in (1.0 - (1.0 + mu) * eta, mu * eta, eta))

    def around(self, h: Tensor, layer: int) -> Tensor:
        """P = Â·h."""
        d = self._graph.inv_sqrt_degree
        p = d * self._rounds.gather(h, layer)
        p += (d * d) * h
        return p

    def half(self, h: Tensor, p: Tensor) -> Tensor:
        """H½ = a·H + b·P + c·H⁰."""
        out = self._a * h
        out += self._b * p
        out += self._c * self._residual
        return out

    def constrained(self, h: Tensor, half: Tensor, p: Tensor, p_next: Tensor, multiplier: float) -> Tensor:
        """H½ + 2ηλ·G with G = Δ − (P' − P)."""
        coefficient = float(np.float32(2.0 * self.spec.eta * multiplier))
        if coefficient == 0.0:
            return half
        return half + coefficient * gap(h, half, p, p_next)


def gap(before: Tensor, after: Tensor, p_before: Tensor, p_after: Tensor) -> Tensor:
    """L̃·D of the change D = after − before."""
    return (after - before) - (p_after - p_before)


def _merged(step: _Step, state: Tensor, multipliers: Multipliers, all_rounds: bool) -> Tensor:
    """One round a layer, see propagation.smp."""
    before = p_before = None
    for layer in range(step.spec.layers):
        p = step.around(state, layer)
        value = multipliers.value(layer)
        if multipliers.live and layer < step.spec.layers - 1:
            dot = 0.0
            if before is not None and p_before is not None:
                dot = row_dot(state - before, gap(before, state, p_before, p))
            multipliers.post(layer, dot)
        half = step.half(state, p)
        before, state = state, step.constrained(state, half, p if p_before is None else p_before, p, value)
        p_before = p
    return state


def _two(step: _Step, state: Tensor, multipliers: Multipliers, all_rounds: bool) -> Tensor:
    """A round for Â·H^k, and one for Â·H½."""
    for layer in range(step.spec.layers):
        p = step.around(state, layer)
        half = step.half(state, p)
        last = layer == step.spec.layers - 1
        if last and multipliers.value(layer) == 0.0 and not all_rounds:
            return half
        p_half = step.around(half, layer)
        value = multipliers.value(layer)
        if multipliers.live and not last:
            multipliers.post(layer, row_dot(half - state, gap(state, half, p, p_half)))
        state = step.constrained(state, half, p, p_half, value)
    return state
