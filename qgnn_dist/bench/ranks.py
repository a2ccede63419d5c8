# SPDX-License-Identifier: Apache-2.0
"""Workers of a bench in processes of their own, one a host: hosts are network namespaces, or this machine itself.

What trains is training.worker.TrainWorker over comm's Group and Exchange, as under Ray; what drives it lies here, so
that several trainings can live in the same processes and take turns on the same links.
"""
from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any, Protocol

from ..comm.formation import Formation
from ..comm.pool import blame, is_consequence
from ..config import RunConfig
from ..errors import DeadlineError, QgnnError, WorkerError
from ..model.features import FeatureStatistics
from ..propagation.multiplier import MultiplierRule
from ..store.reader import Store

__all__ = ["Hosts", "Loopback", "Ranks", "Training"]

_START_S = 120.0
_GRACE_S = 1.0
_LOG_BYTES = 2000


class Hosts(Protocol):
    """Where processes run (bench.netns.NetnsCluster, Loopback)."""

    def address(self, i: int) -> str: ...

    def exec(self, i: int, command: Sequence[str], env: Mapping[str, str] | None = None, *,
             stdout: int | IO[Any] | None = None, stderr: int | IO[Any] | None = None,
             pass_fds: Sequence[int] = ()) -> subprocess.Popen[str]: ...

    def close(self) -> None: ...


class Loopback:
    """This machine as every host."""

    def address(self, i: int) -> str:
        """All hosts are one."""
        return "127.0.0.1"

    def exec(self, i: int, command: Sequence[str], env: Mapping[str, str] | None = None, *,
             stdout: int | IO[Any] | None = None, stderr: int | IO[Any] | None = None,
             pass_fds: Sequence[int] = ()) -> subprocess.Popen[str]:
        """Start a command, in a session of its own."""
        return subprocess.Popen(command, env={**os.environ, **(env or {})}, stdout=stdout, stderr=stderr, text=True,
                                start_new_session=True, pass_fds=pass_fds)

    def close(self) -> None:
        """Nothing was made."""


class Ranks:
    """`size` rank processes, host i for rank i, that have met; and a multiplier server's process on host 0.

    Args:
        threads: of each rank. timeout_s: deadline of the group's waits.
    Attributes:
        idle_bytes: of each rank, the anonymous memory of its process with everything loaded and nothing read.
    """

    def __init__(self, hosts: Hosts, size: int, *, threads: int = 1, timeout_s: float = 120.0) -> None:
        self.size, self._hosts = size, hosts
        self._pipes: list[Connection] = []
        self._processes: list[subprocess.Popen[str]] = []
        self._logs: list[Path] = []
        self._folder = tempfile.TemporaryDirectory(prefix="qgnn-ranks-")
        self._cells = 0
        try:
            for i in [*range(size), 0]:
                self._begin(i, threads)
            self._server = size
            formation = Formation.new()
            self.idle_bytes: list[int] = self._each(
                [("start", (rank, size, threads, formation)) for rank in range(size)], _START_S)
            port = self._one(self._server, _START_S, "serve", hosts.address(0))
            self._meeting = hosts.address(0), int(port)
            if size > 1:
                port = self._one(0, _START_S, "host_store", hosts.address(0))
                self._each([("meet", (hosts.address(0), port, hosts.address(rank), timeout_s))
                            for rank in range(size)], _START_S)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def training(self, store: Store, config: RunConfig) -> Training:
        """Workers of one training, set up and calibrated."""
        self._cells += 1
        return Training(self, f"cell-{self._cells}", store, config)

    def every(self, method: str, *args: Any, timeout_s: float) -> list[Any]:
        """Call all ranks' processes; the answers in rank order."""
        return self._each([(method, args)] * self.size, timeout_s)

    def rank(self, rank: int, method: str, *args: Any, timeout_s: float) -> Any:
        """Call one rank's process."""
        return self._one(rank, timeout_s, method, *args)

    def server(self, method: str, *args: Any) -> Any:
        """Call the multiplier server's process."""
        return self._one(self._server, _START_S, method, *args)

    @property
    def meeting(self) -> tuple[str, int]:
        """Where the multiplier server listens."""
        return self._meeting

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            try:
                process.wait(10.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._pipes, self._processes = [], []
        self._folder.cleanup()

    def _begin(self, host: int, threads: int) -> None:
        mine, theirs = Pipe()
        log = Path(self._folder.name) / f"{len(self._processes)}.log"
        with open(log, "w", encoding="utf-8") as out:
            self._processes.append(self._hosts.exec(
                host, [sys.executable, "-m", "qgnn_dist.bench.rank", str(theirs.fileno())],
                {"OMP_NUM_THREADS": str(threads)}, stdout=subprocess.DEVNULL, stderr=out,
                pass_fds=[theirs.fileno()]))
        theirs.close()
        self._pipes.append(mine)
        self._logs.append(log)

    def _one(self, number: int, timeout_s: float, method: str, *args: Any) -> Any:
        self._pipes[number].send((method, args))
        return self._take([number], timeout_s, method)[0]

    def _each(self, calls: Sequence[tuple[str, tuple[Any, ...]]], timeout_s: float) -> list[Any]:
        for number, call in enumerate(calls):
            self._pipes[number].send(call)
        return self._take(range(len(calls)), timeout_s, calls[0][0])

    def _take(self, numbers: Sequence[int], timeout_s: float, method: str) -> list[Any]:
        """Answers of some processes; raises the error that is the likely cause where some failed."""
        end, found, failed = time.monotonic() + timeout_s, dict[int, Any](), dict[int, Exception]()
        waiting: dict[Any, int] = {self._pipes[number]: number for number in numbers}
        while waiting:
            left = end - time.monotonic()
            if failed:  # a peer that is late has its own error soon
                left = min(left, _GRACE_S) if all(map(is_consequence, failed.values())) else 0.0
            ready = wait(list(waiting), max(left, 0.0))
            for pipe in ready:
                number = waiting.pop(pipe)
                fine, value = self._answer(number)
                if fine:
                    found[number] = value
                else:
                    failed[number] = value
            if not ready:
                break
        if failed:
            raise blame(failed)
        if waiting:
            late = ", ".join(str(number) for number in sorted(waiting.values()))
            raise DeadlineError(f"rank(s) {late} did not answer {method}() within {timeout_s:g} s")
        return [found[number] for number in numbers]

    def _answer(self, number: int) -> tuple[bool, Any]:
        """Whether a process's call went well, and its value or error."""
        try:
            fine, value = self._pipes[number].recv()
        except (EOFError, OSError):
            fine, value = False, WorkerError(f"the process ended; its last words: {self._words(number)}")
        if isinstance(value, QgnnError) and value.rank is None:
            value.rank = number
        return fine, value

    def _words(self, number: int) -> str:
        text = self._logs[number].read_text(encoding="utf-8", errors="replace")[-_LOG_BYTES:].strip()
        return text or f"none (exit code {self._processes[number].poll()})"


class Training:
    """One training on the ranks (comm.pool.WorkerPool), with its multiplier server; `setup` and `calibrate` are done.

    Attributes: norm, signed: how features are normalised. nodes: split → labelled nodes.
    """

    def __init__(self, ranks: Ranks, cell: str, store: Store, config: RunConfig) -> None:
        from ..model.features import choose_norm

        self._ranks, self._cell, self._config = ranks, cell, config
        self._epoch = 0
        self.size = ranks.size
        rule = MultiplierRule.of(config, store.num_edges)
        ranks.server("add_server", cell, ranks.size, rule, config.timeouts.server_s)
        kwargs = {"store": str(store.path), "config": config}
        ranks.every("build", cell, kwargs, ranks.meeting, timeout_s=_START_S)
        loaded = self.call("load", store.fingerprint, timeout_s=config.timeouts.start_s)
        statistics = sum((w["statistics"] for w in loaded), FeatureStatistics())
        self.nodes = {name: sum(w["nodes"][name] for w in loaded) for name in loaded[0]["nodes"]}
        norm = config.model.feature_norm
        self.norm = choose_norm(statistics, store.num_features) if norm == "auto" else norm
        self.signed = statistics.negative > 0
        self.call("setup", self.norm, self.signed, self.nodes["train"], timeout_s=_START_S)
        self.call("calibrate", timeout_s=3600.0)

    def call(self, method: str, *args: Any, timeout_s: float) -> list[Any]:
        """See WorkerPool."""
        return self._ranks.every("call", self._cell, method, *args, timeout_s=timeout_s)

    def call_one(self, rank: int, method: str, *args: Any, timeout_s: float) -> Any:
        """See WorkerPool."""
        return self._ranks.rank(rank, "call", self._cell, method, *args, timeout_s=timeout_s)

    def server_call(self, method: str, *args: Any) -> Any:
        """Call a plain method of the multiplier server."""
        return self._ranks.server("call_server", self._cell, method, *args)

    def epoch(self, *, evaluate: bool = False, timeout_s: float = 3600.0) -> tuple[float, list[dict[str, Any]]]:
        """One epoch on all ranks: its seconds, as who drives it sees them, and each rank's result with `cpu_s`, the
        seconds of CPU that its process took."""
        self._epoch += 1
        start = time.perf_counter()
        found = self._ranks.every("timed", self._cell, "train_epoch", self._epoch, evaluate, timeout_s=timeout_s)
        seconds = time.perf_counter() - start
        return seconds, [{**result, "cpu_s": cpu} for result, cpu in found]

    def close(self) -> None:
        """Forget the workers and their server."""
        self._ranks.every("drop", self._cell, timeout_s=_START_S)
        self._ranks.server("drop_server", self._cell)
