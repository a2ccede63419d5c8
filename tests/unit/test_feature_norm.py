# SPDX-License-Identifier: Apache-2.0
"""`feature_norm=auto`: what the training rows say about how rows should be normalised."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import qgnn_dist as qgnn
from qgnn_dist.data.graph import Graph, SparseFeatures
from qgnn_dist.model.features import FeatureStatistics, choose_norm, feature_statistics
from tests.helpers import make_store, settings, small_graph


def statistics_of(x: np.ndarray, tmp_path: Path, *, sparse: bool, parts: int = 1) -> FeatureStatistics:
    """Over all training rows of a store with these features."""
    graph = small_graph(len(x), features=x.shape[1])
    given: np.ndarray | SparseFeatures = x.astype(np.float32)
    if sparse:
        counts = (x != 0).sum(1)
        given = SparseFeatures(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
                               np.nonzero(x)[1].astype(np.int32), x[x != 0].astype(np.float32), x.shape)
    store = make_store(Graph(**{**graph.__dict__, "features": given}), tmp_path / f"s{parts}{sparse}", parts)
    total = FeatureStatistics()
    for part in (store.part(p) for p in range(parts)):
        assert part.split is not None
        total += feature_statistics(part, np.flatnonzero(part.split == 1))
    return total


def bag(rows: int, columns: int, low: int, high: int) -> np.ndarray:
    """0/1 rows with low … high ones."""
    rng = np.random.default_rng(0)
    x = np.zeros((rows, columns))
    for row in x:
        row[rng.choice(columns, rng.integers(low, high + 1), replace=False)] = 1
    return x


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize(("x", "norm"), [
    (bag(120, 400, 6, 6), "none"), (bag(120, 400, 2, 30), "row"), (bag(120, 400, 50, 300), "l2"),
    (bag(120, 400, 2, 30) - 0.25, "none")])
def test_the_norm_follows_the_rows(x: np.ndarray, norm: str, sparse: bool, tmp_path: Path) -> None:
    assert choose_norm(statistics_of(x, tmp_path, sparse=sparse), x.shape[1]) == norm


def test_statistics_are_those_of_the_training_rows_on_any_number_of_parts(tmp_path: Path) -> None:
    x = bag(120, 50, 2, 30) * 0.5
    train = small_graph(120, features=50).split == 1  # type: ignore[operator]
    sums = x[train].sum(1)
    for parts in (1, 3):
        found = statistics_of(x, tmp_path, sparse=True, parts=parts)
        assert (found.rows, found.nonzero, found.negative) == (train.sum(), (x[train] > 0).sum(), 0)
        assert found.spread == pytest.approx(sums.std() / sums.mean(), rel=1e-12)


@pytest.mark.parametrize(("norm", "decay"), [("none", 0.0), ("l2", 1e-3), ("row", 1e-3)])
def test_open_decay_follows_the_norm(norm: str, decay: float, tmp_path: Path) -> None:
    """The same weights as with the decay that it comes to, others than with the other one; told in the summary."""
    store, losses = make_store(small_graph(), tmp_path / "store", 1), {}
    for name, words in (("open", ()), ("0.0", ("train.weight_decay=0.0",)), ("0.001", ("train.weight_decay=0.001",))):
        config = settings(f"model.feature_norm={norm}", "train.epochs=3", *words)
        qgnn.train(store.path, out=tmp_path / name, config=config)
        records = (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses[name] = [json.loads(record)["loss"] for record in records]
    assert losses["open"] == losses[str(decay)]
    assert losses["0.0"] != losses["0.001"]
    assert json.loads((tmp_path / "open" / "summary.json").read_text(encoding="utf-8"))["weight_decay"] == decay


def test_a_given_decay_stays() -> None:
    train = settings("train.weight_decay=0.25").train
    assert [train.decay(norm) for norm in ("none", "l2")] == [0.25, 0.25]


def test_no_values_have_no_spread() -> None:
    assert FeatureStatistics(rows=3).spread == 0.0
    assert FeatureStatistics().spread == 0.0
