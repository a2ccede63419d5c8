# SPDX-License-Identifier: Apache-2.0
"""What a reader has read, as one text: equal for equal content."""
from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from qgnn_dist.data.graph import Graph, SparseFeatures
from qgnn_dist.store.reader import Part

__all__ = ["digest", "graph_values", "part_values"]


def digest(*values: Any) -> str:
    """Of arrays by shape, type and bytes, of anything else by its repr."""
    found = hashlib.blake2b(digest_size=16)
    for value in values:
        if isinstance(value, np.ndarray):
            found.update(f"{value.dtype}{value.shape}".encode())
            found.update(np.ascontiguousarray(value).tobytes())
        else:
            found.update(repr(value).encode("utf-8", "surrogatepass"))
    return found.hexdigest()


def graph_values(graph: Graph) -> list[Any]:
    """All of a graph, its edges read to the end."""
    edges = [np.asarray(chunk) for chunk in graph.edges()]
    x = graph.features
    features = [x.indptr, x.indices, x.values, x.shape] if isinstance(x, SparseFeatures) else [x]
    ids = None if graph.node_ids is None else graph.node_ids.to_pylist()
    return [graph.num_nodes, graph.num_classes, graph.class_names, graph.labels, graph.split, ids, *features,
            np.concatenate(edges, axis=1) if edges else None]


def part_values(part: Part) -> list[Any]:
    """All arrays of a part."""
    features: list[Any] = []
    if part.feature_kind == "dense":
        features = [part.features_dense(0, part.num_local)]
    elif part.feature_kind == "sparse":
        x = part.features_sparse(0, part.num_local)
        features = [x.indptr, x.indices, x.values]
    plans = [value for plan in part.peers for value in (plan.peer, plan.send_rows, plan.recv_begin, plan.recv_count)]
    return [part.source_index, part.indptr, part.indices, part.degree, part.labels, part.split,
            part.node_ids.to_pylist(), part.halo_source_index, *features, *plans]
