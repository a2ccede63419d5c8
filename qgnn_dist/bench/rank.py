# SPDX-License-Identifier: Apache-2.0
"""A process of a bench: one rank of real workers, or the multiplier server that they share.

Started by `bench.ranks` with the number of an open pipe, from which it takes calls until the pipe closes. The server
and its clients talk by TCP, a line of JSON a message: the workers' hosts may lie in network namespaces.
"""
from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from ..errors import DeadlineError, QgnnError, WorkerError
from ..propagation.multiplier import ANSWER_S

__all__ = ["RankProcess", "main"]

_SERVER_ERRORS = {"DeadlineError": DeadlineError}


class RankProcess:
    """What the parent may call. A rank can hold several workers at a time, `cell` names them; all share one group."""

    def __init__(self) -> None:
        self._rank, self._size, self._threads = 0, 1, 1
        self._formation: Any = None
        self._group: Any = None
        self._store: Any = None
        self._workers: dict[str, Any] = {}
        self._service: _Service | None = None

    def start(self, rank: int, size: int, threads: int, formation: Any, modules: Sequence[str] = ()) -> int:
        """Load what a worker needs; returns the anonymous bytes of a process that has done no more than that.

        Args: formation: of all ranks (comm.formation.Formation).
        """
        import importlib

        import torch

        from .. import kernels
        from ..memory import status_bytes
        from .footprint import wake_torch

        for module in ("qgnn_dist.training.worker", *modules):
            importlib.import_module(module)
        self._rank, self._size, self._threads, self._formation = rank, size, threads, formation
        torch.set_num_threads(threads)
        kernels.set_threads(threads)
        wake_torch()  # its first products and optimiser allocate some 100 MiB for good
        return status_bytes("RssAnon")

    def host_store(self, address: str) -> int:
        """On rank 0: start the store by which the ranks meet; its port."""
        from ..comm.group import Group

        self._store, port = Group.host_store(address)
        return port

    def meet(self, address: str, port: int, own: str, timeout_s: float) -> None:
        """Connect to the other ranks."""
        from ..comm.group import Group

        self._group = Group.open(self._rank, self._size, address, port, own, timeout_s, self._store,
                                 formation=self._formation)

    def build(self, cell: str, kwargs: Mapping[str, Any], server: tuple[str, int]) -> None:
        """A TrainWorker."""
        from ..comm.pool import WorkerContext
        from ..training.worker import TrainWorker

        client = _Client(server, cell, self._rank)
        context = WorkerContext(self._rank, self._size, socket.gethostname(), self._threads, self._group, client,
                                self._formation.run_id)
        self._workers[cell] = TrainWorker(context, **kwargs)

    def drop(self, cell: str) -> None:
        """Forget a worker."""
        worker = self._workers.pop(cell, None)
        if worker is not None:
            worker.close()

    def call(self, cell: str, method: str, *args: Any) -> Any:
        """Call a worker."""
        return getattr(self._workers[cell], method)(*args)

    def timed(self, cell: str, method: str, *args: Any) -> tuple[Any, float]:
        """Call a worker; its answer, and the seconds of CPU that this process took for it."""
        start = time.process_time()
        value = self.call(cell, method, *args)
        return value, time.process_time() - start

    def serve(self, address: str) -> int:
        """In the server's process: listen there; the port."""
        self._service = _Service(address)
        return self._service.port

    def add_server(self, cell: str, size: int, rule: Any, deadline_s: float) -> None:
        """A MultiplierServer for the workers of a cell."""
        from ..propagation.multiplier import MultiplierServer

        assert self._service is not None
        self._service.servers[cell] = MultiplierServer(size, rule, deadline_s)

    def call_server(self, cell: str, method: str, *args: Any) -> Any:
        """Call a plain method of a cell's server."""
        assert self._service is not None
        return getattr(self._service.servers[cell], method)(*args)

    def drop_server(self, cell: str) -> None:
        """Forget a server."""
        assert self._service is not None
        self._service.servers.pop(cell, None)


class _Service:
    """Multiplier servers behind a port, on an event loop in a thread of its own."""

    def __init__(self, address: str) -> None:
        self.servers: dict[str, Any] = {}
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="qgnn-multiplier-server", daemon=True).start()
        listening = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._talk, address, 0), self._loop).result()
        self.port = int(listening.sockets[0].getsockname()[1])
        self._tasks: set[asyncio.Task[None]] = set()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            task = asyncio.create_task(self._answer(json.loads(line), writer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, asked: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        answer: dict[str, Any] = {"number": asked["number"]}
        try:
            answer["value"] = await getattr(self.servers[asked["cell"]], asked["method"])(*asked["args"])
        except Exception as error:  # the rank that asked raises it
            answer |= {"error": type(error).__name__, "text": getattr(error, "message", str(error))}
        writer.write(json.dumps(answer).encode() + b"\n")


class _Client:
    """One rank's way to a cell's server (comm.pool.MultiplierClient)."""

    def __init__(self, server: tuple[str, int], cell: str, rank: int) -> None:
        self._socket = socket.create_connection(server, timeout=30.0)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._lines = self._socket.makefile("rb")
        self._cell, self._rank = cell, rank
        self._asked = 0
        self._answers: dict[int, dict[str, Any]] = {}

    def post_layer(self, epoch: int, layer: int, dot: float, energy: float) -> _Reply:
        """See MultiplierServer.post_layer; does not wait."""
        return self._post("post_layer", epoch, layer, self._rank, dot, energy)

    def post_ranges(self, epoch: int, moments: Mapping[str, Sequence[float]]) -> _Reply:
        """See MultiplierServer.post_ranges; does not wait."""
        return self._post("post_ranges", epoch, self._rank,
                          {name: [float(v) for v in values] for name, values in moments.items()})

    def _post(self, method: str, *args: Any) -> _Reply:
        self._asked += 1
        line = json.dumps({"number": self._asked, "cell": self._cell, "method": method, "args": args})
        self._socket.sendall(line.encode() + b"\n")
        return _Reply(self, self._asked, method)

    def take(self, number: int, what: str, timeout_s: float) -> Any:
        """Wait for one answer; others that come before it are kept."""
        self._socket.settimeout(timeout_s + ANSWER_S)
        while number not in self._answers:
            try:
                line = self._lines.readline()
            except OSError:
                raise DeadlineError(f"no answer of the multiplier server to {what} within {timeout_s:g} s",
                                    rank=self._rank) from None
            if not line:
                raise WorkerError("the multiplier server is gone", rank=self._rank)
            answer = json.loads(line)
            self._answers[answer["number"]] = answer
        answer = self._answers.pop(number)
        if "error" in answer:
            raise _SERVER_ERRORS.get(answer["error"], WorkerError)(answer["text"], rank=self._rank)
        return answer["value"]


class _Reply:
    """An answer that is still on its way."""

    def __init__(self, client: _Client, number: int, what: str) -> None:
        self._client, self._number, self._what = client, number, what

    def result(self, timeout_s: float) -> Any:
        """See comm.pool.Reply."""
        return self._client.take(self._number, self._what, timeout_s)


def main() -> None:
    """Take calls until the parent closes the pipe."""
    pipe, process = Connection(int(sys.argv[1])), RankProcess()
    while True:
        try:
            method, args = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send((True, getattr(process, method)(*args)))
        except QgnnError as error:
            pipe.send((False, error))
        except Exception as error:
            traceback.print_exc()
            pipe.send((False, WorkerError(f"{type(error).__name__}: {error}")))
    os._exit(0)  # gloo's and the event loop's threads have nothing to say any more


if __name__ == "__main__":
    main()
