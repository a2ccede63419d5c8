# SPDX-License-Identifier: Apache-2.0
"""Accuracy on real graphs with public splits, through the whole path: partition, train, export, predict."""
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import qgnn_dist as qgnn
from qgnn_dist.cluster.session import RaySession
from qgnn_dist.config import load_config
from qgnn_dist.store.reader import Store
from tests.helpers import by_source, train_pool


@pytest.fixture(scope="module")
def session() -> Any:
    """One local Ray for all of this module's runs."""
    with RaySession(num_cpus=4) as opened:
        yield opened


def whole_path(graph: Path, work: Path, parts: int, *words: str) -> tuple[dict[str, Any], pa.Table]:
    """Summary of the prediction and its rows, sorted; the trained accuracy must be the predicted one."""
    work.mkdir()
    qgnn.partition(str(graph), parts=parts, out=work / "store")
    summary = qgnn.train(work / "store", out=work / "run", overrides=list(words))
    qgnn.export(work / "run", out=work / "model")
    result = qgnn.predict(work / "store", model=work / "model", out=work / "out")
    assert result["accuracy"] == summary["accuracy"]
    table = pa.concat_tables([pq.read_table(f) for f in sorted((work / "out").glob("*.parquet"))])
    assert table.num_rows == result["rows"]
    return result, table.sort_by("node_id")


@pytest.mark.parametrize("parts", [2, pytest.param(4, marks=pytest.mark.long)])
def test_cora_int2_on_ray(data_dir: Path, tmp_path: Path, session: Any, parts: int) -> None:
    result, table = whole_path(data_dir / "cora.npz", tmp_path / "w", parts, "quant.bits=2")
    print(f"cora INT2, {parts} parts, seed 0: test {100 * result['accuracy']['test']:.2f} %")
    assert result["accuracy"]["test"] >= 0.805
    labels, test = (np.load(data_dir / "cora.npz")[k] for k in ("y", "test_idx"))
    right = table["class"].to_numpy()[test] == labels[test]
    assert right.mean() == pytest.approx(result["accuracy"]["test"])


def test_cora_over_five_seeds(data_dir: Path, tmp_path: Path) -> None:
    scores = [100 * whole_path(data_dir / "cora.npz", tmp_path / str(seed), 1, "quant.bits=2",
                               f"seed={seed}")[0]["accuracy"]["test"] for seed in range(5)]
    print(f"cora INT2, seeds 0-4: {np.mean(scores):.2f} ± {np.std(scores):.2f} ({scores})")
    assert scores[0] >= 80.5
    assert np.mean(scores) >= 82.0


@pytest.mark.parametrize(("name", "words", "bound"), [
    ("cora", ["quant.messages=1"], 0.80), ("cora", ["quant.bits=32"], 0.82), ("amazon_photo", ["quant.bits=2"], 0.90)])
def test_other_widths_and_graphs(data_dir: Path, tmp_path: Path, name: str, words: list[str], bound: float) -> None:
    result, _ = whole_path(data_dir / f"{name}.npz", tmp_path / "w", 1, *words)
    print(f"{name} {words}, seed 0: test {100 * result['accuracy']['test']:.2f} %")
    assert result["accuracy"]["test"] >= bound


def test_packed_predictions_are_the_training_forwards(data_dir: Path, tmp_path: Path) -> None:
    """INT2 on Cora: the float arithmetic that trains against the integers that predict, on every node."""
    qgnn.partition(str(data_dir / "cora.npz"), parts=2, out=tmp_path / "s")
    config = load_config(overrides=["quant.bits=2", "model.feature_norm=row"])
    with train_pool(Store.open(tmp_path / "s"), config) as pool:
        for epoch in range(1, 61):
            pool.call("train_epoch", epoch, epoch == 60, timeout_s=60)
        trained = by_source(pool.call("training_scores", timeout_s=60))
        packed = by_source(pool.call("packed_scores", timeout_s=60))
    agreement = float((trained.argmax(1) == packed.argmax(1)).mean())
    print(f"cora INT2: {100 * agreement:.3f} % of the nodes agree, worst score {np.abs(trained - packed).max():.1e}")
    assert agreement >= 0.999
    assert len(np.unique(packed.argmax(1))) == 7


def test_torch_sparse_wheels_are_those_that_were_given() -> None:
    """Where a folder with the optional wheels was given, `make test` has installed them."""
    if not os.environ.get("QGNN_TEST_WHEELS"):
        pytest.skip("QGNN_TEST_WHEELS names no folder with the optional wheels")
    sparse = pytest.importorskip("torch_sparse")
    assert sparse.SparseTensor.from_dense is not None
