# SPDX-License-Identifier: Apache-2.0
"""Predictions told to stop, and workers that freeze while they write: finished parts stay, nobody waits long."""
from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import qgnn_dist as qgnn
from qgnn_dist.cluster.session import RaySession
from qgnn_dist.comm import faults
from qgnn_dist.inference.output import UNFINISHED
from qgnn_dist.store.reader import Store
from qgnn_dist.training.stop import StoppedError
from tests.helpers import make_store, small_graph, untrained_model

PARTS = 3
WRITE_S = 2.0
KEPT = "finished parts are kept, the same command goes on"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(small_graph(), tmp_path_factory.mktemp("store") / "s", PARTS)


@pytest.fixture(scope="module")
def model(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("model") / "model"
    untrained_model(store).save(file)
    return file


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    with RaySession("local", num_cpus=2):
        yield


def _predict(store: Store, model: Path, out: Path, **more: float) -> int:
    """Rows that the finished output has."""
    qgnn.predict(store.path, model=model, out=out,
                 config={"cluster": {"cpus_per_worker": 0.5}, "timeouts": more})
    assert [path for path in out.parent.iterdir() if path.name.startswith(".out.")] == []
    return sum(pq.read_metadata(file).num_rows for file in out.glob("*.parquet"))


def _finished(out: Path) -> list[str]:
    """Parts of the one unfinished output."""
    return sorted(path.stem for path in out.parent.glob(f".out.*.tmp/{UNFINISHED}/part-*.json"))


@pytest.mark.parametrize("direction", ["evaluation layer=2", "write layer=0"])
def test_a_worker_that_is_told_to_go(ray: None, store: Store, model: Path, tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
                                     direction: str) -> None:
    """Before it has its scores it goes at once, and here no other host is there; its file it ends first."""
    mark, out = tmp_path / "mark", tmp_path / "out"
    monkeypatch.setenv(faults.ENVIRONMENT, f"term direction={direction} rank=1 mark={mark}")
    if direction.startswith("write"):
        assert _predict(store, model, out) == store.num_nodes
        assert "SIGTERM" not in caplog.text
    else:
        with pytest.raises(StoppedError, match=f"all hosts end their workers.*{KEPT}"):
            _predict(store, model, out)
        assert f"host {socket.gethostname()}, rank 1: SIGTERM to the worker" in caplog.text
        assert not out.exists()
        assert _predict(store, model, out) == store.num_nodes
    assert mark.exists()


def test_a_worker_that_freezes_in_its_file_is_named_and_the_rest_goes_on(
        ray: None, store: Store, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    mark, out = tmp_path / "mark", tmp_path / "out"
    monkeypatch.setenv(faults.ENVIRONMENT, f"stop direction=write layer=0 rank=0 mark={mark}")
    start = time.monotonic()
    assert _predict(store, model, out, write_s=WRITE_S) == store.num_nodes
    assert time.monotonic() - start < 60, "far below a day"
    assert f"host {socket.gethostname()}, rank 0, process " in caplog.text
    assert f"has not come further in write() for {WRITE_S:.0f}." in caplog.text
    assert "raise timeouts.write_s (2)" in caplog.text
    assert f"{PARTS - 1} of {PARTS} parts are finished and kept" in caplog.text


@pytest.mark.parametrize("parts", [1, PARTS])
def test_a_command_that_is_told_to_stop_says_so_and_goes_on(ray: None, model: Path, tmp_path: Path,
                                                            parts: int) -> None:
    """One worker waits inside its file, the others have finished theirs."""
    own = make_store(small_graph(), tmp_path / "s", parts)
    out, mark = tmp_path / "out", tmp_path / "mark"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment[faults.ENVIRONMENT] = f"call direction=write layer=0 rank={parts - 1} mark={mark}"
    words = [sys.executable, "-m", "qgnn_dist.cli", "predict", str(own.path), "--model", str(model), "--out", str(out),
             "--set", "cluster.cpus_per_worker=0.5"]
    process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 100
    while not (mark.exists() and mark.stat().st_size and len(_finished(out)) == parts - 1):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 1, told
    assert f"error: stopped by SIGTERM; {KEPT}" in told
    assert not out.exists()
    assert _finished(out) == [f"part-{part:05d}" for part in range(parts - 1)]
    if parts == 1:
        assert list(tmp_path.glob(".out.*")) == []
    assert _predict(own, model, out) == own.num_nodes
