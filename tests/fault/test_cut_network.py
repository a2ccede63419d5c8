# SPDX-License-Identifier: Apache-2.0
"""A host is cut off the network of a Ray cluster, whose hosts are network namespaces, while it trains."""
from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qgnn_dist.cluster.hosts import HEALTH_CHECKS
from qgnn_dist.comm import faults
from qgnn_dist.store.reader import Store
from qgnn_dist.training.run_folder import RunFolder
from tests.netns import NetnsCluster
from tests.recovering import AGAIN_S, SILENCE_S, Struck, config, drawn, outside, places, same_end, tell

RAY = (sys.executable, "-m", "ray.scripts.scripts")
Property = Callable[[str, object], None]


class CutCluster(NetnsCluster):
    """Host 0 has the head and the controller, the three others a worker's CPU each."""

    def __enter__(self) -> CutCluster:
        super().__enter__()
        try:
            self._ray(0, "--head", "--port=6379", "--include-dashboard=false", "--num-cpus=0")
            self._until(lambda: self.exec(0, [*RAY, "health-check", "--address", self.head],
                                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).wait(60) == 0)
            for i in range(1, self.n):
                self.add(i)
            count = [sys.executable, "-c", "import ray, sys, time; ray.init(address=sys.argv[1], logging_level='ERROR')"
                     "\nwhile len([n for n in ray.nodes() if n['Alive']]) < int(sys.argv[2]): time.sleep(0.2)",
                     self.head, str(self.n)]
            assert self.exec(0, count, stderr=subprocess.DEVNULL).wait(60) == 0
        except BaseException:
            self.close()
            raise
        return self

    @property
    def head(self) -> str:
        """Ray's address."""
        return f"{self.address(0)}:6379"

    def add(self, i: int) -> None:
        """Start Ray on a host."""
        self._ray(i, f"--address={self.head}", "--num-cpus=1")

    def host_of(self, pid: int) -> int:
        """The host that a process lives on."""
        return next(i for i in range(self.n) if pid in self.pids(i))

    def _ray(self, i: int, *words: str) -> None:
        self.exec(i, [*RAY, "start", "--block", f"--node-ip-address={self.address(i)}",
                      "--object-store-memory=100000000", "--disable-usage-stats", *words], HEALTH_CHECKS,
                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    @staticmethod
    def _until(done: Callable[[], bool], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, f"Ray was not up within {seconds:g} s"


@pytest.fixture
def cut_cluster() -> Iterator[CutCluster]:
    with CutCluster(4) as made:
        yield made


@pytest.mark.timeout(280)
def test_a_host_that_is_cut_off_is_left_behind(cut_cluster: CutCluster, store: Store, whole: Path, tmp_path: Path,
                                               record_property: Property) -> None:
    _cut_and_compare(cut_cluster, store, whole, tmp_path, "epoch=5 layer=2 rank=1 direction=forward", record_property)


@pytest.mark.long
@pytest.mark.timeout(280)
@pytest.mark.parametrize("seed", range(20))
def test_a_host_that_is_cut_off_anywhere_is_left_behind(cut_cluster: CutCluster, store: Store, whole: Path,
                                                        tmp_path: Path, record_property: Property, seed: int) -> None:
    _cut_and_compare(cut_cluster, store, whole, tmp_path, drawn(f"cut {seed}", places(store)), record_property)


def _cut_and_compare(hosts: CutCluster, store: Store, whole: Path, folder: Path, place: str,
                     record_property: Property) -> None:
    mark, cut = folder / "mark", list[int]()

    def pull(worker: int) -> None:
        cut.append(hosts.host_of(worker))
        hosts.cut(cut[0])

    thread = outside(mark, pull)
    (folder / "config.toml").write_text(config().to_toml())
    run = hosts.exec(0, [sys.executable, "-m", "qgnn_dist.cli", "train", str(store.path), "--out", str(folder / "run"),
                         "--config", str(folder / "config.toml"), "--ray-address", hosts.head, "--json"],
                     {faults.ENVIRONMENT: f"call {place} mark={mark}"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, log = run.communicate(timeout=150)
    thread.join(10)
    assert run.returncode == 0, log
    struck = Struck(folder / "run", json.loads(out), json.loads(mark.read_text()), [])
    same_end(struck.run, whole)
    (restart,) = struck.summary["restarts"]
    rank, name = struck.place["rank"], f"node{cut[0]}"
    assert name in restart["error"], "the host that was cut off is named"
    assert f"rank {rank}" in restart["error"] or f"peer {rank}" in restart["error"]
    assert restart["epoch"] == struck.place["epoch"] - 1
    assert struck.detected_s < SILENCE_S + 2
    assert restart["started_s"] < AGAIN_S
    (stall,) = RunFolder(struck.run).stall_files()
    assert f"host {name}, rank {rank}, process {struck.place['pid']}: no answer within" in stall.read_text()
    tell(record_property, f"host cut off {place}", struck)

