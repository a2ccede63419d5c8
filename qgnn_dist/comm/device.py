# SPDX-License-Identifier: Apache-2.0
"""Rounds of messages whose rows lie on a device: through host memory and gloo, or straight by NCCL.

gloo sends what Exchange sends, the same frames and bytes, from a host copy of the rows that peers read. NCCL needs a
device of its own for every rank; then a round is one all-to-all of device memory, without headers or host copies.
Legend: N local rows, of which the first B are read by others, H halo rows, P packed bytes a row.
"""
from __future__ import annotations

import hashlib
import socket
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InputError
from .exchange import Exchange, PeerRows
from .group import Group

__all__ = ["CollectiveExchange", "DeviceExchange", "HostCopyExchange", "choose_device", "open_device_exchange",
           "sees_gpu"]


class DeviceExchange(Protocol):
    """See Exchange; `rows` is uint8 (N+H, P) on the device, halo rows last."""

    def begin(self, rows: Tensor, bits: int, columns: int, direction: str, layer: int, round: int) -> None: ...
    def finish(self) -> None: ...


class HostCopyExchange:
    """Exchange from and to a host copy of the boundary and halo rows, pinned where the device is a GPU."""

    def __init__(self, peers: Sequence[PeerRows], num_local: int, num_boundary: int, num_halo: int,
                 group: Group | None, run_id: int, timeout_s: float, device: torch.device) -> None:
        # Rows that peers read are boundary rows, and those come first.
        self._exchange = Exchange(peers, num_boundary, num_halo, group, run_id, timeout_s)
        self._num_local, self._num_boundary, self._num_halo = num_local, num_boundary, num_halo
        self._pinned, self._alone = device.type == "cuda", group is None
        self._copies: dict[int, Tensor] = {}
        self._rows: Tensor | None = None

    def begin(self, rows: Tensor, bits: int, columns: int, direction: str, layer: int, round: int) -> None:
        """See Exchange.begin. The copy waits for what the device still computes of the boundary rows."""
        if self._alone:
            return
        copy = self._copy(rows.shape[1])
        copy[:self._num_boundary].copy_(rows[:self._num_boundary])
        self._exchange.begin(copy.numpy(), bits, columns, direction, layer, round)
        self._rows = rows

    def finish(self) -> None:
        """See Exchange.finish. What the device does next waits for the halo rows; so does the next round's copy."""
        if self._alone:
            return
        assert self._rows is not None
        self._exchange.finish()
        rows, self._rows = self._rows, None
        rows[self._num_local:].copy_(self._copy(rows.shape[1])[self._num_boundary:], non_blocking=True)

    def _copy(self, num_bytes: int) -> Tensor:
        """Host rows (B+H, P), made at the first round of a width."""
        if num_bytes not in self._copies:
            self._copies[num_bytes] = torch.empty(self._num_boundary + self._num_halo, num_bytes, dtype=torch.uint8,
                                                  pin_memory=self._pinned)
        return self._copies[num_bytes]


class CollectiveExchange:
    """One all-to-all a round, by a process group that moves the device's own memory.

    A peer that is late or gone is found by the process group's own deadline, which for NCCL ends the process.

    Args:
        backend: of all ranks of `group`, whose counters get the payload's bytes; there are no headers.
    """

    def __init__(self, peers: Sequence[PeerRows], num_local: int, group: Group, backend: Any,
                 device: torch.device) -> None:
        self._backend, self._num_local, self._counters = backend, num_local, group.counters
        self._send_counts, self._recv_counts = [0] * group.size, [0] * group.size
        for plan in peers:  # in the order of the ranks, as halo slots are
            self._send_counts[plan.peer], self._recv_counts[plan.peer] = len(plan.send_rows), plan.recv_count
        rows = [np.asarray(plan.send_rows, np.int64) for plan in peers]
        self._send_rows = torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *rows])).to(device)
        self._work: Any = None
        self._sent: Tensor | None = None

    def begin(self, rows: Tensor, bits: int, columns: int, direction: str, layer: int, round: int) -> None:
        """See Exchange.begin."""
        self._sent = rows.index_select(0, self._send_rows)
        self._work = self._backend.alltoall_base(rows[self._num_local:], self._sent, self._recv_counts,
                                                 self._send_counts)
        self._counters.add(direction, self._sent.numel())

    def finish(self) -> None:
        """See Exchange.finish. On CUDA this makes the device wait, and not this thread."""
        self._work.wait()
        self._work = self._sent = None


def sees_gpu() -> bool:
    """Whether this process has a GPU that torch can use."""
    return torch.cuda.is_available()


def choose_device(wanted: str, rank: int, host: str) -> torch.device:
    """The device of a rank: `cuda` is this process's own GPU, or its turn of those it shares with others.

    Raises: InputError: torch sees no GPU here.
    """
    if wanted != "cuda":
        return torch.device(wanted)
    if not sees_gpu():
        why = "torch is a CPU build" if torch.version.cuda is None else "torch sees no GPU"
        raise InputError(f"cluster.device=cuda: {why} on this host; set cluster.device=cpu, or install a CUDA build of "
                         "torch on hosts with GPUs", host=host, rank=rank)
    torch.set_float32_matmul_precision("highest")  # products of codes must be exact, and tf32 has ten bits
    return torch.device("cuda", rank % torch.cuda.device_count())


def open_device_exchange(peers: Sequence[PeerRows], num_local: int, num_boundary: int, num_halo: int,
                         group: Group | None, run_id: int, timeout_s: float, device: torch.device) -> DeviceExchange:
    """NCCL where every rank has a GPU of its own, gloo with host copies otherwise; all ranks call it together."""
    if group is not None and device.type == "cuda" and dist.is_nccl_available():
        known = np.zeros(group.size, np.int64)
        known[group.rank] = _gpu_number(device)
        group.all_reduce_sum(known)
        if len(set(known.tolist())) == group.size:
            return CollectiveExchange(peers, num_local, group, group.open_nccl(timeout_s), device)
    return HostCopyExchange(peers, num_local, num_boundary, num_halo, group, run_id, timeout_s, device)


def _gpu_number(device: torch.device) -> int:
    """A number that two ranks share where they share a GPU."""
    name = f"{socket.gethostname()}/{getattr(torch.cuda.get_device_properties(device), 'uuid', device.index)}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")
