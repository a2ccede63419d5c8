# SPDX-License-Identifier: Apache-2.0
"""`qgnn train` killed at any moment: nothing of it stays behind, and `--resume` ends as if nothing had been."""
from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

import qgnn_dist as qgnn
from qgnn_dist.store.reader import Store
from qgnn_dist.training.run_folder import RunFolder
from tests.fault.driver import Driver, actors, not_agents
from tests.helpers import make_store, settings, small_graph
from tests.processes import command, descendants, shared_memory, until_gone
from tests.recovering import same_end, undisturbed

LEFT_S = 10.0
"""How long anything may outlive its driver."""
CONFIG = settings("train.epochs=200", "train.checkpoint_every=3", "model.feature_norm=l2", "quant.gradients=4",
                  "propagation.alpha=0.001")
SEEDS = range(25)


@dataclass
class Place:
    """Where commands run: a cluster that outlives them, its raylets, a store, a run without a fault, its settings."""

    address: str
    raylets: list[int]
    store: Store
    whole: Path
    config: Path
    seconds: dict[bool, float]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("place")
    store = make_store(small_graph(), folder / "s", 2)
    whole, config = undisturbed(store, folder / "whole", CONFIG), folder / "config.toml"
    config.write_text(CONFIG.to_toml())
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        raylets = [info.process.pid for node in cluster.list_all_nodes() for info in node.all_processes["raylet"]]
        yield Place(cluster.address, raylets, store, whole, config, {})
    finally:
        ray.shutdown()
        cluster.shutdown()


def _seconds(place: Place, joined: bool, folder: Path) -> float:
    """From the start of an undisturbed command to its end, the same run once more; known after the first call."""
    if joined not in place.seconds:
        start = time.monotonic()
        with Driver(place.store, folder / "undisturbed", place.config, place.address if joined else None) as driver:
            assert driver.process.wait(200) == 0, driver.log.read_text()
            place.seconds[joined] = time.monotonic() - start
        same_end(folder / "undisturbed", place.whole)
    return place.seconds[joined]


def _kill(place: Place, joined: bool, run: Path, wait: Callable[[Driver], None]) -> tuple[list[str], float]:
    """Kill a command once `wait` returns; what it had started, and the seconds until all of that was gone."""
    with Driver(place.store, run, place.config, place.address if joined else None) as driver:
        wait(driver)
        below = list(actors(*place.raylets)) if joined else descendants(driver.process.pid)
        names = {pid: command(pid) for pid in below}
        ours = not_agents(below)
        files = shared_memory([driver.process.pid, *ours])
        driver.kill()
        start = time.monotonic()
        # What was being started at that moment is looked for too.
        ours += not_agents(descendants(*ours))
        assert not_agents(until_gone(ours, LEFT_S)) == [], names
        while actors(*place.raylets) and time.monotonic() < start + LEFT_S:
            time.sleep(0.05)
        assert actors(*place.raylets) == {}
        took = time.monotonic() - start
        if not joined:
            assert [name for name in files if Path(name).exists()] == []
    return list(names.values()), took


def _resume(place: Place, run: Path) -> float:
    """Seconds that the rest of a killed run takes; it ends as one that nothing happened to, and leaves nothing else."""
    start = time.monotonic()
    qgnn.train(place.store.path, out=run, config=CONFIG, resume=True)
    took = time.monotonic() - start
    same_end(run, place.whole)
    assert [str(path) for path in run.rglob(".*")] == []
    return took


@pytest.mark.parametrize("joined", [False, True], ids=["own Ray", "joined Ray"])
def test_a_killed_command_goes_on(place: Place, tmp_path: Path, record_property: Callable[[str, object], None],
                                  joined: bool) -> None:
    """In the middle of its training; what it was writing goes with the next command."""
    run = tmp_path / "run"

    def until_epoch_40(driver: Driver) -> None:
        until = time.monotonic() + 100
        while RunFolder(run).epochs_done() < 40 and driver.running and time.monotonic() < until:
            time.sleep(0.02)
        assert driver.running, driver.log.read_text()

    started, gone_s = _kill(place, joined, run, until_epoch_40)
    assert sum("WorkerActor" in name or "ServerActor" in name for name in started) == 3
    assert not (run / "summary.json").exists()
    for half in (".summary.json.1.tmp", "checkpoints/.epoch-000099.safetensors.1.tmp"):
        (run / half).write_text("half")
    record_property("gone_s", round(gone_s, 2))
    record_property("resumed_s", round(_resume(place, run), 2))


@pytest.mark.long
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("joined", [False, True], ids=["own Ray", "joined Ray"])
def test_a_command_killed_at_any_moment_goes_on(place: Place, tmp_path: Path,
                                                record_property: Callable[[str, object], None], joined: bool,
                                                seed: int) -> None:
    """From the start of its process to the end of its training."""
    run, delay_s = tmp_path / "run", random.Random(f"{joined} {seed}").uniform(0, _seconds(place, joined, tmp_path))
    _, gone_s = _kill(place, joined, run, lambda driver: time.sleep(delay_s))
    epochs = RunFolder(run).epochs_done()
    resumed_s = _resume(place, run)
    record_property("gone_s", round(gone_s, 2))
    record_property("resumed_s", round(resumed_s, 2))
    print(f"killed after {delay_s:.2f} s and {epochs} epochs, gone in {gone_s:.2f} s, the rest took {resumed_s:.2f} s")
