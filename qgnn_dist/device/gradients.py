# SPDX-License-Identifier: Apache-2.0
"""Coded gradients on a device: the bytes of kernels/gradients.py by torch operations, and rounds of them.

Legend: n local rows, H halo rows, C columns, G packed bytes and the scale byte.
"""
from __future__ import annotations

import torch
from torch import Tensor

from ..comm.device import DeviceExchange
from ..comm.wire import frame_row_bytes
from ..kernels.gradients import EXPONENT_BIAS, LEAST_EXPONENT, MOST_EXPONENT, NEGATED, ODD_ROW
from ..propagation.messages import GradientCoding
from .codes import BLOCK_ROWS, DeviceGraph, pack, unpack
from .random import LOW, keyed_bits

__all__ = ["GradientRounds", "code_gradients", "gradient_values"]


class GradientRounds:
    """The twin of propagation.messages.GradientMessenger; sums are added in the device's order."""

    def __init__(self, graph: DeviceGraph, exchange: DeviceExchange, columns: int, coding: GradientCoding) -> None:
        n, device = graph.num_local, graph.device
        self._graph, self._exchange, self._coding = graph, exchange, coding
        self._source = torch.tensor(coding.rows, device=device)
        size = frame_row_bytes(columns, coding.bits, "backward")
        self._payload = torch.zeros(n + graph.num_halo, size, dtype=torch.uint8, device=device)
        self._values = torch.zeros(n + graph.num_halo, columns, device=device)
        self._sums = torch.zeros(n, columns, device=device)
        self._round, self._layer = 0, -1

    def gather(self, h: Tensor, layer: int) -> Tensor:
        """See layers.Rounds; a layer's second call is its second round."""
        g, n, bits = self._graph, self._graph.num_local, self._coding.bits
        key = self._coding.key(layer, layer == self._layer)
        for begin in range(0, n, BLOCK_ROWS):
            some = slice(begin, min(begin + BLOCK_ROWS, n))
            code_gradients(g.inv_sqrt_degree[some] * h[some], bits, key, self._source[some], self._payload[some])
        self._exchange.begin(self._payload, bits, h.shape[1], "backward", layer, self._round)
        gradient_values(self._payload[:n], bits, self._values[:n])
        g.add_neighbours(self._values, True, self._sums)
        self._exchange.finish()
        gradient_values(self._payload[n:], bits, self._values[n:])
        g.add_neighbours(self._values, False, self._sums)
        self._round, self._layer = self._round + 1, layer
        return self._sums


def code_gradients(y: Tensor, bits: int, key: tuple[int, int, int, int, int], rows: Tensor, payload: Tensor) -> None:
    """The bytes of kernels.code_gradients for y = D̃^-½·h, float32 (n, C).

    Args:
        key: seed, epoch, stage, layer, round. rows: int64 (n,), where each row's numbers stand. payload: uint8 (n, G).
    """
    zero, columns = 2 ** (bits - 1) - 1, y.shape[1]
    above, below = (v.amax(1).clamp_min(0.0) for v in (y, -y))
    finite = above.isfinite() & below.isfinite()
    above, below = (torch.where(finite, v, 0.0) for v in (above, below))
    negated, largest = below > above, torch.maximum(above, below)
    exponent = torch.maximum(_least_exponent(largest, zero + 1), _least_exponent(torch.minimum(above, below), zero))
    exponent = exponent.clamp_min(LEAST_EXPONENT)
    odd = ~finite | (exponent > MOST_EXPONENT)
    plain = ~odd & (largest != 0)
    size = torch.where(plain[:, None], y, 0.0).abs() * power(-torch.where(plain, exponent, 0))[:, None]
    whole = size.floor()
    up = (_words(key, rows, columns) >> 1) < ((size - whole) * 2.0**31).long()
    level = whole.long() + up
    codes = torch.where((y < 0) ^ negated[:, None], -level, level) + zero
    pack(torch.where(plain[:, None], codes, 0).to(torch.uint8), bits, payload[:, :-1])
    byte = exponent + EXPONENT_BIAS + NEGATED * negated
    payload[:, -1] = torch.where(plain, byte, ODD_ROW * odd).to(torch.uint8)


def gradient_values(payload: Tensor, bits: int, out: Tensor) -> None:
    """What coded rows stand for, float32 (n, C), each exact."""
    byte = payload[:, -1].int()
    low = byte & (NEGATED - 1)
    scale = power(low - EXPONENT_BIAS) * torch.where(byte >= NEGATED, -1.0, 1.0)
    scale = torch.where(low == 0, 0.0, torch.where(low == ODD_ROW, torch.nan, scale))
    unpack(payload[:, :-1], bits, out)
    out -= 2 ** (bits - 1) - 1
    out *= scale[:, None]


def power(exponent: Tensor) -> Tensor:
    """2^exponent, float32, exactly: made of its bits. exponent: int32, −126 … 127."""
    return ((exponent.int() + 127) << 23).view(torch.float32)


def _least_exponent(x: Tensor, levels: int) -> Tensor:
    """The least e with x ≤ levels·2^e, int32; far below every other where x is 0."""
    fraction, exponent = torch.frexp(x)
    of_levels, bits = torch.frexp(torch.tensor(float(levels)))
    return torch.where(x > 0, exponent - int(bits) + (fraction > float(of_levels)), -1000).int()


def _words(key: tuple[int, int, int, int, int], rows: Tensor, columns: int) -> Tensor:
    """Each value's random number of 32 bits, int64 (n, C): four numbers serve sixteen columns, turned by bytes."""
    groups = torch.arange(-(-columns // 16), device=rows.device)
    drawn = keyed_bits(*key, rows[:, None], groups[None])[:, :, None, :]
    turns = torch.arange(0, 32, 8, device=rows.device)[:, None]
    turned = ((drawn << turns) & LOW) | (drawn >> (32 - turns))
    return turned.reshape(len(rows), -1)[:, :columns]
