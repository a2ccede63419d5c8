# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: written behind the epochs, checked when read, and the one before a damaged one takes its place."""
from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qgnn_dist as qgnn
from qgnn_dist.errors import DeadlineError, ExchangeError, InputError, OutputError, QgnnError, WorkerError
from qgnn_dist.model.row_blocks import RowBlocks
from qgnn_dist.propagation.multiplier import InProcessServer, MultiplierRule, MultiplierServer
from qgnn_dist.training import run_folder
from qgnn_dist.training.checkpoint import Checkpoint, Progress
from qgnn_dist.training.layers import HostLayers
from qgnn_dist.training.run_folder import CheckpointWriter, RunFolder
from qgnn_dist.training.stop import StopSignals
from qgnn_dist.training.worker import TrainWorker
from tests.helpers import make_store, settings, small_graph, train_pool

_IDENTITY = {"parts": 2, "fingerprint": "f", "features": {"norm": "row", "signed": False}}
_SERVER = {"ranges": {"residual": {"rms": 0.1, "mean": 0.1, "largest": 0.2}}}


def _checkpoint(epoch: int) -> Checkpoint:
    rng = np.random.default_rng(epoch)
    return Checkpoint({"w": rng.normal(size=(3, 4)).astype(np.float32), "none": np.zeros((0, 2), np.int8),
                       "step": np.array(epoch, np.float32)}, _IDENTITY,
                      Progress(epoch=epoch, best_epoch=epoch, best_value=0.5), _SERVER)


def _write(run: RunFolder, *epochs: int, keep: int = 3) -> None:
    run.path.mkdir(exist_ok=True)
    with CheckpointWriter(run, keep=keep, timeout_s=20.0) as writer:
        for epoch in epochs:
            writer.save(_checkpoint(epoch))


@pytest.mark.parametrize(("field", "name", "whole"), [
    ("best_accuracy", "test", True), ("best_metric", "test", True), ("best_metric", "valid", False),
    ("calibration_bytes", "test", False)])
def test_no_figure_but_that_of_test_may_be_absent(tmp_path: Path, field: str, name: str, whole: bool) -> None:
    made = _checkpoint(3)
    setattr(made.progress, field, {name: None})
    file = tmp_path / "c"
    file.write_bytes(made.to_bytes())
    if whole:
        assert Checkpoint.read(file).progress == made.progress
        return
    with pytest.raises(InputError, match="damaged checkpoint: progress: figures are"):
        Checkpoint.read(file)


def test_a_checkpoint_reads_back_and_only_the_last_ones_stay(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    assert run.load_checkpoint() is None
    _write(run, 10, 20, 30, 1_000_000)
    assert [file.name for file in run.checkpoint_files()] == [
        "epoch-1000000.safetensors", "epoch-000030.safetensors", "epoch-000020.safetensors"]
    found, made = run.load_checkpoint(), _checkpoint(1_000_000)
    assert found is not None
    assert (found.identity, found.progress, found.server) == (made.identity, made.progress, made.server)
    for name, value in made.tensors.items():
        np.testing.assert_array_equal(found.tensors[name], value)
        assert found.tensors[name].dtype == value.dtype
    assert not [file for file in run.checkpoints.iterdir() if file.name.startswith(".")]


def test_every_changed_byte_is_found_and_the_one_before_serves(tmp_path: Path,
                                                               caplog: pytest.LogCaptureFixture) -> None:
    run = RunFolder(tmp_path / "run")
    _write(run, 1, 2)
    newest = run.checkpoint_files()[0]
    whole = newest.read_bytes()
    for place in range(0, len(whole), 7):
        newest.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1:])
        with caplog.at_level(logging.WARNING):
            found = run.load_checkpoint()
        assert found is not None
        assert found.progress.epoch == 1, f"byte {place}"
        assert "epoch-000002.safetensors" in caplog.text
        assert "going back to epoch-000001" in caplog.text
        caplog.clear()
    for size in (0, 7, 8, len(whole) - 1):
        newest.write_bytes(whole[:size])
        assert run.load_checkpoint().progress.epoch == 1  # type: ignore[union-attr]
    for file in run.checkpoint_files():
        file.write_bytes(b"")
    with pytest.raises(InputError, match=r"epoch-000001.safetensors: damaged checkpoint"):
        run.load_checkpoint()


def test_numbers_that_would_poison_a_run_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    file.write_bytes(Checkpoint({}, _IDENTITY, Progress(epoch=3, best_epoch=4), _SERVER).to_bytes())
    with pytest.raises(InputError, match="epoch 3, the best one 4"):
        Checkpoint.read(file)
    with pytest.raises(ValueError, match="JSON"):
        Checkpoint({}, _IDENTITY, Progress(epoch=3, best_value=np.nan), _SERVER).to_bytes()


def test_a_write_that_fails_is_told_and_leaves_the_earlier_ones(tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path / "run")
    _write(run, 1)
    real = run_folder.write_atomically

    def full(path: Path, data: bytes) -> None:
        raise OutputError("cannot write the file: No space left on device", file=str(path))

    monkeypatch.setattr(run_folder, "write_atomically", full)
    with pytest.raises(OutputError, match=r"epoch-000002.*No space left"):
        _write(run, 2)
    monkeypatch.setattr(run_folder, "write_atomically", real)
    assert run.load_checkpoint().progress.epoch == 1  # type: ignore[union-attr]
    held = threading.Event()
    monkeypatch.setattr(run_folder, "write_atomically", lambda path, data: held.wait(20))
    with pytest.raises(DeadlineError, match=r"epoch-000003.*timeouts.checkpoint_s"), \
            CheckpointWriter(run, keep=3, timeout_s=0.05) as writer:
        writer.save(_checkpoint(3))
    held.set()


def test_saving_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    begun, held = threading.Event(), threading.Event()
    real = run_folder.write_atomically

    def slow(path: Path, data: bytes) -> None:
        begun.set()
        assert held.wait(20)
        real(path, data)

    monkeypatch.setattr(run_folder, "write_atomically", slow)
    with CheckpointWriter(run, keep=3, timeout_s=20.0) as writer:
        writer.save(_checkpoint(1))
        assert begun.wait(20)
        assert run.checkpoint_files() == [], "save returned before the write"
        held.set()
    assert len(run.checkpoint_files()) == 1


def test_a_run_of_version_1_goes_on(tmp_path: Path) -> None:
    from safetensors.numpy import save

    made = _checkpoint(4)
    header = {"version": 1, "identity": made.identity, "progress": {"epoch": 4, "best_epoch": 4}, "server": made.server}
    (tmp_path / "checkpoint.safetensors").write_bytes(save(made.tensors, metadata={"qgnn": json.dumps(header)}))
    assert RunFolder(tmp_path).load_checkpoint().progress.epoch == 4  # type: ignore[union-attr]
    header["version"] = 3
    (tmp_path / "checkpoint.safetensors").write_bytes(save(made.tensors, metadata={"qgnn": json.dumps(header)}))
    with pytest.raises(InputError, match="checkpoint version 3, this program reads 1 to 2"):
        RunFolder(tmp_path).load_checkpoint()


def test_a_damaged_checkpoint_costs_its_epochs_and_nothing_else(tmp_path: Path) -> None:
    store = make_store(small_graph(), tmp_path / "s", 1)
    config = settings("train.epochs=9", "train.checkpoint_every=2", "model.feature_norm=l2")
    whole = qgnn.train(store.path, out=tmp_path / "whole", config=config)

    def stop(record: dict[str, Any]) -> None:
        if record["epoch"] == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qgnn.train(store.path, out=tmp_path / "cut", config=config, on_epoch=stop)
    newest = RunFolder(tmp_path / "cut").checkpoint_files()[0]
    assert newest.name == "epoch-000006.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"\xff")
    resumed: list[int] = []
    summary = qgnn.train(store.path, out=tmp_path / "cut", config=config, resume=True,
                         on_epoch=lambda record: resumed.append(record["epoch"]))
    assert resumed == [5, 6, 7, 8, 9]
    assert summary["accuracy"] == whole["accuracy"]
    last = [RunFolder(tmp_path / name).load_checkpoint() for name in ("cut", "whole")]
    for name, value in last[1].tensors.items():  # type: ignore[union-attr]
        np.testing.assert_array_equal(last[0].tensors[name], value)  # type: ignore[union-attr]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_a_checkpoint(tmp_path: Path, number: signal.Signals) -> None:
    store = make_store(small_graph(), tmp_path / "s", 1)
    words = ["--set", "train.epochs=100000", "--set", "train.patience=0", "--set", "train.checkpoint_every=100000"]
    command = [sys.executable, "-m", "qgnn_dist.cli", "train", str(store.path), "--out", str(tmp_path / "run"), *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        metrics, until = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 60
        while not metrics.exists() or metrics.read_text().count("\n") < 3:
            assert process.poll() is None, process.stderr.read()  # type: ignore[union-attr]
            assert time.monotonic() < until
            time.sleep(0.02)
        os.kill(process.pid, number)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 1
    said = " ".join(said.split())
    assert f"{number.name}: stopping after this epoch" in said
    assert f"stopped by {number.name} after epoch" in said
    assert "go on with --resume" in said
    found = RunFolder(tmp_path / "run").load_checkpoint()
    assert found is not None
    assert found.progress.epoch == len(metrics.read_text().splitlines()) >= 3
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_second_signal_ends_at_once_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert stop.received == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    with StopSignals(enabled=False):
        assert signal.getsignal(signal.SIGINT) is before[0]


@pytest.mark.parametrize("parts", [1, 2])
def test_a_gradient_that_is_not_finite_ends_the_run_and_changes_nothing(tmp_path: Path, parts: int,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(small_graph(), tmp_path / "s", parts)
    config = settings("model.feature_norm=l2", "quant.bits=2")
    with train_pool(store, config) as pool:
        pool.call("train_epoch", 1, True, timeout_s=60)
        before = pool.call_one(0, "state", timeout_s=60)
        weights = {name: value.copy() for name, value in before.items() if name.startswith("network.")}
        real = RowBlocks.backward

        def poisoned(self: RowBlocks, grad: np.ndarray) -> None:
            real(self, np.where(grad == grad.max(), np.float32(np.inf), grad))

        monkeypatch.setattr(RowBlocks, "backward", poisoned)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # the error says it all
            with pytest.raises(QgnnError, match=r"gradient of .*weight1.* is not finite at epoch 2"):
                pool.call("train_epoch", 2, True, timeout_s=60)
        after = pool.workers[0].state()
        for name, value in weights.items():
            np.testing.assert_array_equal(after[name], value, err_msg=name)


@pytest.mark.parametrize("cut", ["before the step", "after the step", "at its end"])
def test_the_state_before_an_epoch_that_was_cut_short_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                              cut: str) -> None:
    store, config = make_store(small_graph(), tmp_path / "s", 2), settings("model.feature_norm=l2")
    server = InProcessServer(MultiplierServer(2, MultiplierRule.of(config, store.num_edges), 60.0))
    with train_pool(store, config, server) as pool:
        for epoch in (1, 2):
            pool.call("train_epoch", epoch, True, timeout_s=60)
            pool.call("keep_best", timeout_s=60)
        wanted, ranges = pool.call("state", timeout_s=60), server.call("state")

        def fail(*_: Any, **__: Any) -> None:
            raise ExchangeError("a peer is gone")

        if cut != "at its end":
            owner, method = (TrainWorker, "_follow") if cut == "after the step" else (HostLayers, "backward")
            monkeypatch.setattr(owner, method, fail)
            with pytest.raises(ExchangeError):
                pool.call("train_epoch", 3, True, timeout_s=60)
        else:
            pool.call("train_epoch", 3, True, timeout_s=60)
            pool.call("keep_best", timeout_s=60)
        moved = cut != "before the step"
        for rank, worker in enumerate(pool.workers):
            assert moved != np.array_equal(worker.state()["network.weight1"], wanted[rank]["network.weight1"])
        tensors, kept = pool.call_any("finished_state", 2, timeout_s=10)
        assert kept == ranges
        assert set(tensors) == set(wanted[0])
        for name, value in wanted[0].items():
            np.testing.assert_array_equal(tensors[name], value, err_msg=name)
        with pytest.raises(WorkerError, match="in epoch 3, expected 4"):
            pool.workers[0].finished_state(3)
        with pytest.raises(WorkerError, match=r"no worker is left that answers finished_state\(\) within 10 s"):
            pool.call_any("finished_state", 3, timeout_s=10)
    server.close()
