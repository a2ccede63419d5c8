# SPDX-License-Identifier: Apache-2.0
"""Dense features at rest: codes of 2, 4 or 8 bits on a uniform grid of each column's own, in the order of packed.py.

Columns of one table differ in what they measure and in scale, rows seldom do: on principal components, errors of grids
by row are two to five times those by column, and a row's two figures would take more bytes than ten features of 2 bits.
Legend: N rows, F features, B packed bytes a row.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .packed import pack_codes, row_bytes, unpack_codes

__all__ = ["FEATURE_BITS", "ColumnGrids"]

FEATURE_BITS = (8, 4, 2)
SHARES = np.geomspace(1, 1 / 64, 32)
"""Of the way from the mean to the least or greatest value, where a grid may end; the whole way first, so that it wins
where all do as well."""
SEARCHES = 2
VALUE_ROWS = 4096
"""Rows that are made of codes at a time, in double."""


@dataclass(frozen=True)
class ColumnGrids:
    """A grid of 2^bits values for each column: value = low + (high − low)·code/(2^bits − 1), in double, rounded once.

    Columns that are constant, or 0 and 1, are exact. Attributes: low, high: float32 (F,).
    """

    bits: int
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def fit(cls, sample: np.ndarray, least: np.ndarray, greatest: np.ndarray, mean: np.ndarray,
            bits: int) -> ColumnGrids:
        """Grids of least squared error on a sample: a few outliers must not stretch what the others share.

        Args:
            sample: float32 (n, F). least, greatest, mean: float64 (F,), of all rows.
        """
        low, high = least.copy(), greatest.copy()
        if len(sample):
            for _ in range(SEARCHES):
                high = _best(sample, bits, [(low, mean + share * (greatest - mean)) for share in SHARES])[1]
                low = _best(sample, bits, [(mean - share * (mean - least), high) for share in SHARES])[0]
        return cls(bits, low.astype(np.float32), high.astype(np.float32))

    def pack(self, x: np.ndarray) -> np.ndarray:
        """Payload uint8 (N, B) of finite values (N, F); what lies outside a grid gets its end."""
        payload = np.empty((len(x), row_bytes(len(self.low), self.bits)), np.uint8)
        for begin in range(0, len(x), VALUE_ROWS):
            some = slice(begin, begin + VALUE_ROWS)
            payload[some] = pack_codes(_codes(x[some], self.low, self.high, self.bits).astype(np.uint8), self.bits)
        return payload

    def unpack(self, payload: np.ndarray) -> np.ndarray:
        """Values float32 (N, F) of a payload uint8 (N, B)."""
        low, span = self.low.astype(np.float64), self.high.astype(np.float64) - self.low
        out = np.empty((len(payload), len(low)), np.float32)
        for begin in range(0, len(payload), VALUE_ROWS):
            some = slice(begin, begin + VALUE_ROWS)
            codes = unpack_codes(payload[some], self.bits, len(low)).astype(np.float64)
            codes *= span
            codes /= 2**self.bits - 1
            codes += low
            out[some] = codes
        return out


def _codes(x: np.ndarray, low: np.ndarray, high: np.ndarray, bits: int) -> np.ndarray:
    """Whole numbers in float32 (N, F), half to even."""
    span = np.asarray(high, np.float64) - low
    scale = np.divide(2**bits - 1, span, out=np.zeros_like(span), where=span > 0)
    codes = (x.astype(np.float64) - low) * scale
    rounded: np.ndarray = np.clip(np.rint(codes, out=codes), 0, 2**bits - 1, out=codes)
    return rounded


def _best(sample: np.ndarray, bits: int, candidates: list[tuple[np.ndarray, np.ndarray]]
          ) -> tuple[np.ndarray, np.ndarray]:
    """Of several grids (low, high) the one of least squared error, for each column apart; the first where equal."""
    errors = np.empty((len(candidates), sample.shape[1]))
    for i, (low, high) in enumerate(candidates):
        values = low + (high - low) / (2**bits - 1) * _codes(sample, low, high, bits)
        errors[i] = np.square(values - sample).sum(0)
    chosen, columns = errors.argmin(0), np.arange(sample.shape[1])
    lows, highs = (np.stack([pair[end] for pair in candidates]) for end in (0, 1))
    return lows[chosen, columns], highs[chosen, columns]
