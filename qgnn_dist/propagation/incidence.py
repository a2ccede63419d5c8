# SPDX-License-Identifier: Apache-2.0
"""The incidence matrix Δ̃ of L̃ = Δ̃ᵀΔ̃: one row x_i/√d_i − x_j/√d_j for every edge {i, j}, d with the node itself.

Legend: n rows, E edges without direction, C columns.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .. import kernels

if TYPE_CHECKING:
    from .neighbourhood import Neighbourhood

__all__ = ["Incidence"]


@dataclass(frozen=True)
class Incidence:
    """Δ̃ by its rows and by its columns, so that both products run row by row.

    Attributes:
        indptr, nodes, weights: Δ̃ in CSR form; int64 (E+1,), int32 (2E,), float32 (2E,): d_i^-½ and −d_j^-½, i < j.
        node_indptr, edges, node_weights: Δ̃ᵀ in CSR form, likewise; int64 (n+1,), the graph's own. A row's edges are in
            the order of its neighbours.
    """

    indptr: np.ndarray
    nodes: np.ndarray
    weights: np.ndarray
    node_indptr: np.ndarray
    edges: np.ndarray
    node_weights: np.ndarray

    @classmethod
    def of(cls, graph: Neighbourhood) -> Incidence:
        """Of a graph's only part. Raises: ValueError: there are others, or some edge has one direction alone."""
        n = graph.num_local
        if graph.num_halo > 0:
            raise ValueError(f"the incidence matrix takes a whole graph, {graph.num_halo} rows lie in other parts")
        key = np.repeat(np.arange(n, dtype=np.int64), np.diff(graph.indptr))
        lower = key < graph.indices
        key = np.where(lower, key * n + graph.indices, graph.indices * np.int64(n) + key)
        order = np.argsort(key, kind="stable")
        first = key[order[::2]]
        if not np.array_equal(first, key[order[1::2]]):
            raise ValueError("the adjacency has an edge without its reverse")
        del key
        edges = np.empty(len(order), np.int32)
        edges[order] = np.arange(len(order), dtype=np.int32) // 2
        del order
        nodes = np.stack([first // n, first % n], 1).astype(np.int32)
        sign = np.array([1, -1], np.float32)
        weights = graph.inv_sqrt_degree[nodes] * sign
        node_weights = np.repeat(graph.inv_sqrt_degree, np.diff(graph.indptr)) * np.where(lower, *sign)
        return cls(2 * np.arange(len(nodes) + 1, dtype=np.int64), nodes.ravel(), weights.ravel(), graph.indptr, edges,
                   node_weights)

    @property
    def num_edges(self) -> int:
        """E."""
        return len(self.indptr) - 1

    def differences(self, f: np.ndarray, out: np.ndarray) -> np.ndarray:
        """out = Δ̃·f, float32 (n, C) to (E, C). Turning an edge around changes its row's sign, and no more."""
        kernels.matmul_float_csr(self.indptr, self.nodes, self.weights, f, out)
        return out

    def gathered(self, z: np.ndarray, out: np.ndarray) -> np.ndarray:
        """out = Δ̃ᵀ·z, float32 (E, C) to (n, C)."""
        kernels.matmul_float_csr(self.node_indptr, self.edges, self.node_weights, z, out)
        return out
