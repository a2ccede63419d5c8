# SPDX-License-Identifier: Apache-2.0
"""Groups of nodes side by side, in groups of groups, and so on, as Rabbit Order (Arai et al., IPDPS 2016) has them.

The groups of each level are the clusters of `levels`, and the nodes of the next. METIS' blocks of as many nodes bring
neighbours no closer, and take far more time and memory (docs/order.md).

Inside the smallest groups nodes lie by falling degree: hubs share cache lines, and rows of one length follow one
another, which kernels of narrow codes like best.
"""
from __future__ import annotations

import numpy as np

from .levels import WHOLE, Level, contract, join
from .order import places

__all__ = ["order_nodes"]

FIRST_GROUP, GROUP_GROWTH = 4096, 16
"""Most nodes of a group on the lowest level, and by how much that grows from level to level. With 40 columns, 4096 rows
of INT2 codes fill a first-level cache, of floats a second-level one."""
_SEED = 0  # of ties; an order needs no other


def order_nodes(indptr: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """The nodes int64 (N,), group by group; inside the smallest groups by falling degree, equal ones as they come.

    Args:
        indptr: int64 (N+1,). indices: int32 (2E,), both directions; memory maps are read from front to back.
    """
    n = len(indptr) - 1
    level, limit, levels, count = Level(indptr, indices), FIRST_GROUP, list[np.ndarray](), n
    while len(level.indices):
        depth = len(levels)
        sizes = np.ones(n, np.int32) if level.node_weight is None else level.node_weight[:, 0].astype(np.int32)
        groups, count = join(level, sizes, min(limit, WHOLE), 0, _SEED, depth)
        levels.append(groups)
        if limit >= n:
            break
        level, _ = contract(level, groups, count, _SEED, depth)
        limit *= GROUP_GROWTH
    rank = np.arange(count)
    for groups in reversed(levels[1:]):
        rank = places(np.argsort(rank[groups], kind="stable"))
    nodes = np.argsort(-np.diff(indptr), kind="stable")
    return nodes[np.argsort(rank[levels[0][nodes]], kind="stable")] if levels else nodes
