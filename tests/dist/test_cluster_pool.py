# SPDX-License-Identifier: Apache-2.0
"""Workers as Ray actors: who they are, how their errors arrive, how they end, and their multiplier server."""
from __future__ import annotations

import asyncio
import base64
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray import cloudpickle

import qgnn_dist
from qgnn_dist.cluster.builders import ray_builders
from qgnn_dist.cluster.pool import RayPool
from qgnn_dist.cluster.session import RaySession
from qgnn_dist.comm.formation import Formation
from qgnn_dist.comm.pool import WorkerContext
from qgnn_dist.config import ClusterConfig, TimeoutsConfig
from qgnn_dist.errors import DeadlineError, InputError, StoreError, WorkerError
from tests.processes import until_gone
from tests.sockets import tree

# Ray's workers cannot import a test module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

HALF_CPU = ClusterConfig(cpus_per_worker=0.5)
TIMES = TimeoutsConfig(start_s=60.0, rendezvous_s=30.0, exchange_s=20.0, server_s=10.0)
SLOW_EPOCH = 2


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    with RaySession(num_cpus=2):
        yield


class Probe:
    """Worker that can be asked for anything."""

    def __init__(self, context: WorkerContext, word: str = "") -> None:
        self.context, self.word = context, word
        if word == "bad store":
            raise StoreError("this host sees another graph", file="/data/store")

    def where(self) -> dict[str, Any]:
        import torch

        from qgnn_dist import kernels

        return {"pid": os.getpid(), "rank": self.context.rank, "size": self.context.size, "host": self.context.host,
                "run_id": self.context.run_id, "torch": torch.get_num_threads(), "kernels": kernels.threads(),
                "shown": f"{vars(self.context)}{vars(self.context.group) if self.context.group else ''}",
                "omp": os.environ.get("OMP_NUM_THREADS"), "simd": os.environ.get("QGNN_SIMD"), "word": self.word}

    def add(self, values: np.ndarray) -> np.ndarray:
        assert self.context.group is not None
        total = values + self.context.rank
        self.context.group.all_reduce_sum(total)
        return total

    def fail(self, rank: int, how: str) -> str:
        """One rank fails; where it raises a plain error, the others wait for it in an all-reduce."""
        if self.context.rank == rank:
            if how == "input":
                raise InputError("the feature count does not fit", file="model.safetensors")
            if how == "plain":
                raise KeyError("missing")
            time.sleep(60)
        if how == "plain":
            self.add(np.zeros(4))
        return "fine"

    def wait_for_others(self) -> None:
        self.add(np.zeros(1000))
        time.sleep(0.5)
        self.wait_for_others()

    def climb(self, layers: int) -> list[float]:
        """Post a layer, compute "the next" meanwhile, and only then read the answer."""
        assert self.context.server is not None
        values, reply = [], self.context.server.post_layer(1, 0, float(self.context.rank), 1.0)
        for layer in range(1, layers):
            following = self.context.server.post_layer(1, layer, float(self.context.rank), 1.0)
            values.append(reply.result(TIMES.server_s))
            reply = following
        return [*values, reply.result(TIMES.server_s)]

    def hidden(self) -> tuple[float, float]:
        assert self.context.server is not None
        start = time.perf_counter()
        reply = self.context.server.post_layer(SLOW_EPOCH, 0, 1.0, 1.0)
        posted = time.perf_counter() - start
        reply.result(TIMES.server_s)
        return posted, time.perf_counter() - start

    def post_alone(self) -> Any:
        assert self.context.server is not None
        return self.context.server.post_ranges(7, {"hidden": [1.0]}).result(TIMES.server_s)

    def post_late(self) -> Any:
        assert self.context.server is not None
        return self.context.server.post_layer(3, 0, 1.0, 1.0).result(0.2)


class FakeServer:
    """Answers a layer with the sum over ranks, after a random while."""

    def __init__(self, size: int, delay_s: float) -> None:
        self.size, self.delay_s, self.random = size, delay_s, random.Random(0)
        self.sums: dict[Any, dict[int, float]] = {}
        self.loaded: Any = None

    async def post_layer(self, epoch: int, layer: int, rank: int, dot: float, energy: float) -> float:
        posts = self.sums.setdefault((epoch, layer), {})
        posts[rank] = dot + energy
        while len(posts) < self.size:
            await asyncio.sleep(0.001)
        await asyncio.sleep(10 * self.delay_s if epoch == SLOW_EPOCH else self.random.random() * self.delay_s)
        return sum(posts.values()) + layer

    async def post_ranges(self, epoch: int, rank: int, moments: dict[str, Any]) -> Any:
        raise DeadlineError("rank(s) 1 did not post ranges", rank=rank)

    def state(self) -> dict[str, Any]:
        return {"loaded": self.loaded, "layers": len(self.sums)}

    def load_state(self, state: Any) -> None:
        self.loaded = state

    def broken(self) -> None:
        raise ZeroDivisionError("inside the server")


def pool(size: int = 2, **more: Any) -> RayPool:
    return RayPool(Probe, more.pop("kwargs", {}), size, cluster=more.pop("cluster", HALF_CPU),
                   timeouts=more.pop("timeouts", TIMES), **more)


def test_workers_are_processes_of_their_own_that_share_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QGNN_SIMD", "scalar")
    with pool(kwargs={"word": "hello"}, cluster=ClusterConfig(cpus_per_worker=0.5, threads=2)) as workers:
        found = workers.call("where", timeout_s=20)
        assert [w["rank"] for w in found] == [0, 1]
        assert [w["pid"] for w in found] == workers.pids()
        assert len({*workers.pids(), os.getpid()}) == 3
        assert workers.hosts() == [socket.gethostname()] * 2
        assert {(w["size"], w["torch"], w["kernels"], w["omp"], w["simd"], w["word"]) for w in found} == {
            (2, 2, 2, "2", "scalar", "hello")}
        assert len({w["run_id"] for w in found}) == 1
        for total in workers.call("add", np.arange(5.0), timeout_s=20):
            np.testing.assert_array_equal(total, 2 * np.arange(5.0) + 1)
        assert workers.call_one(1, "where", timeout_s=20)["rank"] == 1
        pids = workers.pids()
    assert until_gone(pids, 10) == []


def test_the_secret_of_a_formation_is_in_no_place_that_is_shown_or_kept() -> None:
    """Of no process of Ray's and ours in its environment or command line, and in no file of the session, logs too."""
    formation = Formation.new(run_id=9, generation=4)
    spellings = {formation.secret, formation.secret.hex().encode(), repr(formation.secret)[2:-1].encode(),
                 base64.b64encode(formation.secret)}
    with pool(formation=formation) as workers:
        found = workers.call("where", timeout_s=20)
        assert {w["run_id"] for w in found} == {9}
        shown = [str(vars(workers)), *(w["shown"] for w in found)]
        pids = tree(os.getpid())
        assert pids >= set(workers.pids())
        shown += [Path(f"/proc/{pid}/{name}").read_text(errors="surrogateescape")
                  for pid in pids for name in ("environ", "cmdline")]
        names = [actor.get("name", "") for actor in ray.util.list_named_actors(all_namespaces=True)]
        assert {f"qgnn-worker-{9:016x}-4-{rank}" for rank in (0, 1)} <= set(names)
        folder = Path(ray._private.worker._global_node.get_session_dir_path())
        kept = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        assert any("worker" in file.name for file in kept), "no logs of workers were found"
    assert any("Formation(run_id=9, generation=4)" in text for text in shown)
    for spelling in spellings:
        assert not any(spelling in text.encode(errors="surrogateescape") for text in shown)
        assert [file for file, text in kept.items() if spelling in text] == []


def test_errors_arrive_at_once_in_their_type_with_rank_host_and_trace() -> None:
    with pool() as workers:
        with pytest.raises(InputError) as caught:
            workers.call("fail", 1, "input", timeout_s=20)
        assert type(caught.value) is InputError
        assert (caught.value.rank, caught.value.host) == (1, socket.gethostname())
        assert str(caught.value) == (f"host {socket.gethostname()}, rank 1, model.safetensors: the feature count does "
                                     "not fit")
        start = time.monotonic()
        with pytest.raises(WorkerError, match="KeyError: 'missing'") as other:
            workers.call("fail", 1, "plain", timeout_s=20)    # rank 0 waits for rank 1 in an all-reduce
        assert time.monotonic() - start < 5
        assert other.value.rank == 1
        assert "raise KeyError" in other.value.remote_traceback  # type: ignore[attr-defined]


def test_equal_errors_of_several_ranks_are_one() -> None:
    with pytest.raises(StoreError, match="ranks 0, 1: this host sees another graph") as caught:
        pool(kwargs={"word": "bad store"})
    assert caught.value.file == "/data/store"


def test_a_late_worker_is_named() -> None:
    with pool() as workers:
        start = time.monotonic()
        with pytest.raises(DeadlineError, match=r"rank\(s\) 1 on .*did not answer fail\(\) within 1 s"):
            workers.call("fail", 1, "sleep", timeout_s=1)
        assert time.monotonic() - start < 3
        pids = workers.pids()
    assert until_gone(pids, 10) == []


def test_a_killed_worker_is_named_within_5_s() -> None:
    with pool() as workers:
        pids = workers.pids()
        start = time.monotonic()
        killer = threading.Timer(1.0, os.kill, (pids[1], signal.SIGKILL))
        killer.start()
        with pytest.raises(WorkerError, match=rf"the worker process {pids[1]} was lost") as caught:
            workers.call("wait_for_others", timeout_s=60)
        assert time.monotonic() - start < 1 + 5
        killer.join()
        assert (caught.value.rank, caught.value.host) == (1, socket.gethostname())
    assert until_gone(pids, 10) == []


def test_placement_that_cannot_be_says_what_was_asked_and_what_is_there() -> None:
    start = time.monotonic()
    with pytest.raises(DeadlineError) as caught:
        pool(64, cluster=ClusterConfig(cpus_per_worker=1.0), timeouts=TimeoutsConfig(start_s=3.0))
    assert time.monotonic() - start < 6
    message = str(caught.value)
    assert "64 workers of 1 CPU" in message
    assert "within 3 s" in message
    assert f"1 host(s): {socket.gethostname()} (" in message
    assert "2 free of 2 CPU" in message
    assert "timeouts.start_s" in message


def test_hosts_of_another_version_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qgnn_dist.cluster.pool.__version__", "9.9")
    with pytest.raises(InputError, match=rf"^host {socket.gethostname()}: has qgnn-dist {qgnn_dist.__version__}, this "
                                         "command is of 9.9; install the same on all hosts$"):
        pool()


def test_the_servers_round_trip_is_hidden_its_delays_change_nothing_its_errors_arrive() -> None:
    answers = []
    for delay_s in (0.1, 0.0):
        with pool(server_factory=partial(FakeServer, 2, delay_s)) as workers:
            values = workers.call("climb", 12, timeout_s=30)
            assert values[0] == values[1]
            answers.append(values[0])
            workers.server_call("load_state", {"lambda": -0.5})
            assert workers.server_call("state") == {"loaded": {"lambda": -0.5}, "layers": 12}
            if delay_s > 0:
                for posted, answered in workers.call("hidden", timeout_s=30):
                    assert answered > 1.0
                    assert posted < 0.5
                continue
            with pytest.raises(WorkerError, match="ZeroDivisionError: inside the server"):
                workers.server_call("broken")
            with pytest.raises(DeadlineError, match=r"rank\(s\) 1 did not post ranges"):
                workers.call_one(0, "post_alone", timeout_s=20)
            with pytest.raises(DeadlineError, match=r"layer 0 of epoch 3 within 0.2 s.*timeouts\.server_s"):
                workers.call_one(0, "post_late", timeout_s=20)
    assert answers[0] == answers[1] == [3.0 + layer for layer in range(12)]


def test_builders_run_side_by_side_and_their_errors_arrive() -> None:
    run = ray_builders(timeout_s=60, start_s=30)
    results = run(_build, "scratch", [3, 1, 2])
    assert [r["part"] for r in results] == [3, 1, 2]
    assert len({r["pid"] for r in results}) == 2
    with pytest.raises(StoreError, match="part 5"):
        run(_build, "scratch", [4, 5, 6])


def _build(scratch: str, part: int) -> dict[str, Any]:
    assert scratch == "scratch"
    if part == 5:
        raise StoreError("part 5 is damaged")
    time.sleep(0.3)
    return {"part": part, "pid": os.getpid()}


def test_a_connected_process_keeps_its_ray() -> None:
    with RaySession("10.0.0.1:1", num_cpus=64):
        assert ray.cluster_resources()["CPU"] == 2
    assert ray.is_initialized()
