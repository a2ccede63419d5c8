# SPDX-License-Identifier: Apache-2.0
"""The workers of a run as one group: point-to-point bytes over gloo, a sum over all ranks, and deadlines on every wait.

`ProcessGroupGloo` is used directly and not through torch's global default group, so that a process may hold several
groups, one a thread. gloo is bound to a given address and asks no name server; torch's store looks the other side's
name up for its log, which delays the start by seconds where a name server exists in name only.
"""
from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..errors import DeadlineError, ExchangeError
from .formation import Formation
from .wire import HEADER_BYTES, Header, check_frame, check_header, seal_frame

__all__ = ["ConnectionLostError", "Deadline", "Group", "Pending", "WireCounters"]

_ELEMENTS = {np.dtype(np.float32): 0, np.dtype(np.float64): 1, np.dtype(np.int64): 2}
EXCHANGE_LANE, CONTROL_LANE = 0, 1


class ConnectionLostError(ExchangeError):
    """A peer's connection closed: as a rule the consequence of an error on that peer, not a cause."""


@dataclass
class WireCounters:
    """Bytes that this rank has sent, headers included, by what they were sent for.

    Counted as handed to gloo; gloo's own preambles and TCP's headers come on top.
    """

    forward: int = 0
    backward: int = 0
    evaluation: int = 0
    control: int = 0

    def add(self, kind: str, num_bytes: int) -> None:
        """Count a message; `kind` is one of the four names."""
        setattr(self, kind, getattr(self, kind) + num_bytes)

    @property
    def total(self) -> int:
        """All four together."""
        return self.forward + self.backward + self.evaluation + self.control


class Deadline:
    """A moment that several waits share."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._end = time.monotonic() + limit_s

    def left(self) -> timedelta:
        """Time until then. Never 0, which gloo takes for "no deadline"."""
        return timedelta(seconds=max(self._end - time.monotonic(), 1e-3))

    def passed(self) -> bool:
        """Whether it is over."""
        return time.monotonic() >= self._end


@dataclass
class Pending:
    """A message under way. It keeps the buffer alive, which must not be touched until `Group.wait` returned."""

    peer: int
    receiving: bool
    work: Any
    tensor: torch.Tensor


def _tag(num_bytes: int, lane: int, header: bool) -> int:
    """gloo ends the receiving process when a message is longer than the buffer posted for it. With the size in the tag
    a message of another size finds no buffer at all, and the header, of fixed size, tells what is wrong."""
    return (num_bytes & (2**27 - 1)) << 3 | lane << 1 | int(header)


class Group:
    """`size` ranks that can send bytes to one another; every rank opens it at the same time (`Group.open`).

    One thread at a time may use it. All waits end: a peer that is late raises DeadlineError, one whose connection
    closed ConnectionLostError, and after either the group is of no more use.

    Attributes:
        counters: what this rank has sent. timeout_s: deadline of an all-reduce, in seconds. reduce_s: seconds spent in
            all-reduces. run_id, generation, key: of the formation, for the headers and MACs of all frames.
    """

    def __init__(self, rank: int, size: int, timeout_s: float, formation: Formation, backend: Any, place: Any) -> None:
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self.run_id, self.generation = formation.run_id, formation.generation
        self.key = formation.frame_key()
        self.counters = WireCounters()
        self.reduce_s = 0.0
        self._backend, self._place = backend, place
        self._frames: Counter[tuple[int, int, bool]] = Counter()
        self._reduces = 0

    @staticmethod
    def host_store(address: str, timeout_s: float = 60.0) -> tuple[Any, int]:
        """Start the store by which the ranks find one another, on one rank's own address and a free port.

        Returns:
            The store, to be given to this rank's `open` and kept until then, and its port.
        """
        listener = socket.create_server((address, 0), family=_family(address), backlog=1024)
        port = listener.getsockname()[1]
        store = dist.TCPStore(address, port, is_master=True, wait_for_workers=False,
                              master_listen_fd=listener.detach(), timeout=timedelta(seconds=timeout_s))
        return store, port

    @classmethod
    def open(cls, rank: int, size: int, address: str, port: int, bind_address: str, timeout_s: float,
             store: Any = None, *, formation: Formation, rendezvous_s: float | None = None) -> Group:
        """Meet the other ranks and connect to each of them. Blocks until all are there.

        Args:
            address, port: of the store (`host_store`).
            bind_address: this host's own IP address, by which the others can reach it.
            timeout_s: deadline of an all-reduce. rendezvous_s: deadline of this call, `timeout_s` if None.
            store: on the rank that hosts the store, the store itself.
            formation: of these ranks, and of one `open` of each: its key must not count frames from 0 again.
        Raises:
            DeadlineError: names the ranks that did not come. ExchangeError: a rank could not be connected to.
        """
        limit_s = timeout_s if rendezvous_s is None else rendezvous_s
        deadline = Deadline(limit_s)
        if store is None:
            try:
                store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False,
                                      timeout=deadline.left())
            except RuntimeError as error:
                raise DeadlineError(f"rank 0's rendezvous at {address}:{port} cannot be reached within {limit_s:g} s "
                                    f"({_first_line(error)}); is a firewall between the hosts? timeouts.rendezvous_s "
                                    "sets the wait", rank=rank, peer=0) from None
        place = dist.PrefixStore(formation.meeting_place(), store)
        _await_all(place, rank, size, deadline)
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=bind_address)]
        options._threads = 1
        options._timeout = max(deadline.left(), timedelta(seconds=1))
        try:
            backend = gloo(place, rank, size, options)
        except RuntimeError as error:
            raise ExchangeError(f"cannot connect to the other {size - 1} ranks from {bind_address} within {limit_s:g} "
                                f"s ({_first_line(error)}); are all TCP ports open between the hosts?",
                                rank=rank) from None
        return cls(rank, size, timeout_s, formation, backend, place)

    def sequence(self, peer: int, lane: int, *, receiving: bool) -> int:
        """Number of the next frame to or from a peer; each call takes one, so that none is used twice."""
        lane_of = peer, lane, receiving
        self._frames[lane_of] += 1
        return self._frames[lane_of] - 1

    def isend(self, peer: int, buffer: np.ndarray, kind: str, lane: int, *, header: bool = False) -> Pending:
        """Start sending `buffer` (uint8, 1-D, contiguous) and count it as `kind`."""
        pending = self._post(peer, buffer, lane, header, receiving=False)
        self.counters.add(kind, buffer.nbytes)
        return pending

    def irecv(self, peer: int, buffer: np.ndarray, lane: int, *, header: bool = False) -> Pending:
        """Start receiving exactly `buffer.nbytes` bytes into `buffer` (uint8, 1-D, contiguous)."""
        return self._post(peer, buffer, lane, header, receiving=True)

    def wait(self, pending: Sequence[Pending], deadline: Deadline, what: str, layer: int | None = None) -> None:
        """Wait until all messages are through.

        Args:
            what, layer: for the error: what is waited for.
        Raises:
            DeadlineError: names every peer that is late. ConnectionLostError: names the peer.
        """
        for i, one in enumerate(pending):
            try:
                one.work.wait(deadline.left())
            except RuntimeError as error:
                if "Timed out" not in str(error):
                    raise self._lost(one.peer, what, layer, error) from None
                late = self._late(pending[i:])
                verb = "sent nothing for" if one.receiving else "did not take"
                raise DeadlineError(
                    f"peer(s) {_list(late)} {verb} {what} within {deadline.limit_s:g} s; look at those "
                    "workers and their hosts, or raise timeouts.exchange_s", rank=self.rank,
                    peer=late[0] if len(late) == 1 else None, layer=layer) from None

    def all_reduce_sum(self, array: np.ndarray, kind: str = "control") -> None:
        """Replace `array` by its sum over all ranks, in place; every rank must call it with the same shape and dtype.

        Each rank adds up one slice, in rank order (float32 in float64, rounded once), and sends the sum to all others,
        so that every rank gets the same bits, whoever is faster. A rank sends 2·(size−1)/size of the array and a header
        a message, as a ring would, in two steps instead of 2·(size−1); unlike gloo's own ring it can name who is late.

        Args:
            array: float32, float64 or int64, C-contiguous. kind: the counter its bytes go to.
        Raises:
            TypeError: another dtype or layout. DeadlineError, ExchangeError: as for any message.
        """
        if array.dtype not in _ELEMENTS or not array.flags.c_contiguous:
            raise TypeError(f"all_reduce_sum: got {array.dtype}, contiguous {array.flags.c_contiguous}; expected "
                            "float32, float64 or int64, C-contiguous")
        if self.size == 1 or array.size == 0:
            return
        start = time.perf_counter()
        flat = array.reshape(-1)
        bounds = [flat.size * r // self.size for r in range(self.size + 1)]
        slices = [flat[bounds[r]:bounds[r + 1]] for r in range(self.size)]
        others = [r for r in range(self.size) if r != self.rank]
        own = slices[self.rank]
        parts = {r: np.empty_like(own) for r in others}
        deadline = Deadline(self.timeout_s)
        self._swap(0, {r: slices[r] for r in others}, parts, kind, deadline)
        parts[self.rank] = own
        total = np.zeros(own.size, np.float64 if array.dtype == np.float32 else array.dtype)
        for r in range(self.size):
            total += parts[r]
        own[:] = total
        self._swap(1, dict.fromkeys(others, own), {r: slices[r] for r in others}, kind, deadline)
        self._reduces += 1
        self.reduce_s += time.perf_counter() - start

    def open_nccl(self, timeout_s: float) -> Any:
        """A second process group of the same ranks that moves GPU memory; every rank opens it, with a GPU of its own.

        Args: timeout_s: deadline of its collectives; past it torch's watchdog ends the process.
        """
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=timeout_s)
        return dist.ProcessGroupNCCL(dist.PrefixStore("nccl", self._place), self.rank, self.size, options)

    def barrier(self) -> None:
        """Return when every rank has called it; DeadlineError names who did not."""
        self.all_reduce_sum(np.zeros(self.size, np.int64))

    def close(self) -> None:
        """Drop the connections; peers that still wait for this rank get ConnectionLostError. May be called twice."""
        self._backend = self._place = None

    def _swap(self, step: int, out: dict[int, np.ndarray], into: dict[int, np.ndarray], kind: str,
              deadline: Deadline) -> None:
        """One step of an all-reduce: a frame to each rank of `out`, one from each of `into`; empty ones stay."""
        what = f"all-reduce {self._reduces}, step {step}"
        expected, heads, bodies = {}, [], []
        for peer, array in into.items():
            if array.size:
                head = np.zeros(HEADER_BYTES, np.uint8)
                expected[peer] = self._control_header(step, array, peer, receiving=True), head
                heads.append(self.irecv(peer, head, CONTROL_LANE, header=True))
                bodies.append(self.irecv(peer, array.view(np.uint8), CONTROL_LANE))
        sent = []
        for peer, array in out.items():
            if array.size:
                head, body = np.empty(HEADER_BYTES, np.uint8), array.view(np.uint8)
                seal_frame(self._control_header(step, array, peer, receiving=False), body, self.key, head)
                sent += [self.isend(peer, body, kind, CONTROL_LANE),
                         self.isend(peer, head, kind, CONTROL_LANE, header=True)]
        self.wait(heads, deadline, what)
        for header, head in expected.values():
            check_header(head, header)
        self.wait(bodies, deadline, what)
        for peer, (header, head) in expected.items():
            check_frame(head, into[peer].view(np.uint8), header, self.key)
        self.wait(sent, deadline, what)

    def _control_header(self, step: int, array: np.ndarray, peer: int, *, receiving: bool) -> Header:
        sender, receiver = (peer, self.rank) if receiving else (self.rank, peer)
        return Header(self.run_id, self.generation, self.sequence(peer, CONTROL_LANE, receiving=receiving), "control",
                      _ELEMENTS[array.dtype], step, 8 * array.dtype.itemsize, 1, array.size, sender, receiver)

    def _post(self, peer: int, buffer: np.ndarray, lane: int, header: bool, *, receiving: bool) -> Pending:
        if self._backend is None:
            raise ConnectionLostError("this worker has left the group", rank=self.rank, peer=peer)
        tensor = torch.from_numpy(buffer)
        post = self._backend.recv if receiving else self._backend.send
        try:
            work = post([tensor], peer, _tag(buffer.nbytes, lane, header))
        except RuntimeError as error:
            raise self._lost(peer, "a message", None, error) from None
        return Pending(peer, receiving, work, tensor)

    def _late(self, pending: Sequence[Pending]) -> list[int]:
        """After the first timeout: which peers' messages have not come either."""
        late = {pending[0].peer}
        for one in pending[1:]:
            try:
                one.work.wait(Deadline(0).left())
            except RuntimeError:
                late.add(one.peer)
        return sorted(late)

    def _lost(self, peer: int, what: str, layer: int | None, error: Exception) -> ConnectionLostError:
        return ConnectionLostError(f"lost the connection while waiting for {what} ({_first_line(error)}); look at that "
                                   "worker's own error and its host", rank=self.rank, peer=peer, layer=layer)


def _await_all(place: Any, rank: int, size: int, deadline: Deadline) -> None:
    """Wait in the store until every rank has left its name there."""
    try:
        place.set(f"here/{rank}", b"1")
        names = [f"here/{other}" for other in range(size)]
        while not place.check(names):
            if deadline.passed():
                late = [other for other, name in enumerate(names) if not place.check([name])]
                raise DeadlineError(
                    f"rank(s) {_list(late)} of {size} did not come to the rendezvous within {deadline.limit_s:g} s; "
                    "look at those workers, or raise timeouts.rendezvous_s", rank=rank,
                    peer=late[0] if len(late) == 1 else None)
            time.sleep(0.01)
    except RuntimeError as error:
        raise ConnectionLostError(f"lost the rendezvous ({_first_line(error)}); look at rank 0's own error",
                                  rank=rank, peer=0) from None


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _list(ranks: Sequence[int]) -> str:
    return ", ".join(str(r) for r in ranks)


def _first_line(error: Exception) -> str:
    """gloo's own words, without its source path and advice."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    text = text.partition("This is typically caused")[0]
    return (text.partition("] ")[2] if text.startswith("[") else text).strip(" .")
