# SPDX-License-Identifier: Apache-2.0
"""Runs on a real cluster of several Ray nodes that lose workers, servers and hosts, and end as if nothing had been."""
from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import qgnn_dist as qgnn
from qgnn_dist.cluster.pool import RayPool
from qgnn_dist.comm import faults
from qgnn_dist.errors import WorkerLostError
from qgnn_dist.store.reader import Store
from qgnn_dist.training.run_folder import RunFolder
from tests.helpers import untrained_model
from tests.processes import parent
from tests.recovering import (
    EPOCHS,
    SILENCE_S,
    SOON_S,
    Hosts,
    Struck,
    config,
    outside,
    same_end,
    strike,
    tell,
    undisturbed,
)

Property = Callable[[str, object], None]


def _whole_again(struck: Struck, whole: Path, within_s: float) -> None:
    """Equal to a run that nothing happened to, noticed in time, and no finished epoch was lost."""
    same_end(struck.run, whole)
    assert struck.epochs == list(range(1, EPOCHS + 1)), "each epoch was finished once"
    assert struck.restart["epoch"] == struck.place["epoch"] - 1
    assert struck.detected_s < within_s
    assert struck.restart["started_s"] < struck.again_within_s
    assert struck.restart["host"] == socket.gethostname()


@pytest.mark.parametrize("fault", ["kill epoch=5 layer=2 rank=1", "kill epoch=1 layer=0 rank=0",
                                   "kill epoch=7 layer=3 rank=1 direction=backward"])
def test_a_killed_worker_costs_the_epoch_in_hand(hosts: Hosts, store: Store, whole: Path, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
                                                 record_property: Property, fault: str) -> None:
    struck = strike(monkeypatch, store, tmp_path, fault)
    _whole_again(struck, whole, SOON_S)
    restart = struck.restart
    assert restart["rank"] == struck.place["rank"]
    assert restart["layer"] in (struck.place["layer"], None), "None where Ray tells long before who waited for it"
    assert f"the worker process {struck.place['pid']} was lost" in restart["error"]
    assert restart["error"] in caplog.text
    tell(record_property, fault, struck)


def test_a_worker_that_is_out_of_memory_says_so(hosts: Hosts, store: Store, whole: Path, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch, record_property: Property) -> None:
    """An allocation fails; the kernel's own way with processes that take too much is SIGKILL, as above."""
    struck = strike(monkeypatch, store, tmp_path, "memory epoch=4 layer=1 rank=1 direction=evaluation")
    _whole_again(struck, whole, SOON_S)
    assert struck.restart["rank"] == 1
    assert re.search(r"out of memory \(MemoryError: Unable to allocate 1\.00 GiB", struck.restart["error"])
    tell(record_property, "memory", struck)


def test_a_frozen_worker_is_asked_in_vain_and_named_after_the_deadline(
        hosts: Hosts, store: Store, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture, record_property: Property) -> None:
    struck = strike(monkeypatch, store, tmp_path, "stop epoch=4 layer=1 rank=1")
    _whole_again(struck, whole, SILENCE_S + 2)
    error = struck.restart["error"]
    assert struck.detected_s > SILENCE_S - 0.5
    assert "peer 1, layer 1: peer(s) 1 sent nothing" in error
    assert f"(rank 1 is on host {socket.gethostname()})" in error
    assert "timeouts.exchange_s" in error
    (stall,) = RunFolder(struck.run).stall_files()
    text = stall.read_text()
    assert f"rank 1, process {struck.place['pid']}: no answer within" in text
    assert re.search(r"rank 0, process \d+: epoch 4, forward, layer 1, round 1; it waits, for 1\.\d s", text)
    assert re.search(r"in finish\n.*\n.* in _wait\n", text), "the stack of the worker that waits for messages"
    for line in text.split("\n\n")[0].splitlines():
        assert line in caplog.text
    assert caplog.text.index("no worker has come further") < caplog.text.index("timeouts.exchange_s")
    tell(record_property, "stop", struck)


def test_a_lost_multiplier_server_is_named_and_replaced(hosts: Hosts, store: Store, whole: Path, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch,
                                                        record_property: Property) -> None:
    struck = strike(monkeypatch, store, tmp_path, "call epoch=5 layer=2 rank=0", act=hosts.kill_server)
    _whole_again(struck, whole, SOON_S)
    assert "the multiplier server was lost" in struck.restart["error"]
    assert len(struck.summary["restarts"]) == 1
    tell(record_property, "multiplier server", struck)


def test_a_lost_host_is_replaced_by_the_spare_one_and_then_by_sharing(
        hosts: Hosts, store: Store, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture, record_property: Property) -> None:
    """Three hosts of one CPU and two workers: the first loss takes the spare host, the second one doubles up."""
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        struck = strike(monkeypatch, store, folder, "call epoch=5 layer=2 rank=1", act=hosts.kill)
        _whole_again(struck, whole, SOON_S)
        # Ray may need longer than the grace after a peer's complaint, which names the one that it has lost.
        assert struck.restart["rank"] == 1 or "rank 0, peer 1, layer" in struck.restart["error"]
        assert len(struck.summary["restarts"]) == 1
        tell(record_property, f"host {number}", struck)
    assert "0.5 CPUs for each of 2 workers" in caplog.text


def test_a_frozen_host_is_found_by_health_checks_before_the_deadline(
        hosts: Hosts, store: Store, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        record_property: Property) -> None:
    struck = strike(monkeypatch, store, tmp_path, "call epoch=6 layer=3 rank=1 direction=backward",
                    "timeouts.exchange_s=30", "timeouts.server_s=30", "timeouts.stall_s=1", act=hosts.freeze)
    _whole_again(struck, whole, SOON_S)
    assert len(struck.summary["restarts"]) == 1
    assert struck.restart["rank"] == 1
    assert f"the worker process {struck.place['pid']} was lost" in struck.restart["error"]
    (stall,) = RunFolder(struck.run).stall_files()
    assert f"rank 1, process {struck.place['pid']}: no answer within" in stall.read_text()
    tell(record_property, "host frozen", struck)


def test_a_worker_with_sigterm_finishes_its_epoch_and_moves(hosts: Hosts, store: Store, whole: Path, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch,
                                                            record_property: Property) -> None:
    at: dict[int, dict[int, int]] = {}

    def note(epoch: int) -> None:
        at[epoch] = {pid: parent(pid) for pid in hosts.actors("WorkerActor")}

    struck = strike(monkeypatch, store, tmp_path, "term epoch=5 layer=2 rank=1", on_epoch=note)
    same_end(struck.run, whole)
    assert struck.epochs == list(range(1, EPOCHS + 1))
    assert struck.restart["epoch"] == 5, "the epoch under way was finished"
    assert struck.restart["rank"] == 1
    assert "SIGTERM to rank(s) 1: stopped after epoch 5, with a checkpoint" in struck.restart["error"]
    left = at[5][struck.place["pid"]]
    assert left not in at[EPOCHS].values(), "nobody works on the host that is about to end"
    assert len(at[EPOCHS]) == 2
    tell(record_property, "term", struck)


def test_a_host_with_sigterm_costs_no_finished_epoch(hosts: Hosts, store: Store, whole: Path, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch,
                                                     record_property: Property) -> None:
    """Ray ends at once, and its workers with it: who is left hands over what was finished."""
    struck = strike(monkeypatch, store, tmp_path, "call epoch=6 layer=1 rank=0", act=hosts.terminate)
    _whole_again(struck, whole, SOON_S)
    assert struck.restart["rank"] == 0
    tell(record_property, "host with SIGTERM", struck)


def test_where_all_hosts_end_the_run_says_so_and_can_go_on(store: Store, whole: Path, tmp_path: Path) -> None:
    """A Ray of one host, which is about to end."""
    run, file = tmp_path / "run", tmp_path / "config.toml"
    file.write_text(config().to_toml())
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment[faults.ENVIRONMENT] = f"term epoch=4 layer=1 rank=1 direction=backward mark={tmp_path / 'mark'}"
    done = subprocess.run([sys.executable, "-m", "qgnn_dist.cli", "train", str(store.path), "--out", str(run),
                           "--config", str(file)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "error: stopped by SIGTERM: all hosts end their workers" in done.stderr
    assert "--resume" in done.stderr
    assert RunFolder(run).checkpoint_files()[0].name == "epoch-000004.safetensors"
    same_end(undisturbed(store, run, config(), resume=True), whole)


@pytest.mark.parametrize("fault", ["term", "kill host"])
def test_a_prediction_begins_again_on_other_hosts(hosts: Hosts, store: Store, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
                                                  fault: str) -> None:
    """A worker that is told to go leaves its host too, though that is there still."""
    file, out, mark = tmp_path / "model", tmp_path / "out", tmp_path / "mark"
    untrained_model(store).save(file)
    formed = list[list[str]]()

    def note(pool: RayPool) -> RayPool:
        formed.append(pool.nodes())
        return pool

    monkeypatch.setattr(RayPool, "__enter__", note)
    monkeypatch.setenv(faults.ENVIRONMENT,
                       f"{fault.split()[0].replace('kill', 'call')} direction=evaluation layer=2 rank=1 mark={mark}")
    helper = outside(mark, hosts.kill) if fault == "kill host" else None
    try:
        qgnn.predict(store.path, model=file, out=out)
    finally:
        if helper is not None:
            helper.join(10)
    assert "restart 1 of what is not finished" in caplog.text
    struck = json.loads(mark.read_text())["pid"]
    assert ("SIGTERM to the worker" if fault == "term" else f"the worker process {struck} was lost") in caplog.text
    assert [len(nodes) for nodes in formed] == [2, 2]
    assert formed[0][1] not in formed[1], "nobody works on the host that ends, or is gone"
    monkeypatch.delenv(faults.ENVIRONMENT)
    qgnn.predict(store.path, model=file, out=tmp_path / "whole")
    for part in sorted((tmp_path / "whole").glob("*.parquet")):
        assert (out / part.name).read_bytes() == part.read_bytes()
    assert len(list(out.glob("*.parquet"))) == 2


def test_a_fault_that_stays_is_given_up_with_its_reason(hosts: Hosts, store: Store, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WorkerLostError, match=r"given up: 0 restarts|was lost") as lost:
        strike(monkeypatch, store, tmp_path, "kill epoch=2 layer=0 rank=1", "cluster.max_restarts=0")
    assert lost.value.rank == 1
    assert RunFolder(tmp_path / "run").read_restarts() == []
