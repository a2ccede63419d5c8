# SPDX-License-Identifier: Apache-2.0
"""The loop around the workers: resume, odd parts, bytes on the wire, memory over depth."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import qgnn_dist as qgnn
from qgnn_dist.comm.wire import HEADER_BYTES
from qgnn_dist.data.graph import TRAIN
from qgnn_dist.errors import InputError
from qgnn_dist.partitioning import api as partitioning
from qgnn_dist.quant.packed import row_bytes
from tests.helpers import make_store, settings, small_graph, train_pool

TIMES = ("train_s", "compute_s", "wait_s", "evaluation_s", "epoch_s")


def _records(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


@pytest.mark.parametrize("stop_at", [1, 4, 7, 9])
def test_resumed_run_ends_like_one_that_was_never_stopped(tmp_path: Path, stop_at: int) -> None:
    store = make_store(small_graph(), tmp_path / "s", 1)
    config = settings("train.epochs=10", "train.checkpoint_every=3", "model.feature_norm=l2")
    qgnn.train(store.path, out=tmp_path / "whole", config=config)

    def stop(record: dict[str, Any]) -> None:
        if record["epoch"] == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qgnn.train(store.path, out=tmp_path / "cut", config=config, on_epoch=stop)
    assert not (tmp_path / "cut" / "summary.json").exists()
    with pytest.raises(InputError, match="--resume to go on or --overwrite"):
        qgnn.train(store.path, out=tmp_path / "cut", config=config)
    resumed: list[int] = []
    summary = qgnn.train(store.path, out=tmp_path / "cut", config=config, resume=True,
                         on_epoch=lambda record: resumed.append(record["epoch"]))
    assert resumed == list(range(stop_at // 3 * 3 + 1, 11))
    assert _records(tmp_path / "cut") == _records(tmp_path / "whole")
    tensors = [load_file(tmp_path / run / "checkpoints" / "epoch-000010.safetensors") for run in ("cut", "whole")]
    assert set(tensors[0]) == set(tensors[1])
    for name, value in tensors[1].items():
        np.testing.assert_array_equal(tensors[0][name], value, err_msg=name)
    assert qgnn.train(store.path, out=tmp_path / "cut", config=config, resume=True) == summary
    with pytest.raises(InputError, match="other settings"):
        qgnn.train(store.path, out=tmp_path / "cut", config=config, overrides=["seed=1"], resume=True)


def _odd_owners(indptr: np.ndarray, indices: np.ndarray, parts: int, *_: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """Part 0 most nodes, part 1 isolated nodes alone (no boundary), part 2 nothing, part 3 no training node."""
    assert parts == 4
    owners = np.zeros(len(indptr) - 1, np.int32)
    owners[np.diff(indptr) == 0] = 1
    owners[_NOT_TRAINED[:40]] = 3
    return owners, {}


_NOT_TRAINED = np.empty(0, np.int64)


@pytest.mark.parametrize("words", [("quant.bits=2",), ("quant.bits=32",), ("quant.bits=4", "propagation.kind=none")])
@pytest.mark.parametrize("sparse", [False, True])
def test_parts_without_boundary_training_nodes_or_any_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                           words: tuple[str, ...], sparse: bool) -> None:
    graph = small_graph(sparse=sparse)
    assert graph.split is not None
    monkeypatch.setitem(globals(), "_NOT_TRAINED", np.flatnonzero(graph.split != TRAIN))
    monkeypatch.setitem(partitioning.METHODS, "random", _odd_owners)
    store = make_store(graph, tmp_path / "s", 4)
    parts = [store.part(i) for i in range(4)]
    assert [p.num_local > 0 for p in parts] == [True, True, False, True]
    assert parts[1].num_boundary == parts[1].num_halo == 0
    assert not (parts[3].split == TRAIN).any()
    config = settings(*words, "model.feature_norm=l2")
    losses = {}
    for name, path in (("odd", store), ("one", make_store(graph, tmp_path / "1", 1, "stream"))):
        with train_pool(path, config) as pool:
            losses[name] = [sum(r["loss"] for r in pool.call("train_epoch", e, True, timeout_s=60)) for e in (1, 2, 3)]
    assert losses["odd"] == pytest.approx(losses["one"], rel=1e-4)


@pytest.mark.parametrize(("words", "bits", "rounds"), [
    (("quant.bits=2",), 2, 4), (("quant.messages=1", "propagation.kind=appnp"), 1, 4), (("quant.bits=8",), 8, 4),
    (("quant.bits=32",), 32, 4), (("quant.bits=2", "propagation.rounds=two"), 2, 7),
    (("messages.stride=2", "propagation.layers=9"), 2, 9)])
def test_bytes_are_what_the_formula_says(tmp_path: Path, words: tuple[str, ...], bits: int, rounds: int) -> None:
    """Law 5, λ = 0 throughout: K rounds merged, 2K − 1 with two rounds a layer; rounds left out send nothing."""
    sent = 7 if "messages.stride=2" in words else rounds  # of rounds 0 … 8, those but 5 and 7
    store = make_store(small_graph(), tmp_path / "s", 4)
    sends = sum(len(p.send_rows) for i in range(4) for p in store.part(i).peers)
    frames = sum(len(store.part(i).peers) for i in range(4))
    columns = store.num_classes
    assert store.manifest["bytes_per_round"]["2"] == sends * row_bytes(columns, 2)
    with train_pool(store, settings(*words, "propagation.alpha=1000", "model.feature_norm=l2")) as pool:
        results = pool.call("train_epoch", 1, True, timeout_s=60)
    wire = {kind: sum(r["wire_bytes"][kind] for r in results) for kind in ("forward", "backward", "evaluation")}
    round_bytes = sends * row_bytes(columns, bits) + frames * HEADER_BYTES
    gradient_row = row_bytes(columns, 32) if bits == 32 else row_bytes(columns, 4) + 1
    assert wire == {"forward": sent * round_bytes, "evaluation": sent * round_bytes,
                    "backward": rounds * (sends * gradient_row + frames * HEADER_BYTES)}
    assert 0.01 * 10_000 * row_bytes(40, 1) > HEADER_BYTES


def test_training_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    """Law 9, in processes of their own: peak memory at K = 64 against K = 10, by the system's own mark."""
    store = make_store(small_graph(nodes=60_000, classes=32, features=16, degree=3, signed=True), tmp_path / "s", 1)
    peaks = {}
    for layers in (10, 64):
        out = subprocess.run(
            [sys.executable, "-m", "qgnn_dist.cli", "train", str(store.path), "--out", str(tmp_path / str(layers)),
             "--set", f"propagation.layers={layers}", "--set", "train.epochs=3", "--set", "cluster.threads=2",
             "--json"], capture_output=True, text=True, check=True, timeout=200)
        peaks[layers] = json.loads(out.stdout)["peak_rss_bytes"][0]
    print(f"law 9: peak memory at K = 64 is {peaks[64] / peaks[10]:.3f} of K = 10's {peaks[10] / 1e6:.0f} MB")
    assert peaks[64] <= 1.05 * peaks[10]


def test_warnings_say_what_to_change(tmp_path: Path) -> None:
    store = make_store(small_graph(), tmp_path / "s", 1)
    words = ["train.epochs=2", "model.feature_norm=l2", "propagation.layers=3"]
    calm = qgnn.train(store.path, out=tmp_path / "calm", config=settings(*words, "propagation.alpha=1000"))
    assert calm["warnings"] == []
    wild = qgnn.train(store.path, out=tmp_path / "wild", config=settings(
        *words, "propagation.alpha=0", "propagation.eta_lambda=1000"))
    assert "clamped" in wild["warnings"][0]
    assert wild["multipliers"]["clamped"] > 0
    published = qgnn.train(store.path, out=tmp_path / "published", config=settings(
        *words, "propagation.constraint=published", "propagation.rounds=two"))
    assert any("for reproduction" in text for text in published["warnings"])
    assert published["multipliers"]["last"][0] == 1e-3


def test_best_epoch_is_the_earliest_where_nothing_tells_them_apart(tmp_path: Path) -> None:
    store = make_store(small_graph(), tmp_path / "s", 1)
    summary = qgnn.train(store.path, out=tmp_path / "r", config=settings(
        "train.lr=1e-12", "quant.bits=32", "model.feature_norm=l2", "train.patience=3", "train.epochs=50"))
    assert summary["best_epoch"] == 1, "nothing moves, so every epoch ties with the first"
    assert summary["epochs"] == 4, "patience counts from the best epoch"
