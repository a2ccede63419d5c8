# SPDX-License-Identifier: Apache-2.0
"""jobs/pipeline.py on a cluster of three hosts that share nothing but an object store: killed, stopped, and to its end."""
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest

from qgnn_dist.config import StorageConfig, load_config
from qgnn_dist.data.load import load_graph
from qgnn_dist.partitioning.api import partition_graph
from qgnn_dist.storage.local import fetched_folder
from qgnn_dist.storage.place import Place
from qgnn_dist.store.reader import Store
from qgnn_dist.training.remote_run import fetched_run
from tests.helpers import npz_graph
from tests.processes import command, descendants
from tests.rayhead import free_port, ray_head, ray_node
from tests.recovering import same_end, undisturbed
from tests.s3 import BUCKET, S3, SECRET

ROOT, BIN = Path(__file__).parents[2], Path(sys.executable).parent
NODES, EPOCHS = 120, 200
"""So many epochs that none is the last one before the job is killed or stopped."""
SETTINGS = [f"train.epochs={EPOCHS}", "train.patience=0", "train.checkpoint_every=10", "model.hidden=8",
            "propagation.layers=3", "storage.retry_s=5"]
QUICK = StorageConfig(retry_s=5)
WAIT_S = 240.0
THERE, NEWEST = f"s3://{BUCKET}/all", "run/checkpoints/newest.json"


@dataclass
class Cluster:
    """A head without CPUs, two hosts of one, and what jobs for it are submitted with."""

    address: str
    uploaded: Path
    environment: dict[str, str]

    def submit(self, name: str, log: Path, *more: str) -> subprocess.Popen[bytes]:
        """`qgnn submit` of the pipeline, in the background."""
        words = ["jobs/pipeline.py", f"s3://{BUCKET}/graph.npz", "--parts", "2", "--out", THERE]
        for setting in (*SETTINGS, *more):
            words += ["--set", setting]
        with open(log, "wb") as out:
            return subprocess.Popen([BIN / "qgnn", "submit", *words, "--working-dir", self.uploaded, "--address",
                                     self.address, "--name", name, "--json"], stdout=out, stderr=out,
                                    env=self.environment)

    def driver(self) -> int:
        """The process of the job that runs."""
        (found,) = [pid for pid in descendants(os.getpid()) if command(pid).startswith("python jobs/pipeline.py")]
        return found


@pytest.fixture
def cluster(s3: S3, tmp_path: Path) -> Iterator[Cluster]:
    """Its processes have the object store's address and credentials in their environment."""
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_JOB_STOP_WAIT_TIME_S": "30",
                   "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    shutil.copytree(ROOT / "jobs", tmp_path / "job" / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    port = free_port()
    with ExitStack() as running:
        head = running.enter_context(ray_head(environment, address="127.0.0.1", num_cpus=0, dashboard=port))
        for _ in range(2):
            running.enter_context(ray_node(head, environment))
        address, until = f"http://127.0.0.1:{port}", time.monotonic() + 60
        while not _answers(address):
            assert time.monotonic() < until, "no jobs server within 60 s"
            time.sleep(0.2)
        yield Cluster(address, tmp_path / "job", environment)


def _answers(address: str) -> bool:
    """Whether the head takes jobs."""
    try:
        urllib.request.urlopen(f"{address}/api/jobs/", timeout=2).read()
        return True
    except OSError:
        return False


def _named() -> list[str]:
    """Checkpoints that are there, the newest first."""
    data = Place(f"{THERE}/{NEWEST}", QUICK).read(1 << 20)
    return [] if data is None else [one["name"] for one in json.loads(data)["checkpoints"]]


def _until(there: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + WAIT_S
    while not there():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.1)


def _ended(process: subprocess.Popen[bytes], log: Path) -> tuple[int, dict[str, Any], str]:
    """Exit code, result, and all that was said."""
    code, text = process.wait(WAIT_S), log.read_text()
    print(text)
    return code, json.loads(text.splitlines()[-1]), text


@pytest.mark.long
@pytest.mark.timeout(1000)
def test_from_a_graph_to_parquet_in_a_bucket(cluster: Cluster, tmp_path: Path) -> None:
    """Killed, submitted again and stopped, and again to its end: as if nothing had happened."""
    graph = npz_graph(tmp_path / "graph.npz", NODES)
    Place(f"s3://{BUCKET}/graph.npz", QUICK).put(graph)

    log = tmp_path / "killed"
    job = cluster.submit("killed", log)
    _until(lambda: bool(_named()), job, log)
    os.kill(cluster.driver(), signal.SIGKILL)
    code, told, text = _ended(job, log)
    assert (code, told["status"], told["message"]) == (137, "FAILED", "Job entrypoint command failed with exit code 137")
    kept = _named()
    assert kept

    log = tmp_path / "stopped"
    job = cluster.submit("stopped", log)
    _until(lambda: _named()[0] > kept[0], job, log)
    subprocess.run([BIN / "ray", "job", "stop", "stopped", "--address", cluster.address], env=cluster.environment,
                   check=True, capture_output=True, timeout=60)
    code, told, text = _ended(job, log)
    assert (code, told["status"], told["message"]) == (1, "STOPPED", "the job was stopped")
    assert "partition: done before" in text
    assert f"epoch {int(kept[0][6:12]) + 1}:" in text
    assert f"epoch {int(kept[0][6:12])}:" not in text
    assert "stopped by SIGTERM after epoch" in text
    last = int(_named()[0][6:12])

    log = tmp_path / "done"
    code, told, text = _ended(cluster.submit("done", log), log)
    assert (code, told["status"], told["exit_code"]) == (0, "SUCCEEDED", 0), text
    assert f"epoch {last + 1}:" in text
    assert f"epoch {last}:" not in text
    log = tmp_path / "refused"
    code, told, text = _ended(cluster.submit("refused", log, "quant.bits=4"), log)
    assert (code, told["status"], told["exit_code"]) == (2, "FAILED", 2)
    assert f"error: {THERE}: was begun with another config" in text

    partition_graph(load_graph(graph), parts=2, out=tmp_path / "store")
    whole = undisturbed(Store.open(tmp_path / "store"), tmp_path / "whole", load_config(overrides=SETTINGS))
    with fetched_run(f"{THERE}/run", QUICK) as run:
        same_end(run, whole)
    fetched_folder(Place(f"{THERE}/predictions", QUICK), tmp_path / "predictions")
    table = ds.dataset(tmp_path / "predictions", exclude_invalid_files=True).to_table()
    assert sorted(table["node_id"].to_pylist()) == list(range(NODES))
    assert not [log.name for log in tmp_path.iterdir() if log.is_file() and SECRET.encode() in log.read_bytes()]
