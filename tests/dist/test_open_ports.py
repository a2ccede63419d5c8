# SPDX-License-Identifier: Apache-2.0
"""Which ports a run opens: its own on its host's address alone, and what Ray opens beside them."""
from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

import qgnn_dist as qgnn
from qgnn_dist.bench.ranks import Loopback, Ranks
from qgnn_dist.cluster.pool import RayPool
from tests.helpers import make_store, settings, small_graph
from tests.rayhead import ray_head
from tests.sockets import EVERYWHERE, Listener, listeners, tree


def test_the_kernel_s_tables_are_read_right() -> None:
    places = [("127.0.0.1", socket.AF_INET), ("0.0.0.0", socket.AF_INET), ("::1", socket.AF_INET6),
              ("::", socket.AF_INET6)]
    made = [socket.create_server((address, 0), family=family) for address, family in places]
    assert listeners(os.getpid()) >= {one.getsockname()[:2] for one in made}
    for one in made:
        one.close()


def watch(monkeypatch: pytest.MonkeyPatch, found: dict[str, Any]) -> None:
    """Note who listens before the workers meet: that is Ray's."""
    build = RayPool._build

    def watched(self: RayPool, *args: Any) -> None:
        found["pids"] = self.pids()
        found["before"] = {pid: listeners(pid) for pid in {*tree(os.getpid()), *self.pids()}}
        build(self, *args)

    monkeypatch.setattr(RayPool, "_build", watched)


def train(store: Path, out: Path, found: dict[str, Any], address: str | None = None) -> None:
    def look(_: dict[str, Any]) -> None:
        found["after"] = {pid: listeners(pid) for pid in {*tree(os.getpid()), *found["pids"]}}

    summary = qgnn.train(store, out=out, config=settings("train.epochs=2", "cluster.cpus_per_worker=0.5"),
                         ray_address=address, on_epoch=look)
    assert summary["parts"] == 2


def opened(found: dict[str, Any]) -> list[set[Listener]]:
    """Of each worker, what it listens on since the workers met."""
    return [found["after"][pid] - found["before"][pid] for pid in found["pids"]]


def test_a_local_run_listens_on_the_loopback_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it: command, workers, multiplier server, and Ray's own processes."""
    store, found = make_store(small_graph(), tmp_path / "s", 2).path, dict[str, Any]()
    watch(monkeypatch, found)
    train(store, tmp_path / "run", found)
    assert [len(new) for new in opened(found)] == [2, 1], "gloo's socket of each rank, and the store's on rank 0"
    assert set(found["pids"]) < set(found["after"])
    everything = set().union(*found["after"].values())
    assert len(everything) > 3
    assert {address for address, _ in everything} <= {"127.0.0.1", "::1"}


def test_workers_of_a_cluster_listen_on_their_host_s_address_alone(tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """What Ray opens on all interfaces it had opened before; the workers open three sockets, none of them so."""
    own = host_address()
    store, found = make_store(small_graph(), tmp_path / "s", 2).path, dict[str, Any]()
    watch(monkeypatch, found)
    with ray_head({"RAY_AUTH_MODE": "disabled"}, address=own) as address:
        train(store, tmp_path / "run", found, address)
    new = opened(found)
    assert [len(one) for one in new] == [2, 1]
    assert {address for one in new for address, _ in one} == {own}
    late = {at for pid, sockets in found["after"].items() for at in sockets - found["before"].get(pid, set())}
    assert {at for at in late if at[0] in EVERYWHERE} == set()


def host_address() -> str:
    """By which other hosts reach this one; the loopback where it has no network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def test_processes_of_a_bench_listen_on_the_given_address_alone() -> None:
    """Two ranks and a multiplier server without Ray, so that all sockets are ours."""
    with Ranks(Loopback(), 2) as ranks:
        found = [listeners(process.pid) for process in ranks._processes]
    assert [len(sockets) for sockets in found] == [2, 1, 1]
    assert {address for sockets in found for address, _ in sockets} == {"127.0.0.1"}
