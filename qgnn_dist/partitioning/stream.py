# SPDX-License-Identifier: Apache-2.0
"""One pass over the nodes in blocks: each goes where most of its placed neighbours are, less what is full.

Linear deterministic greedy (Stanton and Kliot, KDD 2012), vectorised over small blocks, in a few bytes a node.
"""
from __future__ import annotations

import numpy as np

__all__ = ["assign"]

SLACK = 1.05
"""Capacity of a part, in units of the mean."""


def assign(indptr: np.ndarray, indices: np.ndarray, parts: int, seed: int) -> np.ndarray:
    """Owners int32 (N,); no part holds more than 1.05 times the mean (rounded up)."""
    n = len(indptr) - 1
    capacity = max(int(np.ceil(SLACK * n / parts)), 1)
    owners = np.full(n, -1, np.int32)
    sizes = np.zeros(parts, np.int64)
    # The first nodes decide where communities grow: small blocks at first, larger ones later.
    begin, block = 0, max(8, parts)
    offset = int(np.random.default_rng(seed).integers(0, parts))
    while begin < n:
        end = min(begin + block, n)
        _place(owners, sizes, indptr, indices, begin, end, capacity, offset)
        begin, block = end, min(block + max(block // 8, 1), max(n // 256, 8))
    return owners


def _place(owners: np.ndarray, sizes: np.ndarray, indptr: np.ndarray, indices: np.ndarray, begin: int, end: int,
           capacity: int, offset: int) -> None:
    """Place the nodes begin..end; `owners` and `sizes` are brought up to date."""
    parts, count = len(sizes), end - begin
    neighbours = owners[indices[indptr[begin]:indptr[end]]]
    rows = np.repeat(np.arange(count), np.diff(indptr[begin:end + 1]))
    placed = neighbours >= 0
    votes = np.bincount(rows[placed] * parts + neighbours[placed], minlength=count * parts).reshape(count, parts)
    room = np.maximum(1.0 - sizes / capacity, 0.0)
    score = votes * room
    choice = score.argmax(1).astype(np.int32)
    lost = score.max(1) <= 0
    if lost.any():
        # No neighbour placed yet: fill the emptiest parts evenly.
        order = np.argsort(np.roll(sizes, -offset), kind="stable")
        emptiest = ((order + offset) % parts)[:max(parts // 2, 1)].astype(np.int32)
        choice[lost] = np.resize(emptiest, int(lost.sum()))
    for part in np.argsort(-np.bincount(choice, minlength=parts), kind="stable"):
        members = np.flatnonzero(choice == part)
        free = capacity - int(sizes[part])
        if len(members) > free:
            # Those with the fewest votes here leave for the emptiest part.
            leaving = members[np.argsort(votes[members, part], kind="stable")[:len(members) - max(free, 0)]]
            expected = sizes + np.bincount(choice, minlength=parts)
            for node in leaving:
                expected[part] -= 1
                target = int(expected.argmin())
                choice[node] = target
                expected[target] += 1
    owners[begin:end] = choice
    sizes += np.bincount(choice, minlength=parts)
