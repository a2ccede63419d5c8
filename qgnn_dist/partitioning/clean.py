# SPDX-License-Identifier: Apache-2.0
"""From edges as they come to the canonical graph: undirected, no self loops, no duplicates, rows sorted."""
from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ..data.graph import Graph, SparseFeatures
from ..errors import InputError

__all__ = ["CleanGraph", "clean", "fingerprint"]

HASH_ROWS = 65536


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


def clean(graph: Graph) -> CleanGraph:
    """Symmetrise and sort a graph's edges, in memory (8 bytes a directed edge, a few times over)."""
    n = graph.num_nodes
    if n >= 2**31:
        raise InputError(f"{graph.name} has {n} nodes; at most {2**31 - 1} are supported")
    loops, total = 0, 0
    pieces: list[np.ndarray] = []
    for chunk in graph.edges():
        src, dst = chunk[0].astype(np.int64), chunk[1].astype(np.int64)
        keep = src != dst
        loops += int(len(keep) - keep.sum())
        pieces.append(src[keep] * n + dst[keep])
        total += len(pieces[-1])
    keys = np.concatenate(pieces) if pieces else np.empty(0, np.int64)
    pieces.clear()
    keys = _sorted_unique(keys)
    distinct = len(keys)
    keys = _sorted_unique(np.concatenate([keys, keys % max(n, 1) * n + keys // max(n, 1)]))
    counts = np.bincount(keys // max(n, 1), minlength=n)
    indptr = np.zeros(n + 1, np.int64)
    np.cumsum(counts, out=indptr[1:])
    return CleanGraph(indptr, (keys % max(n, 1)).astype(np.int32), {
        "self_loops": loops, "duplicates": total - distinct, "one_way": len(keys) - distinct,
        "isolated": int((counts == 0).sum())})


def _sorted_unique(keys: np.ndarray) -> np.ndarray:
    keys.sort()
    if len(keys) == 0:
        return keys
    return keys[np.concatenate([[True], keys[1:] != keys[:-1]])]


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
        ids = graph.node_ids
        digest.update(f"ids:{ids.type};".encode())
        for buffer in pa.concat_arrays([ids]).buffers():
            if buffer is not None:
                digest.update(buffer)
    return digest.hexdigest()
