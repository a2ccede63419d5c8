# SPDX-License-Identifier: Apache-2.0
"""Sums and whole rounds at every width and at the degrees where sums move to wider fields, in whole numbers."""
from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from qgnn_dist import kernels
from qgnn_dist.quant.packed import pack_codes, unpack_codes

LEVELS = ["scalar", "reference"] + (["avx2"] if kernels.isa() == "avx2" else [])
DEGREES = (0, 1, 17, 84, 85, 86, 255, 10**5)
UNIT, STEP, NEXT = 2.0, 2.0, 4.0  # powers of two: float32 holds every number below as a whole one
MIDDLE = 3.0  # whole numbers that stand for 0


class Round:
    """One round over a graph, and by whole numbers what it gives: R takes 2·Σcode − (2^b − 1)·degree, out = R + H + H⁰,
    and Ŷ and the next codes follow."""

    def __init__(self, degrees: np.ndarray, indices: np.ndarray, buffer: int, columns: int, bits: int,
                 seed: int) -> None:
        rng = np.random.default_rng(seed)
        n = len(degrees)
        self.degree, self.indices, self.bits, self.columns = degrees.astype(np.int32), indices, bits, columns
        self.known_type = np.uint8 if bits <= 4 else np.uint16
        self.indptr = np.concatenate([[0], np.cumsum(degrees)]).astype(np.int64)
        self.codes = rng.integers(0, 2**bits, (buffer, columns)).astype(np.uint8)
        self.codes[-1] = 2**bits - 1
        self.payload = pack_codes(self.codes, bits)
        self.stride = -(-columns // 8) * 8
        self.r, self.known = (rng.integers(0, 200, (n, self.stride)).astype(np.uint16) for _ in range(2))
        self.residual = rng.integers(-128, 128, (n, self.stride)).astype(np.int8)
        self.h = rng.integers(-9, 9, (n, columns)).astype(np.float32)
        self.full = np.flatnonzero(200 + degrees * (2**bits - 1) >= 2**16).astype(np.int32)

    @property
    def sums(self) -> np.ndarray:
        counts = [np.bincount(self.indices[self.indptr[i]:self.indptr[i + 1]], minlength=len(self.codes))
                  for i in range(len(self.degree))]
        return np.array(counts, np.int64) @ self.codes.astype(np.int64)

    def values(self, whole: np.ndarray, twice_zero: Any) -> np.ndarray:
        """What fixed point stands for: whole numbers of UNIT, less the half of `twice_zero`."""
        return 2 * whole[:, :self.columns].astype(np.int64) - twice_zero

    def before(self) -> tuple[np.ndarray, np.ndarray]:
        """R and Ŷ; Ŷ has the codes of this round, which its neighbours are getting."""
        return (self.values(self.r, 2 * MIDDLE * self.degree[:, None]),
                self.values(self.known, 2 * MIDDLE + 2**self.bits - 1))

    def wanted(self) -> dict[str, np.ndarray]:
        (r, known), residual = self.before(), self.residual[:, :self.columns].astype(np.int64)
        r += 2 * self.sums - (2**self.bits - 1) * self.degree[:, None]
        out = r + self.h.astype(np.int64) + 2 * residual + 1
        half = 2 ** (self.bits - 1)
        level = np.clip((out - known) // 4, -half, half - 1)
        assert np.abs(r).max(initial=0) < 2**24
        return {"r": r, "out": out, "known": known + 4 * level + 2, "codes": level + half}

    def aggregated(self) -> np.ndarray:
        out = np.full((len(self.degree), self.columns), -7, np.int32)
        kernels.aggregate_codes(self.indptr, self.indices, self.payload, self.bits, 0, len(out), out)
        return out

    def run(self, fixed: bool, measured: bool) -> dict[str, np.ndarray]:
        n, columns = len(self.degree), self.columns
        r, known, narrow = *self.before(), (slice(None), slice(columns))
        out, following = np.empty_like(self.h), np.full((n, self.payload.shape[1]), 77, np.uint8)
        head = (self.indptr, self.indices, self.payload, self.bits, STEP, np.ones(n, np.float32))
        tail = (self.h, None, out, True, 0.0, 0.0, 1.0, 1.0)
        last = (NEXT, following, np.empty((n, 3)) if measured else None, None, 0, n)
        if fixed:
            far, sums, news = r[self.full].astype(np.float32), self.r.copy(), self.known.astype(self.known_type)
            kernels.fixed_layer(*head, self.residual, 2.0, UNIT, MIDDLE, sums, self.full, far, *tail, news, *last)
            highest = 2**self.bits - 1
            r = self.values(sums, (2 * MIDDLE + highest) * self.degree[:, None]).astype(np.float32)
            r[self.full] = far
            known = self.values(news, 2 * MIDDLE + 3 * highest)
        else:
            r, known = r.astype(np.float32), known.astype(np.float32)
            kernels.layer(*head, 2 * self.residual[narrow].astype(np.float32) + 1, r, *tail, known, *last)
        return {"r": r, "out": out, "known": known, "codes": unpack_codes(following, self.bits, columns)}


@cache
def _graph() -> tuple[np.ndarray, np.ndarray, int]:
    rng, buffer = np.random.default_rng(0), 40
    indices = rng.integers(0, buffer, sum(DEGREES)).astype(np.int32)
    indices[rng.random(len(indices)) < 0.4] = buffer - 1  # the highest codes, behind which the buffer ends
    return np.array(DEGREES), indices, buffer


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("columns", range(1, 131))
def test_every_width_is_whole_numbers(bits: int, columns: int) -> None:
    this = Round(*_graph(), columns, bits, columns)
    sums, want = this.sums, this.wanted()
    for level in LEVELS if columns in (1, 33, 130) else [level for level in LEVELS if level != "reference"]:
        with kernels.using_isa(level):
            np.testing.assert_array_equal(this.aggregated(), sums, err_msg=level)
            for fixed, measured in ((False, False), (True, False), (True, True)):
                got = this.run(fixed, measured)
                for name, value in want.items():
                    np.testing.assert_array_equal(got[name], value, err_msg=f"{level} {fixed} {measured} {name}")
