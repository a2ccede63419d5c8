# SPDX-License-Identifier: Apache-2.0
"""Dense feature columns brought to mean 0 and deviation 1, once, when a store is made (`--standardise`).

A row's features share one scale when they are coded, and one learning rate: a column of incomes beside others of about
1 drowns them. Means and deviations are of all nodes, in the order of the source, so that they do not depend on the cut.

Legend: N nodes, F features.
"""
from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..data.graph import Graph, SparseFeatures
from ..errors import InputError, QgnnWarning
from .features import BLOCK_ROWS, refuse_not_finite
from .scratch import write_values

__all__ = ["check_columns", "standardised"]

MOST_COLUMNS = 1 << 16
"""Of which a manifest has room for means and deviations."""
LOOKED_AT, TIMES_LARGER = 65536, 100.0
"""Rows that are looked at, spread evenly, for a column so many times as large as half of the columns."""


def check_columns(graph: Graph, standardise: bool) -> int:
    """Refuse, before anything is read, features that cannot be standardised; warn of columns that should be.

    Returns: bytes of disk that standardising takes.
    """
    x = graph.features
    dense = x is not None and not isinstance(x, SparseFeatures)
    if not standardise:
        if dense and graph.num_features:
            _warn_of_sizes(graph)
        return 0
    if not dense:
        raise InputError(f"--standardise: {graph.name} has {'no' if x is None else 'sparse'} features, and only dense "
                         "ones are standardised; leave it out")
    if graph.num_features > MOST_COLUMNS:
        raise InputError(f"--standardise: {graph.name} has {graph.num_features} features, expected at most "
                         f"{MOST_COLUMNS}; standardise them beforehand")
    return 4 * graph.num_nodes * graph.num_features


def standardised(graph: Graph, scratch: Path, known: dict[str, list[float]] | None = None,
                 ) -> tuple[Graph, dict[str, list[float]]]:
    """The graph with (x − mean) / deviation, a mapped file of float32 in `scratch`; columns without spread become 0.

    Args: known: means and deviations of an earlier state of the graph, instead of this one's.
    Returns: and the `means` and `deviations` that were taken, of each column.
    Raises: InputError: NaN or infinity; numbers beyond float32 once they are scaled.
    """
    x = graph.features
    assert isinstance(x, np.ndarray)
    found = known or _measured(graph.name, x)
    means, deviations = np.array(found["means"]), np.array(found["deviations"])

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, len(x), BLOCK_ROWS):
            block = ((np.asarray(x[start:start + BLOCK_ROWS], np.float64) - means) / deviations).astype(np.float32)
            refuse_not_finite(graph.name, block, start)
            yield block

    file = scratch / "standardised.npy"
    write_values(file, x.shape, np.dtype(np.float32), blocks())
    return replace(graph, features=np.load(file, mmap_mode="r", allow_pickle=False)), found


def _measured(name: str, x: np.ndarray) -> dict[str, list[float]]:
    """Two passes over all rows, sums in double: the second about the means, so that large ones cost no digits."""
    def total(power: int, about: np.ndarray) -> np.ndarray:
        found = np.zeros(x.shape[1])
        for start in range(0, len(x), BLOCK_ROWS):
            block = np.asarray(x[start:start + BLOCK_ROWS], np.float64)
            refuse_not_finite(name, block, start)
            found += ((block - about) ** power).sum(0)
        return found / max(len(x), 1)

    means = total(1, np.zeros(x.shape[1]))
    deviations = np.sqrt(total(2, means))
    deviations[deviations <= 1e-12 * np.abs(means)] = 1.0  # nothing but rounding
    deviations[deviations == 0] = 1.0
    return {"means": means.tolist(), "deviations": deviations.tolist()}


def _warn_of_sizes(graph: Graph) -> None:
    x = graph.features
    assert isinstance(x, np.ndarray)
    largest = np.zeros(graph.num_features)
    stride = max(len(x) // LOOKED_AT, 1)
    for start in range(0, len(x), BLOCK_ROWS):
        block = np.abs(np.asarray(x[start:start + BLOCK_ROWS][-start % stride::stride], np.float64))
        largest = np.maximum(largest, block.max(0, initial=0.0, where=np.isfinite(block)))
    column, usual = int(largest.argmax()), float(np.median(largest[largest > 0])) if largest.any() else 0.0
    if largest[column] > TIMES_LARGER * usual:
        warnings.warn(
            f"{graph.name}: feature column {column} reaches {largest[column]:.3g}, half of the columns no more than "
            f"{usual:.3g}: columns of so different sizes drown one another; --standardise (standardise=True in Python) "
            "brings all to mean 0 and deviation 1", QgnnWarning, stacklevel=2)
