# SPDX-License-Identifier: Apache-2.0
"""Sparse features with many non-zeros, whose codes are worked on as dense ones: the same numbers, and when."""
from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from qgnn_dist.cluster import api
from qgnn_dist.data.graph import Graph, SparseFeatures
from qgnn_dist.model.features import FeatureScheme, keeps_dense, read_block
from qgnn_dist.planning.memory import training_need
from qgnn_dist.planning.shapes import GraphSize, parts_of
from qgnn_dist.store.reader import Store
from tests.helpers import make_store, settings, small_graph, train_pool


def _half() -> Graph:
    """Half of all values are 0, and those of row 5 all."""
    graph = small_graph(signed=True)
    x = np.asarray(graph.features).clip(0)
    x[5] = 0
    counts = (x > 0).sum(1)
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return dataclasses.replace(graph, features=SparseFeatures(indptr, np.nonzero(x)[1].astype(np.int32), x[x > 0],
                                                              x.shape))


def test_when() -> None:
    assert keeps_dense(25, 64, 2)
    assert not keeps_dense(21, 64, 2), "row pointers take less"
    assert not keeps_dense(64, 64, 32), "floats keep their order of addition"
    assert not keeps_dense(0, 0, 2)


@pytest.mark.parametrize("norm", ["none", "row", "l2"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_are_those_of_the_sparse_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int,
                                            norm: str) -> None:
    monkeypatch.setattr("qgnn_dist.model.features.DENSE_ROWS", 64)
    part = make_store(_half(), tmp_path / "s", 1).part(0)
    for begin, end in ((0, 300), (3, 131), (7, 7)):
        sparse, dense = (read_block(part, FeatureScheme(norm, False, bits), begin, end, as_dense=how)
                         for how in (False, True))
        assert sparse.indptr is not None
        assert sparse.indices is not None
        assert dense.indptr is None
        assert dense.values.dtype == np.int16
        expected = np.zeros((end - begin, 24), np.int16)
        expected[np.repeat(np.arange(end - begin), np.diff(sparse.indptr)), sparse.indices] = sparse.values
        np.testing.assert_array_equal(dense.values, expected)
        np.testing.assert_array_equal(dense.scale, sparse.scale)


def test_a_column_named_twice_stays_sparse(tmp_path: Path) -> None:
    graph = _half()
    features = graph.features
    assert isinstance(features, SparseFeatures)
    indices = features.indices.copy()
    indices[int(features.indptr[9]) + 1] = indices[int(features.indptr[9])]
    part = make_store(dataclasses.replace(graph, features=dataclasses.replace(features, indices=indices)),
                      tmp_path / "s", 1).part(0)
    assert read_block(part, FeatureScheme("none", False, 2), 0, 300, as_dense=True).indptr is not None


def test_training_and_prediction_are_the_same_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first epoch's loss to the last bit: products of codes are whole numbers; and every prediction of a model."""
    store, config = make_store(_half(), tmp_path / "s", 1), settings()
    found, predicted, measured = [], [], []
    for share in (0.01, 2.0):
        monkeypatch.setattr("qgnn_dist.model.features.DENSE_SHARE", share)
        with train_pool(store, config) as pool:
            assert pool.workers[0]._matrix.is_sparse == (share > 1)
            found.append(pool.call("train_epoch", 1, True, timeout_s=60)[0]["loss"])
        if not predicted:
            api.train(store.path, out=tmp_path / "run", overrides=["train.epochs=2", "model.hidden=8"])
            api.export(tmp_path / "run", out=tmp_path / "model")
        out = tmp_path / str(share)
        api.predict(store.path, model=tmp_path / "model", out=out, scores=True)
        predicted.append((out / "part-00000.parquet").read_bytes())
        measured.append(api.inspect(tmp_path / "model", store=store.path)["diagnosis"]["stages"])
    assert measured[0] == measured[1]
    assert found[0] == found[1]
    assert predicted[0] == predicted[1]


def test_a_plan_knows(tmp_path: Path) -> None:
    store = Store.open(make_store(_half(), tmp_path / "s", 1).path)
    size, part = GraphSize.of(store), parts_of(store)[0]
    assert size.sparse
    assert size.stored == pytest.approx(len(_half().features.values) / 300, rel=0.1)  # type: ignore[union-attr]
    assert training_need(part, size, settings()).items["features"] == 300 * (2 * 24 + 4)
    affine = training_need(part, size, settings("quant.method=minmax")).items["features"]
    assert training_need(part, size, settings("quant.method=qlr")).items["features"] < affine
