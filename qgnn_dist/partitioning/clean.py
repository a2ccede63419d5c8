# SPDX-License-Identifier: Apache-2.0
"""From edges as they come to the canonical graph: undirected, no self loops, no duplicates, rows sorted."""
from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ..data.graph import Graph, SparseFeatures
from ..errors import InputError

__all__ = ["CleanGraph", "check_arrays", "clean", "fingerprint"]

HASH_ROWS = 65536
BLOCK_KEYS = 1 << 20
"""Keys that a pass over all of them copies at once."""
PIECE_KEYS = 1 << 23
"""Keys that are collected in one allocation: large enough (64 MiB) for the allocator to hand it back when freed."""


@dataclass(frozen=True)
class CleanGraph:
    """The canonical adjacency in CSR form, both directions, without the nodes themselves.

    Attributes:
        indptr: int64 (N+1,). indices: int32 (2E,), ascending in each row.
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
        if isinstance(features, SparseFeatures) and not np.isfinite(features.values).all():
            raise InputError(f"{graph.name}: features hold NaN or infinity; fill or drop them")
    if graph.class_names is not None and len(graph.class_names) != graph.num_classes:
        raise InputError(f"{graph.name}: {len(graph.class_names)} class names for {graph.num_classes} classes")
    ids = graph.node_ids
    if ids is not None and (len(ids) != n or ids.null_count):
        raise InputError(f"{graph.name}: {len(ids)} node ids, {ids.null_count} of them null, expected {n} without null")


def clean(graph: Graph) -> CleanGraph:
    """Symmetrise and sort a graph's edges, in memory: some 30 bytes an undirected edge at the peak.

    Raises:
        InputError: too many nodes, or an edge end outside 0…N−1.
    """
    n = graph.num_nodes
    if n >= 2**31:
        raise InputError(f"{graph.name} has {n} nodes; at most {2**31 - 1} are supported")
    keys, loops = _directed_keys(graph)
    total = len(keys)
    keys.sort()
    distinct = _drop_repeats(keys)
    for start in range(0, distinct, BLOCK_KEYS):
        keys[start:start + BLOCK_KEYS] >>= 1
    num_edges = _drop_repeats(keys[:distinct])
    keys.resize(num_edges, refcheck=False)
    indptr, indices = _both_directions(keys, n)
    return CleanGraph(indptr, indices, {
        "self_loops": loops, "duplicates": total - distinct, "one_way": 2 * num_edges - distinct,
        "isolated": int((np.diff(indptr) == 0).sum())})


def _directed_keys(graph: Graph) -> tuple[np.ndarray, int]:
    """Every edge as int64 (low end · N + high end) · 2 + direction, unsorted, and the number of self loops left out.

    Both directions of an edge differ in the last bit alone, so one sort brings them together. N < 2³¹ keeps it in 63
    bits. Keys are collected in pieces that are freed as they move into the whole: both at once would need it twice.
    """
    n, total, loops, free = graph.num_nodes, 0, 0, 0
    pieces: list[np.ndarray] = []
    for chunk in graph.edges():
        src, dst = np.asarray(chunk[0], np.int64), np.asarray(chunk[1], np.int64)
        if len(src) and not (min(src.min(), dst.min()) >= 0 and max(src.max(), dst.max()) < n):
            bad = int(np.flatnonzero((src < 0) | (dst < 0) | (src >= n) | (dst >= n))[0])
            raise InputError(f"{graph.name}: edge {src[bad]} – {dst[bad]} names a node that is not in 0…{n - 1}")
        keep = src != dst
        src, dst = src[keep], dst[keep]
        loops += len(keep) - len(src)
        found = (np.minimum(src, dst) * n + np.maximum(src, dst)) * 2 + (src > dst)
        total += len(found)
        while len(found):
            if free == 0:
                pieces.append(np.empty(PIECE_KEYS, np.int64))
                free = PIECE_KEYS
            taken = found[:free]
            start = PIECE_KEYS - free
            pieces[-1][start:start + len(taken)] = taken
            free, found = free - len(taken), found[len(taken):]
    keys = np.empty(total, np.int64)
    while pieces:
        start = (len(pieces) - 1) * PIECE_KEYS
        keys[start:start + PIECE_KEYS] = pieces.pop()[:total - start]
    return keys, loops


def _drop_repeats(keys: np.ndarray) -> int:
    """Move the distinct ones of sorted keys to the front; returns how many there are. In place, block by block."""
    kept, last = 0, -1
    for start in range(0, len(keys), BLOCK_KEYS):
        block = keys[start:start + BLOCK_KEYS]
        fresh = np.empty(len(block), bool)
        fresh[0] = block[0] != last
        np.not_equal(block[1:], block[:-1], out=fresh[1:])
        last = int(block[-1])
        distinct = block[fresh]
        keys[kept:kept + len(distinct)] = distinct
        kept += len(distinct)
    return kept


def _both_directions(keys: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """CSR of sorted keys low · N + high.

    Row r holds its lower neighbours, then its higher ones. The higher ones lie in `keys` in the right order already;
    the lower ones do in the sorted list of the swapped keys. Each then moves to a place known from the row starts.
    """
    bounds = np.arange(n + 1, dtype=np.int64) * n
    higher = np.searchsorted(keys, bounds)
    swapped = np.empty_like(keys)
    for start in range(0, len(keys), BLOCK_KEYS):
        low, high = np.divmod(keys[start:start + BLOCK_KEYS], n)
        swapped[start:start + BLOCK_KEYS] = high * n + low
    swapped.sort()
    lower = np.searchsorted(swapped, bounds)
    del bounds
    indices = np.empty(2 * len(keys), np.int32)
    for listed, shift in ((swapped, higher[:-1]), (keys, lower[1:])):
        for start in range(0, len(listed), BLOCK_KEYS):
            row, column = np.divmod(listed[start:start + BLOCK_KEYS], n)
            indices[np.arange(start, start + len(row)) + shift[row]] = column
    return (lower + higher).astype(np.int64), indices


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
