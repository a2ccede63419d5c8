# SPDX-License-Identifier: Apache-2.0
"""From edges as they come to the canonical graph: undirected, no self loops, no duplicates, rows sorted."""
from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from ..data.graph import Graph, SparseFeatures
from ..errors import InputError
from .scratch import append, map_array
from .sorting import BLOCK_KEYS, GrowingArray, KeySorter

__all__ = ["INDICES", "CleanGraph", "check_arrays", "clean", "fingerprint"]

HASH_ROWS = 65536
INDICES = "indices.bin"
"""File of the scratch folder that holds the neighbours of all rows."""
COLUMN_BITS = 31


@dataclass(frozen=True)
class CleanGraph:
    """The canonical adjacency in CSR form, both directions, without the nodes themselves.

    Attributes:
        indptr: int64 (N+1,). indices: int32 (2E,), ascending in each row; may be a memory map.
        counts: what was dropped or added: self_loops, duplicates, one_way (edges that had no reverse), isolated nodes.
    """

    indptr: np.ndarray
    indices: np.ndarray
    counts: dict[str, int]

    @property
    def num_nodes(self) -> int:
        """N."""
        return len(self.indptr) - 1

    @property
    def num_edges(self) -> int:
        """E, undirected."""
        return len(self.indices) // 2


def check_arrays(graph: Graph) -> None:
    """Refuse arrays whose type, size or range is not what Graph promises: sources check, hand-made graphs may not.

    Raises:
        InputError: names the array.
    """
    n = graph.num_nodes
    for name, dtype, low, high in (("labels", np.int32, -1, graph.num_classes - 1), ("split", np.int8, 0, 3)):
        array = getattr(graph, name)
        if array is None:
            continue
        if array.dtype != dtype or array.shape != (n,):
            raise InputError(f"{graph.name}: {name} is {array.dtype} {array.shape}, expected {np.dtype(dtype)} ({n},)")
        bad = np.flatnonzero((array < low) | (array > high))
        if len(bad):
            raise InputError(f"{graph.name}: {name} is {array[bad[0]]} in row {bad[0]}, expected {low} to {high}")
    features = graph.features
    if features is not None:
        if len(features.shape) != 2 or features.shape[0] != n or features.shape[1] < 1:
            raise InputError(f"{graph.name}: features have shape {tuple(features.shape)}, expected ({n}, at least 1)")
        if not isinstance(features, SparseFeatures) and features.dtype not in (np.float16, np.float32):
            raise InputError(f"{graph.name}: features are {features.dtype}, expected float16 or float32")
        if isinstance(features, SparseFeatures) and not all(
                np.isfinite(features.values[start:start + BLOCK_KEYS]).all()
                for start in range(0, len(features.values), BLOCK_KEYS)):
            raise InputError(f"{graph.name}: features hold NaN or infinity; fill or drop them")
    if graph.class_names is not None and len(graph.class_names) != graph.num_classes:
        raise InputError(f"{graph.name}: {len(graph.class_names)} class names for {graph.num_classes} classes")
    ids = graph.node_ids
    if ids is not None and (len(ids) != n or ids.null_count):
        raise InputError(f"{graph.name}: {len(ids)} node ids, {ids.null_count} of them null, expected {n} without null")


def clean(graph: Graph, scratch: Path | None = None, keys_at_once: int | None = None) -> CleanGraph:
    """Symmetrise and sort a graph's edges.

    Every edge becomes two keys, one a direction. With `scratch` no more than `keys_at_once` of them (8 bytes each) are
    in memory, the rest lie there in sorted runs (16 bytes a given edge), and `indices` is a memory map of a file there;
    beside it stay 8 bytes a node. Without it all is in memory: 16 bytes a given edge and 8 an undirected one.

    Args:
        scratch: an existing folder. keys_at_once: at least 1; None for all.
    Raises:
        InputError: too many nodes, or an edge end outside 0…N−1. OSError: the disk.
    """
    n = graph.num_nodes
    if n >= 1 << COLUMN_BITS:
        raise InputError(f"{graph.name} has {n} nodes; at most {2**31 - 1} are supported")
    sorter = KeySorter(keys_at_once if scratch is not None else None, scratch)
    given, loops = _add_edges(graph, sorter)
    indptr, pieces = np.zeros(n + 1, np.int64), GrowingArray(np.int32)
    keys_found = directed = 0
    last = -1
    for keys in sorter.blocks():
        keys_found += len(keys)
        pairs = keys >> 1
        fresh = pairs != np.concatenate([[last], pairs[:-1]])
        last = int(pairs[-1])
        pairs = pairs[fresh]
        directed += len(pairs)
        rows = pairs >> COLUMN_BITS
        if len(rows):
            first, end = int(rows[0]), int(rows[-1]) + 1
            indptr[first + 1:end + 1] += np.bincount(rows - first)
        columns = (pairs & ((1 << COLUMN_BITS) - 1)).astype(np.int32)
        if scratch is None:
            pieces.append(columns)
        else:
            append(scratch / INDICES, columns)
    np.cumsum(indptr, out=indptr)
    distinct = keys_found // 2
    indices = pieces.take() if scratch is None else map_array(scratch / INDICES, np.int32)
    return CleanGraph(indptr, indices, {
        "self_loops": loops, "duplicates": given - distinct, "one_way": directed - distinct,
        "isolated": int((np.diff(indptr) == 0).sum())})


def _add_edges(graph: Graph, sorter: KeySorter) -> tuple[int, int]:
    """Hand over the keys of all edges; returns how many edges there are, and how many self loops were left out.

    A key is row · 2³² + column · 2 + (0 if given in this direction, 1 if it is the other one's mirror image): both keys
    of a pair lie side by side, and N < 2³¹ keeps them in 63 bits.
    """
    n, given, loops = graph.num_nodes, 0, 0
    for chunk in graph.edges():
        for start in range(0, len(chunk[0]), BLOCK_KEYS):
            src, dst = (np.asarray(ends[start:start + BLOCK_KEYS], np.int64) for ends in chunk)
            if not (min(src.min(), dst.min()) >= 0 and max(src.max(), dst.max()) < n):
                bad = int(np.flatnonzero((src < 0) | (dst < 0) | (src >= n) | (dst >= n))[0])
                raise InputError(f"{graph.name}: edge {src[bad]} – {dst[bad]} names a node that is not in 0…{n - 1}")
            keep = src != dst
            if not keep.all():
                loops += len(keep) - int(np.count_nonzero(keep))
                src, dst = src[keep], dst[keep]
            given += len(src)
            for mirrored, (row, column) in enumerate(((src, dst), (dst, src))):
                sorter.add((row << (COLUMN_BITS + 1)) | (column << 1) | mirrored)
    return given, loops


def fingerprint(clean_graph: CleanGraph, graph: Graph) -> str:
    """BLAKE2b-256, hex, of the canonical graph and all that its nodes carry; the same for every partition of it."""
    digest = hashlib.blake2b(digest_size=32)

    def put(name: str, array: np.ndarray) -> None:
        digest.update(f"{name}:{array.dtype.str}:{array.shape};".encode())
        digest.update(np.ascontiguousarray(array).data)

    put("indptr", clean_graph.indptr)
    put("indices", clean_graph.indices)
    features = graph.features
    if isinstance(features, SparseFeatures):
        digest.update(f"sparse:{features.shape};".encode())
        for name in ("indptr", "indices", "values"):
            put(name, np.asarray(getattr(features, name)))
    elif features is not None:
        for start in range(0, graph.num_nodes, HASH_ROWS):
            put("x", np.asarray(features[start:start + HASH_ROWS]))
    for name in ("labels", "split"):
        value = getattr(graph, name)
        if value is not None:
            put(name, value)
    if graph.node_ids is not None:
        # Values alone: buffers may carry padding, an offset, or a validity bitmap that says nothing.
        ids = pa.concat_arrays([graph.node_ids])
        digest.update(f"ids:{ids.type}:{len(ids)};".encode())
        for buffer in ids.buffers()[1:]:
            if buffer is not None:
                digest.update(buffer)
    return digest.hexdigest()
