# SPDX-License-Identifier: Apache-2.0
"""The process of one worker. Heavy imports wait until the number of threads is known."""
from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .failure import attempt

if TYPE_CHECKING:
    from ..comm.formation import Formation

__all__ = ["WorkerActor"]


class WorkerActor:
    """Ray actor around one worker object; its calls run one after the other, in one thread.

    Args:
        environment: variables of the controller that decide how this process computes (QGNN_SIMD).
    """

    def __init__(self, rank: int, size: int, threads: int, environment: Mapping[str, str]) -> None:
        os.environ.update(environment)
        # Ray sets it to the reserved CPUs, 1 for a fraction; `cluster.threads` decides.
        os.environ["OMP_NUM_THREADS"] = str(threads)
        self._rank, self._size, self._threads = rank, size, threads
        self._host = socket.gethostname()
        self._group: Any = None
        self._worker: Any = None
        self._store: Any = None

    def hello(self) -> Any:
        """Import what a worker needs, set its threads, and say where it is."""
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
        return attempt(lambda: getattr(self._worker, method)(*args), host=self._host, rank=self._rank)

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

        from .. import kernels
        from ..comm.device import sees_gpu

        torch.set_num_threads(self._threads)
        kernels.set_threads(self._threads)
        return {"host": self._host, "address": _own_address(), "pid": os.getpid(), "sees_gpu": sees_gpu()}

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
                                formation.run_id, device)
        self._worker = worker_class(context, **kwargs)


def _own_address() -> str:
    """The address by which Ray's other hosts reach this one."""
    import ray

    return str(ray.util.get_node_ip_address())
