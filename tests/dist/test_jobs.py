# SPDX-License-Identifier: Apache-2.0
"""jobs/train.py and jobs/predict.py as real Ray jobs on a real head, from a working directory that is uploaded."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.helpers import make_store, small_graph
from tests.rayhead import free_port, ray_head

JOBS = Path(__file__).parents[2] / "jobs"
BIN = Path(sys.executable).parent
ENV = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0",
       "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """Address of the jobs server of a Ray head of this module's own."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    with ray_head(ENV, address="127.0.0.1", num_cpus=4, dashboard=port):
        until = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{address}/api/jobs/", timeout=2).read()
                break
            except OSError:
                assert time.monotonic() < until, "no jobs server within 60 s"
                time.sleep(0.5)
        yield address


def _submit(address: str, folder: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Ray's head answers before its agent, which runs jobs, is there: that refusal alone is tried again."""
    command = [BIN / "ray", "job", "submit", "--address", address, "--working-dir", str(folder), "--", "python",
               *map(str, words)]
    until = time.monotonic() + 60
    while True:
        done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=150, check=False)
        if "No available agent to submit job" not in done.stdout + done.stderr or time.monotonic() > until:
            return done
        time.sleep(1)


@pytest.mark.timeout(400)
def test_train_and_predict_run_as_jobs(head: str, tmp_path: Path) -> None:
    uploaded = tmp_path / "job"
    shutil.copytree(JOBS, uploaded / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    assert sum(f.stat().st_size for f in uploaded.rglob("*") if f.is_file()) < 1 << 20
    store = make_store(small_graph(), tmp_path / "store", 2)
    trained = _submit(head, uploaded, "jobs/train.py", store.path, "--out", tmp_path / "run", "--set",
                      "train.epochs=3", "--set", "cluster.cpus_per_worker=0.5")
    assert trained.returncode == 0, trained.stdout + trained.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["parts"] == 2
    assert summary["versions"]["kernels"] in ("avx2", "scalar"), "the job must run the compiled kernels"
    assert summary["wire_bytes_per_epoch"]["forward"] > 0
    export = subprocess.run([BIN / "qgnn", "export", tmp_path / "run", "--out", tmp_path / "m"], check=False)
    assert export.returncode == 0
    predicted = _submit(head, uploaded, "jobs/predict.py", store.path, "--model", tmp_path / "m", "--out",
                        tmp_path / "out")
    assert predicted.returncode == 0, predicted.stdout + predicted.stderr
    assert sum(pq.read_table(f).num_rows for f in (tmp_path / "out").glob("*.parquet")) == store.num_nodes
    refused = _submit(head, uploaded, "jobs/train.py", tmp_path / "none", "--out", tmp_path / "run2")
    assert refused.returncode != 0
    assert "not a store" in refused.stdout + refused.stderr


@pytest.mark.timeout(400)
def test_submitted_commands_end_with_their_own_codes(head: str, tmp_path: Path) -> None:
    store = make_store(small_graph(), tmp_path / "store", 1)

    def submit(*words: str | Path, name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([BIN / "qgnn", "submit", *map(str, words), "--address", head, "--name", name, "--json"],
                              capture_output=True, text=True, env=ENV, timeout=150, check=False)

    done = submit("inspect", store.path, name="looks")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"job": "looks", "status": "SUCCEEDED", "exit_code": 0, "message": ""}
    assert "300, " in done.stderr, "the job's own output comes with its log"
    failed = submit("inspect", tmp_path / "none", name="fails")
    assert failed.returncode == 2
    assert json.loads(failed.stdout)["status"] == "FAILED"
    assert "no such path" in failed.stderr
    again = submit("inspect", store.path, name="looks")
    assert again.returncode == 2
    assert "there has been a job named looks on this cluster" in again.stderr


@pytest.mark.long
@pytest.mark.timeout(400)
def test_the_pipeline_as_a_job_goes_on_where_it_was(head: str, tmp_path: Path) -> None:
    uploaded, folder = tmp_path / "job", tmp_path / "all"
    shutil.copytree(JOBS, uploaded / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    source = "synthetic:sbm?nodes=300&edges=1500&features=8&classes=3&seed=1"
    words = ("jobs/pipeline.py", source, "--parts", "2", "--out", folder, "--set", "train.epochs=3", "--set",
             "cluster.cpus_per_worker=0.5")
    first = _submit(head, uploaded, *words)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "epoch 3" in first.stdout
    assert "kernels avx2" in first.stdout or "kernels scalar" in first.stdout, "the compiled kernels"
    assert sum(pq.read_table(f).num_rows for f in (folder / "predictions").glob("*.parquet")) == 300
    shutil.rmtree(folder / "predictions")
    again = _submit(head, uploaded, *words)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "partition: done before" in again.stdout
    assert "export: done before" in again.stdout
    assert "epoch 1" not in again.stdout
    assert (folder / "predictions" / "summary.json").exists()
