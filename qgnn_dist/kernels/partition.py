# SPDX-License-Identifier: Apache-2.0
"""Passes over the nodes of a graph that decide who owns them: what each computes, node by node.

In every pass a node sees what the ones before it did, so a pass runs on one thread, in the order of the nodes (rows of
a memory map are read once, from front to back), and gives the same on every machine. csrc/partition.cpp has the
compiled twins, some hundred times faster.

Legend: N nodes, E directed edges (both directions), P parts. A load is (nodes, directed edges, training nodes).
"""
from __future__ import annotations

import numpy as np

from .dispatch import kernel

__all__ = ["LOADS", "contract", "join_clusters", "place_nodes"]

LOADS = 3
"""Kinds of load; csrc/partition.h has it too."""
_32 = 0xFFFFFFFF


@kernel(indptr="i8 N+1", indices="i4 E", edge_weight="?i8 E", weight="i4 N", labels="=i4 N", sizes="=i4 N")
def join_clusters(indptr: np.ndarray, indices: np.ndarray, edge_weight: np.ndarray | None, weight: np.ndarray,
                  limit: int, most: int, salt: int, gather: bool, labels: np.ndarray, sizes: np.ndarray) -> int:
    """One sweep of size-constrained label propagation: every node joins the cluster that most of its edges lead to and
    that has room for it; on ties it stays, or `salt` decides.

    Args:
        edge_weight: None: 1 each. weight: of the nodes, at least 1. limit: of a cluster's size, in the same unit.
        most: edges that a node looks at, spread over its row; 0: all. gather: nodes that stay alone, because their
            cluster of choice is full or they have no neighbours, join the last such one alike; for the last sweep, or
            the leaves of a hub would stay clusters of their own.
        labels: cluster of each node, in 0…N−1. sizes: of the clusters, the sum of their nodes' weights.
    Returns: how many nodes moved.
    """
    n, moves = len(labels), 0
    waiting = np.full(n + 1, -1, np.int64)
    for node in range(n):
        sampled, _ = _sample(indptr, node, most, salt)
        votes: dict[int, int] = {}
        for j in sampled:
            cluster = int(labels[indices[j]])
            votes[cluster] = votes.get(cluster, 0) + (1 if edge_weight is None else int(edge_weight[j]))
        own, size = int(labels[node]), int(weight[node])
        goal, best, rank = own, votes.get(own, 0), 0
        full, most_full = n, 0
        for cluster, mine in votes.items():
            if mine < best or (mine == best and goal == own):
                continue
            if int(sizes[cluster]) + size > limit:
                if mine > most_full:
                    full, most_full = cluster, mine
                continue
            here = _mix(cluster ^ salt)
            if mine > best or here < rank:
                goal, best, rank = cluster, mine, here
        if gather and goal == own and sizes[own] == size and (full != n or not votes):
            last = int(waiting[full])
            if last >= 0 and last != own and int(sizes[last]) + size <= limit:
                goal = last
            else:
                waiting[full] = own
        if goal != own:
            sizes[own] -= size
            sizes[goal] += size
            labels[node] = goal
            moves += 1
    return moves


@kernel(indptr="i8 N+1", indices="i4 E", edge_weight="?i8 E", labels="i4 N")
def contract(indptr: np.ndarray, indices: np.ndarray, edge_weight: np.ndarray | None, labels: np.ndarray, groups: int,
             most: int, salt: int, room: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """The graph of `groups` groups of nodes: edges between two are one, of the sum of their weights; those inside one
    are left out.

    Args:
        labels: group of each node, in 0…groups−1. most: edges of a node that are counted, each then standing for as
            many as were left out (so that both directions of a pair may differ); 0: all.
    Returns: indptr int64 (groups+1,), indices int32, weights int64, rows sorted; or None where that would be more than
        `room` pairs.
    """
    nodes = range(len(labels))
    sampled = [_sample(indptr, node, most, salt) for node in nodes]
    lengths = [len(places) for places, _ in sampled]
    at = np.fromiter((j for places, _ in sampled for j in places), np.int64, sum(lengths))
    row = np.repeat(np.asarray(labels, np.int64), lengths)
    column = np.asarray(labels[indices[at]], np.int64)
    weight = np.repeat(np.array([step for _, step in sampled], np.int64), lengths)
    if edge_weight is not None:
        weight *= edge_weight[at]
    apart = row != column
    keys, pair = np.unique(row[apart] * groups + column[apart], return_inverse=True)
    if len(keys) > room:
        return None
    weights = np.zeros(len(keys), np.int64)
    np.add.at(weights, pair, weight[apart])
    starts = np.searchsorted(keys, np.arange(groups + 1) * groups).astype(np.int64)
    return starts, (keys % max(groups, 1)).astype(np.int32), weights


@kernel(indptr="i8 N+1", indices="i4 E", edge_weight="?i8 E", node_weight="?i8 N 3", train="?u1 N", order="?i4 N",
        frozen="?u1 N", capacity="i8 3", owners="=i4 N", loads="=i8 P 3")
def place_nodes(indptr: np.ndarray, indices: np.ndarray, edge_weight: np.ndarray | None,
                node_weight: np.ndarray | None, train: np.ndarray | None, order: np.ndarray | None,
                frozen: np.ndarray | None, capacity: np.ndarray, pull: float, owners: np.ndarray,
                loads: np.ndarray) -> int:
    """One pass of (re)streaming: each node goes where it has most edges less `pull` · its edges · the part's fill,
    among the parts with room for it; on ties it stays, or goes where the fill is least.

    A part's fill is the largest of its three loads over `capacity`, the node counted. A node whose edges all stay in
    its part is left there, and one for which no part has room stays, or if it has no part yet goes to the least filled
    of those with room for a node, else of all. A part that is over its capacity has no room for its own nodes.

    Args:
        node_weight: loads of each node, or None: 1, its number of edges, and `train` (0 or 1; None: 0).
        order: in which nodes take their turns; None: as they come. frozen: 1 for nodes that stay; None: none.
        pull: 0 to 1. owners: −1: in no part yet. loads: of the parts, by those that are in one.
    Returns: how many nodes moved.
    """
    n, parts = len(owners), len(loads)
    share = [1.0 / int(c) if c > 0 else 0.0 for c in capacity]
    room = [int(c) for c in capacity]
    moves = 0
    for node in range(n) if order is None else order.tolist():
        if frozen is not None and frozen[node]:
            continue
        begin, end, own = int(indptr[node]), int(indptr[node + 1]), int(owners[node])
        near = owners[indices[begin:end]]
        known = near >= 0
        torn = own < 0 or any(loads[own] > capacity) or bool((near[known] != own).any())
        if not torn:
            continue
        ties = np.zeros(parts, np.int64)
        np.add.at(ties, near[known], 1 if edge_weight is None else edge_weight[begin:end][known])
        weight = [1, end - begin, 0 if train is None else int(train[node])]
        if node_weight is not None:
            weight = node_weight[node].tolist()
        if own >= 0:
            loads[own] -= weight
        goal, best, fill_of_goal = -1, 0.0, 0.0
        spare: tuple[bool, float, int] | None = None
        for p in range(parts):
            if goal >= 0 and float(ties[p]) < best:
                continue
            after = [int(load) + more for load, more in zip(loads[p], weight)]
            fill = max(float(a) * s for a, s in zip(after, share))
            if any(a > c for a, c in zip(after, room)):
                candidate = (after[0] > room[0], fill, p)
                spare = candidate if spare is None else min(spare, candidate)
                continue
            score = float(ties[p]) - pull * float(weight[1]) * fill
            if goal < 0 or score > best or (score == best and goal != own and (p == own or fill < fill_of_goal)):
                goal, best, fill_of_goal = p, score, fill
        if goal < 0:
            goal = own if own >= 0 or spare is None else spare[2]
        loads[goal] += weight
        if goal != own:
            owners[node] = goal
            moves += 1
    return moves


def _sample(indptr: np.ndarray, node: int, most: int, salt: int) -> tuple[range, int]:
    """Places of the edges of a node that are looked at, and how many each of them stands for."""
    first, end, step = int(indptr[node]), int(indptr[node + 1]), 1
    if most and end - first > most:
        step = -(-(end - first) // most)
        first += _mix(node ^ salt) % step
    return range(first, end, step), step


def _mix(x: int) -> int:
    """A hash of 32 bits (Wellons' lowbias32)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _32
    x = (x ^ (x >> 15)) * 0x846CA68B & _32
    return x ^ (x >> 16)
