# SPDX-License-Identifier: Apache-2.0
"""A pool of workers, one a part, as the controller sees it; and the pool that lives in this process.

`cluster/` has the pool of Ray actors. Both call a method on every worker at the same time and report who failed first.
"""
from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from .. import kernels
from ..errors import DeadlineError, ExchangeError, HostLeavingError, QgnnError, WorkerError
from .formation import Formation
from .group import ConnectionLostError, Group
from .standing import Deadline, Standing

__all__ = ["LocalPool", "MultiplierClient", "Reply", "TimedClient", "WorkerContext", "WorkerPool", "blame",
           "is_consequence", "nobody_answered"]

GRACE_S = 1.0
"""How long to wait, after a worker complained of another one, for that other one's own error."""


class Reply(Protocol):
    """An answer that is still on its way."""

    def result(self, timeout_s: float) -> Any:
        """Wait for it; DeadlineError where it does not come in time, or the server names ranks that did not post."""


class MultiplierClient(Protocol):
    """One rank's way to the multiplier server. Posting does not wait."""

    def post_layer(self, epoch: int, layer: int, dot: float, energy: float) -> Reply:
        """This rank's share of ⟨Δ, G⟩ and ‖H⁰‖²; the reply is λ of the next layer."""

    def post_ranges(self, epoch: int, moments: Mapping[str, Sequence[float]]) -> Reply:
        """This rank's moments of every stage; the reply is the running ranges for the next epoch."""


class TimedClient:
    """A rank's way to the server that adds up, in `wait_s`, the seconds for which its answers were waited for."""

    def __init__(self, client: MultiplierClient) -> None:
        self._client = client
        self.wait_s = 0.0

    def post_layer(self, epoch: int, layer: int, dot: float, energy: float) -> Reply:
        """See MultiplierClient."""
        return _TimedReply(self, self._client.post_layer(epoch, layer, dot, energy))

    def post_ranges(self, epoch: int, moments: Mapping[str, Sequence[float]]) -> Reply:
        """See MultiplierClient."""
        return _TimedReply(self, self._client.post_ranges(epoch, moments))


class _TimedReply:
    def __init__(self, clock: TimedClient, reply: Reply) -> None:
        self._clock, self._reply = clock, reply

    def result(self, timeout_s: float) -> Any:
        start = time.perf_counter()
        try:
            return self._reply.result(timeout_s)
        finally:
            self._clock.wait_s += time.perf_counter() - start


@dataclass(frozen=True)
class WorkerContext:
    """What a worker is told of its place. `group` is None with one worker, `server` where there is none.

    `device` is torch's name of where the rows live in training; None: on the host, by our own kernels. `standing` is
    for the worker to say how far it is.
    """

    rank: int
    size: int
    host: str
    threads: int
    group: Group | None
    server: MultiplierClient | None
    run_id: int
    device: str | None = None
    standing: Standing = field(default_factory=Standing)


class WorkerPool(Protocol):
    """Workers 0 … size−1. After a call has raised, only `call_any` and `close` make sense."""

    @property
    def size(self) -> int: ...

    def call(self, method: str, *args: Any, timeout_s: float, step: Deadline | None = None) -> list[Any]:
        """Call a method with the same arguments on every worker at once; the results in rank order.

        Args: step: for calls in which workers do not wait for one another: until each has come further (its Standing).
        Raises: the first failing worker's error, with rank and host; DeadlineError names ranks that have not answered.
        """

    def call_one(self, rank: int, method: str, *args: Any, timeout_s: float) -> Any:
        """Call a method on one worker."""

    def call_any(self, method: str, *args: Any, timeout_s: float) -> Any:
        """Call a method on every worker that is left, and take the first answer.

        Workers may still hang in an earlier call; the method runs beside it.

        Raises: WorkerError: none has answered, or all with errors.
        """

    def close(self) -> None:
        """End the workers."""


def nobody_answered(method: str, timeout_s: float) -> WorkerError:
    """For WorkerPool.call_any."""
    return WorkerError(f"no worker is left that answers {method}() within {timeout_s:g} s")


def is_consequence(error: BaseException) -> bool:
    """Whether another rank may be the cause: a message was late, wrong, or its connection closed."""
    return isinstance(error, (ExchangeError, DeadlineError))


def blame(failures: Mapping[int, Exception]) -> Exception:
    """The error to report out of those of several ranks: the likely cause, not what followed from it.

    A worker's own error comes before a wrong frame, that before a peer that is late, that before a lost connection; a
    late peer that did not complain itself before one that did. Equal errors of several ranks become one. A lost
    worker's error gets the layer in which others lost their connection to it.
    """
    def weight(rank: int) -> tuple[int, bool, int]:
        error = failures[rank]
        order = (ConnectionLostError, DeadlineError, ExchangeError)
        kind = next((i for i, cls in enumerate(order) if isinstance(error, cls)), len(order))
        return len(order) - kind, getattr(error, "peer", None) in failures, rank

    culprit = min(failures, key=weight)
    first = failures[culprit]
    if not isinstance(first, QgnnError):
        return first
    if first.layer is None:  # a process that died could not say; who waited for it can
        first.layer = next((one.layer for one in failures.values() if isinstance(one, ExchangeError)
                            and one.peer == culprit and one.layer is not None), None)
    alike = [rank for rank, error in sorted(failures.items()) if type(error) is type(first)
             and error.message == first.message and error.peer == first.peer and error.layer == first.layer]
    if len(alike) < 2:
        return first
    hosts = sorted({str(failures[rank].host) for rank in alike} - {"None"})  # type: ignore[attr-defined]
    merged = type(first)(f"ranks {', '.join(map(str, alike))}: {first.message}", host=", ".join(hosts) or None,
                         peer=first.peer, layer=first.layer, file=first.file)
    merged.__cause__ = first.__cause__
    if isinstance(merged, HostLeavingError):
        merged.ranks = tuple(alike)
    if hasattr(first, "remote_traceback"):
        merged.remote_traceback = first.remote_traceback  # type: ignore[attr-defined]
    return merged


class LocalPool:
    """Workers in this process: one is called directly, several live in a thread each, with real gloo between them.

    Args:
        worker_class, kwargs: each worker is worker_class(context, **kwargs); a `close` method, if any, ends it.
        server: has `client(rank)`, which becomes the worker's `context.server`; None: no multiplier server.
        timeout_s: deadline of the group's waits, and of the start.
        threads: of each worker (torch's, and the kernels' pool, which all workers of a process share).
        device: see WorkerContext.
    """

    def __init__(self, worker_class: type, kwargs: Mapping[str, Any], size: int, server: Any = None,
                 timeout_s: float = 60.0, threads: int = 1, device: str | None = None) -> None:
        self.size = size
        self.workers: list[Any] = [None] * size
        self._groups: list[Group | None] = [None] * size
        self._timeout_s = timeout_s
        host, formation = socket.gethostname(), Formation.new()
        contexts = [WorkerContext(rank, size, host, threads, None, server.client(rank) if server is not None else None,
                                  formation.run_id, device) for rank in range(size)]
        kernels.set_threads(threads)
        if size == 1:
            torch.set_num_threads(threads)
            self._threads: list[ThreadPoolExecutor] = []
            self.workers[0] = worker_class(contexts[0], **kwargs)
            return
        store, port = Group.host_store("127.0.0.1")

        def start(rank: int) -> None:
            torch.set_num_threads(threads)
            group = self._groups[rank] = Group.open(
                rank, size, "127.0.0.1", port, "127.0.0.1", timeout_s, store if rank == 0 else None,
                formation=formation)
            self.workers[rank] = worker_class(replace(contexts[rank], group=group), **kwargs)

        self._threads = [ThreadPoolExecutor(1, f"qgnn-rank-{rank}") for rank in range(size)]
        try:
            self._gather([thread.submit(start, rank) for rank, thread in enumerate(self._threads)], 2 * timeout_s,
                         "start")
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *args: Any, timeout_s: float, step: Deadline | None = None) -> list[Any]:
        """See WorkerPool. A single worker runs in the caller's thread, where no deadline can end it; several live and
        freeze with this process, so that nobody is asked how far they are."""
        if self.size == 1:
            return [getattr(self.workers[0], method)(*args)]
        return self._gather([thread.submit(getattr(worker, method), *args)
                             for thread, worker in zip(self._threads, self.workers)], timeout_s, method)

    def call_one(self, rank: int, method: str, *args: Any, timeout_s: float) -> Any:
        """See WorkerPool."""
        if self.size == 1:
            return getattr(self.workers[rank], method)(*args)
        future = self._threads[rank].submit(getattr(self.workers[rank], method), *args)
        return self._gather([future], timeout_s, method, first_rank=rank)[0]

    def call_any(self, method: str, *args: Any, timeout_s: float) -> Any:
        """See WorkerPool."""
        for worker in self.workers:
            try:
                return getattr(worker, method)(*args)
            except QgnnError:
                continue  # another one may have what is asked for
        raise nobody_answered(method, timeout_s)

    def close(self) -> None:
        """See WorkerPool. Ranks that are still busy lose their connections and are waited for until their deadline."""
        busy = []
        for rank, thread in enumerate(self._threads or [None]):
            closing = getattr(self.workers[rank], "close", None)
            if thread is None:
                if closing is not None:
                    closing()
            else:
                busy.append(thread.submit(self._close_rank, rank, closing))
        _, late = wait(busy, timeout=self._timeout_s + 5)
        for thread in self._threads:
            thread.shutdown(wait=not late, cancel_futures=True)
        self.workers, self._groups, self._threads = [None] * self.size, [None] * self.size, []

    def _close_rank(self, rank: int, closing: Any) -> None:
        group = self._groups[rank]
        if group is not None:
            group.close()
        if closing is not None:
            closing()

    def _gather(self, futures: list[Future[Any]], timeout_s: float, method: str, first_rank: int = 0) -> list[Any]:
        ranks = {future: first_rank + i for i, future in enumerate(futures)}
        done, pending = wait(futures, timeout=timeout_s, return_when=FIRST_EXCEPTION)
        failed = _errors(done, ranks)
        if not failed and pending:
            late = ", ".join(str(rank) for rank in sorted(ranks[f] for f in pending))
            raise DeadlineError(f"rank(s) {late} did not answer {method}() within {timeout_s:g} s")
        if failed and all(map(is_consequence, failed.values())):
            until = time.monotonic() + GRACE_S
            while pending and time.monotonic() < until:
                done, pending = wait(futures, timeout=0.02)
            failed = _errors(done, ranks)
        if failed:
            raise blame(failed)
        return [future.result() for future in futures]


def _errors(done: set[Future[Any]], ranks: Mapping[Future[Any], int]) -> dict[int, Exception]:
    """Rank → its error, with the rank filled in."""
    found: dict[int, Exception] = {}
    for future in done:
        error = future.exception()
        if isinstance(error, QgnnError) and error.rank is None:
            error.rank = ranks[future]
        if isinstance(error, Exception):
            found[ranks[future]] = error
        elif error is not None:
            raise error
    return found
