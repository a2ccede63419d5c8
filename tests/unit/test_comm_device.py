# SPDX-License-Identifier: Apache-2.0
"""Rounds of rows that torch holds: host copies over gloo, one all-to-all of a process group, and which device it is."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qgnn_dist.comm import device as comm_device
from qgnn_dist.comm.device import CollectiveExchange, HostCopyExchange, choose_device, open_device_exchange
from qgnn_dist.comm.group import Group
from qgnn_dist.comm.pool import LocalPool, WorkerContext
from qgnn_dist.comm.wire import HEADER_BYTES
from qgnn_dist.errors import InputError
from tests.unit.test_comm_exchange import Layout, random_layouts

CPU = torch.device("cpu")


class RowsWorker:
    """Sends rows that say whose they are, by either exchange."""

    def __init__(self, context: WorkerContext, layouts: list[Layout]) -> None:
        self.context, self.layout = context, layouts[context.rank]

    def rounds(self, kind: str) -> tuple[list[np.ndarray], int]:
        layout, group, rank = self.layout, self.context.group, self.context.rank
        n, halo = layout.num_local, len(layout.halo)
        exchange: Any = CollectiveExchange(layout.peers, n, group, group._backend, CPU)
        if kind == "host":
            exchange = open_device_exchange(layout.peers, n, n, halo, group, 7, 20.0, CPU)
            assert isinstance(exchange, HostCopyExchange), "there is no NCCL for CPU memory"
        seen, before = [], group.counters.forward
        for number in range(4):
            rows = torch.zeros(n + halo, 4 + number % 2 * 4, dtype=torch.uint8)
            rows[:n, 0], rows[:n, 1], rows[:n, 2] = rank, torch.arange(n), number
            exchange.begin(rows, 8, rows.shape[1], "forward", 0, number)
            exchange.finish()
            seen.append(rows.numpy().copy())
        return seen, group.counters.forward - before


@pytest.mark.parametrize("kind", ["host", "collective"])
@pytest.mark.parametrize("seed", [0, 2])
def test_halo_rows_are_exact_and_bytes_counted(kind: str, seed: int) -> None:
    layouts = random_layouts(3, seed)
    pool = LocalPool(RowsWorker, {"layouts": layouts}, 3, timeout_s=20)
    try:
        results = pool.call("rounds", kind, timeout_s=60)
    finally:
        pool.close()
    for rank, (seen, sent) in enumerate(results):
        layout = layouts[rank]
        for number, rows in enumerate(seen):
            local, halo = rows[:layout.num_local], rows[layout.num_local:]
            assert local[:, :3].tolist() == [[rank, i, number] for i in range(layout.num_local)]
            assert halo[:, :3].tolist() == [[owner, row, number] for owner, row in layout.halo]
        counts = [len(plan.send_rows) for plan in layout.peers]
        headers = 4 * HEADER_BYTES * sum(count > 0 for count in counts)
        assert sent == (4 + 8) * 2 * sum(counts) + (headers if kind == "host" else 0)


def test_one_part_sends_nothing() -> None:
    exchange = open_device_exchange([], 5, 0, 0, None, 7, 20.0, CPU)
    rows = torch.arange(5, dtype=torch.uint8)[:, None].clone()
    exchange.begin(rows, 8, 1, "forward", 0, 0)
    exchange.finish()
    assert rows[:, 0].tolist() == [0, 1, 2, 3, 4]


def test_cuda_without_a_gpu_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError) as caught:
        choose_device("cuda", 3, "alpha")
    assert str(caught.value).startswith("host alpha, rank 3: cluster.device=cuda: torch ")
    assert "cluster.device=cpu" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert choose_device("cpu", 0, "alpha") == CPU


def test_ranks_share_out_the_gpus_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    torch.set_float32_matmul_precision("high")
    assert [choose_device("cuda", rank, "alpha").index for rank in range(3)] == [0, 1, 0]
    assert torch.get_float32_matmul_precision() == "highest", "products of codes are exact"


class ChoosingWorker:
    """Opens an exchange as on a GPU, of which rank r has number gpus[r]."""

    def __init__(self, context: WorkerContext, gpus: list[int]) -> None:
        self.context, self.gpu = context, gpus[context.rank]

    def choose(self) -> str:
        device = torch.device("cuda", self.gpu)
        return type(open_device_exchange([], 5, 0, 0, self.context.group, 7, 20.0, device)).__name__


@pytest.mark.parametrize(("gpus", "nccl", "kind"), [
    ([0, 1, 2], True, "Straight"), ([0, 1, 0], True, "HostCopyExchange"), ([0, 1, 2], False, "HostCopyExchange")])
def test_nccl_needs_a_gpu_of_its_own_for_every_rank(monkeypatch: pytest.MonkeyPatch, gpus: list[int], nccl: bool,
                                                    kind: str) -> None:
    """The choice alone: no GPU is touched."""
    class Straight:
        def __init__(self, peers: Any, num_local: int, group: Group, backend: str, device: torch.device) -> None:
            assert (backend, num_local, device.type) == ("nccl", 5, "cuda")

    monkeypatch.setattr(comm_device, "CollectiveExchange", Straight)
    monkeypatch.setattr(comm_device, "_gpu_number", lambda device: device.index + 1)
    monkeypatch.setattr(comm_device.dist, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(Group, "open_nccl", lambda self, timeout_s: "nccl")
    pool = LocalPool(ChoosingWorker, {"gpus": gpus}, 3, timeout_s=20)
    try:
        assert pool.call("choose", timeout_s=30) == [kind] * 3
    finally:
        pool.close()
