# SPDX-License-Identifier: Apache-2.0
"""Coded gradients: what each kernel computes, as NumPy; csrc/gradients_body.h has the compiled twins.

A row of y = D̃^-½·g travels as packed codes of b = 2, 4 or 8 bits and, behind them, one scale byte. Code c stands for
s·(c − z) with z = 2^(b−1) − 1: levels −z … z + 1, zero among them, times s = ±2^e, whose sign is that of the row's
largest value. Byte: bits 0-6 hold e + 90 (0: a row of zeros; 127: every value is NaN), bit 7 the sign of s. e is the
least exponent at which no value is clipped, so that rounding up or down at random is unbiased. At 2 bits, scale 0.5:

>>> h, ones, rows = np.array([[-0.75, 0.5, 0.0, 0.25, 0.1]], np.float32), np.ones(1, np.float32), np.zeros(1, np.int64)
>>> payload, y = np.zeros((1, 3), np.uint8), np.zeros((1, 5), np.float32)
>>> code_gradients(h, ones, 2, 0, 0, 0, 0, 0, rows, 0, 1, payload)
>>> int(payload[0, 2]), 128 + 90 - 1
(217, 217)
>>> aggregate_scaled(np.array([0, 1]), np.zeros(1, np.int32), payload, 2, 0, 1, y)
>>> y.tolist()
[[-1.0, 0.5, 0.0, 0.0, 0.5]]

Legend: N rows, M rows of a buffer (local, then halo), C columns, G packed bytes and the scale byte.
"""
from __future__ import annotations

import numpy as np

from ..quant.packed import pack_codes, unpack_codes
from .dispatch import kernel
from .ops import aggregate_float, layer_float
from .random import philox

__all__ = ["aggregate_scaled", "code_gradients", "layer_scaled"]
F4 = np.float32
EXPONENT_BIAS, LEAST_EXPONENT, MOST_EXPONENT = 90, -89, 36
ODD_ROW, NEGATED = 127, 128


@kernel(h="f4 N C", inv_sqrt_degree="f4 N", rows="i8 N", payload="=u1 N+ G")
def code_gradients(h: np.ndarray, inv_sqrt_degree: np.ndarray, bits: int, seed: int, epoch: int, stage: int, layer: int,
                   round: int, rows: np.ndarray, begin: int, end: int, payload: np.ndarray) -> None:
    """Code rows begin ≤ i < end of y = D̃^-½·h, each value to one of the two levels around it.

    With x = |y|/2^e and u of 31 bits, |level| = ⌊x⌋ + (u < ⌊(x − ⌊x⌋)·2^31⌋). For column c, u are the upper bits of
    number 4·⌊c/16⌋ + c mod 4 of the row (`keyed_bits`), turned left by ⌊c/4⌋ mod 4 bytes. A row with a value that is
    not finite, or that would need e > 36, stands for NaN in every column, so that what diverges shows.

    Args: rows: where each row's random numbers stand. Raises: ValueError: more than LAYER_COLUMNS columns.
    """
    span, columns = slice(begin, end), h.shape[1]
    zero = 2 ** (bits - 1) - 1
    with np.errstate(invalid="ignore", over="ignore"):
        y = inv_sqrt_degree[span, None] * h[span]
    above, below = y.max(1, initial=0), (-y).max(1, initial=0)
    finite = np.isfinite(above) & np.isfinite(below)
    above, below = np.where(finite, above, F4(0)), np.where(finite, below, F4(0))
    negated, largest = below > above, np.maximum(above, below)
    exponent = np.maximum(_least_exponent(largest, zero + 1), _least_exponent(np.minimum(above, below), zero))
    exponent = np.maximum(exponent, LEAST_EXPONENT)
    odd, empty = ~finite | (exponent > MOST_EXPONENT), largest == 0
    plain = ~(odd | empty & finite)
    size = np.ldexp(np.abs(np.where(plain[:, None], y, F4(0))), -np.where(plain, exponent, 0)[:, None])
    whole = np.floor(size)
    column = np.arange(columns)
    words = philox(seed, epoch, stage, layer, round, rows[span, None], (column // 16 * 4 + column % 4)[None])
    turn = (column // 4 % 4 * 8).astype(np.uint32)
    words = words << turn | words >> np.uint32(1) >> (np.uint32(31) - turn)
    up = (words >> np.uint32(1)) < ((size - whole) * F4(2**31)).astype(np.uint32)
    level = whole.astype(np.int64) + up
    codes = np.where((y < 0) ^ negated[:, None], -level, level) + zero
    payload[span, :-1] = pack_codes(np.where(plain[:, None], codes, 0).astype(np.uint8), bits)
    byte = exponent + EXPONENT_BIAS + np.where(negated, NEGATED, 0)
    payload[span, -1] = np.where(plain, byte, np.where(odd, ODD_ROW, 0))


@kernel(indptr="i8 N+1", indices="i4 E", payload="u1 M G", out="=f4 N C")
def aggregate_scaled(indptr: np.ndarray, indices: np.ndarray, payload: np.ndarray, bits: int, begin: int, end: int,
                     out: np.ndarray) -> None:
    """out[i] = sum of what the coded rows of i's neighbours stand for, for rows begin ≤ i < end.

    float32, added in the order of the row; each term is exact. Raises: ValueError: more than LAYER_COLUMNS columns.
    """
    aggregate_float(indptr, indices, _values(payload, bits, out.shape[1]), begin, end, out)


@kernel(indptr="i8 N+1", indices="i4 E", payload="u1 M G", inv_sqrt_degree="f4 N", h0="f4 N C", h="f4 N C",
        before="?f4 N C", out="=f4 N C", p="=?f4 N C", next_payload="=?u1 N+ G", rows="i8 N")
def layer_scaled(indptr: np.ndarray, indices: np.ndarray, payload: np.ndarray, bits: int, inv_sqrt_degree: np.ndarray,
                 h0: np.ndarray, h: np.ndarray, before: np.ndarray | None, out: np.ndarray, p: np.ndarray | None,
                 first: bool, second: bool, coefficient: float, a: float, b: float, c: float,
                 next_payload: np.ndarray | None, seed: int, epoch: int, stage: int, layer: int, round: int,
                 rows: np.ndarray, begin: int, end: int) -> None:
    """A round of coded gradients and its layer, in one pass over rows begin ≤ i < end: `layer_float` with the sums of
    `aggregate_scaled` in place of those of float rows, then `code_gradients` of `out` for the next round, to the last
    bit. Key and `rows` are those of the next round.

    Args:
        payload: uint8 (M, G), coded rows of all. next_payload: other memory; None: nothing is to be sent.
    Raises: ValueError: a multiplier without `p`, `second` without `before`, more than LAYER_COLUMNS columns.
    """
    if ((second or coefficient != 0) and p is None) or (second and before is None):
        raise ValueError("layer_scaled: a multiplier needs p, and its second round needs before")
    layer_float(indptr, indices, _values(payload, bits, h.shape[1]), inv_sqrt_degree, h0, h, before, out, p, first,
                second, coefficient, a, b, c, None, None, begin, end)
    if next_payload is not None:
        code_gradients(out, inv_sqrt_degree, bits, seed, epoch, stage, layer, round, rows, begin, end, next_payload)


def _least_exponent(x: np.ndarray, levels: int) -> np.ndarray:
    """The least e with x ≤ levels·2^e, int; far below every other where x is 0."""
    fraction, exponent = np.frexp(x)
    of_levels, bits = np.frexp(F4(levels))
    return np.where(x > 0, exponent - bits + (fraction > of_levels), -1000)


def _values(payload: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """What coded rows stand for, float32 (M, columns)."""
    byte = payload[:, -1].astype(np.int32)
    low = byte & 127
    scale = np.where(byte >= NEGATED, F4(-1), F4(1)) * np.ldexp(F4(1), low - EXPONENT_BIAS)
    scale = np.where(low == 0, F4(0), np.where(low == ODD_ROW, F4(np.nan), scale))
    codes = unpack_codes(np.ascontiguousarray(payload[:, :-1]), bits, columns).astype(np.int32)
    values: np.ndarray = scale[:, None] * (codes - (2 ** (bits - 1) - 1)).astype(F4)
    return values
