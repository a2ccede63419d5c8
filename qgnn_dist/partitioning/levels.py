# SPDX-License-Identifier: Apache-2.0
"""A graph made smaller level by level, in a few sweeps over its nodes and some hundred bytes a node beside it.

Sweeps of size-constrained label propagation (Meyerhenke, Sanders and Schulz, SEA 2014) find clusters; clusters and the
edges between them are the next, smaller graph. `stream` places its nodes by such levels, `community` orders them.

Legend: n nodes of a level.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .. import kernels
from .balance import loads_of

__all__ = ["SWEEPS", "WHOLE", "Level", "contract", "join"]

SWEEPS = 3
"""Of label propagation over a level; a fourth one moves few."""
SAMPLED, PAIRS_A_NODE = 16, 2
"""Edges of a node of the whole graph that the first small one counts, and how many pairs that may give; then fewer."""
WHOLE = 1 << 30
"""A cluster's size limit, where its nodes' sizes are shares of one."""


@dataclass(frozen=True)
class Level:
    """In CSR form; `edge_weight` and `node_weight`, int64 (n, 3), are None on the whole graph, `train` is elsewhere."""

    indptr: np.ndarray
    indices: np.ndarray
    edge_weight: np.ndarray | None = None
    node_weight: np.ndarray | None = None
    train: np.ndarray | None = None

    @property
    def n(self) -> int:
        """Nodes."""
        return len(self.indptr) - 1

    def loads(self, owners: np.ndarray, parts: int) -> np.ndarray:
        """Of every part, int64 (P, 3)."""
        if self.node_weight is None:
            return loads_of(owners, self.indptr, self.train, parts)
        loads = np.zeros((parts, kernels.LOADS), np.int64)
        np.add.at(loads, owners, self.node_weight)
        return loads

    def shares(self, limit: np.ndarray) -> np.ndarray:
        """The largest of each node's loads over `limit`, int32 (n,) of 1 to WHOLE; sums of them bound each load."""
        used = np.where(limit > 0, WHOLE / np.maximum(limit, 1), 0.0)
        if self.node_weight is None:
            share = np.diff(self.indptr) * used[1]
            np.maximum(share, used[0], out=share)
            if self.train is not None:
                np.maximum(share, self.train * used[2], out=share)
        else:
            share = (self.node_weight * used).max(1)
        shares: np.ndarray = np.ceil(np.minimum(share, WHOLE)).astype(np.int32)
        return shares

    def cut(self, owners: np.ndarray) -> int:
        """Weight of the edges between parts, both directions."""
        apart = np.repeat(owners, np.diff(self.indptr)) != owners[self.indices]
        return int(np.count_nonzero(apart) if self.edge_weight is None else self.edge_weight[apart].sum())


def join(level: Level, weight: np.ndarray, limit: int, votes: int, seed: int, depth: int) -> tuple[np.ndarray, int]:
    """The cluster int32 (n,) of every node, and how many there are.

    Args:
        weight: int32 (n,), of which a cluster holds up to `limit`. votes: edges that a node looks at; 0: all.
        depth: levels above this one, which with the seed decides ties.
    """
    labels, sizes = np.arange(level.n, dtype=np.int32), weight.copy()
    for sweep in range(SWEEPS):
        kernels.join_clusters(level.indptr, level.indices, level.edge_weight, weight, limit, votes,
                              _salt(seed, depth, sweep), sweep == SWEEPS - 1, labels, sizes)
    return _renumber(labels)


def contract(level: Level, group: np.ndarray, count: int, seed: int, depth: int) -> tuple[Level, int]:
    """The level of `count` groups, and how many passes it took.

    Args: group: of each node, as `join` gives it. depth: as of `join`; at 0, the whole graph, edges are sampled.
    """
    loads = level.loads(group, count)
    most, room, tries = (0, len(level.indices), 1) if depth else (SAMPLED, PAIRS_A_NODE * level.n, 1)
    while (found := kernels.contract(level.indptr, level.indices, level.edge_weight, group, count, most,
                                     _salt(seed, depth, SWEEPS), room)) is None:
        most, tries = most // 2, tries + 1  # at 1 there is room for all
    return Level(*found, node_weight=loads), tries


def _renumber(labels: np.ndarray) -> tuple[np.ndarray, int]:
    """Labels without gaps, int32 (n,), and how many there are."""
    used = np.zeros(len(labels), bool)
    used[labels] = True
    return (np.cumsum(used, dtype=np.int32) - 1)[labels].astype(np.int32, copy=False), int(np.count_nonzero(used))


def _salt(*words: int) -> int:
    return int(np.random.SeedSequence(words).generate_state(1)[0])
