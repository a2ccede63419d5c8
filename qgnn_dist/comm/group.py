# SPDX-License-Identifier: Apache-2.0
"""The workers' process group: gloo over an address of our choosing, deadlines on every wait, bytes counted where sent.

It holds `torch.distributed` process groups as objects and never touches the global default group, so that several
ranks can live in one process (tests) and a run can be formed again after a fault.
"""
from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..errors import DeadlineError, ExchangeError

__all__ = ["Group", "WireCounters"]


@dataclass
class WireCounters:
    """Bytes that this rank has sent, frame headers included.

    `control` is what is not a round of messages: the all-reduce of weight gradients and of small statistics, by the
    ring formula, 2·(p − 1)/p of the array (gloo's ring sends each of p chunks p − 1 times, in two phases).
    """

    forward: int = 0
    backward: int = 0
    evaluation: int = 0
    control: int = 0

    def add(self, kind: str, count: int) -> None:
        """Count bytes under one of the four kinds."""
        setattr(self, kind, getattr(self, kind) + count)


class Group:
    """One rank's membership. Build it by `Group.open`, on every rank at once.

    Attributes:
        rank, size: this worker's number and how many there are. timeout_s: of every wait.
        counters: what this rank has sent.
    """

    def __init__(self, group: Any, store: Any, rank: int, size: int, timeout_s: float) -> None:
        self._group, self._store = group, store
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self.counters = WireCounters()

    @staticmethod
    def host_store(address: str, timeout_s: float = 60.0) -> tuple[Any, int]:
        """Open the meeting point on a free port of this host; returns it (keep it alive) and the port."""
        store = dist.TCPStore(address, 0, None, True, timedelta(seconds=timeout_s), wait_for_workers=False)
        return store, int(store.port)

    @classmethod
    def open(cls, rank: int, size: int, address: str, port: int, prefix: str, bind_address: str, timeout_s: float,
             store: Any = None, rendezvous_s: float | None = None) -> Group:
        """Meet the other ranks.

        Args:
            address, port: the meeting point. prefix: separates one group's keys from another's.
            bind_address: this host's own IP; gloo then needs no look-up of a host name.
            timeout_s: deadline of every later wait. rendezvous_s: deadline of this meeting (default the same).
            store: the object of `host_store` on the rank that hosts it.
        Raises:
            DeadlineError: some ranks did not come; the message names them.
        """
        wait = timedelta(seconds=timeout_s if rendezvous_s is None else rendezvous_s)
        try:
            base = store if store is not None else dist.TCPStore(address, port, None, False, wait)
            keys = dist.PrefixStore(prefix, base)
            keys.set(f"here/{rank}", bind_address)
            cls._await_all(keys, rank, size, wait.total_seconds())
            options = dist.ProcessGroupGloo._Options()
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=bind_address)]
            options._timeout = wait
            return cls(dist.ProcessGroupGloo(keys, rank, size, options), keys, rank, size, timeout_s)
        except (RuntimeError, dist.DistError) as error:
            raise DeadlineError(f"could not meet the other workers at {address}:{port} from {bind_address} within "
                                f"{wait.total_seconds():g} s ({_first_line(error)}); look at the network between the "
                                "hosts, or raise timeouts.rendezvous_s", rank=rank) from None

    @staticmethod
    def _await_all(keys: Any, rank: int, size: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        names = [f"here/{r}" for r in range(size)]
        while not keys.check(names):
            if time.monotonic() > end:
                missing = [r for r in range(size) if not keys.check([names[r]])]
                raise DeadlineError(f"rank(s) {', '.join(map(str, missing))} did not come to the rendezvous within "
                                    f"{seconds:g} s; look at those hosts, or raise timeouts.rendezvous_s", rank=rank)
            time.sleep(0.01)

    def irecv(self, buffer: np.ndarray, peer: int, tag: int) -> Any:
        """Start to receive into a uint8 array, C-contiguous and kept alive by the caller; returns the work to wait for."""
        return self._start(self._group.recv, buffer, peer, tag)

    def isend(self, buffer: np.ndarray, peer: int, tag: int, kind: str) -> Any:
        """Start to send a uint8 array and count its bytes; it must not change until the work is done."""
        self.counters.add(kind, buffer.nbytes)
        return self._start(self._group.send, buffer, peer, tag)

    def _start(self, operation: Any, buffer: np.ndarray, peer: int, tag: int) -> Any:
        try:
            return operation([torch.from_numpy(buffer)], peer, tag)
        except RuntimeError as error:
            raise ExchangeError(f"connection lost: {_first_line(error)}", rank=self.rank, peer=peer) from None

    def wait(self, work: Any, peer: int, layer: int, end: float) -> None:
        """Wait for one work until the monotonic time `end`.

        Raises:
            DeadlineError: it took too long. ExchangeError: the peer's connection broke.
        """
        left = max(end - time.monotonic(), 0.001)
        try:
            work.wait(timedelta(seconds=left))
        except RuntimeError as error:
            if time.monotonic() >= end - 0.05 or "imed out" in str(error):
                raise DeadlineError(f"nothing from the peer within {self.timeout_s:g} s; look at its log, or raise "
                                    "timeouts.exchange_s", rank=self.rank, peer=peer, layer=layer) from None
            raise ExchangeError(f"connection lost: {_first_line(error)}", rank=self.rank, peer=peer,
                                layer=layer) from None

    def all_reduce_sum(self, array: np.ndarray, kind: str = "control") -> None:
        """Add an array (float32, float64 or int64, C-contiguous) over all ranks, in place; the same bits on each rank.

        Raises:
            DeadlineError, ExchangeError: a rank is missing or lost.
        """
        options = dist.AllreduceOptions()
        options.timeout = timedelta(seconds=self.timeout_s)
        self.counters.add(kind, 2 * (self.size - 1) * array.nbytes // self.size)
        start = time.monotonic()
        try:
            self._group.allreduce([torch.from_numpy(array.reshape(-1))], options).wait()
        except RuntimeError as error:
            if time.monotonic() - start >= self.timeout_s - 0.05:
                raise DeadlineError(f"a sum over all {self.size} ranks took more than {self.timeout_s:g} s; some rank "
                                    "did not come, see its log, or raise timeouts.exchange_s", rank=self.rank) from None
            raise ExchangeError(f"connection lost during a sum over all ranks: {_first_line(error)}",
                                rank=self.rank) from None

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.all_reduce_sum(np.zeros(1, np.int64))

    def close(self) -> None:
        """Leave. Peers that still wait for this rank get an error at once."""
        self._group = self._store = None


def _first_line(error: BaseException) -> str:
    lines: Sequence[str] = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
