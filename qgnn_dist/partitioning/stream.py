# SPDX-License-Identifier: Apache-2.0
"""Cuts a graph in some twelve passes over its nodes in their order, and a few dozen bytes a node beside it.

Passes over the whole graph cannot see far, so it is made small first (levels.py). The smallest level is placed by
restreaming (Nishimura and Ugander, KDD 2013) with Fennel's pull to emptier parts (Tsourakakis et al., WSDM 2014)
falling from pass to pass; on the way back each level is restreamed again, so that nodes leave where their cluster
went. Parts keep three capacities (balance.py).

Legend: n nodes of a level, P parts.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import kernels
from .balance import Balance, deal
from .levels import SWEEPS, WHOLE, Level, contract, join

__all__ = ["assign", "extend"]

CLUSTERS_A_PART = 20
"""Clusters hold at most this share of a part, in each of its loads, so that parts can be evened out."""
COARSEST = 100
"""Nodes a part, at which a graph is small enough."""
LEAST_SHRINKING = 0.9
"""Of the nodes that a level leaves, above which another one is not worth it."""
VOTES = 32
"""Edges that a node of the whole graph looks at in a sweep."""
STARTS, START_WORK = (2, 16), 1 << 22
"""Least and most placements of the smallest graph, of which the best is kept, and their work together: nodes times
parts, and edges."""
START_PASSES = 8
"""Of a placement, with a pull that falls from 1 to 0."""
PULLS = (0.2, 0.1, 0.05)
"""Of the first passes over a level; 1 takes a full part's edges for nothing. Then there is none."""
LAST_PASSES, FEW_MOVES = (2, 10), 0.001
"""Passes without a pull over the whole graph and over a smaller one, and the share of moves that ends them early."""


def assign(indptr: np.ndarray, indices: np.ndarray, parts: int, seed: int,
           balance: Balance) -> tuple[np.ndarray, dict[str, Any]]:
    """Owners int32 (N,) and what a manifest tells of them. No part is over `balance.capacities`.

    Args:
        indptr: int64 (N+1,). indices: int32 (2E,), both directions; memory maps are read from front to back.
    """
    train = None if balance.train is None else np.ascontiguousarray(balance.train, np.uint8)
    capacity = balance.capacities(indptr, parts)
    whole = Level(indptr, indices, train=train)
    levels, groups, passes = _coarsen(whole, capacity, parts, seed)
    owners = _start(levels[1:] or levels, groups[1:], capacity, parts, seed)
    if groups:
        owners = owners[groups[0]]
        passes += _restream(whole, owners, parts, capacity)
    dealt = bool((whole.loads(owners, parts) > capacity).any())
    if dealt:
        owners = deal(indptr, train, parts)
    return owners, {"objective": "fennel", "passes": passes, "levels": [level.n for level in levels], "dealt": dealt,
                    "capacity": _named(capacity)}


def extend(indptr: np.ndarray, indices: np.ndarray, parts: int, owners: np.ndarray,
           balance: Balance) -> tuple[np.ndarray, dict[str, Any]]:
    """Place the nodes whose owner is −1, and leave the others where they are; as `assign`.

    Parts that those fill already get no more. Where no part has room for a node in all three loads, one takes it that
    has room for a node.
    """
    train = None if balance.train is None else np.ascontiguousarray(balance.train, np.uint8)
    capacity = balance.capacities(indptr, parts)
    found, frozen = owners.copy(), (owners >= 0).astype(np.uint8)
    passes = _restream(Level(indptr, indices, train=train), found, parts, capacity, frozen)
    return found, {"objective": "fennel", "passes": passes, "capacity": _named(capacity)}


def _named(capacity: np.ndarray) -> dict[str, int]:
    return {name: int(value) for name, value in zip(("nodes", "edges", "train"), capacity)}


def _coarsen(level: Level, capacity: np.ndarray, parts: int, seed: int
             ) -> tuple[list[Level], list[np.ndarray], int]:
    """All levels, the given one first, between them the group int32 (n,) of each node, and passes over the first."""
    levels, groups, passes = [level], list[np.ndarray](), 0
    limit = np.ceil(capacity / CLUSTERS_A_PART)
    while level.n > COARSEST * parts:
        depth = len(groups)
        group, count = join(level, level.shares(limit), WHOLE, 0 if depth else VOTES, seed, depth)
        passes += 0 if depth else SWEEPS
        if count > LEAST_SHRINKING * level.n:
            break
        level, tries = contract(level, group, count, seed, depth)
        passes += 0 if depth else tries
        groups.append(group)
        levels.append(level)
    return levels, groups, passes


def _start(levels: Sequence[Level], groups: Sequence[np.ndarray], capacity: np.ndarray, parts: int,
           seed: int) -> np.ndarray:
    """Owners int32 (n,) on the first of `levels`: the best of several placements of the last one, restreamed."""
    last, first = levels[-1], levels[0]
    least, most = STARTS
    work = len(last.indices) + len(first.indices) + (last.n + first.n) * parts
    size = last.shares(capacity).astype(np.int64)
    rng = np.random.default_rng([seed, 6])
    best: tuple[bool, int] | None = None
    for start in range(min(max(START_WORK // max(work, 1), least), most)):
        # Large ones first leaves small ones to even out with; any order finds what that one misses.
        order = rng.permutation(last.n) if start % 2 else np.argsort(-size * (1 + rng.random(last.n)), kind="stable")
        owners = np.full(last.n, -1, np.int32)
        loads = np.zeros((parts, kernels.LOADS), np.int64)
        for turn in range(START_PASSES):
            _place(last, capacity, 1 - turn / (START_PASSES - 1), owners, loads,
                   order.astype(np.int32) if turn == 0 else None)
        _restream(last, owners, parts, capacity)
        for level, group in zip(levels[-2::-1], groups[::-1]):
            owners = owners[group]
            _restream(level, owners, parts, capacity)
        found = bool((first.loads(owners, parts) > capacity).any()), first.cut(owners)
        if best is None or found < best:
            best, kept = found, owners
    return kept


def _restream(level: Level, owners: np.ndarray, parts: int, capacity: np.ndarray,
              frozen: np.ndarray | None = None) -> int:
    """Passes over a level with the pull falling, then without; changes `owners`, returns how many passes it were."""
    loads = level.loads(owners, parts)
    for pull in PULLS:
        _place(level, capacity, pull, owners, loads, frozen=frozen)
    last = LAST_PASSES[level.node_weight is not None]
    for turn in range(last):
        if _place(level, capacity, 0.0, owners, loads, frozen=frozen) <= FEW_MOVES * level.n:
            return len(PULLS) + turn + 1
    return len(PULLS) + last


def _place(level: Level, capacity: np.ndarray, pull: float, owners: np.ndarray, loads: np.ndarray,
           order: np.ndarray | None = None, frozen: np.ndarray | None = None) -> int:
    return kernels.place_nodes(level.indptr, level.indices, level.edge_weight, level.node_weight, level.train, order,
                               frozen, capacity, pull, owners, loads)
