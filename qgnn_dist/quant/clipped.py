# SPDX-License-Identifier: Apache-2.0
"""What a uniform grid means, and how many values lie outside it: counted on a sample of rows beside an evaluation.

The kernels do not count. What they wrote is looked at again in NumPy, of some SAMPLE_ROWS rows of the whole graph, and
nothing is changed. Every grid of a packed model is uniform: code q in 0 … 2^b − 1 means lowest + q·S.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from .grids import AffineGrid

__all__ = ["Clipped", "Grid", "shares"]

SAMPLE_ROWS = 512


@dataclass(frozen=True)
class Grid:
    """A uniform grid of 2^bits levels.

    Attributes:
        kind: `mid-rise`, `mid-tread`, `unsigned` or `affine`. step: S, positive. lowest: what code 0 means.
        coder: of an affine grid, whose cells need not lie around their values (bt cuts bits off).

    >>> Grid.midrise(2, 0.5).values(np.arange(4)).tolist()
    [-0.75, -0.25, 0.25, 0.75]
    >>> Grid.midrise(2, 0.5).outside(np.array([-1.0, -1.01, 0.99, 1.0])).tolist()
    [False, True, False, True]
    """

    kind: str
    bits: int
    step: float
    lowest: float
    coder: AffineGrid | None = None

    @classmethod
    def affine(cls, bits: int, coder: AffineGrid) -> Grid:
        """Levels low + q·S."""
        return cls("affine", bits, coder.step, coder.low, coder)

    @classmethod
    def midrise(cls, bits: int, step: float) -> Grid:
        """Levels (q − 2^(b−1) + ½)·S: messages and the residual."""
        return cls("mid-rise", bits, step, (0.5 - 2 ** (bits - 1)) * step)

    @classmethod
    def midtread(cls, bits: int, step: float) -> Grid:
        """Levels (q − 2^(b−1))·S: weights and signed features."""
        return cls("mid-tread", bits, step, -(2 ** (bits - 1)) * step)

    @classmethod
    def unsigned(cls, bits: int, step: float) -> Grid:
        """Levels q·S: hidden activations and features that are not negative."""
        return cls("unsigned", bits, step, 0.0)

    def values(self, codes: np.ndarray) -> np.ndarray:
        """What codes 0 … 2^b − 1 mean, float64."""
        return self.lowest + codes.astype(np.float64) * self.step

    def outside(self, x: np.ndarray) -> np.ndarray:
        """Whether a value lies outside the end codes' cells, half a step to either side of a level.

        A mid-rise cell holds its lower edge and not its upper one, as the coder's floor has it; on the other grids a
        value on either outer edge still lies inside. Affine: where (x − low)·scale + bias is not in [0, 2^b). NaN lies
        outside.
        """
        if self.coder is not None:
            level = (x - self.coder.low) * self.coder.scale + self.coder.bias
            inside: np.ndarray = (level >= 0) & (level < 2**self.bits)
            return ~inside
        low = self.lowest - 0.5 * self.step
        high = self.lowest + (2**self.bits - 0.5) * self.step
        below_high = x < high if self.kind == "mid-rise" else x <= high
        inside = (x >= low) & below_high
        return ~inside


class Clipped:
    """Counts of one part.

    Args: source_index: int (n,), the local rows' places in the source. num_nodes: of the graph.
    Attributes: rows: int64 (m,), the sampled local rows, ascending; which ones does not depend on the cut.
        counts: stage → [values outside the grid, values].
    """

    def __init__(self, source_index: np.ndarray, num_nodes: int) -> None:
        every = max(1, num_nodes // SAMPLE_ROWS)
        self.rows = np.flatnonzero(np.asarray(source_index) % every == 0)
        self.counts: dict[str, list[int]] = {}

    def add(self, stage: str, x: np.ndarray, grid: Grid) -> None:
        """Count values, float of any shape, as they were before the grid."""
        outside, count = self.counts.get(stage, (0, 0))
        self.counts[stage] = [outside + int(np.count_nonzero(grid.outside(x.astype(np.float64)))), count + x.size]


def shares(counts: Iterable[Mapping[str, list[int]]]) -> dict[str, float]:
    """Stage → share of the values that lay outside, from the counts of all parts; stages without values are left out.

    >>> shares([{"hidden": [1, 4], "messages": [0, 0]}, {"hidden": [0, 4]}])
    {'hidden': 0.125}
    """
    totals: dict[str, list[int]] = {}
    for part in counts:
        for stage, (outside, count) in part.items():
            before = totals.setdefault(stage, [0, 0])
            totals[stage] = [before[0] + outside, before[1] + count]
    return {stage: outside / count for stage, (outside, count) in totals.items() if count}
