# SPDX-License-Identifier: Apache-2.0
"""Runs of many epochs: with kills now and then they end as without, and no process's memory grows."""
from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from ray.cluster_utils import Cluster

from qgnn_dist.config import RunConfig
from qgnn_dist.store.reader import Store
from qgnn_dist.training.run_folder import RunFolder
from tests.fault.driver import Driver, actors
from tests.helpers import make_store, settings, small_graph
from tests.processes import anonymous_bytes, gone
from tests.recovering import same_end, undisturbed

EVERY = 5
"""Epochs between checkpoints."""
KILLS = ["worker"] * 4 + ["server"] * 2 + ["driver"] * 2
GROWTH_BYTES = 4096.0
"""An epoch, at most."""
LOOK_S = 1.0
"""Between looks for new processes."""
WARM = 200
"""Epochs after which the heaps of all processes have what they need."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(small_graph(), tmp_path_factory.mktemp("store") / "s", 2)


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, list[int]]]:
    """Its address and its raylets."""
    running = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        yield running.address, [info.process.pid for node in running.list_all_nodes()
                                for info in node.all_processes["raylet"]]
    finally:
        running.shutdown()


@dataclass
class Soak:
    """A run by `qgnn train`, started again where it is killed, whose processes are watched.

    Attributes: memory: process and what it is → epochs and anonymous bytes. struck: epoch and what was killed.
    """

    store: Store
    folder: Path
    config: RunConfig
    cluster: tuple[str, list[int]]
    memory: dict[tuple[int, str], list[tuple[int, int]]] = field(default_factory=dict)
    struck: list[tuple[int, str]] = field(default_factory=list)
    _running: dict[int, str] = field(default_factory=dict)
    _looked: float = 0.0

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def go(self, kills: list[tuple[int, str]]) -> None:
        """Train to the end; each kill, (not before this epoch, what), waits for a checkpoint after the one before."""
        file, waiting, limit = self.folder / "config.toml", list(kills), time.monotonic() + 1500
        file.write_text(self.config.to_toml())
        while not (self.run / "summary.json").exists():
            with Driver(self.store, self.run, file, self.cluster[0], ["--resume"]) as driver:
                while driver.running:
                    assert time.monotonic() < limit, driver.log.read_text()
                    self._look(driver, waiting)
                    time.sleep(0.005)
                killed = driver.process.returncode == -signal.SIGKILL
                assert killed or driver.process.returncode == 0, driver.log.read_text()
        assert waiting == [], "all were killed"

    def _look(self, driver: Driver, waiting: list[tuple[int, str]]) -> None:
        epoch = _lines(self.run / "metrics.jsonl")
        if time.monotonic() > self._looked + LOOK_S or any(map(gone, self._running)):
            self._running = {**actors(*self.cluster[1]), driver.process.pid: "driver"}
            self._looked = time.monotonic()
        for pid, what in self._running.items():
            seen = self.memory.setdefault((pid, what), [])
            found = anonymous_bytes(pid)
            if found and (not seen or seen[-1][0] < epoch):
                seen.append((epoch, found))
        if waiting and epoch >= waiting[0][0] and self._newest() > (self.struck[-1][0] if self.struck else 0):
            _, what = waiting.pop(0)
            at = [pid for pid, name in self._running.items() if name == what]
            if not at:
                waiting.insert(0, (epoch, what))
                return
            os.kill(random.Random(epoch).choice(sorted(at)), signal.SIGKILL)
            self.struck.append((epoch, what))

    def _newest(self) -> int:
        files = RunFolder(self.run).checkpoint_files()
        return int(files[0].stem.partition("-")[2]) if files else 0

    def growth(self, since: int, least: int) -> dict[str, float]:
        """Bytes an epoch by least squares, of the processes that were seen in `least` epochs from `since` on."""
        found = {}
        for (pid, what), seen in self.memory.items():
            epochs, sizes = np.array([one for one in seen if one[0] >= since], np.float64).reshape(-1, 2).T
            if len(epochs) >= least:
                found[f"{what} {pid}"] = float(np.polyfit(epochs, sizes, 1)[0])
        return found


def _lines(file: Path) -> int:
    try:
        return file.read_bytes().count(b"\n")
    except OSError:
        return 0


def _config(epochs: int) -> RunConfig:
    return settings(f"train.epochs={epochs}", f"train.checkpoint_every={EVERY}", "model.feature_norm=l2",
                    "quant.gradients=4", "propagation.alpha=0.001", "cluster.max_restarts=20", "train.patience=0")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_kills_now_and_then_change_nothing(cluster: tuple[str, list[int]], store: Store, tmp_path: Path,
                                           record_property: Callable[[str, object], None]) -> None:
    config, rng = _config(200), random.Random(0)
    whole = undisturbed(store, tmp_path / "whole", config)
    what = rng.sample(KILLS, len(KILLS))
    soak = Soak(store, tmp_path, config, cluster)
    soak.go(list(zip(sorted(rng.sample(range(10, 180), len(what))), what)))
    same_end(soak.run, whole)
    assert sorted(name for _, name in soak.struck) == sorted(KILLS)
    assert RunFolder(soak.run).epochs_done() == 200
    print(soak.struck)
    record_property("kills", len(soak.struck))


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_memory_is_flat(cluster: tuple[str, list[int]], store: Store, tmp_path: Path,
                        record_property: Callable[[str, object], None]) -> None:
    soak = Soak(store, tmp_path, _config(5 * WARM), cluster)
    soak.go([])
    found = soak.growth(WARM, WARM // 2)
    print({name: f"{slope:.0f} bytes an epoch" for name, slope in found.items()})
    assert sorted(name.split()[0] for name in found) == ["driver", "server", "worker", "worker"]
    assert max(found.values()) < GROWTH_BYTES, found
    record_property("growth_bytes", round(max(found.values())))
