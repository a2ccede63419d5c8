# SPDX-License-Identifier: Apache-2.0
"""Predictions whose workers or whole command are lost: the same files in the end, finished parts kept, nothing half."""
from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import qgnn_dist as qgnn
from qgnn_dist.cluster.session import RaySession
from qgnn_dist.comm import faults
from qgnn_dist.comm.pool import LocalPool
from qgnn_dist.config import TimeoutsConfig
from qgnn_dist.errors import InputError, OutputError, WorkerLostError
from qgnn_dist.files.folders import held
from qgnn_dist.inference.batch import check_output, run_prediction
from qgnn_dist.inference.output import UNFINISHED, Predictions
from qgnn_dist.inference.worker import PredictWorker
from qgnn_dist.model.packed import PackedModel
from qgnn_dist.store.reader import Store
from tests.helpers import make_store, small_graph, untrained_model

PARTS = 3
VOLATILE = {"seconds", "peak_anon_bytes", "peak_rss_bytes"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(small_graph(), tmp_path_factory.mktemp("store") / "s", PARTS)


@pytest.fixture(scope="module")
def model(store: Store) -> PackedModel:
    return untrained_model(store)


@pytest.fixture(scope="module")
def whole(store: Store, model: PackedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Files of a prediction that nothing happened to."""
    return _files(_predict(store, model, tmp_path_factory.mktemp("whole") / "out"))


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    with RaySession("local", num_cpus=2):
        yield


def _predict(store: Store, model: PackedModel, out: Path, *, scores: bool = True, trace: bool = False) -> Path:
    pool = LocalPool(PredictWorker, {"store": str(store.path), "exchange_s": 20.0}, store.num_parts, timeout_s=20)
    try:
        run_prediction(pool, store, model, out, scores=scores, timeouts=TimeoutsConfig(), trace=trace)
    finally:
        pool.close()
    return out


def _files(out: Path) -> dict[str, Any]:
    """Bytes by name; the summary without what no two runs have alike."""
    found: dict[str, Any] = {file.name: file.read_bytes() for file in out.iterdir()}
    summary = json.loads(found.pop("summary.json"))
    return {**found, "summary": {key: value for key, value in summary.items() if key not in VOLATILE}}


def _hidden(out: Path) -> list[Path]:
    """What lies beside an output under names of its own."""
    return sorted(path for path in out.parent.iterdir() if path.name.startswith(f".{out.name}."))


def _finished(out: Path) -> list[str]:
    """Parts that are kept, of the one unfinished output."""
    (folder,) = _hidden(out)
    return sorted(path.stem for path in (folder / UNFINISHED).glob("part-*.json"))


@contextmanager
def _failing(*parts: int) -> Iterator[list[int]]:
    """These parts cannot be written; yields those that are."""
    written: list[int] = []
    write = PredictWorker._write

    def fail(self: PredictWorker, *args: Any) -> None:
        if self._context.rank in parts:
            raise OutputError("the disk of this host is gone")
        write(self, *args)
        written.append(self._context.rank)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PredictWorker, "_write", fail)
        yield written


def test_only_missing_parts_are_written_again(store: Store, model: PackedModel, whole: dict[str, Any], tmp_path: Path,
                                              caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    with _failing(1), pytest.raises(OutputError, match="rank 1: the disk"):
        _predict(store, model, out)
    assert not out.exists()
    assert _finished(out) == ["part-00000", "part-00002"]
    with _failing() as written:
        _predict(store, model, out)
    assert written == [1]
    assert "2 of 3 parts are finished and kept" in caplog.text
    assert _files(out) == whole
    assert _hidden(out) == []


def test_complete_parts_need_no_worker(store: Store, model: PackedModel, whole: dict[str, Any], tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Predictions, "commit", stop)
        with pytest.raises(KeyboardInterrupt):
            _predict(store, model, out)
    assert not out.exists()
    assert len(_finished(out)) == PARTS
    with monkeypatch.context() as patch:
        patch.setattr(PredictWorker, "load", stop)
        _predict(store, model, out)
    assert _files(out) == whole


def test_damaged_parts_are_written_again(store: Store, model: PackedModel, whole: dict[str, Any], tmp_path: Path,
                                         caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    with _failing(1), pytest.raises(OutputError):
        _predict(store, model, out)
    (folder,) = _hidden(out)
    file, record = folder / "part-00000.parquet", folder / UNFINISHED / "part-00002.json"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    values = json.loads(record.read_text())
    values["result"]["rows"] += 1
    record.write_text(json.dumps(values))
    (folder / ".part-00001-00000000000000ff.tmp").write_bytes(b"half")
    with _failing() as written:
        _predict(store, model, out)
    assert sorted(written) == [0, 1, 2]
    assert "part-00000.parquet: is written again: its checksum" in caplog.text
    assert "part-00002.parquet: is written again: it has" in caplog.text
    assert _files(out) == whole


@pytest.mark.parametrize("other", ["another model", "other columns (--scores)", "another graph and another partition"])
def test_what_is_left_of_other_predictions_goes(store: Store, model: PackedModel, whole: dict[str, Any], tmp_path: Path,
                                                caplog: pytest.LogCaptureFixture, other: str) -> None:
    out, first, columns = tmp_path / "out", model, True
    source = store
    if other == "another model":
        first = untrained_model(store, seed=1)
    elif other.startswith("another graph"):
        source = make_store(small_graph(seed=1), tmp_path / "s", PARTS)
    else:
        columns = False
    with _failing(1), pytest.raises(OutputError):
        _predict(source, first, out, scores=columns)
    assert _finished(out) == ["part-00000", "part-00002"]
    _predict(store, model, out)
    assert f"starting over; what an earlier command left is of {other}" in caplog.text
    assert _files(out) == whole
    assert _hidden(out) == []


def test_a_traced_prediction_goes_on_too(store: Store, model: PackedModel, whole: dict[str, Any],
                                         tmp_path: Path) -> None:
    out = tmp_path / "out"
    with _failing(0), pytest.raises(OutputError):
        _predict(store, model, out)
    _predict(store, model, out, trace=True)
    found = _files(out)
    assert json.loads(found.pop("trace.json"))
    assert len(found["summary"].pop("overlap")) == PARTS
    assert found == whole


def test_two_commands_do_not_write_one_output(store: Store, model: PackedModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Predictions(out, store, model, scores=True), pytest.raises(InputError, match="another process is writing"):
        _predict(store, model, out)
    assert _hidden(out) == []


def test_an_older_output_stays_until_the_new_one_is_whole(store: Store, model: PackedModel, whole: dict[str, Any],
                                                          tmp_path: Path) -> None:
    out = _predict(store, untrained_model(store, seed=1), tmp_path / "out")
    before = _files(out)
    with _failing(2), pytest.raises(OutputError):
        _predict(store, model, check_output(out, True))
    assert _files(out) == before
    # Killed between the two renames: the old one lies aside, and goes once the new one is there.
    os.rename(out, tmp_path / ".out.0123.old")
    _predict(store, model, out)
    assert _files(out) == whole
    assert _hidden(out) == []


@pytest.mark.parametrize("fault", ["evaluation layer=2 rank=1", "write layer=0 rank=1", "written layer=0 rank=0"])
def test_a_lost_worker_costs_no_finished_part(ray: None, store: Store, model: PackedModel, whole: dict[str, Any],
                                              tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              caplog: pytest.LogCaptureFixture, fault: str) -> None:
    file, mark, out = tmp_path / "model", tmp_path / "mark", tmp_path / "out"
    model.save(file)
    monkeypatch.setenv(faults.ENVIRONMENT, f"kill direction={fault} mark={mark}")
    with caplog.at_level(logging.WARNING):
        qgnn.predict(store.path, model=file, out=out, scores=True, config={"cluster": {"cpus_per_worker": 0.5}})
    assert mark.exists()
    assert "was lost" in caplog.text
    kept = {"evaluation": 0, "write": 2, "written": 3}[fault.split()[0]]
    assert (f"{kept} of 3 parts are finished and kept" in caplog.text) == (kept > 0)
    assert _files(out) == whole
    assert _hidden(out) == []


def _command(store: Store, model: PackedModel, folder: Path, fault: str | None = None) -> subprocess.Popen[str]:
    model.save(folder / "model", overwrite=True)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    if fault is not None:
        environment[faults.ENVIRONMENT] = fault
    return subprocess.Popen(
        [sys.executable, "-m", "qgnn_dist.cli", "predict", str(store.path), "--model", str(folder / "model"), "--out",
         str(folder / "out"), "--scores", "--set", "cluster.cpus_per_worker=0.5", "--set", "cluster.max_restarts=0"],
        env=environment, stderr=subprocess.PIPE, text=True)


def test_a_killed_command_leaves_nothing_that_looks_whole_and_goes_on(store: Store, model: PackedModel,
                                                                      whole: dict[str, Any], tmp_path: Path) -> None:
    """One worker waits inside its file while the others finish theirs; then the command is killed."""
    out, mark = tmp_path / "out", tmp_path / "mark"
    killed = _command(store, model, tmp_path, f"call direction=write layer=0 rank=1 mark={mark}")
    until = time.monotonic() + 100
    while not (mark.exists() and _hidden(out) and len(_finished(out)) == 2) and time.monotonic() < until:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait(10)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    (folder,) = _hidden(out)
    assert not (folder / "summary.json").exists()
    assert (folder / UNFINISHED).is_dir()
    assert _finished(out) == ["part-00000", "part-00002"]
    again = _command(store, model, tmp_path)
    assert again.stderr is not None
    text = again.stderr.read()
    assert again.wait(100) == 0, text
    assert "2 of 3 parts are finished and kept" in text
    assert _files(out) == whole
    assert _hidden(out) == []


def test_a_prediction_that_is_given_up_keeps_what_is_finished(ray: None, store: Store, model: PackedModel,
                                                              tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out = tmp_path / "model", tmp_path / "out"
    model.save(file)
    monkeypatch.setenv(faults.ENVIRONMENT, f"kill direction=write layer=0 rank=2 mark={tmp_path / 'mark'}")
    with pytest.raises(WorkerLostError):
        qgnn.predict(store.path, model=file, out=out, scores=True,
                     config={"cluster": {"cpus_per_worker": 0.5, "max_restarts": 0}})
    assert not out.exists()
    assert _finished(out) == ["part-00000", "part-00001"]
    (folder,) = _hidden(out)
    with held(folder) as free:
        assert free
    assert pq.read_metadata(folder / "part-00000.parquet").num_rows > 0
