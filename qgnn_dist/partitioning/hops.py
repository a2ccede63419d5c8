# SPDX-License-Identifier: Apache-2.0
"""Features of neighbours, mixed into a node's own once, when a store is made (`--hops`).

A store of H hops holds [X, c₁·M·X, …, c_H·M^H·X], where M = D̃⁻¹(A + I) is the mean over a node and its neighbours and
c_h makes a hop as large as X in the mean square, so that one scale a row serves all. The columns of SIGN (Rossi et al.,
"SIGN: Scalable Inception Graph Neural Networks", 2020); here a perceptron codes them with few bits and propagates.

Legend: N nodes, F features, H hops.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from .. import kernels
from ..data.graph import Graph, SparseFeatures
from ..errors import InputError
from .clean import CleanGraph
from .features import BLOCK_ROWS, refuse_not_finite
from .scratch import write_values

__all__ = ["MOST_HOPS", "MixedFeatures", "check_hops", "hop_bytes"]

MOST_HOPS = 8


def check_hops(graph: Graph, hops: int) -> None:
    """Refuse, before anything is read, numbers of no use and features that cannot be mixed."""
    if not 0 <= hops <= MOST_HOPS:
        raise InputError(f"--hops {hops}: expected 0 to {MOST_HOPS}")
    if hops and (graph.features is None or isinstance(graph.features, SparseFeatures)):
        what = "no" if graph.features is None else "sparse"
        raise InputError(f"--hops {hops}: {graph.name} has {what} features, and only dense ones are mixed; leave it "
                         "out")


def hop_bytes(graph: Graph, hops: int) -> int:
    """Bytes of disk that mixing takes, and that features take more in the store and in what its builders read."""
    one = 4 * graph.num_nodes * graph.num_features
    return one * (hops + 1) + 2 * one * hops if hops else 0


class MixedFeatures:
    """Stands for the array of a graph's features while its parts are written: hops are joined when they are read.

    Memory: a block of rows. Disk: N·F float32 a hop in `scratch`, and once more where X is not float32 in one piece.

    Attributes:
        scales: c₁ … c_H. dtype, shape: float32 and (N, F·(H+1)), as of the array that it stands for.
    Args:
        scales: of an earlier state of the graph, instead of this one's.
    Raises:
        InputError: NaN or infinity.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, graph: Graph, cleaned: CleanGraph, hops: int, scratch: Path,
                 scales: Sequence[float] | None = None) -> None:
        assert graph.features is not None
        assert not isinstance(graph.features, SparseFeatures)
        kernels.check_csr(cleaned.indptr, cleaned.indices, graph.num_nodes)
        first, size = _as_float32(graph, scratch)
        self._hops, found = [first], []
        for hop in range(1, hops + 1):
            mixed, square = _mean(cleaned, self._hops[-1], scratch / f"hop-{hop}.npy")
            self._hops.append(mixed)
            found.append(float(np.float32(np.sqrt(size / square))) if square else 1.0)
        self.scales = list(found if scales is None else scales)
        self.shape = (graph.num_nodes, graph.num_features * (hops + 1))

    def __getitem__(self, rows: slice) -> np.ndarray:
        own = np.asarray(self._hops[0][rows])
        rest = (np.asarray(hop[rows]) * np.float32(scale) for hop, scale in zip(self._hops[1:], self.scales))
        return np.concatenate([own, *rest], axis=1)


def _as_float32(graph: Graph, scratch: Path) -> tuple[np.ndarray, float]:
    """X as one float32 array, and the sum of its squares."""
    x, total = graph.features, 0.0
    assert isinstance(x, np.ndarray)

    def blocks() -> Iterator[np.ndarray]:
        nonlocal total
        for start in range(0, len(x), BLOCK_ROWS):
            block = np.asarray(x[start:start + BLOCK_ROWS], np.float32)
            refuse_not_finite(graph.name, block, start)
            total += _squares(block)
            yield block

    if x.dtype == np.float32 and x.flags.c_contiguous:
        for _ in blocks():
            pass
        return x, total
    return _written(scratch / "hop-0.npy", x.shape, blocks()), total


def _mean(cleaned: CleanGraph, x: np.ndarray, file: Path) -> tuple[np.ndarray, float]:
    """The mean over each node and its neighbours, a file of (N, F), and the sum of its squares.

    Neighbours are added in the order of the row, by source index, the node itself last: the same whatever the parts.
    """
    total = 0.0

    def blocks() -> Iterator[np.ndarray]:
        nonlocal total
        for begin in range(0, len(x), BLOCK_ROWS):
            bounds = np.ascontiguousarray(cleaned.indptr[begin:begin + BLOCK_ROWS + 1])
            block = np.empty((len(bounds) - 1, x.shape[1]), np.float32)
            kernels.aggregate_float(bounds, cleaned.indices, x, 0, len(block), block)
            block += x[begin:begin + len(block)]
            block /= (np.diff(bounds) + 1).astype(np.float32)[:, None]
            total += _squares(block)
            yield block

    return _written(file, x.shape, blocks()), total


def _squares(block: np.ndarray) -> float:
    return float(np.square(block, dtype=np.float64).sum())


def _written(file: Path, shape: tuple[int, ...], blocks: Iterator[np.ndarray]) -> np.ndarray:
    """A file of float32 rows, by ordinary writes (scratch.py says why), mapped."""
    write_values(file, shape, np.dtype(np.float32), blocks)
    mapped: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
    return mapped
