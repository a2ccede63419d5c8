# SPDX-License-Identifier: Apache-2.0
"""Law 2 (packed inference is bit-identical however it is run) and law 8 (no float product of torch runs in it)."""
from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from qgnn_dist import kernels
from qgnn_dist.comm.pool import LocalPool
from qgnn_dist.config import TimeoutsConfig
from qgnn_dist.data.graph import Graph, SparseFeatures
from qgnn_dist.errors import InputError, ModelError
from qgnn_dist.inference import worker
from qgnn_dist.inference.batch import check_output, check_predictable, run_prediction
from qgnn_dist.inference.worker import PredictWorker
from qgnn_dist.model.packed import PackedModel
from qgnn_dist.store.reader import Store
from tests.helpers import make_store, settings, small_graph, train_pool, untrained_model


def trained_model(store: Store, *words: str) -> PackedModel:
    """The packed model of a few epochs."""
    with train_pool(store, settings(*words)) as pool:
        for epoch in range(1, 9):
            pool.call("train_epoch", epoch, epoch == 8, timeout_s=60)
        pool.call("keep_best", timeout_s=60)
        data = pool.call_one(0, "best_model", timeout_s=60)
    return PackedModel.from_bytes(data)


def predictions(store: Store, model: PackedModel, out: Path) -> tuple[pa.Table, dict[str, Any]]:
    """All rows sorted by node_id, and the summary."""
    pool = LocalPool(PredictWorker, {"store": str(store.path), "exchange_s": 60.0}, store.num_parts, timeout_s=60)
    try:
        summary = run_prediction(pool, store, model, out, scores=True, timeouts=TimeoutsConfig())
    finally:
        pool.close()
    table = pa.concat_tables([pq.read_table(f) for f in sorted(out.glob("part-*.parquet"))])
    return table.sort_by("node_id"), summary


def bits_of(table: pa.Table) -> dict[str, np.ndarray]:
    """Columns as integers, so that equal means the same bits."""
    scores = table["scores"].combine_chunks().flatten().to_numpy()
    return {"node_id": table["node_id"].to_numpy(), "class": table["class"].to_numpy(),
            "confidence": table["confidence"].to_numpy().view(np.uint32), "scores": scores.view(np.uint32)}


@pytest.mark.parametrize("words", [
    ("quant.bits=2",), ("quant.messages=1", "propagation.kind=appnp"), ("quant.bits=4", "propagation.rounds=two"),
    ("quant.bits=8", "messages.coding=direct"), ("messages.stride=2", "propagation.layers=9"), ("quant.bits=32",)])
@pytest.mark.parametrize("sparse", [False, True])
def test_bits_do_not_depend_on_how_it_is_run(tmp_path: Path, words: tuple[str, ...], sparse: bool) -> None:
    graph = small_graph(nodes=700, sparse=sparse)
    one = make_store(graph, tmp_path / "1", 1)
    model = trained_model(one, *words, "propagation.alpha=0.001", "model.feature_norm=l2")
    kernels.set_threads(1)
    want, summary = predictions(one, model, tmp_path / "want")
    assert summary["rows"] == len(want) == 700
    assert summary["range_gain"] == 0
    want_bits = bits_of(want)
    assert len(np.unique(want_bits["class"])) > 1
    runs: dict[str, Callable[[], Store]] = {
        f"{parts}-{method}": (lambda parts=parts, method=method: make_store(
            graph, tmp_path / f"{parts}{method}", parts, method))
        for parts in (2, 4, 8) for method in ("random", "metis")}
    for name, store in runs.items():
        got = bits_of(predictions(store(), model, tmp_path / f"out{name}")[0])
        for column, values in want_bits.items():
            np.testing.assert_array_equal(got[column], values, err_msg=f"{name} {column}")
    for level in ("scalar", "reference"):
        with kernels.using_isa(level):
            got = bits_of(predictions(one, model, tmp_path / level)[0])
        for column, values in want_bits.items():
            np.testing.assert_array_equal(got[column], values, err_msg=f"{level} {column}")
    kernels.set_threads(3)
    got = bits_of(predictions(one, model, tmp_path / "threads")[0])
    for column, values in want_bits.items():
        np.testing.assert_array_equal(got[column], values, err_msg=f"threads {column}")
    print(f"law 2, {words} sparse={sparse}: no bit differs over parts, partitioners, levels and threads")


@pytest.mark.parametrize("words", [("quant.bits=2",), ("quant.bits=32",), ("quant.method=bt_star",)])
def test_bits_do_not_depend_on_the_order_of_rows(tmp_path: Path, words: tuple[str, ...]) -> None:
    """Float ones too: every row adds up its neighbours by rising source index, wherever they lie."""
    graph = small_graph(nodes=700)
    one = make_store(graph, tmp_path / "1", 1)
    model = trained_model(one, *words, "propagation.alpha=0.001", "model.feature_norm=l2")
    want = bits_of(predictions(one, model, tmp_path / "want")[0])
    assert len(np.unique(want["class"])) > 1
    for order in ("degree", "rcm", "community", "random"):
        for parts in (1, 2, 4):
            store = make_store(graph, tmp_path / f"{order}{parts}", parts, "metis", order=order)
            assert (store.part(0).source_index[1:] < store.part(0).source_index[:-1]).any()
            got = bits_of(predictions(store, model, tmp_path / f"out-{order}{parts}")[0])
            for column, values in want.items():
                np.testing.assert_array_equal(got[column], values, err_msg=f"{order}, {parts} parts, {column}")


@pytest.mark.parametrize("method", ["recipe", "bt_star", "percentile"])
def test_no_float_product_of_torch_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    store = make_store(small_graph(), tmp_path / "s", 2)
    model = trained_model(store, "quant.bits=2", "model.feature_norm=l2", f"quant.method={method}")

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a float product of torch ran during predict")

    for holder, names in ((torch, ("mm", "matmul", "addmm", "bmm", "einsum", "index_add", "scatter_add")),
                          (torch.sparse, ("mm", "addmm")), (torch.nn.functional, ("linear", "softmax")),
                          (torch.Tensor, ("__matmul__", "matmul", "mm", "index_add", "index_add_", "scatter_add_"))):
        for name in names:
            monkeypatch.setattr(holder, name, refuse)
    monkeypatch.setattr(kernels, "matmul_float_dense", refuse)
    monkeypatch.setattr(kernels, "matmul_float_csr", refuse)
    monkeypatch.setattr(kernels, "aggregate_float", refuse)
    with pytest.raises(AssertionError, match="a float product"):
        torch.ones(2, 2) @ torch.ones(2, 2)
    _, summary = predictions(store, model, tmp_path / "out")
    assert summary["rows"] == store.num_nodes
    assert summary["message_bytes"] > 0


def test_models_that_do_not_fit_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    store = make_store(small_graph(), tmp_path / "s", 1)
    model = trained_model(store, "quant.bits=2", "model.feature_norm=l2")
    wide = make_store(small_graph(features=25), tmp_path / "wide", 1)
    with pytest.raises(ModelError, match=r"takes 24 features, the store .* has 25"):
        check_predictable(wide, model, "m")
    bare = small_graph()
    bare = Graph(name="bare", num_nodes=bare.num_nodes, edges=bare.edges)
    with pytest.raises(InputError, match="has no features"):
        check_predictable(make_store(bare, tmp_path / "bare", 1), model, "m")
    signed = make_store(small_graph(signed=True), tmp_path / "signed", 1)
    with pytest.raises(ModelError, match=r"negative feature values.*\(norm=l2, unsigned grid"):
        predictions(signed, model, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_outputs_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(small_graph(), tmp_path / "s", 2)
    model = trained_model(store, "quant.bits=2", "model.feature_norm=l2")
    predictions(store, model, tmp_path / "out")
    with pytest.raises(InputError, match="--overwrite"):
        check_output(tmp_path / "out", False)
    before = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PredictWorker, "_write", fail)
    with pytest.raises(OSError, match="No space left"):
        predictions(store, model, check_output(tmp_path / "out", True))
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == before
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="not a folder of predictions"):
        check_output(tmp_path / "mine", True)


def test_ranges_follow_a_graph_of_another_scale(tmp_path: Path) -> None:
    """A model whose recorded level is three octaves lower shifts every step by 2^3."""
    store = make_store(small_graph(), tmp_path / "s", 1)
    model = trained_model(store, "quant.bits=2", "model.feature_norm=l2")
    assert model.info.level > 0
    other = dataclasses.replace(model, info=dataclasses.replace(model.info, level=model.info.level - 48))
    _, summary = predictions(store, other, tmp_path / "out")
    assert summary["range_gain"] == 3


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("words", [["quant.bits=2"], ["quant.method=percentile", "quant.bits=4"]])
def test_features_of_another_scale_give_the_same_bits(tmp_path: Path, sparse: bool, words: list[str]) -> None:
    """Features that are taken as they are, four times as large or half: divided back, on one part and on three."""
    graph = small_graph(sparse=sparse)
    store = make_store(graph, tmp_path / "s", 1)
    model = trained_model(store, "model.feature_norm=none", *words)
    want = bits_of(predictions(store, model, tmp_path / "want")[0])
    for power, parts in ((2, 1), (-1, 3)):
        features = graph.features
        if isinstance(features, SparseFeatures):
            scaled = dataclasses.replace(features, values=np.ldexp(features.values, power))
        else:
            assert features is not None
            scaled = np.ldexp(features, power)
        other = make_store(dataclasses.replace(graph, features=scaled), tmp_path / f"o{power}", parts)
        table, summary = predictions(other, model, tmp_path / f"p{power}")
        assert summary["feature_gain"] == power
        for column, values in bits_of(table).items():
            np.testing.assert_array_equal(values, want[column], err_msg=column)
    normalised = trained_model(store, "model.feature_norm=l2", *words)
    assert normalised.info.feature_level == -1, "their scale does not matter"


def _named(model: PackedModel) -> PackedModel:
    return dataclasses.replace(model, info=dataclasses.replace(model.info, class_names=["", "b", "çç", "d d", "e"]))


def test_row_groups_are_written_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, names and scores of all groups are those of one; 100 nodes in groups of 30."""
    store = make_store(small_graph(nodes=100), tmp_path / "s", 1)
    model = _named(untrained_model(store))
    want, _ = predictions(store, model, tmp_path / "whole")
    names = ["", "b", "çç", "d d", "e"]
    assert want["class_name"].to_pylist() == [names[i] for i in want["class"].to_pylist()]
    assert len(set(want["class"].to_pylist())) > 2
    monkeypatch.setattr(worker, "WRITTEN_ROWS", 30)
    got, _ = predictions(store, model, tmp_path / "pieces")
    assert got.equals(want)
    metadata = pq.read_metadata(tmp_path / "pieces" / "part-00000.parquet")
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [30, 30, 30, 10]


def test_prediction_loads_no_pandas(tmp_path: Path) -> None:
    """Arrow's own conversions do, where it is installed: 50 MB and a second of every worker."""
    store = make_store(small_graph(), tmp_path / "s", 1)
    _named(untrained_model(store)).save(tmp_path / "m")
    code = ("import sys; from qgnn_dist.cluster import api; store, model, out = sys.argv[1:]\n"
            "api.predict(store, model=model, out=out, scores=True); print('pandas' in sys.modules)")
    words = [str(path) for path in (store.path, tmp_path / "m", tmp_path / "out")]
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "False\n", done.stderr
