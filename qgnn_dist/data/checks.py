# SPDX-License-Identifier: Apache-2.0
"""Checks that every source shares. Each raises InputError in one line: what, where, got, expected, what to try.

`where` names the array or column, `file` its file; rows and columns are counted from 0.
"""
from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qgnn_dist.data.arrays import new_rows
from qgnn_dist.data.graph import NO_SPLIT, SPLITS, Graph, SparseFeatures
from qgnn_dist.errors import InputError
from qgnn_dist.files.read import shown

__all__ = [
    "FeatureSink",
    "check_edge_shape",
    "check_edges",
    "check_evidence",
    "check_graph",
    "check_num_nodes",
    "dense_features",
    "labels_from",
    "sparse_features",
    "split_from_indices",
    "split_from_masks",
]

ROWS_AT_ONCE = 1 << 16
SHOWN_ROWS = 5
MOVE_SOME = "split the labelled nodes between train and valid; nodes without a split are predicted too"
MOST_NODES = 2**31 - 1
BARE_NODES, BARE_NODES_AN_EDGE = 1 << 20, 64
"""Nodes that a source may have beyond those with rows of their own: so many, and so many more for every edge."""


def check_num_nodes(num_nodes: int, where: str, file: str | None = None) -> int:
    """The node count as an int, if there is at least one node and int32 has room for all."""
    if num_nodes < 1:
        raise InputError(f"{where}: the graph has {num_nodes} nodes, expected at least 1", file=file)
    if num_nodes > MOST_NODES:
        raise InputError(f"{where}: the graph has {shown(int(num_nodes))} nodes, expected at most {MOST_NODES}",
                         file=file)
    return int(num_nodes)


def check_evidence(num_nodes: int, rows: int, edges: int, where: str, file: str | None = None) -> int:
    """The node count, if what is there bears it out: nobody allocates by a number alone.

    Args:
        rows: of the longest array that has one a node, 0 without any. edges: at most as many are there.
    """
    most = max(rows, BARE_NODES + BARE_NODES_AN_EDGE * edges)
    if num_nodes > most:
        raise InputError(f"{where}: {num_nodes} nodes with {edges} edges, expected at most {most}; number the nodes "
                         "one after the other, or give an array with a row for each, x or y", file=file)
    return num_nodes


def check_edge_shape(shape: tuple[int, ...], dtype: np.dtype, where: str, file: str | None = None) -> None:
    """Edges are integers of shape (2, E)."""
    if not np.issubdtype(dtype, np.integer):
        raise InputError(f"{where} is {dtype}, expected an integer type such as int64", file=file)
    if len(shape) != 2 or shape[0] != 2:
        hint = "; transpose it" if len(shape) == 2 and shape[1] == 2 else ""
        raise InputError(f"{where} has shape {shape}, expected (2, number of edges){hint}", file=file)


def check_edges(
    chunk: np.ndarray, num_nodes: int, where: str, file: str | None = None, offset: int = 0, unit: str = "column"
) -> np.ndarray:
    """An integer (2, k) chunk as int64, every index in [0, num_nodes).

    Args:
        offset: how many edges came before the chunk, for the message.
        unit: what the file calls an edge's position (column of an array, row of a table).
    """
    if chunk.shape[1]:
        low, high = int(chunk.min()), int(chunk.max())
        if low < 0 or high >= num_nodes:
            bad = (chunk < 0) | (chunk >= num_nodes)
            at = int(np.argmax(bad.any(axis=0)))
            value = int(chunk[0 if bad[0, at] else 1, at])
            raise InputError(
                f"{where} names node {value} ({unit} {offset + at}), expected 0 to {num_nodes - 1}"
                + ("; are the nodes counted from 1?" if low >= 1 and high == num_nodes else ""),
                file=file,
            )
    return chunk.astype(np.int64, copy=False)


def _feature_dtype(dtype: np.dtype, where: str, file: str | None) -> np.dtype:
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise InputError(f"{where} is {dtype}, expected float16, float32 or float64; cast it to float32", file=file)
    return np.dtype(np.float16 if dtype.itemsize == 2 else np.float32)


class FeatureSink:
    """Collects dense feature rows block by block, counting what is not finite on the way.

    Args:
        shape: (N, F).
        dtype: of the source: float16 stays, wider ones become float32.
        where, file: for messages.
    """

    def __init__(self, shape: tuple[int, int], dtype: np.dtype, where: str, file: str | None = None) -> None:
        self.where, self.file = where, file
        kept = _feature_dtype(np.dtype(dtype), where, file)
        if shape[1] < 1:
            raise InputError(f"{where} has no columns; leave it out for a graph without features", file=file)
        self.rows = new_rows(shape, kept)
        self._bad, self._bad_rows = 0, list[int]()

    def put(self, start: int, block: np.ndarray) -> None:
        """Stores rows start … start+len(block)."""
        with np.errstate(over="ignore"):
            kept = block.astype(self.rows.dtype, copy=False)
        self.rows[start : start + len(block)] = kept
        finite = np.isfinite(kept)
        if not finite.all():
            self._bad += int(finite.size - np.count_nonzero(finite))
            self._bad_rows += (start + np.flatnonzero(~finite.all(axis=1))[:SHOWN_ROWS]).tolist()

    def done(self) -> np.ndarray:
        """The filled array. Raises InputError if a value was NaN, infinite, or too large for float32."""
        _refuse_not_finite(self._bad, self._bad_rows, self.where, self.file)
        return self.rows


def _refuse_not_finite(count: int, rows: list[int], where: str, file: str | None) -> None:
    if count:
        shown = ", ".join(str(row) for row in rows[:SHOWN_ROWS])
        raise InputError(
            f"{where} holds {count} value{'s' if count > 1 else ''} that {'are' if count > 1 else 'is'} NaN or "
            f"infinite (first rows: {shown}); fill or drop them",
            file=file,
        )


def dense_features(x: np.ndarray, num_nodes: int, where: str, file: str | None = None) -> np.ndarray:
    """Features (N, F) as float16 (if they are) or float32, all finite. A float32 array is returned as it is."""
    kept = _feature_dtype(x.dtype, where, file)
    if x.ndim != 2 or len(x) != num_nodes:
        raise InputError(f"{where} has shape {x.shape}, expected ({num_nodes}, number of features)", file=file)
    if x.shape[1] < 1:
        raise InputError(f"{where} has no columns; leave it out for a graph without features", file=file)
    if x.dtype != kept:
        sink = FeatureSink((num_nodes, x.shape[1]), x.dtype, where, file)
        for start in range(0, num_nodes, ROWS_AT_ONCE):
            sink.put(start, x[start : start + ROWS_AT_ONCE])
        return sink.done()
    count, rows = 0, list[int]()
    for start in range(0, num_nodes, ROWS_AT_ONCE):
        finite = np.isfinite(x[start : start + ROWS_AT_ONCE])
        if not finite.all():
            count += int(finite.size - np.count_nonzero(finite))
            rows += (start + np.flatnonzero(~finite.all(axis=1))[:SHOWN_ROWS]).tolist()
    _refuse_not_finite(count, rows, where, file)
    return x


def sparse_features(
    indptr: np.ndarray, indices: np.ndarray, values: np.ndarray, shape: tuple[int, int], where: str,
    file: str | None = None,
) -> SparseFeatures:  # fmt: skip
    """CSR pieces as SparseFeatures: sizes that fit, columns in range, values finite and float32."""
    num_rows, num_columns = shape
    for name, array in (("indptr", indptr), ("indices", indices)):
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise InputError(f"{where}_{name} is {array.dtype} {array.shape}, expected integers (n,)", file=file)
    _feature_dtype(values.dtype, f"{where}_data", file)
    if len(indptr) != num_rows + 1:
        raise InputError(f"{where}_indptr has {len(indptr)} values, expected {num_rows + 1} (rows + 1)", file=file)
    if num_columns < 1:
        raise InputError(f"{where}_shape says {num_columns} columns, expected at least 1", file=file)
    if values.ndim != 1 or len(values) != len(indices):
        raise InputError(f"{where}_data has shape {values.shape}, {where}_indices {indices.shape}", file=file)
    if indptr[0] != 0 or indptr[-1] != len(indices):
        raise InputError(
            f"{where}_indptr runs from {indptr[0]} to {indptr[-1]}, expected 0 to {len(indices)} ({where}_indices)",
            file=file,
        )
    falls = np.flatnonzero(indptr[1:] < indptr[:-1])
    if len(falls):
        raise InputError(f"{where}_indptr falls after row {falls[0]}, expected it to rise", file=file)
    if len(indices) and (indices.min() < 0 or indices.max() >= num_columns):
        at = int(np.argmax((indices < 0) | (indices >= num_columns)))
        raise InputError(
            f"{where}_indices[{at}] is column {indices[at]}, expected 0 to {num_columns - 1}", file=file
        )
    with np.errstate(over="ignore"):
        kept = values.astype(np.float32, copy=False)
    bad = np.flatnonzero(~np.isfinite(kept))
    if len(bad):
        rows = np.unique(np.searchsorted(indptr, bad, side="right") - 1)
        _refuse_not_finite(len(bad), rows.tolist(), f"{where}_data", file)
    return SparseFeatures(
        indptr.astype(np.int64, copy=False), indices.astype(np.int32, copy=False), kept, (num_rows, num_columns)
    )


def labels_from(
    y: np.ndarray, num_nodes: int, where: str, file: str | None = None, num_classes: int | None = None
) -> tuple[np.ndarray | None, int]:
    """Labels as int32 (N,) and the number of classes; (None, 0) if no node has one.

    Args:
        y: integers (N,) or (N, 1), -1 where unlabelled; floats only if they are whole numbers, NaN where unlabelled.
        num_classes: known from elsewhere; otherwise the largest label + 1.
    """
    if y.ndim == 2 and y.shape[1] > 1:
        raise InputError(f"{where} has {y.shape[1]} labels a node: only one label a node is supported", file=file)
    if y.ndim not in (1, 2) or len(y) != num_nodes:
        raise InputError(f"{where} has shape {y.shape}, expected ({num_nodes},)", file=file)
    y = y.reshape(num_nodes)
    if y.dtype.kind == "f":
        filled = np.where(np.isnan(y), -1.0, y)
        whole = filled == np.floor(filled)
        if not (whole & np.isfinite(filled)).all():
            at = int(np.argmin(whole & np.isfinite(filled)))
            raise InputError(f"{where} is {y[at]} in row {at}, expected whole class numbers, or NaN for no label",
                             file=file)
        y = filled
    elif y.dtype.kind not in "iu":
        raise InputError(f"{where} is {y.dtype}, expected an integer type; -1 means unlabelled", file=file)
    low, high = int(y.min()), int(y.max())
    limit = num_classes if num_classes is not None else num_nodes
    if low < -1 or high >= limit:
        at = int(np.argmax((y < -1) | (y >= limit)))
        what = f"{limit} classes" if num_classes is not None else f"{num_nodes} nodes, so at most as many classes"
        raise InputError(
            f"{where} is {int(y[at])} in row {at}, expected 0 to {limit - 1} ({what}), or -1 for no label", file=file
        )
    if high < 0:
        return None, 0
    return y.astype(np.int32), num_classes if num_classes is not None else high + 1


def split_from_indices(
    indices: Mapping[str, np.ndarray], num_nodes: int, called: Mapping[str, str] | None = None, file: str | None = None
) -> np.ndarray:
    """int8 (N,) from one index array a split, keyed train, valid and, where there are test nodes, test; `called`: what
    the splits are in the source, for messages."""
    split, called = np.full(num_nodes, NO_SPLIT, np.int8), called or {name: name for name in SPLITS}
    for name, number in SPLITS.items():
        if name == "test" and name not in indices:
            continue
        if name not in indices:
            raise InputError(f"{called[name]} is missing: give train and valid, and test if there are such nodes, or "
                             "none of them", file=file)
        index = np.asarray(indices[name])
        if index.ndim != 1 or (index.size and not np.issubdtype(index.dtype, np.integer)):
            raise InputError(f"{called[name]} is {index.dtype} {index.shape}, expected integers (n,)", file=file)
        if not index.size and name == "test":
            continue
        if not index.size:
            raise InputError(f"{called[name]} is empty, expected at least one node; {MOVE_SOME}", file=file)
        if index.min() < 0 or index.max() >= num_nodes:
            at = int(np.argmax((index < 0) | (index >= num_nodes)))
            raise InputError(
                f"{called[name]}[{at}] is node {index[at]}, expected 0 to {num_nodes - 1}", file=file
            )
        taken = index[split[index] != NO_SPLIT]
        if taken.size:
            other = next(key for key, value in SPLITS.items() if value == split[taken[0]])
            raise InputError(
                f"{called[name]} overlaps {called[other]} in {np.unique(taken).size} nodes (first: {taken[0]}); "
                "splits must be disjoint",
                file=file,
            )
        split[index] = number
    return split


def split_from_masks(masks: Mapping[str, np.ndarray], num_nodes: int, called: Mapping[str, str]) -> np.ndarray:
    """int8 (N,) from one boolean mask (N,) a split, which the source has as `called`."""
    indices = {}
    for name, mask in masks.items():
        if mask.ndim == 2 and mask.shape[1] > 1:
            raise InputError(f"{called[name]} holds {mask.shape[1]} splits: choose one column")
        if mask.dtype != np.bool_ or mask.reshape(-1).shape != (num_nodes,):
            raise InputError(f"{called[name]} is {mask.dtype} {mask.shape}, expected bool ({num_nodes},)")
        indices[name] = np.flatnonzero(mask)
    return split_from_indices(indices, num_nodes, called)


def check_graph(graph: Graph, file: str | None = None) -> Graph:
    """What only shows on the whole: training and validation nodes need labels, classes their names."""
    if graph.split is not None and graph.labels is not None:
        for name in ("train", "valid"):
            bare = np.flatnonzero((graph.split == SPLITS[name]) & (graph.labels < 0))
            if bare.size:
                raise InputError(
                    f"{bare.size} {name} node{'s have' if bare.size > 1 else ' has'} no label (first: {bare[0]}); "
                    "label them or take them out of the split",
                    file=file,
                )
    if graph.class_names is not None and len(graph.class_names) != graph.num_classes:
        raise InputError(f"{len(graph.class_names)} class names for {graph.num_classes} classes", file=file)
    return graph
