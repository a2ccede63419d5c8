# SPDX-License-Identifier: Apache-2.0
"""Joining a cluster, starting a local Ray, and what is left when the driver is killed: nothing."""
from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster

from qgnn_dist.cluster.session import RaySession
from qgnn_dist.errors import InputError, QgnnError
from tests.processes import gone, until_gone

DRIVER = """
import json, os, sys, time
import ray
from ray import cloudpickle
from qgnn_dist.cluster.pool import RayPool
from qgnn_dist.cluster.session import RaySession
from qgnn_dist.config import ClusterConfig, TimeoutsConfig

class Sleeper:
    def __init__(self, context):
        self.context = context
    def sleep(self):
        time.sleep(600)

class Server:
    async def post_layer(self):
        pass
    def pid(self):
        return os.getpid()

with RaySession(num_cpus=1):
    pool = RayPool(Sleeper, {}, 2, cluster=ClusterConfig(cpus_per_worker=0.5), timeouts=TimeoutsConfig(start_s=60.0),
                   server_factory=Server)
    with pool:
        raylets = len(ray.nodes())
        print(json.dumps({"pids": [*pool.pids(), pool.server_call("pid")], "cpus": ray.cluster_resources()["CPU"]}))
        sys.stdout.flush()
        if sys.argv[1] == "sleep":
            pool.call("sleep", timeout_s=600)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A Ray of its own that drivers can join; three CPUs tell it from a local one."""
    running = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False})
    try:
        yield running.address
    finally:
        running.shutdown()


def start_driver(argument: str, address: str | None) -> tuple[subprocess.Popen[str], list[int], float]:
    """A driver process, the pids of its workers and server, and how many CPUs its cluster has."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    if address:
        environment["RAY_ADDRESS"] = address
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, argument], stdout=subprocess.PIPE, text=True,
                              env=environment)
    assert driver.stdout is not None
    line = driver.stdout.readline()
    assert line, f"the driver ended with {driver.wait(30)}"
    told = json.loads(line)
    return driver, told["pids"], told["cpus"]


def test_a_driver_joins_the_cluster_of_its_environment_and_leaves_it_running(cluster: str) -> None:
    for _ in range(2):
        driver, pids, cpus = start_driver("end", cluster)
        assert driver.wait(60) == 0
        assert driver.stdout is not None
        assert driver.stdout.read() == ""
        assert cpus == 3
        assert until_gone(pids, 10) == []


@pytest.mark.parametrize("joined", [True, False])
def test_workers_and_server_end_within_10_s_of_a_killed_driver(cluster: str, joined: bool) -> None:
    driver, pids, cpus = start_driver("sleep", cluster if joined else None)
    assert cpus == (3 if joined else 1)
    assert len(pids) == 3
    assert not any(map(gone, pids))
    driver.send_signal(signal.SIGKILL)
    driver.wait(10)
    start = time.monotonic()
    assert until_gone(pids, 10) == []
    print(f"gone after {time.monotonic() - start:.1f} s")


@pytest.mark.parametrize(("ray_version", "python_version"), [("2.9.1", None), (None, "3.11.99")])
def test_a_cluster_of_other_versions_is_refused(cluster: str, ray_version: str | None,
                                                python_version: str | None) -> None:
    """As Ray itself finds it, in what the head has said of itself: Python's third number counts, too."""
    head, key = GcsClient(address=cluster), b"CLUSTER_METADATA"
    before = head.internal_kv_get(key, b"cluster")
    told = json.loads(before)
    told |= {name: value for name, value in (("ray_version", ray_version), ("python_version", python_version)) if value}
    head.internal_kv_put(key, json.dumps(told).encode(), True, b"cluster")
    try:
        with pytest.raises(InputError) as caught:
            RaySession(cluster).__enter__()
    finally:
        head.internal_kv_put(key, before, True, b"cluster")
    mine = f"Ray {ray.__version__} and Python {platform.python_version()}"
    there = f"Ray {told['ray_version']} and Python {told['python_version']}"
    assert str(caught.value).startswith(f"--ray-address {cluster}: the cluster is of {there}, this command of {mine}; ")
    assert "\n" not in str(caught.value)


def test_a_working_folder_that_is_gone_is_no_matter_of_tokens(cluster: str, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """A job's is cleared away where another Ray starts on its host; Ray looks at it when a cluster is joined."""
    (tmp_path / "job").mkdir()
    monkeypatch.chdir(tmp_path / "job")
    (tmp_path / "job").rmdir()
    with pytest.raises(QgnnError, match=rf"^--ray-address {cluster}: a folder was gone .*; begin it again$") as caught:
        RaySession(cluster).__enter__()
    assert not isinstance(caught.value, InputError), "the same command may go well"


def test_an_address_without_a_cluster_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.monotonic()
    with pytest.raises(InputError, match=r"--ray-address 127\.0\.0\.1:9: no Ray cluster could be joined") as caught:
        RaySession("127.0.0.1:9").__enter__()
    assert time.monotonic() - start < 15
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:8")
    with pytest.raises(InputError, match=r"127\.0\.0\.1:8"):
        RaySession().__enter__()
