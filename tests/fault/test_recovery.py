# SPDX-License-Identifier: Apache-2.0
"""Runs on a real cluster of several Ray nodes that lose workers, servers and hosts, and end as if nothing had been."""
from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

import qgnn_dist as qgnn
from qgnn_dist.comm import faults
from qgnn_dist.config import RunConfig
from qgnn_dist.errors import WorkerLostError
from qgnn_dist.store.reader import Store
from qgnn_dist.training.run_folder import RunFolder
from tests.helpers import make_store, settings, small_graph
from tests.processes import parent, until_gone
from tests.recovering import same_end

HEALTH = {"RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_period_ms": "500",
          "RAY_health_check_timeout_ms": "1000", "RAY_health_check_failure_threshold": "3"}
WORDS = ("train.epochs=8", "train.checkpoint_every=3", "model.feature_norm=l2", "quant.gradients=4",
         "timeouts.exchange_s=4", "timeouts.server_s=8", "propagation.alpha=0.001")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs, and three nodes of one CPU each."""
    before = {name: os.environ.get(name) for name in (*HEALTH, "RAY_AUTH_MODE", "RAY_ADDRESS")}
    os.environ.update({**HEALTH, "RAY_AUTH_MODE": "disabled"})
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(3):
            made.add_node(num_cpus=1)
        made.wait_for_nodes()
        ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
        yield made
    finally:
        ray.shutdown()
        made.shutdown()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(small_graph(), tmp_path_factory.mktemp("store") / "s", 2)


@pytest.fixture(scope="module")
def whole(cluster: Cluster, store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    qgnn.train(store.path, out=out, config=_config())
    return out


def _config(*words: str) -> RunConfig:
    return settings(*WORDS, *words)


def _outside(mark: Path, act: Callable[[], None]) -> threading.Thread:
    """Once the fault `call` has struck, act, and let the worker go on."""
    def work() -> None:
        until = time.monotonic() + 60
        while not (mark.exists() and mark.stat().st_size) and time.monotonic() < until:
            time.sleep(0.01)
        act()
        mark.with_name(mark.name + ".done").touch()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def _train(monkeypatch: pytest.MonkeyPatch, store: Store, out: Path, fault: str, mark: Path,
           *words: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The summary, and where the fault struck."""
    monkeypatch.setenv(faults.ENVIRONMENT, f"{fault} mark={mark}")
    summary = qgnn.train(store.path, out=out, config=_config(*words))
    monkeypatch.delenv(faults.ENVIRONMENT)
    return summary, json.loads(mark.read_text())


@pytest.mark.parametrize("fault", ["kill epoch=5 layer=2 rank=1", "kill epoch=1 layer=0 rank=0",
                                   "kill epoch=7 layer=3 rank=1 direction=backward"])
def test_a_killed_worker_costs_the_epochs_since_the_checkpoint(cluster: Cluster, store: Store, whole: Path,
                                                               tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                               caplog: pytest.LogCaptureFixture, fault: str) -> None:
    summary, struck = _train(monkeypatch, store, tmp_path / "run", fault, tmp_path / "mark")
    same_end(tmp_path / "run", whole)
    (restart,) = summary["restarts"]
    assert (restart["epoch"], restart["rank"]) == (struck["epoch"] - 1, struck["rank"])
    assert f"the worker process {struck['pid']} was lost" in restart["error"]
    assert restart["error"] in caplog.text
    assert restart["time"] - struck["time"] < 5.0, "seconds to detection"
    assert restart["started_s"] < 20.0, "seconds until it trains again"
    print(f"{fault}: detected in {restart['time'] - struck['time']:.2f} s, again in {restart['started_s']:.2f} s")


def test_a_frozen_worker_is_named_after_the_deadline(cluster: Cluster, store: Store, whole: Path, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    summary, struck = _train(monkeypatch, store, tmp_path / "run", "stop epoch=4 layer=1 rank=1", tmp_path / "mark")
    same_end(tmp_path / "run", whole)
    (restart,) = summary["restarts"]
    assert "peer 1" in restart["error"]
    assert "layer 1" in restart["error"]
    assert "timeouts.exchange_s" in restart["error"]
    took = restart["time"] - struck["time"]
    assert 3.5 < took < 4 + 3, "the exchange's deadline, and the grace for others"
    assert restart["started_s"] < 20.0
    print(f"frozen: detected in {took:.2f} s, again in {restart['started_s']:.2f} s")


def test_a_lost_multiplier_server_is_named_and_replaced(cluster: Cluster, store: Store, whole: Path, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "mark"

    def kill_server() -> None:
        (server,) = _actors("ServerActor")
        os.kill(server, signal.SIGKILL)
        time.sleep(0.2)

    thread = _outside(mark, kill_server)
    summary, _ = _train(monkeypatch, store, tmp_path / "run", "call epoch=5 layer=2 rank=0", mark)
    thread.join(10)
    same_end(tmp_path / "run", whole)
    assert "the multiplier server was lost" in summary["restarts"][0]["error"]
    assert len(summary["restarts"]) == 1


def test_a_lost_host_is_replaced_by_the_spare_one_and_then_by_sharing(cluster: Cluster, store: Store, whole: Path,
                                                                      tmp_path: Path,
                                                                      monkeypatch: pytest.MonkeyPatch,
                                                                      caplog: pytest.LogCaptureFixture) -> None:
    """Three hosts of one CPU and two workers: the first loss takes the spare host, the second one doubles up."""
    added = []
    try:
        for number in range(2):
            mark, out = tmp_path / f"mark{number}", tmp_path / f"run{number}"

            def kill_host(mark: Path = mark) -> None:
                pid = json.loads(mark.read_text())["pid"]
                node = next(node for node in cluster.list_all_nodes()
                            if any(info.process.pid == parent(pid) for info in node.all_processes["raylet"]))
                cluster.remove_node(node, allow_graceful=False)
                until_gone([pid], 3.5)  # a worker may outlive its raylet by a moment, and a run so small would be over

            thread = _outside(mark, kill_host)
            summary, struck = _train(monkeypatch, store, out, "call epoch=5 layer=2 rank=1", mark)
            thread.join(10)
            same_end(out, whole)
            assert len(summary["restarts"]) >= 1
            first = summary["restarts"][0]
            assert first["time"] - struck["time"] < 5.0
            assert first["started_s"] < 20.0
            print(f"host {number}: detected in {first['time'] - struck['time']:.2f} s, {summary['restarts']}")
        assert "0.5 CPUs for each of 2 workers" in caplog.text
    finally:
        for _ in range(2):
            added.append(cluster.add_node(num_cpus=1))
        cluster.wait_for_nodes()


def _actors(name: str) -> list[int]:
    """Processes of actors of a class: Ray puts its name in their command lines, and only this test's cluster runs."""
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                words = (place / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if words.startswith(f"ray::{name}"):
                found.append(int(place.name))
    return found


def test_a_fault_that_stays_is_given_up_with_its_reason(cluster: Cluster, store: Store, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WorkerLostError, match=r"given up: 0 restarts|was lost") as lost:
        _train(monkeypatch, store, tmp_path / "run", "kill epoch=2 layer=0 rank=1", tmp_path / "mark",
               "cluster.max_restarts=0")
    assert lost.value.rank == 1
    assert RunFolder(tmp_path / "run").read_restarts() == []
