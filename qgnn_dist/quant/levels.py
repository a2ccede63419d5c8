# SPDX-License-Identifier: Apache-2.0
"""How large values are, as one whole number that does not depend on their order: frozen ranges follow a shifted graph.

The level of a value is its binary logarithm in sixteenths, 16·log2|x| + 2032 rounded down, with the logarithm drawn
straight between powers of two: the upper bits of a float32. Multiplying all values by two moves their level by 16.
"""
from __future__ import annotations

import numpy as np

__all__ = ["NUM_LEVELS", "level_of", "octaves"]

PER_OCTAVE = 16
NUM_LEVELS = 256 * PER_OCTAVE
LEVEL_SHARE = 0.9


def level_of(histogram: np.ndarray) -> int:
    """The level at or below which 90 % of the non-zero values lie; −1 where all are zero.

    Args:
        histogram: int64 (NUM_LEVELS,) of kernels.level_histogram. Zeros, denormals, infinities and NaN are left out.
    """
    counts = histogram.copy()
    counts[:PER_OCTAVE] = counts[-PER_OCTAVE:] = 0
    total = int(counts.sum())
    if total == 0:
        return -1
    return int(np.searchsorted(np.cumsum(counts), LEVEL_SHARE * total))


def octaves(level: int, reference: int) -> int:
    """How many powers of two a level lies above another, to the nearest; 0 where either is unknown (−1).

    A graph that is like the reference stays at 0 wherever its level happens to fall: it takes a factor of √2 to move.

    >>> octaves(2048, 2000), octaves(2007, 2000), octaves(1990, 2000), octaves(-1, 2000)
    (3, 0, -1, 0)
    """
    if level < 0 or reference < 0:
        return 0
    return (2 * (level - reference) + PER_OCTAVE) // (2 * PER_OCTAVE)
