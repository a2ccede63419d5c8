# SPDX-License-Identifier: Apache-2.0
"""A graph's dense features as the packed codes that a store keeps at rest (`--features-bits`)."""
from __future__ import annotations

import numpy as np

from ..data.graph import Graph, SparseFeatures
from ..errors import InputError
from ..quant.columns import FEATURE_BITS, ColumnGrids
from ..quant.packed import row_bytes

__all__ = ["BLOCK_ROWS", "CodedFeatures", "check_feature_bits", "refuse_not_finite"]

BLOCK_ROWS = 65536
SAMPLE_VALUES, SAMPLE_ROWS = 1 << 20, 4096
"""The grids are fitted on so many values, and on so many rows at least, spread evenly over the source."""


def check_feature_bits(graph: Graph, bits: int | None) -> None:
    """Refuse, before anything is read, widths that do not exist and features that there is nothing to gain from."""
    if bits is None:
        return
    if bits not in FEATURE_BITS:
        raise InputError(f"--features-bits {bits}: expected 8, 4 or 2, or leave it out to keep features as they are")
    if graph.features is None or isinstance(graph.features, SparseFeatures):
        what = "no" if graph.features is None else "sparse"
        raise InputError(f"--features-bits {bits}: {graph.name} has {what} features, and only dense ones are coded; "
                         "leave it out")


def refuse_not_finite(name: str, block: np.ndarray, start: int) -> None:
    """Raise InputError where some of a graph's feature rows, the first of them `start`, hold NaN or infinity."""
    finite = np.isfinite(block)
    if not finite.all():
        row = start + int(np.flatnonzero(~finite.all(1))[0])
        raise InputError(f"{name}: features hold NaN or infinity (first row: {row}); fill or drop them")


class CodedFeatures:
    """Stands for the array of a graph's features while its parts are written: rows are coded when they are read.

    The grids are those of the whole graph in the order of the source, so that they do not depend on the cut.

    Attributes:
        grids: of the columns. dtype, shape: uint8 and (N, B), as of the array that it stands for.
    Raises:
        InputError: NaN or infinity.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, graph: Graph, bits: int) -> None:
        assert graph.features is not None
        assert not isinstance(graph.features, SparseFeatures)
        self._features: np.ndarray = graph.features
        num_nodes, num_features = graph.features.shape
        self.grids = _fit(graph.name, graph.features, bits)
        self.shape = (num_nodes, row_bytes(num_features, bits))

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.grids.pack(np.asarray(self._features[rows]))


def _fit(name: str, x: np.ndarray, bits: int) -> ColumnGrids:
    """One pass over all rows for ends and means, then the search on a sample."""
    num_nodes, num_features = x.shape
    least, greatest = np.full(num_features, np.inf), np.full(num_features, -np.inf)
    total, pieces = np.zeros(num_features), []
    stride = max(num_nodes // max(SAMPLE_VALUES // num_features, SAMPLE_ROWS), 1)
    for start in range(0, num_nodes, BLOCK_ROWS):
        block = np.asarray(x[start:start + BLOCK_ROWS])
        refuse_not_finite(name, block, start)
        least, greatest = np.minimum(least, block.min(0)), np.maximum(greatest, block.max(0))
        total += block.sum(0, dtype=np.float64)
        pieces.append(np.asarray(block[-start % stride::stride], np.float32))
    return ColumnGrids.fit(np.concatenate(pieces), least, greatest, total / num_nodes, bits)
