# SPDX-License-Identifier: Apache-2.0
"""What a run goes on after, and when it gives up."""
from __future__ import annotations

import socket
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

from qgnn_dist.cluster import api, hosts, pool, session
from qgnn_dist.cluster.failure import attempt, unwrap
from qgnn_dist.cluster.hosts import fit
from qgnn_dist.cluster.recovery import WITHOUT_PROGRESS, Restarts
from qgnn_dist.comm.formation import Formation
from qgnn_dist.comm.group import ConnectionLostError
from qgnn_dist.comm.pool import blame
from qgnn_dist.config import load_config
from qgnn_dist.errors import (
    ConfigError,
    DeadlineError,
    ExchangeError,
    InputError,
    QgnnError,
    StoreError,
    WorkerError,
    WorkerLostError,
)


@pytest.mark.parametrize("kind", [InputError, ConfigError, StoreError, QgnnError, WorkerError])
def test_what_would_fail_again_is_not_tried_again(kind: type[QgnnError]) -> None:
    restarts = Restarts("train", 5)
    with pytest.raises(kind, match=r"^rank 1: no$"):
        restarts.after(kind("no", rank=1), 3)
    assert restarts.made == []


@pytest.mark.parametrize("kind", [WorkerLostError, DeadlineError, ExchangeError])
def test_restarts_are_counted_and_capped(kind: type[QgnnError]) -> None:
    restarts = Restarts("train", 4)
    for epoch in range(4):
        made = restarts.after(kind("lost", host="h", rank=2, layer=1), epoch)
        assert (made.number, made.epoch, made.host, made.rank, made.layer, made.pause_s) == (
            epoch + 1, epoch, "h", 2, 1, 0.0)
        assert restarts.told(made) == f"host h, rank 2, layer 1: lost; restart {epoch + 1} from the last checkpoint"
    with pytest.raises(kind, match=r"lost; given up: 4 restarts were made \(cluster.max_restarts=4\).*--resume"):
        restarts.after(kind("lost"), 9)


def test_a_run_that_gets_no_farther_is_given_up_after_growing_pauses() -> None:
    restarts = Restarts("train", 100)
    pauses = [restarts.after(WorkerLostError("lost"), 7).pause_s for _ in range(WITHOUT_PROGRESS)]
    assert pauses == [0.0, 0.5, 1.0]
    with pytest.raises(WorkerLostError, match="3 restarts got no farther than epoch 7"):
        restarts.after(WorkerLostError("lost"), 7)
    assert restarts.after(WorkerLostError("lost"), 8).pause_s == 0.0


def test_a_prediction_has_no_checkpoint() -> None:
    restarts = Restarts("predict", 2)
    assert restarts.told(restarts.after(WorkerLostError("lost"), 0)) == "lost; restart 1 of what is not finished"
    assert restarts.told(restarts.after(WorkerLostError("lost"), 0)).endswith("finished, after 0.5 s")
    with pytest.raises(WorkerLostError, match="then give the same command again"):
        restarts.after(WorkerLostError("lost"), 0)


def test_none_are_made_where_none_are_wanted() -> None:
    with pytest.raises(WorkerLostError, match=r"^lost$"):
        Restarts("train", 0).after(WorkerLostError("lost"), 1)


@pytest.mark.parametrize(("each", "cpus", "workers"), [([1, 1, 1], 1.0, 3), ([1, 1, 1], 0.75, 3), ([1], 0.5, 2),
                                                        ([4, 0, 2], 0.3, 19), ([], 1.0, 0)])
def test_workers_that_hosts_hold(each: list[float], cpus: float, workers: int) -> None:
    assert fit(each, cpus) == workers


def test_hosts_whose_port_does_not_open_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    listening, closed = (socket.create_server(("127.0.0.1", 0)) for _ in range(2))
    nodes = [{"NodeID": name, "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": one.getsockname()[1],
              "Resources": {"CPU": 2.0}} for name, one in (("there", listening), ("gone", closed))]
    closed.close()
    monkeypatch.setattr(hosts, "_alive", lambda: nodes)
    with listening:
        assert hosts.unreachable_hosts() == {"gone"}
        assert hosts.placeable_cpus(4, 1.0, 0.0) == 1.0
        assert hosts.placeable_cpus(4, 1.0, 0.0, {"gone"}) == 0.5
        assert hosts.placeable_cpus(4, 1.0, 0.0, {"gone", "there"}) == 0.0
    assert hosts.unreachable_hosts() == set(), "who reaches nobody is outside, and cannot know"


def test_placements_are_kept_off_hosts() -> None:
    assert hosts.place_off((), 3) == {}
    assert hosts.place_off({"b", "a"}, 2) == {"bundle_label_selector": [{"ray.io/node-id": "!in(a,b)"}] * 2}


def test_memory_that_cannot_be_had_loses_a_worker_and_a_lost_one_has_the_layer_of_who_waited() -> None:
    def too_much() -> None:
        np.empty(1 << 60, np.uint8)

    def torch_has_none() -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    for call in (too_much, torch_has_none):
        with pytest.raises(WorkerLostError, match=r"^host h, rank 1: out of memory \("):
            unwrap(attempt(call, host="h", rank=1))
    lost = WorkerLostError("lost", rank=1)
    assert blame({1: lost, 0: ConnectionLostError("closed", rank=0, peer=1, layer=3)}) is lost
    assert lost.layer == 3


def test_each_formation_of_a_run_has_its_number_and_a_secret_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    formed: list[Formation] = []

    class Lost:
        """A pool whose workers are lost twice."""

        def __init__(self, *_: Any, formation: Formation, **__: Any) -> None:
            formed.append(formation)
            self.server_call = None

        def __enter__(self) -> Lost:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

    def work(*_: Any) -> dict[str, Any]:
        if len(formed) < 3:
            raise WorkerLostError("lost")
        return {"done": True}

    monkeypatch.setattr(pool, "RayPool", Lost)
    monkeypatch.setattr(hosts, "placeable_cpus", lambda size, wanted, wait_s, without: wanted)
    monkeypatch.setattr(hosts, "unreachable_hosts", set)
    monkeypatch.setattr(session, "RaySession", lambda *_, **__: nullcontext())
    for _ in range(2):
        formed.clear()
        epochs_done = iter(range(3)).__next__
        assert api._with_workers(object, {}, 2, load_config(), None, None, work, epochs_done) == {"done": True}
        assert [one.generation for one in formed] == [0, 1, 2]
        assert len({one.run_id for one in formed}) == 1
        assert len({one.secret for one in formed}) == 3
