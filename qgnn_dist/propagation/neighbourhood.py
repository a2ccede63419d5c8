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


@dataclass(frozen=True)
class Neighbourhood:
    """The graph as one worker sees it. n local rows, of which the first `num_boundary` have remote neighbours.

    Attributes:
        indptr: int64 (n+1,). indices: int32 (nnz,), below n a local row, from n on a halo slot.
        degree: int32 (n,), neighbours without the node itself.
        inv_sqrt_degree: float32 (n,), d^-½ with d counting the node itself.
        num_boundary, num_halo: rows with remote neighbours; remote rows that are read.
    """

    indptr: np.ndarray
    indices: np.ndarray
    degree: np.ndarray
    inv_sqrt_degree: np.ndarray
    num_boundary: int
    num_halo: int

    @classmethod
    def of(cls, part: Part) -> Neighbourhood:
        """From a part of the store; raises ValueError where the row pointer or an index is out of range."""
        kernels.check_csr(part.indptr, part.indices, part.num_local + part.num_halo)
        degree = np.ascontiguousarray(part.degree, np.int32)
        # Square root and division in double, rounded once: the same on every host, whatever its vector units do.
        inv_sqrt = (1.0 / np.sqrt(degree.astype(np.float64) + 1.0)).astype(np.float32)
        return cls(part.indptr, part.indices, degree, inv_sqrt, part.num_boundary, part.num_halo)

    @property
    def num_local(self) -> int:
        """n, the rows that this worker owns."""
        return len(self.indptr) - 1

    @cached_property
    def incidence(self) -> Incidence:
        """Δ̃ of a graph that is whole here; made when first asked for, and kept."""

        return Incidence.of(self)
