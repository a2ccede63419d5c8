# SPDX-License-Identifier: Apache-2.0
"""In which order a part's rows lie: neighbours close together share cache lines, whichever kernel gathers them.

An order is of the whole graph; a part keeps it among its rows with remote neighbours, and among its interior rows.
No result depends on it: a row's neighbours are still added up by rising source index, and outputs carry node ids.
All orders take time in proportion to the edges; docs/order.md says what each gives.
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .. import kernels
from ..errors import InputError

__all__ = ["ORDERS", "choose_order", "mean_log2_distance", "places"]

LEAST_NODES = 1 << 16
"""Nodes below which `auto` leaves them as they come: their states fit into the caches in any order."""
LEAST_GAIN = 1.0
"""Drop of the mean log2 distance below which `auto` leaves the nodes as they come: 1 halves the typical distance."""
SAMPLED_EDGES = 1 << 20


def choose_order(order: str, indptr: np.ndarray, indices: np.ndarray, seed: int) -> tuple[np.ndarray, str, str]:
    """The nodes in their order (N,), the order's name and why it was taken.

    `auto` tries `community` from LEAST_NODES nodes on, and takes it where it lowers the mean log2 distance of
    neighbours by LEAST_GAIN or more; else nodes stay as they come. Measured (docs/order.md): where that figure falls,
    every kernel gains, float ones most; `rcm` and `degree` beat `community` by no more than the noise; a crawl, whose
    own order is as local, gains nothing.

    Args:
        order: `auto` or one of ORDERS. indptr int64 (N+1,), indices int32 (2E,): the whole graph, both directions.
    Raises: InputError: an order that cannot be had for this graph.
    """
    nodes = len(indptr) - 1
    if order != "auto":
        return ORDERS[order](indptr, indices, seed), order, "asked for"
    if nodes < LEAST_NODES:
        return _source(indptr, indices, seed), "source", f"{nodes} nodes lie in the caches together"
    if kernels.isa() == "reference":
        return _source(indptr, indices, seed), "source", "finding communities takes too long without compiled kernels"
    before = mean_log2_distance(indptr, indices, np.arange(nodes))
    found = _community(indptr, indices, seed)
    after = mean_log2_distance(indptr, indices, found)
    reason = f"neighbours lie 2^{before:.1f} apart as they come, 2^{after:.1f} by community"
    if before - after < LEAST_GAIN:
        return _source(indptr, indices, seed), "source", reason
    return found, "community", reason


def mean_log2_distance(indptr: np.ndarray, indices: np.ndarray, order: np.ndarray) -> float:
    """Mean of log2 |i − j| over (a regular sample of) the edges, i and j the ends' places in `order`; 0 without edges.

    About log2 N − 2.2 where neighbours lie anywhere.
    """
    at = places(order)
    sampled = np.arange(0, len(indices), max(len(indices) // SAMPLED_EDGES, 1))
    rows = np.searchsorted(indptr, sampled, side="right") - 1
    return float(np.log2(np.abs(at[rows] - at[indices[sampled]])).mean()) if len(sampled) else 0.0


def places(order: np.ndarray) -> np.ndarray:
    """Where each node lies in the order, int64 (N,): the inverse permutation."""
    result = np.empty(len(order), np.int64)
    result[order] = np.arange(len(order))
    return result


def _source(indptr: np.ndarray, indices: np.ndarray, seed: int) -> np.ndarray:
    return np.arange(len(indptr) - 1)


def _random(indptr: np.ndarray, indices: np.ndarray, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, 5]).permutation(len(indptr) - 1)  # not the stream of a source that was drawn


def _degree(indptr: np.ndarray, indices: np.ndarray, seed: int) -> np.ndarray:
    return np.argsort(-np.diff(indptr), kind="stable")


def _rcm(indptr: np.ndarray, indices: np.ndarray, seed: int) -> np.ndarray:
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import reverse_cuthill_mckee

    n = len(indptr) - 1
    if len(indices) >= 2**31:
        raise InputError(f"--order rcm: {len(indices)} directed edges, it takes at most {2**31 - 1}; use --order "
                         "community")
    graph = csr_array((np.ones(len(indices), np.int8), indices, indptr.astype(np.int32)), shape=(n, n))
    return np.asarray(reverse_cuthill_mckee(graph, symmetric_mode=True), np.int64)


def _community(indptr: np.ndarray, indices: np.ndarray, seed: int) -> np.ndarray:
    from . import community

    return community.order_nodes(indptr, indices)


ORDERS: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "source": _source, "degree": _degree, "rcm": _rcm, "community": _community, "random": _random}
"""Order → the nodes in it, from the graph and a seed. `random` is the worst, to measure and test against."""
