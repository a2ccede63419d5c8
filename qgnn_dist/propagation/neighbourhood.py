# SPDX-License-Identifier: Apache-2.0
"""A part's rows of the adjacency, as the kernels want them."""
from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from .. import kernels
from .incidence import Incidence

if TYPE_CHECKING:
    from ..store.reader import Part

__all__ = ["Neighbourhood"]

BLOCK_ROWS = 1 << 16
"""Rows looked at at once: what that takes is not worth counting."""


@dataclass(frozen=True)
class Neighbourhood:
    """The graph as one worker sees it. n local rows, of which the first `num_boundary` have remote neighbours.

    Attributes:
        indptr: int64 (n+1,). indices: int32 (nnz,), below n a local row, from n on a halo slot.
        inv_sqrt_degree: float32 (n,), d^-½ with d counting the node itself.
        num_boundary, num_halo: rows with remote neighbours; remote rows that are read.
    """

    indptr: np.ndarray
    indices: np.ndarray
    inv_sqrt_degree: np.ndarray
    num_boundary: int
    num_halo: int

    @classmethod
    def of(cls, part: Part) -> Neighbourhood:
        """From a part of the store; raises ValueError where the row pointer or an index is out of range."""
        return cls._of(part.indptr, part.indices, part.num_boundary, part.num_halo)

    @classmethod
    def whole(cls, indptr: np.ndarray, indices: np.ndarray) -> Neighbourhood:
        """Of a graph in one part: rows of both directions of every edge, without the nodes themselves."""
        return cls._of(indptr, indices, 0, 0)

    @classmethod
    def _of(cls, indptr: np.ndarray, indices: np.ndarray, num_boundary: int, num_halo: int) -> Neighbourhood:
        num_local = len(indptr) - 1
        kernels.check_csr(indptr, indices, num_local + num_halo)
        inv_sqrt = np.empty(num_local, np.float32)
        for begin in range(0, num_local, BLOCK_ROWS):
            rows = indptr[begin:begin + BLOCK_ROWS + 1]
            # Square root and division in double, rounded once: the same on every host, whatever its vector units do.
            inv_sqrt[begin:begin + BLOCK_ROWS] = 1.0 / np.sqrt(np.diff(rows) + 1.0)
        return cls(indptr, indices, inv_sqrt, num_boundary, num_halo)

    @cached_property
    def degree(self) -> np.ndarray:
        """int32 (n,), neighbours without the node itself."""
        return np.diff(self.indptr).astype(np.int32)

    def rows_above(self, most: int) -> np.ndarray:
        """Rows of more than `most` neighbours, int32, ascending."""
        found = [begin + np.flatnonzero(np.diff(self.indptr[begin:begin + BLOCK_ROWS + 1]) > most)
                 for begin in range(0, self.num_local, BLOCK_ROWS)]
        return np.concatenate([np.zeros(0, np.int64), *found]).astype(np.int32)

    @property
    def num_local(self) -> int:
        """n, the rows that this worker owns."""
        return len(self.indptr) - 1

    @cached_property
    def incidence(self) -> Incidence:
        """Δ̃ of a graph that is whole here; made when first asked for, and kept."""

        return Incidence.of(self)
