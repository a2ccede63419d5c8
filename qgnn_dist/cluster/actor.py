# SPDX-License-Identifier: Apache-2.0
"""The process of one worker. Heavy imports wait until the number of threads is known."""
from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ray

from ..comm.standing import Report, Standing
from .failure import attempt
from .telemetry import Telemetry, WorkerTelemetry

if TYPE_CHECKING:
    from ..comm.formation import Formation

__all__ = ["WATCH", "WorkerActor"]

_LOG = logging.getLogger(__name__)
WATCH = "watch"
"""Ray's concurrency group, a thread of its own, in which a worker answers while it computes or waits."""


class WorkerActor:
    """Ray actor around one worker object; its calls run one after the other, in one thread, beside which `report`
    answers at any time. SIGTERM does not end it: it is noted, for the controller to move the worker elsewhere.

    Args:
        environment: variables of the controller that decide how this process computes (QGNN_SIMD).
        telemetry: what it is to tell besides its results; None: nothing.
    """

    def __init__(self, rank: int, size: int, threads: int, environment: Mapping[str, str],
                 telemetry: Telemetry | None = None) -> None:
        os.environ.update(environment)
        # Ray sets it to the reserved CPUs, 1 for a fraction; `cluster.threads` decides.
        os.environ["OMP_NUM_THREADS"] = str(threads)
        self._rank, self._size, self._threads = rank, size, threads
        self._host = socket.gethostname()
        self._telemetry = WorkerTelemetry(telemetry, self._host, rank)
        self._standing = Standing()
        _note_sigterm(self._standing)
        self._group: Any = None
        self._worker: Any = None
        self._store: Any = None

    def hello(self) -> Any:
        """Import what a worker needs, set its threads, and say where it is, and of which version."""
        return attempt(self._hello, host=self._host, rank=self._rank)

    def host_store(self, timeout_s: float) -> Any:
        """On rank 0: start the store by which the group meets; its address and port."""
        def start() -> tuple[str, int]:
            from ..comm.group import Group

            self._store, port = Group.host_store(_own_address(), timeout_s)
            return _own_address(), port

        return attempt(start, host=self._host, rank=self._rank)

    def build(self, worker_class: type, kwargs: Mapping[str, Any], meeting: tuple[str, int] | None,
              formation: Formation, timeouts: Any, server: Any, device: str | None = None) -> Any:
        """Meet the other workers at `meeting` (None: there are none) and build the worker object.

        Args:
            formation: comes by this call and not with the actor's creation, whose arguments Ray's head keeps.
            device: see comm.pool.WorkerContext.
        """
        return attempt(lambda: self._build(worker_class, kwargs, meeting, formation, timeouts, server, device),
                       host=self._host, rank=self._rank)

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the worker object; its result, or a Failure."""
        self._standing.step(f"{method}()")
        self._telemetry.before(method, args)
        try:
            result = attempt(lambda: getattr(self._worker, method)(*args), host=self._host, rank=self._rank)
            return self._telemetry.after(method, args, result)
        finally:
            self._standing.step(f"done with {method}()")

    @ray.method(concurrency_group=WATCH)
    def call_aside(self, method: str, *args: Any) -> Any:
        """`call` beside the worker's own thread, which may hang in a call: for methods that say that they allow it."""
        return attempt(lambda: getattr(self._worker, method)(*args), host=self._host, rank=self._rank)

    @ray.method(concurrency_group=WATCH)
    def report(self, stacks_after_s: float) -> Report:
        """Where the worker stands, with stacks where it has not moved for so many seconds."""
        return self._standing.report(stacks_after_s)

    def close(self) -> None:
        """Close the worker object and leave the group."""
        closing = getattr(self._worker, "close", None)
        if closing is not None:
            closing()
        if self._group is not None:
            self._group.close()
        self._worker = self._group = self._store = None

    def _hello(self) -> dict[str, Any]:
        import torch

        from .. import __version__, kernels
        from ..comm.device import sees_gpu

        torch.set_num_threads(self._threads)
        kernels.set_threads(self._threads)
        return {"host": self._host, "address": _own_address(), "pid": os.getpid(), "sees_gpu": sees_gpu(),
                "version": __version__, "node": ray.get_runtime_context().get_node_id()}

    def _build(self, worker_class: type, kwargs: Mapping[str, Any], meeting: tuple[str, int] | None,
               formation: Formation, timeouts: Any, server: Any, device: str | None) -> None:
        from ..comm.group import Group
        from ..comm.pool import WorkerContext
        from .server import RayMultiplierClient

        if meeting is not None:
            self._group = Group.open(self._rank, self._size, *meeting, _own_address(), timeouts.exchange_s, self._store,
                                     formation=formation, rendezvous_s=timeouts.rendezvous_s)
        client = RayMultiplierClient(server, self._rank) if server is not None else None
        context = WorkerContext(self._rank, self._size, self._host, self._threads, self._group, client,
                                formation.run_id, device, self._standing)
        self._worker = worker_class(context, **kwargs)


def _own_address() -> str:
    """The address by which Ray's other hosts reach this one."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def _note_sigterm(standing: Standing) -> None:
    """Have SIGTERM noted, at once and whatever the main thread does: a handler in Python would wait for that thread."""
    there, here = os.pipe()
    os.set_blocking(here, False)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    signal.set_wakeup_fd(here, warn_on_full_buffer=False)

    def watch() -> None:
        while numbers := os.read(there, 16):
            if signal.SIGTERM in numbers and not standing.leaving:
                standing.leaving = True
                _LOG.info("SIGTERM: this worker goes elsewhere after its epoch")

    threading.Thread(target=watch, name="qgnn-sigterm", daemon=True).start()
