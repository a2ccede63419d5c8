# SPDX-License-Identifier: Apache-2.0
"""Workers that compute much longer than the others: a synchronous run is as fast as the slowest of them."""
from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["SlowWorkers", "WorkerShare"]

RATIO = 3.0
"""To the median of the others, from which on a worker is named."""
LAST = 3
"""Epochs in a row; one long epoch alone is no slow worker."""
LEAST_S = 0.02
"""Computing of an epoch below which nobody cares who is slow."""
EVERY = 100
"""Epochs until a worker that is still slow is named again."""


@dataclass(frozen=True)
class WorkerShare:
    """Where a worker runs, and how much it has to do: local rows, and directed edges that end in them."""

    host: str
    rows: int
    edges: int


class SlowWorkers:
    """Takes every epoch's seconds of computing, without waits, and says who is slow.

    Args:
        workers: by rank.
    """

    def __init__(self, workers: Sequence[WorkerShare]) -> None:
        self._workers = list(workers)
        self._last: deque[Sequence[float]] = deque(maxlen=LAST)
        self._named: dict[int, int] = {}

    def look(self, epoch: int, seconds: Sequence[float]) -> list[str]:
        """A sentence for each worker that has been slow in the last epochs and was not named lately.

        Args: seconds: of computing in this epoch, by rank.
        """
        self._last.append(seconds)
        if len(self._workers) < 2 or len(self._last) < LAST:
            return []
        least = [min(one) for one in zip(*self._last)]
        found = []
        for rank, own in enumerate(least):
            others = statistics.median(least[:rank] + least[rank + 1:])
            named = self._named.get(rank)
            if own < max(RATIO * others, LEAST_S) or (named is not None and epoch < named + EVERY):
                continue
            self._named[rank] = epoch
            found.append(self._sentence(rank, epoch, own, others))
        return found

    def _sentence(self, rank: int, epoch: int, own: float, others: float) -> str:
        worker, rest = self._workers[rank], self._workers[:rank] + self._workers[rank + 1:]
        rows, edges = (statistics.median(getattr(one, key) for one in rest) for key in ("rows", "edges"))
        work = max(worker.rows / max(rows, 1), worker.edges / max(edges, 1))
        what = ("its part is that much larger: partition the graph again" if work >= RATIO / 2 else
                "look at what else runs on that host, and at its cores")
        return (f"rank {rank} on host {worker.host} is slow: it computes {own:.3g} s an epoch (epoch {epoch}), the "
                f"median of the others is {others:.3g} s; it has {worker.rows:,} rows and {worker.edges:,} edges, they "
                f"{rows:,.0f} and {edges:,.0f}; {what}")
