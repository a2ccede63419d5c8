# SPDX-License-Identifier: Apache-2.0
"""How much a part may hold: nodes, directed edges and training nodes, each at most a slack times the mean."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..data.graph import TRAIN, Graph
from ..errors import InputError
from ..kernels import LOADS

__all__ = ["Balance", "deal", "loads_of"]

BLOCK_NODES = 1 << 20
"""Nodes whose loads are converted at once."""


@dataclass(frozen=True)
class Balance:
    """Largest loads of a part over the mean.

    Attributes:
        nodes: of nodes. edges: of directed edges, and of training nodes: looser, since cuts of real graphs pay for it
            (docs/cuts.md). train: uint8 (N,), 1 for a training node; None: there are none.
    """

    nodes: float = 1.05
    edges: float = 2.0
    train: np.ndarray | None = None

    def __post_init__(self) -> None:
        for option, value in (("--balance", self.nodes), ("--edge-balance", self.edges)):
            if not 1 <= value < float("inf"):
                raise InputError(f"{option} {value:g}: expected 1 or more, 1 being parts of equal size")

    @classmethod
    def of(cls, graph: Graph, **asked: float) -> Balance:
        """Of a graph's training nodes; `asked`: `nodes` or `edges` where they are not the usual ones."""
        train = None if graph.split is None else (graph.split == TRAIN).astype(np.uint8)
        return cls(train=train, **asked)

    def capacities(self, indptr: np.ndarray, parts: int) -> np.ndarray:
        """Nodes, directed edges and training nodes that a part may hold, int64 (3,); parts as `deal` makes them always
        fit: so nodes and training nodes are rounded up, and edges have at least the mean and the two largest degrees.
        """
        n = len(indptr) - 1
        degree = int(np.diff(indptr).max(initial=0))
        train = 0 if self.train is None else int(np.count_nonzero(self.train))
        edges = max(int(np.ceil(self.edges * int(indptr[-1]) / parts)), int(indptr[-1]) // parts + 2 * degree)
        return np.array([np.ceil(self.nodes * n / parts), edges, np.ceil(self.edges * train / parts)], np.int64)


def loads_of(owners: np.ndarray, indptr: np.ndarray, train: np.ndarray | None, parts: int) -> np.ndarray:
    """Nodes, directed edges and training nodes of every part, int64 (P, 3); nodes of no part (−1) are left out."""
    loads = np.zeros((parts, LOADS), np.int64)
    for begin in range(0, len(owners), BLOCK_NODES):
        block = slice(begin, begin + BLOCK_NODES)
        own, degree = owners[block], np.diff(indptr[begin:begin + BLOCK_NODES + 1])
        placed = own >= 0
        weights = [None, degree[placed], *([] if train is None else [train[block][placed]])]
        for kind, weight in enumerate(weights):  # a block's sums are whole numbers below 2^53
            loads[:, kind] += np.bincount(own[placed], weight, parts).astype(np.int64)
    return loads


def deal(indptr: np.ndarray, train: np.ndarray | None, parts: int) -> np.ndarray:
    """Owners int32 (N,), dealt like cards, training nodes first, each kind by falling degree: nodes and training nodes
    of two parts differ by one at most, edges by the largest degrees of both kinds. Its cut is that of chance."""
    n = len(indptr) - 1
    kind = np.zeros(n, bool) if train is None else train == 0
    owners = np.empty(n, np.int32)
    owners[np.lexsort((-np.diff(indptr), kind))] = np.arange(n, dtype=np.int64) % parts
    return owners
