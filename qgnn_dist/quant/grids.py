# SPDX-License-Identifier: Apache-2.0
"""Affine grids: what the paper's quantisers (qlr, bt, bt_star, percentile, degree_quant) code on.

A grid of 2^b codes: value = low + code·step, code = clip(⌊(x − low)·scale + bias⌋, 0, 2^b − 1), in float32 with one
rounding an operation. Rounding to nearest and bit truncation are both of this form, and sums of values over neighbours
stay sums of whole numbers: Σ value = low·count + step·Σ code.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["AFFINE_METHODS", "LEARNED_METHODS", "PERCENTILE_METHODS", "AffineGrid", "affine_grid", "as_lists",
           "from_list", "stage_names"]

LEARNED_METHODS = ("qlr", "bt", "bt_star")
PERCENTILE_METHODS = ("percentile", "degree_quant")
AFFINE_METHODS = LEARNED_METHODS + PERCENTILE_METHODS
LEAST_SPAN = 2.0**-80
"""A stage that has been one constant still has a grid, and its scale is still a number that a model file may hold."""


@dataclass(frozen=True)
class AffineGrid:
    """One stage's grid; every field is exact in float32.

    Attributes:
        low: what code 0 means. step: between neighbouring codes, positive. scale: codes a unit of x. bias: added before
            the floor, in codes: ½ rounds to nearest.
    """

    low: float
    step: float
    scale: float
    bias: float

    def shifted(self, gain: int) -> AffineGrid:
        """The grid of values 2^gain times as large: the same codes, exactly."""
        def times(x: float, power: int) -> float:
            return float(np.ldexp(np.float32(x), power))

        return AffineGrid(times(self.low, gain), times(self.step, gain), times(self.scale, -gain), self.bias)

    def codes(self, x: np.ndarray, bits: int) -> np.ndarray:
        """Codes uint8 of x, float32 of any shape; kernels.affine_codes gives the same bits."""
        level = (x - np.float32(self.low)) * np.float32(self.scale) + np.float32(self.bias)
        codes: np.ndarray = np.floor(np.fmin(np.fmax(level, np.float32(0)), np.float32(2**bits - 1))).astype(np.uint8)
        return codes

    def values(self, codes: np.ndarray) -> np.ndarray:
        """What codes uint8 mean, float32 of their shape."""
        values: np.ndarray = np.float32(self.low) + codes.astype(np.float32) * np.float32(self.step)
        return values

    def sides(self, x: np.ndarray, bits: int) -> np.ndarray:
        """int8 of x's shape: −1 below the range [low, low + (2^b − 1)·step], 1 above it, 0 inside."""
        high = np.float32(self.low + (2**bits - 1) * self.step)
        sides: np.ndarray = (x > high).astype(np.int8) - (x < np.float32(self.low)).astype(np.int8)
        return sides


def affine_grid(low: float, high: float, bits: int, method: str, skewness: float = 0.0) -> AffineGrid:
    """The grid of a method over the range [low, high], the end codes at its ends.

    `bt` keeps the top b bits of the 8-bit code q8 = round((x − low)·255/(high − low)): ⌊q8/2^(8−b)⌋ is one floor,
    since ⌊⌊y⌋/n⌋ = ⌊y/n⌋. `bt_star` adds round(skewness), half to even, to q8 first; only the code is clipped, not q8
    before it, which differs for values outside the range alone. All others round to nearest.

    >>> affine_grid(-1.0, 2.0, 2, "qlr")
    AffineGrid(low=-1.0, step=1.0, scale=1.0, bias=0.5)
    >>> affine_grid(0.0, 255.0, 2, "bt"), affine_grid(0.0, 255.0, 2, "bt_star", 2.0).bias
    (AffineGrid(low=0.0, step=85.0, scale=0.015625, bias=0.0078125), 0.0390625)
    """
    span, top = max(high - low, LEAST_SPAN), 2**bits - 1
    scale, bias = top / span, 0.5
    if method in ("bt", "bt_star"):
        cell = 2 ** (8 - bits)
        offset = float(round(skewness)) if method == "bt_star" else 0.0
        scale, bias = 255 / (span * cell), (0.5 + offset) / cell
    return AffineGrid(*(float(np.float32(v)) for v in (low, span / top, scale, bias)))


def stage_names(bits: dict[str, int], rounds: int) -> list[str]:
    """Names of the stages that have an affine grid at these widths; `news/k` is round k's messages."""
    named = {"weights": ["weights1", "weights2"], "hidden": ["hidden"], "residual": ["residual"],
             "messages": [f"news/{k}" for k in range(rounds)]}
    return [name for stage, names in named.items() if bits[stage] < 32 for name in names]


def as_lists(grids: dict[str, AffineGrid]) -> dict[str, list[float]]:
    """As a packed model keeps them: stage → [low, step, scale, bias]."""
    return {name: [g.low, g.step, g.scale, g.bias] for name, g in grids.items()}


def from_list(values: Sequence[float]) -> AffineGrid:
    """The other way round."""
    return AffineGrid(*(float(v) for v in values))
