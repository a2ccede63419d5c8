# SPDX-License-Identifier: Apache-2.0
"""Sorting more keys than memory holds: sorted runs on disk, merged range by range."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .scratch import append, map_array

__all__ = ["BLOCK_KEYS", "GrowingArray", "KeySorter"]

BLOCK_KEYS = 1 << 18
"""Keys that a pass over all of them copies at once; few enough for a second-level cache."""
GROWTH = 1 << 22
"""Values by which an array grows at most: few enough that what is reserved too much does not count."""


class GrowingArray:
    """A one-dimensional array that grows in place: the allocator moves pages of large ones, it does not copy them."""

    def __init__(self, dtype: type) -> None:
        self._values: np.ndarray = np.empty(0, dtype)
        self.size = 0

    def append(self, values: np.ndarray) -> None:
        """Add values at the end."""
        wanted = self.size + len(values)
        if wanted > len(self._values):
            # No view of it lives longer than a statement, so nothing is left behind where it moves.
            self._values.resize(max(wanted, self.size + min(self.size, GROWTH)), refcheck=False)
        self._values[self.size:wanted] = values
        self.size = wanted

    def take(self) -> np.ndarray:
        """The values; the array is empty then."""
        self._values.resize(self.size, refcheck=False)
        values, self._values, self.size = self._values, np.empty(0, self._values.dtype), 0
        return values


class KeySorter:
    """Sorts any number of int64 keys and drops repeats, with at most `limit` of them in memory (8 bytes each).

    Whenever `limit` keys are there, they leave as a sorted run in `folder`. Merging takes as many of the lowest keys of
    each run as fit together and sorts those: whatever the keys are, many of one row included, a range never has more
    than `limit`. Where all of them fit no file is written.

    Args:
        limit: keys; None for no limit, without a folder. folder: exists; its files are gone after the last block.
    """

    def __init__(self, limit: int | None = None, folder: Path | None = None) -> None:
        self._limit, self._folder = limit, folder
        self._keys = GrowingArray(np.int64)
        self._runs: list[Path] = []

    def add(self, keys: np.ndarray) -> None:
        """Take keys int64 (k,), copied."""
        while len(keys):
            room = len(keys) if self._limit is None else self._limit - self._keys.size
            self._keys.append(keys[:room])
            keys = keys[room:]
            if self._keys.size == self._limit:
                self._spill()

    def blocks(self) -> Iterator[np.ndarray]:
        """All distinct keys ascending, int64 (≤ BLOCK_KEYS,) at a time; the sorter is empty then."""
        if self._runs and self._keys.size:
            self._spill()
        for keys in self._merged() if self._runs else [_distinct(self._keys.take())]:
            for start in range(0, len(keys), BLOCK_KEYS):
                yield keys[start:start + BLOCK_KEYS].copy()  # a view would keep this range while the next is made
            del keys

    def _spill(self) -> None:
        assert self._folder is not None
        run = self._folder / f"keys-{len(self._runs)}.bin"
        append(run, _distinct(self._keys.take()))
        self._runs.append(run)

    def _merged(self) -> Iterator[np.ndarray]:
        """Ranges of keys, one after the other, each in memory as a whole."""
        assert self._limit is not None
        runs = [map_array(run, np.int64) for run in self._runs]
        share = max(self._limit // len(runs), 1)
        while runs:
            # Below the lowest of the keys that lie `share` further on, no run has more than `share`; keys of a run
            # differ, so that the run that has it gives all of those.
            beyond = [run[share] for run in runs if share < len(run)]
            ends = [np.searchsorted(run[:share], min(beyond)) if beyond else len(run) for run in runs]
            yield _distinct(np.concatenate([run[:end] for run, end in zip(runs, ends)]))
            runs = [run[end:] for run, end in zip(runs, ends) if end < len(run)]
        for path in self._runs:
            path.unlink()
        self._runs = []


def _distinct(keys: np.ndarray) -> np.ndarray:
    """Sort keys in place and move the distinct ones to the front, block by block; a view of those."""
    keys.sort()
    kept, last = 0, -1
    for start in range(0, len(keys), BLOCK_KEYS):
        block = keys[start:start + BLOCK_KEYS]
        fresh = np.empty(len(block), bool)
        fresh[0] = start == 0 or block[0] != last
        np.not_equal(block[1:], block[:-1], out=fresh[1:])
        last = int(block[-1])
        distinct = block[fresh]
        keys[kept:kept + len(distinct)] = distinct
        kept += len(distinct)
    return keys[:kept]
