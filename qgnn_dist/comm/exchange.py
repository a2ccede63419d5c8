# SPDX-License-Identifier: Apache-2.0
"""A round of messages: the rows that peers read of ours go out, the rows that we read of theirs come in.

Legend: n local rows, H halo rows, C columns, P packed bytes a row.
"""
from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import kernels
from ..errors import ExchangeError
from .group import Group
from .wire import DIRECTIONS, HEADER_BYTES, FrameHeader, check_header, pack_header

if TYPE_CHECKING:
    from ..store.reader import PeerPlan

__all__ = ["Exchange"]


@dataclass
class _Lane:
    """Frames to and from one peer, for one row size."""

    outgoing: np.ndarray
    incoming: np.ndarray


@dataclass
class _Open:
    """The round that is under way."""

    buffer: np.ndarray
    bits: int
    columns: int
    direction: str
    layer: int
    round: int
    receives: list[Any]
    sends: list[Any]


class Exchange:
    """One part's side of every round. `begin`, then work on interior rows, then `finish`.

    Args:
        peers: the halo plan (store.reader.PeerPlan), one entry a peer with rows to send or to receive.
        num_local, num_halo: n and H; the buffer of a round has n + H rows.
        group: the workers, None with one part (then a round is nothing at all).
        run_id: u64 that all workers of a run share. timeout_s: deadline of a round.
    Attributes:
        wait_s: seconds spent waiting in `finish`, all rounds together.
        num_rounds: rounds finished.
    """

    def __init__(self, peers: Sequence[PeerPlan], num_local: int, num_halo: int, group: Group | None, run_id: int,
                 timeout_s: float) -> None:
        if peers and group is None:
            raise ExchangeError(f"the part has {len(peers)} peers, but no process group was formed")
        self._peers, self._num_local, self._num_halo = list(peers), num_local, num_halo
        self._group, self._run_id, self._timeout_s = group, run_id, timeout_s
        self._lanes: dict[int, list[_Lane]] = {}
        self._open: _Open | None = None
        self.wait_s = 0.0
        self.num_rounds = 0

    def expected_bytes(self, row_bytes: int) -> int:
        """Bytes that one round sends from here: Σ rows × P, and one header a peer."""
        return sum(HEADER_BYTES + len(p.send_rows) * row_bytes for p in self._peers)

    def begin(self, buffer: np.ndarray, bits: int, columns: int, direction: str, layer: int, round: int) -> None:
        """Post every receive, then send our rows.

        Args:
            buffer: uint8 (n + H, P), the first n rows filled; the halo rows are written by `finish`.
            bits, columns: what a row means; P = ⌈C·bits/8⌉. direction: forward, backward or evaluation.
            layer, round: for the header and for errors.
        """
        if self._open is not None:
            raise ExchangeError("a round was begun before the last one was finished", layer=layer)
        self._open = _Open(buffer, bits, columns, direction, layer, round, [], [])
        group = self._group
        if group is None:
            return
        row_bytes = buffer.shape[1]
        if buffer.shape[0] != self._num_local + self._num_halo or row_bytes != -(-columns * bits // 8):
            raise ExchangeError(f"round buffer is {buffer.shape}, expected ({self._num_local + self._num_halo}, "
                                f"{-(-columns * bits // 8)}) at {bits} bits", rank=group.rank, layer=layer)
        lanes = self._lanes.get(row_bytes) or self._new_lanes(row_bytes)
        # Both sides of a connection send at once: with no receive posted, gloo stops at half the link's rate.
        self._open.receives = [group.irecv(lane.incoming, p.peer, self._tag()) for p, lane in zip(self._peers, lanes)]
        for p, lane in zip(self._peers, lanes):
            header = pack_header(self._header(group.rank, len(p.send_rows), row_bytes))
            lane.outgoing[:HEADER_BYTES] = np.frombuffer(header, np.uint8)
            rows = lane.outgoing[HEADER_BYTES:].reshape(len(p.send_rows), row_bytes)
            kernels.gather_rows(buffer[:self._num_local], p.send_rows, rows)
            self._open.sends.append(group.isend(lane.outgoing, p.peer, self._tag(), direction))

    def finish(self) -> None:
        """Wait for every peer's rows, check their headers, and put them into the buffer's halo rows.

        Raises:
            DeadlineError, ExchangeError: name rank, peer and layer.
        """
        now, self._open = self._open, None
        if now is None:
            raise ExchangeError("finish without begin")
        group = self._group
        if group is not None:
            start = time.monotonic()
            end = start + self._timeout_s
            row_bytes = now.buffer.shape[1]
            for p, lane, work in zip(self._peers, self._lanes[row_bytes], now.receives):
                group.wait(work, p.peer, now.layer, end)
                self._check(lane.incoming, now, p.peer, p.recv_count, row_bytes)
                first = self._num_local + p.recv_begin
                now.buffer[first:first + p.recv_count] = lane.incoming[HEADER_BYTES:].reshape(p.recv_count, row_bytes)
            for p, work in zip(self._peers, now.sends):
                group.wait(work, p.peer, now.layer, end)
            self.wait_s += time.monotonic() - start
        self.num_rounds += 1

    def _tag(self) -> int:
        return self.num_rounds % (1 << 30)

    def _new_lanes(self, row_bytes: int) -> list[_Lane]:
        lanes = [_Lane(np.empty(HEADER_BYTES + len(p.send_rows) * row_bytes, np.uint8),
                       np.empty(HEADER_BYTES + p.recv_count * row_bytes, np.uint8)) for p in self._peers]
        self._lanes[row_bytes] = lanes
        return lanes

    def _header(self, sender: int, rows: int, row_bytes: int, now: _Open | None = None) -> FrameHeader:
        now = now or self._open
        assert now is not None
        return FrameHeader(DIRECTIONS[now.direction], now.bits, self._run_id, self.num_rounds, now.layer, now.round,
                           rows, now.columns, rows * row_bytes, sender)

    def _check(self, frame: np.ndarray, now: _Open, peer: int, rows: int, row_bytes: int) -> None:
        assert self._group is not None
        check_header(frame, self._header(peer, rows, row_bytes, now), rank=self._group.rank)
