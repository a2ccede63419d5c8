# SPDX-License-Identifier: Apache-2.0
"""What every source yields: one graph, its arrays still as large and as sparse as the source had them."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["NO_SPLIT", "SPLITS", "TEST", "TRAIN", "VALID", "Graph", "SparseFeatures", "row_entries"]

NO_SPLIT, TRAIN, VALID, TEST = 0, 1, 2, 3
SPLITS: dict[str, int] = {"train": TRAIN, "valid": VALID, "test": TEST}
"""Name of a split → its number in `Graph.split`."""


def row_entries(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Where the entries of rows lie, int64 (sum of counts,), one row after the other; starts and counts int64 (n,)."""
    ends = np.cumsum(counts)
    return np.repeat(starts - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)


@dataclass(frozen=True)
class SparseFeatures:
    """Feature rows in compressed form (CSR).

    Attributes:
        indptr: int64 (N+1,), starts at 0.
        indices: int32 (nnz,), the column of each stored value.
        values: float32 (nnz,).
        shape: (N, F).
    """

    indptr: np.ndarray
    indices: np.ndarray
    values: np.ndarray
    shape: tuple[int, int]

    def block(self, start: int, stop: int) -> SparseFeatures:
        """Rows start..stop; values and indices are views."""
        lo, hi = int(self.indptr[start]), int(self.indptr[stop])
        return SparseFeatures(
            np.asarray(self.indptr[start : stop + 1] - lo, np.int64),
            self.indices[lo:hi],
            self.values[lo:hi],
            (stop - start, self.shape[1]),
        )

    def rows(self, index: np.ndarray) -> SparseFeatures:
        """The given rows (int64, any order), copied."""
        starts = np.asarray(self.indptr[index], np.int64)
        counts = np.asarray(self.indptr[index + 1], np.int64) - starts
        indptr = np.zeros(len(index) + 1, np.int64)
        np.cumsum(counts, out=indptr[1:])
        take = row_entries(starts, counts)
        return SparseFeatures(indptr, self.indices[take], self.values[take], (len(index), self.shape[1]))


@dataclass
class Graph:
    """A graph as a source gives it, before cleaning and partitioning.

    Attributes:
        name: shown to people, stored in the manifest.
        num_nodes: N.
        edges: each call starts a fresh pass that yields int64 (2, k) chunks; one or both directions, self loops and
            duplicates allowed, every index already checked to lie in [0, N).
        features: float16/float32 (N, F) array (a memory map is fine), SparseFeatures, or None.
        labels: int32 (N,), −1 where unlabelled, or None.
        num_classes: C, 0 without labels.
        split: int8 (N,) of NO_SPLIT, TRAIN, VALID, TEST, or None.
        node_ids: the source's own ids as an Arrow array, or None for 0..N−1.
        class_names: C names, or None.
        edge_rows: how many edges a pass yields, or None where only a pass tells.
    """

    name: str
    num_nodes: int
    edges: Callable[[], Iterator[np.ndarray]]
    features: np.ndarray | SparseFeatures | None = None
    labels: np.ndarray | None = None
    num_classes: int = 0
    split: np.ndarray | None = None
    node_ids: pa.Array | None = None
    class_names: list[str] | None = None
    edge_rows: int | None = None

    @property
    def num_features(self) -> int:
        """F, 0 without features."""
        return 0 if self.features is None else int(self.features.shape[1])
