# SPDX-License-Identifier: Apache-2.0
"""What a run goes on after, and when it gives up."""
from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest

from qgnn_dist.cluster import api, pool, session
from qgnn_dist.cluster.pool import _fit
from qgnn_dist.cluster.recovery import WITHOUT_PROGRESS, Restarts
from qgnn_dist.comm.formation import Formation
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
    restarts = Restarts(5)
    with pytest.raises(kind, match=r"^rank 1: no$"):
        restarts.after(kind("no", rank=1), 3)
    assert restarts.made == []


@pytest.mark.parametrize("kind", [WorkerLostError, DeadlineError, ExchangeError])
def test_restarts_are_counted_and_capped(kind: type[QgnnError]) -> None:
    restarts = Restarts(4)
    for epoch in range(4):
        made = restarts.after(kind("lost", host="h", rank=2, layer=1), epoch)
        assert (made.number, made.epoch, made.host, made.rank, made.layer, made.pause_s) == (
            epoch + 1, epoch, "h", 2, 1, 0.0)
        assert "restart" in str(made)
    with pytest.raises(kind, match=r"lost; given up: 4 restarts were made \(cluster.max_restarts=4\).*--resume"):
        restarts.after(kind("lost"), 9)


def test_a_run_that_gets_no_farther_is_given_up_after_growing_pauses() -> None:
    restarts = Restarts(100)
    pauses = [restarts.after(WorkerLostError("lost"), 7).pause_s for _ in range(WITHOUT_PROGRESS)]
    assert pauses == [0.0, 0.5, 1.0]
    with pytest.raises(WorkerLostError, match="3 restarts got no farther than epoch 7"):
        restarts.after(WorkerLostError("lost"), 7)
    assert restarts.after(WorkerLostError("lost"), 8).pause_s == 0.0


def test_none_are_made_where_none_are_wanted() -> None:
    with pytest.raises(WorkerLostError, match=r"^lost$"):
        Restarts(0).after(WorkerLostError("lost"), 1)


@pytest.mark.parametrize(("hosts", "cpus", "workers"), [([1, 1, 1], 1.0, 3), ([1, 1, 1], 0.75, 3), ([1], 0.5, 2),
                                                        ([4, 0, 2], 0.3, 19), ([], 1.0, 0)])
def test_workers_that_hosts_hold(hosts: list[float], cpus: float, workers: int) -> None:
    assert _fit(hosts, cpus) == workers


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
    monkeypatch.setattr(pool, "placeable_cpus", lambda size, wanted, wait_s: wanted)
    monkeypatch.setattr(session, "RaySession", lambda *_, **__: nullcontext())
    for _ in range(2):
        formed.clear()
        epochs_done = iter(range(3)).__next__
        assert api._with_workers(object, {}, 2, load_config(), None, None, work, epochs_done) == {"done": True}
        assert [one.generation for one in formed] == [0, 1, 2]
        assert len({one.run_id for one in formed}) == 1
        assert len({one.secret for one in formed}) == 3
