# SPDX-License-Identifier: Apache-2.0
"""One pass over the nodes in blocks: each goes where most of its placed neighbours are, less what is full.

Linear deterministic greedy (Stanton and Kliot, KDD 2012), vectorised over small blocks, in a few bytes a node beside
the graph. Inside a block a few sweeps let nodes follow one another, so that orders with locality (web pages, crawls)
cut about as well as node by node.

Legend: k nodes of a block, P parts.
"""
from __future__ import annotations

import numpy as np

__all__ = ["assign"]

SLACK = 1.05
"""Capacity of a part, in units of the mean."""
SWEEPS = 3
BLOCK_NODES, LARGEST_BLOCK, LARGEST_VOTES = 64, 1024, 1 << 22


def assign(indptr: np.ndarray, indices: np.ndarray, parts: int, seed: int) -> np.ndarray:
    """Owners int32 (N,); no part holds more than 1.05 times the mean (rounded up)."""
    n = len(indptr) - 1
    capacity = max(int(np.ceil(SLACK * n / parts)), 1)
    owners = np.full(n, -1, np.int32)
    sizes = np.zeros(parts, np.int64)
    offset = int(np.random.default_rng(seed).integers(0, parts))
    limit = min(max(BLOCK_NODES, n >> 14), LARGEST_BLOCK, max(LARGEST_VOTES // parts, 1))
    # The first nodes decide where communities grow: small blocks at first, larger ones later.
    begin, block = 0, max(min(8, limit), 1)
    while begin < n:
        end = min(begin + block, n)
        # Ties and nodes without placed neighbours go to the emptiest parts; the seed turns the order of equal ones.
        emptiest = (np.argsort(np.roll(sizes, -offset), kind="stable") + offset) % parts
        choice, votes = _choose(owners, sizes, indptr, indices, begin, end, capacity, emptiest)
        _respect_capacity(choice, votes, sizes, capacity)
        owners[begin:end] = choice
        sizes += np.bincount(choice, minlength=parts)
        begin, block = end, min(block + max(block // 8, 1), limit)
    return owners


def _choose(owners: np.ndarray, sizes: np.ndarray, indptr: np.ndarray, indices: np.ndarray, begin: int, end: int,
            capacity: int, emptiest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The part (k,) that each node of begin..end would choose, and its votes (k, P)."""
    parts, count = len(sizes), end - begin
    columns = indices[indptr[begin]:indptr[end]]
    rows = np.repeat(np.arange(count), np.diff(indptr[begin:end + 1]))
    earlier = columns < begin
    inside = (columns >= begin) & (columns < end)
    votes = fixed = _count(rows[earlier], owners[columns[earlier]], count, parts)
    rows, columns = rows[inside], columns[inside] - begin
    room = np.maximum(1.0 - sizes / capacity, 0.0)
    choice = np.full(count, -1, np.int64)
    for sweep in range(SWEEPS):
        score = votes * room
        choice = np.where(score.max(1) > 0, score.argmax(1), choice)
        lost = choice < 0
        if lost.any() and (lost.all() or sweep == SWEEPS - 1):
            # Nobody to follow: runs of nodes that lie together in the source share one of the emptier parts.
            candidates = emptiest[:max(parts // 2, 1)]
            missing = int(lost.sum())
            choice[lost] = candidates[np.arange(missing) * len(candidates) // missing]
        if len(rows) == 0 and (choice >= 0).all():
            break
        known = choice[columns] >= 0
        votes = fixed + _count(rows[known], choice[columns[known]], count, parts)
    return choice, votes


def _count(rows: np.ndarray, parts_of: np.ndarray, count: int, parts: int) -> np.ndarray:
    """How often each (row, part) pair occurs, (k, P)."""
    return np.bincount(rows * parts + parts_of, minlength=count * parts).reshape(count, parts)


def _respect_capacity(choice: np.ndarray, votes: np.ndarray, sizes: np.ndarray, capacity: int) -> None:
    """Send nodes away from parts that would overflow, those with the fewest votes there first; changes `choice`."""
    parts = len(sizes)
    expected = sizes + np.bincount(choice, minlength=parts)
    for part in np.flatnonzero(expected > capacity):
        members = np.flatnonzero(choice == part)
        leaving = np.argsort(votes[members, part], kind="stable")[:int(expected[part]) - capacity]
        for node in members[leaving]:
            target = int(expected.argmin())
            choice[node] = target
            expected[part] -= 1
            expected[target] += 1
