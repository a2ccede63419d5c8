# SPDX-License-Identifier: Apache-2.0
"""Workers that are called together: what a pool is, and the one that lives in this process.

A worker class is built as `worker_class(context, **kwargs)`; its public methods are then called by name on all ranks at
once. `cluster/` has the pool of Ray actors.
"""
from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .. import kernels
from ..errors import DeadlineError
from .group import Group

__all__ = ["LocalPool", "MultiplierClient", "Reply", "WorkerContext", "WorkerPool"]


class Reply(Protocol):
    """An answer that is still on its way."""

    def result(self, timeout_s: float) -> Any:
        """Wait for it; DeadlineError, naming who is missing, after `timeout_s` seconds."""


class MultiplierClient(Protocol):
    """One rank's way to the multiplier server; neither call waits."""

    def post_layer(self, epoch: int, layer: int, dot: float, energy: float) -> Reply:
        """This rank's share of ⟨Δ, G⟩ and ‖H⁰‖²; the answer is the next layer's λ."""

    def post_ranges(self, epoch: int, moments: Mapping[str, Sequence[float]]) -> Reply:
        """This rank's moments of every stage; the answer holds the running ranges."""


@dataclass
class WorkerContext:
    """What a worker is told about its place.

    Attributes:
        rank, size: its number among the workers. host: the machine's name. threads: of its kernels.
        group: the process group, None with one worker. server: None where the job has no multiplier server.
        run_id: u64, the same on all workers.
    """

    rank: int
    size: int
    host: str
    threads: int
    group: Group | None
    server: MultiplierClient | None
    run_id: int


class WorkerPool(Protocol):
    """Workers of one job, in rank order."""

    size: int

    def call(self, method: str, *args: Any, timeout_s: float) -> list[Any]:
        """Call a method on all ranks with the same arguments; results in rank order. The first error ends the call."""

    def call_one(self, rank: int, method: str, *args: Any, timeout_s: float) -> Any:
        """Call a method on one rank."""

    def close(self) -> None:
        """End the workers."""


class LocalPool:
    """Workers in this process: one is called directly, several run as threads with real gloo on the loopback.

    Args:
        server: source of each rank's multiplier client (`server.client(rank)`), or None.
        timeout_s: deadline of every wait between workers. threads: of the kernels.
    Attributes:
        workers: the worker objects, in rank order.
    """

    def __init__(self, worker_class: type, kwargs: dict[str, Any], size: int, *, server: Any = None,
                 timeout_s: float = 60.0, threads: int | None = None) -> None:
        self.size = size
        threads = threads or os.cpu_count() or 1
        kernels.set_threads(threads)
        run_id, host = secrets.randbits(63), socket.gethostname()
        groups: list[Group | None] = [None]
        if size > 1:
            store, port = Group.host_store("127.0.0.1", timeout_s)
            groups = self._together([
                lambda rank=rank: Group.open(rank, size, "127.0.0.1", port, str(run_id), "127.0.0.1", timeout_s,
                                             store=store if rank == 0 else None) for rank in range(size)], timeout_s)
        self.groups = groups
        self.workers = [
            worker_class(WorkerContext(rank, size, host, threads, groups[rank],
                                       server.client(rank) if server is not None else None, run_id), **kwargs)
            for rank in range(size)]

    def call(self, method: str, *args: Any, timeout_s: float) -> list[Any]:
        """See WorkerPool."""
        if self.size == 1:
            return [getattr(self.workers[0], method)(*args)]
        return self._together([lambda w=w: getattr(w, method)(*args) for w in self.workers], timeout_s)

    def call_one(self, rank: int, method: str, *args: Any, timeout_s: float) -> Any:
        """See WorkerPool."""
        return getattr(self.workers[rank], method)(*args)

    def close(self) -> None:
        """Close the workers that can be closed, and leave the groups."""
        for worker in self.workers:
            if hasattr(worker, "close"):
                worker.close()
        for group in self.groups:
            if group is not None:
                group.close()

    @staticmethod
    def _together(calls: list[Any], timeout_s: float) -> list[Any]:
        """Run one call a thread; raise the first error in time, since the others follow from it."""
        results: list[Any] = [None] * len(calls)
        errors: list[BaseException] = []

        def run(rank: int) -> None:
            try:
                results[rank] = calls[rank]()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(len(calls))]
        for thread in threads:
            thread.start()
        end = time.monotonic() + timeout_s
        for thread in threads:
            thread.join(max(end - time.monotonic(), 0))
        if errors:
            raise errors[0]
        late = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
        if late:
            raise DeadlineError(f"rank(s) {', '.join(map(str, late))} did not answer within {timeout_s:g} s")
        return results
