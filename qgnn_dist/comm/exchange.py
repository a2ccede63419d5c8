# SPDX-License-Identifier: Apache-2.0
"""One round of messages: every rank sends its boundary rows to the peers that read them, and gets its halo rows.

Legend: N local rows, H halo rows, P bytes of a row in a frame (wire.frame_row_bytes). A state's rows lie in one buffer
(N+H, P), halo rows last, so that a peer's rows arrive where the kernels read them.
"""
from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from .. import kernels
from ..errors import StoreError
from .group import EXCHANGE_LANE, Deadline, Group, Pending
from .trace import PACK, WAIT, WIRE, Span, Trace, span
from .wire import (
    DIRECTIONS,
    HEADER_BYTES,
    Header,
    check_frame,
    check_header,
    frame_row_bytes,
    seal_frame,
)

__all__ = ["Exchange", "PeerRows"]


class PeerRows(Protocol):
    """What goes to and comes from one peer (store.reader.PeerPlan).

    Attributes:
        peer: rank. send_rows: int32 (n,), local rows in the order of the peer's slots.
        recv_begin, recv_count: the peer's slots, counted from the first halo slot.
    """

    @property
    def peer(self) -> int: ...
    @property
    def send_rows(self) -> np.ndarray: ...
    @property
    def recv_begin(self) -> int: ...
    @property
    def recv_count(self) -> int: ...


@dataclass
class _Incoming:
    """A frame that a peer is to send in this round."""

    expected: Header
    head: np.ndarray
    payload: np.ndarray


@dataclass
class _Round:
    """A round, from when its receives are posted until `finish`.

    Attributes: key: what it must be begun with, see Exchange._key. heads: uint8 (2·peers, 64), headers to come, then
        headers to send.
    """

    what: str
    layer: int
    number: int
    key: tuple[Any, ...]
    heads: np.ndarray
    incoming: list[_Incoming] = field(default_factory=list)
    head_receives: list[Pending] = field(default_factory=list)
    payload_receives: list[Pending] = field(default_factory=list)
    sent: list[Pending] = field(default_factory=list)
    watcher: threading.Thread | None = None
    error: BaseException | None = None


class Exchange:
    """A part's halo plan over a group of workers. All ranks call `begin` and `finish` the same number of times.

    Args:
        peers: this part's plans; a peer with nothing to send in one direction sends nothing.
        num_local, num_halo: N and H.
        group: the workers; None with one part, where a round does nothing.
        run_id: u64 in every header. timeout_s: deadline of a `finish`.
    Raises:
        StoreError: a plan that does not fit the part; kernels and gloo would read and write past its rows.
    Attributes:
        exchange_rounds: rounds finished. wait_s: seconds spent in `finish`, the share of the wire that nothing hid.
        trace: collects how long each round packs, is on the wire and waits; None for none.
        position: the round begun last, in words. on_round: called with direction, layer and round as each begins.
    """

    def __init__(self, peers: Sequence[PeerRows], num_local: int, num_halo: int, group: Group | None, run_id: int,
                 timeout_s: float) -> None:
        if peers and group is None:
            raise ValueError(f"Exchange: {len(peers)} peers, but no group to reach them")
        _check_plans(peers, num_local, num_halo, group)
        self._peers, self._group = list(peers), group
        self._num_local, self._num_halo = num_local, num_halo
        self._run_id, self._timeout_s = run_id, timeout_s
        self._frames: dict[int, dict[int, np.ndarray]] = {}
        self._round: _Round | None = None
        self._announced: _Round | None = None
        self.exchange_rounds = 0
        self.wait_s = 0.0
        self.trace: Trace | None = None
        self.position = ""
        self.on_round: Callable[[str, int, int], None] | None = None

    def expected_bytes(self, bits: int, columns: int, direction: str = "forward") -> int:
        """Bytes that this rank sends in one round: rows times their bytes, and one header a peer (DESIGN law 5)."""
        rows = [len(p.send_rows) for p in self._peers]
        return sum(rows) * frame_row_bytes(columns, bits, direction) + HEADER_BYTES * sum(n > 0 for n in rows)

    def begin(self, buffer: np.ndarray, bits: int, columns: int, direction: str, layer: int, round: int, *,
              following: tuple[np.ndarray, int, int] | None = None) -> None:
        """Send local rows to the peers and start receiving the halo rows; does not wait for them.

        Every receive is posted before the first send: gloo moves no byte before both sides are there, and with sends
        first a full link reaches half its rate. Where it was posted a round before, rows leave at once.

        Args:
            buffer: uint8 (N+H, P): packed codes, and a scale byte behind those of a coded gradient row; float32 rows
                as their bytes, bits = 32. The halo rows arrive in it, so they may be neither read nor written until
                `finish` returns; the local rows are copied here and free again.
            direction: forward, backward or evaluation; the counter that the bytes go to.
            following: another buffer, the layer and the round of the next `begin`, where it is sure to come, with the
                rest as now: its receives are posted here. Its halo rows belong to them from now on.
        Raises:
            ValueError: a buffer of another shape, or not the round that was announced. ConnectionLostError: a peer is
                gone.
        """
        if self._round is not None:
            raise ValueError("Exchange.begin: the round before has not been finished")
        self._check_buffer(buffer, bits, columns, direction)
        self.position = f"{direction}, layer {layer}, round {round}"
        if self.on_round is not None:
            self.on_round(direction, layer, round)
        now, self._announced = self._announced, None
        key = _key(buffer, bits, columns, direction, layer, round)
        if now is not None and now.key != key:
            raise ValueError(f"Exchange.begin: round is {key}, the round before announced {now.key}")
        with span(self.trace, PACK, "pack and send", layer, round):
            now = self._round = now or self._expect(buffer, key)
            if self._group is not None:
                self._send(now, self._group, buffer)
            if following is not None:
                later = following[0]
                self._check_buffer(later, bits, columns, direction)
                key = _key(later, bits, columns, direction, *following[1:])
                self._announced = self._expect(later, key)
        if self._group is not None and self.trace is not None:
            now.watcher = threading.Thread(target=self._watch, args=(now, self.trace), name="qgnn-trace", daemon=True)
            now.watcher.start()

    def _expect(self, buffer: np.ndarray, key: tuple[Any, ...]) -> _Round:
        """Post the receives of a round."""
        bits, columns, direction, layer, round = key[1:]
        # Zeros: a header that was cut must not be made whole by what the memory held before.
        heads = np.zeros((2 * len(self._peers), HEADER_BYTES), np.uint8)
        one = _Round(f"{direction} round {round}", layer, round, key, heads)
        group = self._group
        for plan, head in zip(self._peers, heads):
            if group is not None and plan.recv_count:
                sequence = group.sequence(plan.peer, EXCHANGE_LANE, receiving=True)
                expected = Header(self._run_id, group.generation, sequence, direction, layer, round, bits,
                                  plan.recv_count, columns, plan.peer, group.rank)
                first = self._num_local + plan.recv_begin
                incoming = _Incoming(expected, head, buffer[first:first + plan.recv_count].reshape(-1))
                one.head_receives.append(group.irecv(plan.peer, head, EXCHANGE_LANE, header=True))
                one.payload_receives.append(group.irecv(plan.peer, incoming.payload, EXCHANGE_LANE))
                one.incoming.append(incoming)
        return one

    def _send(self, now: _Round, group: Group, buffer: np.ndarray) -> None:
        """Copy each peer's rows into its frame, and post it; headers go last: who waits for one wakes once, when all is
        there."""
        bits, columns, direction, layer, round = now.key[1:]
        frames = self._send_frames(buffer.shape[1])
        for plan, head in zip(self._peers, now.heads[len(self._peers):]):
            if len(plan.send_rows):
                frame = frames[plan.peer]
                kernels.gather_rows(buffer, plan.send_rows, frame)
                payload = frame.reshape(-1)
                sequence = group.sequence(plan.peer, EXCHANGE_LANE, receiving=False)
                header = Header(self._run_id, group.generation, sequence, direction, layer, round, bits, len(frame),
                                columns, group.rank, plan.peer)
                seal_frame(header, payload, group.key, head)
                now.sent += [group.isend(plan.peer, payload, direction, EXCHANGE_LANE),
                             group.isend(plan.peer, head, direction, EXCHANGE_LANE, header=True)]

    def finish(self) -> None:
        """Wait until the halo rows are in the buffer, checked, and the own rows are sent.

        Raises:
            DeadlineError: names every peer that is late and timeouts.exchange_s. ConnectionLostError: a peer is gone.
            ExchangeError: a peer's frame is not the one of this round; names what came and what was expected.
        """
        now = self._round
        if now is None:
            raise ValueError("Exchange.finish: no round was begun")
        if self._group is not None:
            start = time.monotonic()
            with span(self.trace, WAIT, "wait", now.layer, now.number):
                if now.watcher is None:
                    self._wait(now, self._group)
                else:
                    now.watcher.join()
                    if now.error is not None:
                        raise now.error
            self.wait_s += time.monotonic() - start
        self._round = None
        self.exchange_rounds += 1

    def _wait(self, now: _Round, group: Group) -> None:
        deadline = Deadline(self._timeout_s)
        group.wait(now.head_receives, deadline, now.what, now.layer)
        for one in now.incoming:
            check_header(one.head, one.expected)
        group.wait(now.payload_receives, deadline, now.what, now.layer)
        for one in now.incoming:
            check_frame(one.head, one.payload, one.expected, group.key)
        group.wait(now.sent, deadline, now.what, now.layer)

    def _watch(self, now: _Round, trace: Trace) -> None:
        """Sees when a traced round's messages are there, which no call tells without waiting for them."""
        assert self._group is not None
        start = trace.now()
        try:
            self._wait(now, self._group)
        except BaseException as error:  # `finish` raises it in the thread that asked
            now.error = error
        trace.add(Span(WIRE, now.what, start, trace.now(), now.layer, now.number))

    def release(self) -> None:
        """Give back the buffers to send from, of every width; the next round makes its own."""
        if self._round is not None or self._announced is not None:
            raise ValueError("Exchange.release: a round is begun or announced, and not finished")
        self._frames.clear()

    def _send_frames(self, num_bytes: int) -> dict[int, np.ndarray]:
        """Peer → uint8 (rows, P), made at the first round of a width and used again in every later one."""
        if num_bytes not in self._frames:
            self._frames[num_bytes] = {p.peer: np.empty((len(p.send_rows), num_bytes), np.uint8) for p in self._peers}
        return self._frames[num_bytes]

    def _check_buffer(self, buffer: np.ndarray, bits: int, columns: int, direction: str) -> None:
        shape = (self._num_local + self._num_halo, frame_row_bytes(columns, bits, direction))
        if buffer.dtype != np.uint8 or buffer.shape != shape or not buffer.flags.c_contiguous:
            raise ValueError(f"Exchange.begin: buffer is {buffer.dtype} {buffer.shape}, contiguous "
                             f"{buffer.flags.c_contiguous}; expected uint8 {shape}, C-contiguous")
        if direction not in DIRECTIONS or direction == "control":
            raise ValueError(f"Exchange.begin: direction is {direction!r}, expected forward, backward or evaluation")


def _key(buffer: np.ndarray, bits: int, columns: int, direction: str, layer: int, round: int) -> tuple[Any, ...]:
    """What a round is: where its rows lie, and its arguments."""
    return buffer.ctypes.data, bits, columns, direction, layer, round


def _check_plans(peers: Sequence[PeerRows], num_local: int, num_halo: int, group: Group | None) -> None:
    seen: set[int] = set()
    for plan in peers:
        rank, size = (group.rank, group.size) if group is not None else (0, 1)
        rows, end = np.asarray(plan.send_rows), plan.recv_begin + plan.recv_count
        fault = ""
        if not 0 <= plan.peer < size or plan.peer == rank or plan.peer in seen:
            fault = f"peer {plan.peer} of rank {rank}, expected another rank below {size}, once"
        elif rows.dtype != np.int32 or rows.ndim != 1 or not rows.flags.c_contiguous:
            fault = f"send rows are {rows.dtype} {rows.shape}, expected int32 (n,), contiguous"
        elif len(rows) and not (rows.min() >= 0 and rows.max() < num_local):
            fault = f"send rows run from {rows.min()} to {rows.max()}, the part has {num_local} rows"
        elif not 0 <= plan.recv_begin <= end <= num_halo:
            fault = f"receives into slots {plan.recv_begin} to {end}, the part has {num_halo} halo slots"
        if fault:
            raise StoreError(f"halo plan of rank {rank}: {fault}; check the store with `qgnn inspect --verify`",
                             rank=rank, peer=plan.peer)
        seen.add(plan.peer)
