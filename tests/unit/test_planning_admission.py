# SPDX-License-Identifier: Apache-2.0
"""A run that its hosts cannot hold is refused with the numbers, before anything is loaded or written."""
from __future__ import annotations

import re
from pathlib import Path

import pytest

import qgnn_dist as qgnn
from qgnn_dist.comm.pool import LocalPool
from qgnn_dist.errors import InputError
from qgnn_dist.planning.admission import check_training
from qgnn_dist.training.worker import TrainWorker
from tests.helpers import make_store, settings, small_graph, untrained_model


def _leave(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr("qgnn_dist.planning.admission.available_bytes", lambda: count)


def test_training_is_refused_before_it_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(small_graph(), tmp_path / "s", 1)
    _leave(monkeypatch, 50_000)
    monkeypatch.setattr(TrainWorker, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(InputError) as refused:
        qgnn.train(store.path, out=tmp_path / "r", config=settings())
    for text in ("host ", "training does not fit: 1 worker here need", "perceptron rows", "48.8 KiB are available",
                 "cluster.memory_check=off"):
        assert text in str(refused.value)
    assert not (tmp_path / "r").exists()


def test_the_check_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(small_graph(), tmp_path / "s", 1)
    _leave(monkeypatch, 50_000)
    config = settings("train.epochs=1", "model.feature_norm=l2", "cluster.memory_check=off")
    assert qgnn.train(store.path, out=tmp_path / "r", config=config)["epochs"] == 1
    assert config.digest() == settings("train.epochs=1", "model.feature_norm=l2").digest(), "a run may resume with it"


def test_prediction_is_refused_before_it_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(small_graph(), tmp_path / "s", 1)
    untrained_model(store).save(tmp_path / "m.safetensors", False)
    _leave(monkeypatch, 10_000)
    with pytest.raises(InputError, match="prediction does not fit: 1 worker here need about"):
        qgnn.predict(store.path, model=tmp_path / "m.safetensors", out=tmp_path / "p")
    assert [p.name for p in tmp_path.iterdir() if p.name == "p" or ".tmp" in p.name] == []
    off = {"cluster": {"memory_check": "off"}}
    assert qgnn.predict(store.path, model=tmp_path / "m.safetensors", out=tmp_path / "p", config=off)["rows"] == 300


def test_workers_of_a_host_are_added_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(small_graph(), tmp_path / "s", 2)
    pool = LocalPool(TrainWorker, {"store": str(store.path), "config": settings()}, 2)
    try:
        _leave(monkeypatch, 10_000)
        with pytest.raises(InputError, match="2 workers here need about") as refused:
            check_training(pool, store, settings())
        found = re.search(r"need about ([\d.]+) KiB", str(refused.value))
        assert found is not None
        needed = float(found[1]) * 1024
        _leave(monkeypatch, int(0.75 * needed))  # enough for either of them, not for both
        with pytest.raises(InputError, match="2 workers"):
            check_training(pool, store, settings())
        _leave(monkeypatch, int(1.01 * needed))
        check_training(pool, store, settings())
        for room, fits in ((int(0.75 * needed), True), (10_000, False)):  # workers answer in any order
            monkeypatch.setattr(TrainWorker, "room", lambda self, room=room: {
                "host": ("one", "two")[self._context.rank], "available": room})
            if fits:
                check_training(pool, store, settings())
        with pytest.raises(InputError, match=r"host one: .*1 worker here"):
            check_training(pool, store, settings())
    finally:
        pool.close()
