# SPDX-License-Identifier: Apache-2.0
"""Runs into which faults are placed, and what must be the same afterwards as without one."""
from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster

import qgnn_dist as qgnn
from qgnn_dist.cluster.hosts import HEALTH_CHECKS
from qgnn_dist.comm import faults
from qgnn_dist.comm.pool import LocalPool
from qgnn_dist.config import RunConfig
from qgnn_dist.propagation.multiplier import InProcessServer, MultiplierRule, MultiplierServer
from qgnn_dist.store.reader import Store
from qgnn_dist.training.loop import run_training
from qgnn_dist.training.run_folder import RunFolder
from qgnn_dist.training.worker import TrainWorker
from tests.helpers import settings, train_pool
from tests.processes import children, parent, until_gone

TIMES = ("train_s", "compute_s", "wait_s", "evaluation_s", "epoch_s", "slow_workers")
EPOCHS, HOSTS = 8, 3
WORDS = (f"train.epochs={EPOCHS}", "train.checkpoint_every=3", "model.feature_norm=l2", "quant.gradients=4",
         "timeouts.exchange_s=4", "timeouts.server_s=8", "propagation.alpha=0.001")
SOON_S, SILENCE_S, AGAIN_S = 5.0, 4.0, 20.0
"""Until a dead process or host is noticed; timeouts.exchange_s; and until training goes on after that."""


def config(*words: str) -> RunConfig:
    """Of the runs here."""
    return settings(*WORDS, *words)


@dataclass
class Struck:
    """A finished run into which one fault was placed.

    Attributes: place: what the fault wrote where it struck. epochs: those that were finished, in order. ready_s:
        seconds that its first workers took until they trained.
    """

    run: Path
    summary: dict[str, Any]
    place: dict[str, Any]
    epochs: list[int]
    ready_s: float = 0.0

    @property
    def restart(self) -> dict[str, Any]:
        """The first one."""
        return dict(self.summary["restarts"][0])

    @property
    def detected_s(self) -> float:
        """Seconds from the fault until the controller knew."""
        return float(self.restart["time"]) - float(self.place["time"])

    @property
    def again_within_s(self) -> float:
        """Until training goes on: AGAIN_S, or, where a busy or slow host starts processes slowly, thrice ready_s."""
        return max(AGAIN_S, 3 * self.ready_s)


class Hosts:
    """A Ray cluster of a head without CPUs and HOSTS nodes of one CPU each, on this machine; a context manager."""

    def __enter__(self) -> Hosts:
        names = (*HEALTH_CHECKS, "RAY_AUTH_MODE", "RAY_ADDRESS")
        self._before = {name: os.environ.get(name) for name in names}
        os.environ.update({**HEALTH_CHECKS, "RAY_AUTH_MODE": "disabled"})
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            self.mend()
            ray.init(address=self.cluster.address, log_to_driver=False, logging_level="ERROR")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        ray.shutdown()
        self.cluster.shutdown()
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    def mend(self) -> None:
        """Replace hosts that were lost."""
        for node in list(self.cluster.worker_nodes):
            (raylet,) = node.all_processes["raylet"]
            if state(raylet.process.pid) == "T":  # frozen, and what it started
                for pid in children(raylet.process.pid):
                    os.kill(pid, signal.SIGKILL)
                self.cluster.remove_node(node, allow_graceful=False)
            elif raylet.process.poll() is not None:
                self.cluster.remove_node(node, allow_graceful=False)
        for _ in range(HOSTS - len(self.cluster.worker_nodes)):
            self.cluster.add_node(num_cpus=1)
        self.cluster.wait_for_nodes()

    def kill(self, worker: int) -> None:
        """The host of a worker's process is gone, Ray and all."""
        raylet = parent(worker)
        node = next(node for node in self.cluster.list_all_nodes()
                    if any(info.process.pid == raylet for info in node.all_processes["raylet"]))
        self.cluster.remove_node(node, allow_graceful=False)
        until_gone([worker], 3.5)  # a worker may outlive its raylet by a moment, and a run so small would be over

    def freeze(self, worker: int) -> None:
        """Nothing on the host of a worker runs any more, and all its connections stay."""
        raylet = parent(worker)
        for pid in [raylet, *children(raylet)]:
            os.kill(pid, signal.SIGSTOP)

    def terminate(self, worker: int) -> None:
        """What a spot host's end is to its processes: SIGTERM to all."""
        raylet = parent(worker)
        os.kill(worker, signal.SIGTERM)
        os.kill(raylet, signal.SIGTERM)
        until_gone([worker], 3.5)


    def actors(self, name: str) -> list[int]:
        """Processes of actors of a class: Ray puts its name in their command lines."""
        found = []
        for node in self.cluster.list_all_nodes():
            for pid in children(node.all_processes["raylet"][0].process.pid):
                try:
                    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
                except OSError:
                    continue
                if words.startswith(f"ray::{name}"):
                    found.append(pid)
        return found

    def kill_server(self, worker: int) -> None:
        """The multiplier server's process is gone, whoever's round it is."""
        (server,) = self.actors("ServerActor")
        os.kill(server, signal.SIGKILL)
        time.sleep(0.2)


def state(pid: int) -> str:
    """As the kernel has it: R, S, T for stopped, Z and so on; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def undisturbed(store: Store, run: Path, own: RunConfig, *, resume: bool = False) -> Path:
    """Train on workers in this process, without a fault; `resume` goes on with what another one left."""
    server = InProcessServer(MultiplierServer(store.num_parts, MultiplierRule.of(own, store.num_edges), 60.0))
    pool = LocalPool(TrainWorker, {"store": str(store.path), "config": own}, store.num_parts, server=server)
    try:
        run_training(pool, server.call, store, own, RunFolder(run), resume=resume)
    finally:
        pool.close()
        server.close()
    return run


def outside(mark: Path, act: Callable[[int], None]) -> threading.Thread:
    """Once the fault `call` has struck, act on the worker's process, and let the worker go on."""
    def work() -> None:
        until = time.monotonic() + 60
        while not (mark.exists() and mark.stat().st_size) and time.monotonic() < until:
            time.sleep(0.01)
        try:
            act(json.loads(mark.read_text())["pid"])
        finally:
            mark.with_name(mark.name + ".done").touch()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def strike(monkeypatch: pytest.MonkeyPatch, store: Store, folder: Path, fault: str, *words: str,
           act: Callable[[int], None] | None = None, on_epoch: Callable[[int], None] | None = None) -> Struck:
    """Train with a fault, "KIND epoch=… layer=…"; `act` is done outside where the kind is `call`."""
    mark, epochs = folder / "mark", list[int]()
    began, trained = time.time(), list[float]()

    def note(record: dict[str, Any]) -> None:
        trained.append(time.time())
        epochs.append(record["epoch"])
        if on_epoch is not None:
            on_epoch(record["epoch"])

    with ExitStack() as after:
        after.enter_context(monkeypatch.context()).setenv(faults.ENVIRONMENT, f"{fault} mark={mark}")
        if act is not None:
            after.callback(outside(mark, act).join, 10)
        summary = qgnn.train(store.path, out=folder / "run", config=config(*words), on_epoch=note)
    assert mark.exists(), f"no worker came by {fault}"
    place = json.loads(mark.read_text())
    kind, *wanted = fault.split()
    assert place["kind"] == kind
    assert all(str(place[name]) == value for name, value in (word.split("=") for word in wanted))
    return Struck(folder / "run", summary, place, epochs, min(trained[0], place["time"]) - began)


def same_end(run: Path, whole: Path) -> None:
    """Every epoch's line but its times, every tensor, the progress and the server's state, bit by bit."""
    assert records(run) == records(whole)
    found, wanted = RunFolder(run).load_checkpoint(), RunFolder(whole).load_checkpoint()
    assert found is not None
    assert wanted is not None
    assert set(found.tensors) == set(wanted.tensors)
    for name, value in wanted.tensors.items():
        np.testing.assert_array_equal(found.tensors[name], value, err_msg=name)
    assert (found.progress, found.server) == (wanted.progress, wanted.server)


def records(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without its times."""
    return [{key: value for key, value in record.items() if key not in TIMES}
            for record in RunFolder(run).read_metrics()]


def tell(record_property: Callable[[str, object], None], name: str, struck: Struck) -> None:
    """Keep a run's times with the test's result."""
    detected, again = round(struck.detected_s, 2), round(struck.restart["started_s"], 2)
    record_property("fault", name)
    record_property("detected_after_s", detected)
    record_property("restarted_after_s", again)
    print(f"{name}: detected after {detected:.2f} s, new workers met after {again:.2f} s")


def places(store: Store) -> list[tuple[str, int, int]]:
    """Direction, layer and round of every round of an epoch."""
    found: list[tuple[str, int, int]] = []
    with train_pool(store, config()) as pool:
        pool.workers[0]._exchange.on_round = lambda *place: found.append(place)
        pool.call("train_epoch", 1, True, timeout_s=60)
    return found


def drawn(seed: str, rounds: list[tuple[str, int, int]]) -> str:
    """A place for a fault, as the words of QGNN_FAULT."""
    draw = random.Random(seed)
    direction, layer, round = draw.choice(rounds)
    return (f"epoch={draw.randint(1, EPOCHS)} layer={layer} round={round} rank={draw.randint(0, 1)} "
            f"direction={direction}")
