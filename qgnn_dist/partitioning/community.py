# SPDX-License-Identifier: Apache-2.0
"""Groups of nodes side by side, in groups of groups, and so on, as Rabbit Order (Arai et al., IPDPS 2016) has them.

Each level is a few sweeps of size-constrained label propagation (Meyerhenke, Sanders and Schulz, SEA 2014), whose
groups are the nodes of the next level. METIS' blocks of as many nodes bring neighbours no closer, and take five times
as long and twice the memory (docs/order.md).

Inside the smallest groups nodes lie by falling degree: hubs share cache lines, and rows of one length follow one
another, which kernels of narrow codes like best.

Legend: n nodes of a level.
"""
from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array, vstack

from .order import places

__all__ = ["order_nodes"]

SWEEPS = 2
"""Over all nodes of a level, each joining the group of most of its neighbours; a third one moves few."""
FIRST_GROUP, GROUP_GROWTH = 4096, 16
"""Most nodes of a group on the lowest level, and by how much that grows from level to level. With 40 columns, 4096 rows
of INT2 codes fill a first-level cache, of floats a second-level one."""
BLOCKS = 64
"""Of rows whose votes are counted together. More of them let a row see newer groups, in less memory, but scipy's
product clears a column counter for each, so that their number may not grow with the graph."""
LEAST_ROWS = 64


def order_nodes(indptr: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """The nodes int64 (N,), group by group; inside the smallest groups by falling degree, equal ones as they come.

    Args:
        indptr: int64 (N+1,). indices: int32 (2E,), both directions.
    """
    n = len(indptr) - 1
    graph = csr_array((np.ones(len(indices), np.int8), indices, indptr), shape=(n, n))
    weights, limit, levels = np.ones(n, np.int64), FIRST_GROUP, []
    while graph.nnz:
        used, groups = np.unique(_groups(graph, weights, limit), return_inverse=True)
        groups = groups.astype(np.int32)
        levels.append(groups)
        weights = np.bincount(groups, weights=weights, minlength=len(used)).astype(np.int64)
        if limit >= n:
            break
        graph = _contract(graph, groups, len(used))
        limit *= GROUP_GROWTH
    rank = np.arange(len(weights))
    for groups in reversed(levels[1:]):
        rank = places(np.argsort(rank[groups], kind="stable"))
    nodes = np.argsort(-np.diff(indptr), kind="stable")
    return nodes[np.argsort(rank[levels[0][nodes]], kind="stable")] if levels else nodes


def _groups(graph: csr_array, weights: np.ndarray, limit: int) -> np.ndarray:
    """The group int32 (n,) of every node: that of most of its neighbours which has room for it, on ties its own.

    Groups hold up to `limit` of `weights`; more only where one block's rows join together.
    """
    n = graph.shape[0]
    member = _membership(np.arange(n, dtype=np.int32), n)
    groups: np.ndarray = member.indices  # `member` follows as groups change
    sizes = weights.copy()
    for block in _blocks(n) * SWEEPS:
        own, weight = groups[block], weights[block]
        votes = graph[block] @ member
        counts = np.diff(votes.indptr)
        rows, theirs = np.repeat(np.arange(len(own)), counts), votes.indices
        stays = theirs == own[rows]
        score = 2 * votes.data + stays
        score[~stays & (sizes[theirs] + weight[rows] > limit)] = 0
        if not score.any():
            continue
        some = counts > 0
        best = np.maximum.reduceat(score, votes.indptr[:-1][some])
        at = np.flatnonzero((score == np.repeat(best, counts[some])) & (score > 0))
        movers, first = np.unique(rows[at], return_index=True)
        goals = np.minimum.reduceat(theirs[at], first)
        changed = goals != own[movers]
        movers, goals = movers[changed], goals[changed]
        np.subtract.at(sizes, own[movers], weight[movers])
        np.add.at(sizes, goals, weight[movers])
        own[movers] = goals
    return groups


def _blocks(rows: int) -> list[slice]:
    step = max(-(-rows // BLOCKS), LEAST_ROWS)
    return [slice(begin, begin + step) for begin in range(0, rows, step)]


def _contract(graph: csr_array, groups: np.ndarray, count: int) -> csr_array:
    """The graph of `count` groups, its values the edges between them; those inside one are left out."""
    member = _membership(groups, count)
    nodes, ends = np.argsort(groups, kind="stable"), np.cumsum(np.bincount(groups, minlength=count))
    pieces = []
    for block in _blocks(count):  # whole groups, so that each piece is smaller than what it is made from
        some = nodes[ends[block.start - 1] if block.start else 0:ends[block][-1]]
        piece = _membership(groups[some] - block.start, len(ends[block])).T.tocsr() @ (graph[some] @ member)
        heads = np.repeat(np.arange(block.start, block.start + piece.shape[0], dtype=np.int32), np.diff(piece.indptr))
        piece.data[piece.indices == heads] = 0
        piece.eliminate_zeros()
        pieces.append(piece)
    return vstack(pieces, format="csr")


def _membership(groups: np.ndarray, count: int) -> csr_array:
    """A 1 for every node (row) in the column of its group."""
    n = len(groups)
    return csr_array((np.ones(n, np.int64), groups, np.arange(n + 1, dtype=np.int32)), shape=(n, count))
