# SPDX-License-Identifier: Apache-2.0
"""What a grid does to the values that are coded on it: clipped shares, histograms of codes, signal over noise.

Legend: n values, b bits, S step. Every grid of a packed model is uniform: code q in 0 … 2^b − 1 means lowest + q·S.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import ModelError
from ..model.packed import ModelInfo
from ..quant.clipped import Grid
from ..quant.grids import AFFINE_METHODS

__all__ = ["Tally", "check_grids", "finite"]

KNOWN_METHODS = ("recipe", "lsq", "minmax", *AFFINE_METHODS)
"""Methods whose grids follow from a model's steps, symmetric about zero or unsigned, or stand in it as affine ones."""


def finite(x: float) -> float | None:
    """A figure for JSON, which has no infinity and no NaN: None for those."""
    return float(x) if math.isfinite(x) else None


def check_grids(info: ModelInfo, file: str) -> None:
    """Refuse a model whose grids nobody here knows.

    Raises: ModelError, naming the method.
    """
    if info.method not in KNOWN_METHODS and any(bits < 32 for bits in info.bits.values()):
        raise ModelError(f"quant.method={info.method}: the diagnosis knows the grids of {', '.join(KNOWN_METHODS)} "
                         "only", file=file)


@dataclass
class Tally:
    """Sums over the values of one stage; those of blocks and of parts add up.

    Attributes:
        bits: 32 where the stage is float. count: values. squares: Σx². errors: Σ(x − x̂)². clipped: values outside.
        codes: int64 (2^b,), how often each code occurs; empty at 32 bits.
        steps: [smallest, largest, sum, count] of the steps, where rows have their own.
    """

    bits: int
    count: int = 0
    squares: float = 0.0
    errors: float = 0.0
    clipped: int = 0
    codes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    steps: list[float] = field(default_factory=lambda: [math.inf, 0.0, 0.0, 0.0])

    def __post_init__(self) -> None:
        if self.bits < 32 and len(self.codes) == 0:
            self.codes = np.zeros(2**self.bits, np.int64)

    def add(self, x: np.ndarray, codes: np.ndarray | None = None, grid: Grid | None = None,
            scale: np.ndarray | float = 1.0) -> None:
        """Count values that were coded; in float64.

        Args:
            x: float, any shape: what went into the coder. codes: of x's shape, 0 … 2^b − 1; None at 32 bits.
            grid: what the codes mean, in units of `scale`, which is a number or fits x's shape.
        """
        exact = x.astype(np.float64)
        self.count += x.size
        self.squares += float((exact * exact).sum())
        if codes is None or grid is None:
            return
        self.errors += float(((exact - grid.values(codes) * scale) ** 2).sum())
        self.clipped += int(grid.outside(exact / scale).sum())
        self.codes += np.bincount(codes.ravel(), minlength=len(self.codes))

    def add_steps(self, steps: np.ndarray) -> None:
        """Count the steps of rows (float, (n,))."""
        if len(steps):
            self.steps = [min(self.steps[0], float(steps.min())), max(self.steps[1], float(steps.max())),
                          self.steps[2] + float(steps.sum(dtype=np.float64)), self.steps[3] + len(steps)]

    def merge(self, other: Tally) -> None:
        """Add another block's or part's sums."""
        self.count += other.count
        self.squares += other.squares
        self.errors += other.errors
        self.clipped += other.clipped
        self.codes = self.codes + other.codes
        a, b = self.steps, other.steps
        self.steps = [min(a[0], b[0]), max(a[1], b[1]), a[2] + b[2], a[3] + b[3]]

    def report(self, kind: str | None, step: float | None) -> dict[str, Any]:
        """The figures, ready for JSON; None where there is nothing to say.

        Args:
            kind, step: of the grid; None at 32 bits, and a step of None where rows have their own.
        Returns:
            `bits`, `grid`, `step` (the rows' mean where they have their own, then also `step_range`), `count`, `rms`
            (of what is coded), `clipped` (share), `snr_db` = 10·log10(Σx²/Σ(x − x̂)²), `error_rms`, `histogram` (counts
            by code). Without any error `snr_db` is None and `error_rms` 0.
        """
        result: dict[str, Any] = {"bits": self.bits, "grid": kind, "step": step, "count": self.count,
                                  "rms": self._mean_root(self.squares), "clipped": None, "snr_db": None,
                                  "error_rms": None, "histogram": None}
        if self.bits == 32:
            return result
        if self.steps[3]:
            result |= {"step": self.steps[2] / self.steps[3], "step_range": self.steps[:2]}
        if self.count:
            result |= {"clipped": self.clipped / self.count, "error_rms": self._mean_root(self.errors)}
        if 0 < self.squares < math.inf and 0 < self.errors < math.inf:
            result["snr_db"] = finite(10.0 * math.log10(self.squares / self.errors))
        return result | {"histogram": self.codes.tolist()}

    def _mean_root(self, total: float) -> float | None:
        return finite(math.sqrt(total / self.count)) if self.count and total >= 0 else None
