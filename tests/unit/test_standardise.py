# SPDX-License-Identifier: Apache-2.0
"""Feature columns brought to one scale when a store is made: their numbers, whatever the cut, and who is told to."""
from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import qgnn_dist as qgnn
from qgnn_dist.cli import app
from qgnn_dist.data.graph import Graph
from qgnn_dist.errors import InputError, QgnnWarning, StoreError
from qgnn_dist.partitioning import standardise as module
from qgnn_dist.partitioning.api import partition_graph
from qgnn_dist.store.reader import Store
from tests.helpers import edit_manifest, features_of, goes_on_alone, settings, small_graph


def _made(graph: Graph, path: Path, parts: int = 1, *, standardise: bool = True, **more: Any) -> Store:
    partition_graph(graph, parts=parts, out=path, method="random" if "like" not in more else "auto",
                    standardise=standardise, **more)
    return Store.open(path)


def _raw(nodes: int = 300) -> Graph:
    """Column 3 is of incomes, column 5 far from zero, column 7 the same everywhere."""
    graph = small_graph(nodes, signed=True)
    x = np.array(graph.features, np.float32)
    x[:, 3] = np.exp(10 + x[:, 3])
    x[:, 5] += 1e4
    x[:, 7] = 3.7
    return dataclasses.replace(graph, features=x)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_numbers_whatever_the_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: type) -> None:
    monkeypatch.setattr(module, "BLOCK_ROWS", 64)
    graph = _raw() if dtype == np.float32 else small_graph(signed=True)
    graph = dataclasses.replace(graph, features=np.asarray(graph.features).astype(dtype))
    x = np.asarray(graph.features, np.float64)
    spread = np.where(x.std(0) > 1e-9 * np.abs(x.mean(0)), x.std(0), 1.0)
    stores = [_made(graph, tmp_path / str(parts), parts, order=order)
              for parts, order in ((1, "source"), (3, "degree"))]
    for store in stores:
        assert store.standardised
        np.testing.assert_allclose(store.manifest["standardised"]["means"], x.mean(0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(store.manifest["standardised"]["deviations"], spread, rtol=1e-9)
        np.testing.assert_allclose(features_of(store), (x - x.mean(0)) / spread, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(features_of(stores[0]), features_of(stores[1]))
    plain = _made(graph, tmp_path / "plain", standardise=False)
    assert (plain.standardised, plain.fingerprint) == (False, stores[0].fingerprint)
    assert "standardised" not in plain.manifest
    assert not list((tmp_path / "1").glob("*.npy"))


def test_before_hops_and_codes(tmp_path: Path) -> None:
    store = _made(_raw(), tmp_path / "store", 2, hops=1, features_bits=8)
    assert (store.standardised, store.hops, store.feature_bits, store.num_features) == (True, 1, 8, 48)
    assert len(store.manifest["standardised"]["means"]) == 24
    plain = features_of(_made(_raw(), tmp_path / "plain"))
    assert np.abs(features_of(store)[:, :24] - plain).max() <= 0.02 * np.abs(plain).max()


def test_a_later_graph_keeps_means_and_deviations(tmp_path: Path) -> None:
    graph = _raw()
    _made(graph, tmp_path / "first", 2)
    later = dataclasses.replace(graph, features=2 * np.asarray(graph.features))
    like = _made(later, tmp_path / "like", 2, like=tmp_path / "first")
    known = like.manifest["standardised"]
    assert known == Store.open(tmp_path / "first").manifest["standardised"]
    np.testing.assert_allclose(features_of(like), (2 * np.asarray(graph.features, np.float64) - known["means"])
                               / known["deviations"], rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="has features that are standardised, --standardise: this command leaves it o"):
        _made(later, tmp_path / "other", 2, like=tmp_path / "first", standardise=False)
    fewer = dataclasses.replace(graph, features=np.asarray(graph.features)[:, :9])
    with pytest.raises(InputError, match="has means of 24 features, the graph has 9: expected the same"):
        _made(fewer, tmp_path / "other", 2, like=tmp_path / "first")
    _made(graph, tmp_path / "plain", 2, standardise=False)
    with pytest.raises(InputError, match="has features that are not standardised, --standardise: this command has it"):
        _made(later, tmp_path / "other", 2, like=tmp_path / "plain")


def test_a_column_of_another_size_is_told(tmp_path: Path) -> None:
    with pytest.warns(QgnnWarning, match=r"small: feature column 3 reaches .*, half of the columns .*; --standardise"):
        _made(_raw(), tmp_path / "raw", standardise=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _made(_raw(), tmp_path / "scaled")
        _made(small_graph(), tmp_path / "plain", standardise=False)
        rare = dataclasses.replace(small_graph(), features=np.eye(300, dtype=np.float32))
        _made(rare, tmp_path / "categories", standardise=False)
    np.save(tmp_path / "edges.npy", np.concatenate(list(_raw().edges()), 1))
    np.savez(tmp_path / "raw.npz", edge_index=np.load(tmp_path / "edges.npy"), x=np.asarray(_raw().features))
    said = CliRunner().invoke(app, ["partition", str(tmp_path / "raw.npz"), "--parts", "1", "--out",
                                    str(tmp_path / "told"), "--json"])
    assert (said.exit_code, said.stderr.count("warning: raw: feature column 3 reaches")) == (0, 1)
    assert "standardised" not in json.loads(said.stdout)


def test_training_learns_from_columns_of_any_size(tmp_path: Path) -> None:
    """What a newcomer with incomes among the features would otherwise see: no better than chance."""
    clean = dataclasses.replace(small_graph(600, signed=True), name="clean")
    x = np.array(clean.features, np.float32)
    income = np.exp(np.random.default_rng(0).normal(10, 1, (len(x), 1))).astype(np.float32)
    raw = dataclasses.replace(clean, features=np.concatenate([x, income], axis=1))
    accuracy = {}
    for name, graph, standardise in (("clean", clean, False), ("raw", raw, False), ("scaled", raw, True)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", QgnnWarning)
            _made(graph, tmp_path / name, standardise=standardise)
        found = qgnn.train(tmp_path / name, out=tmp_path / f"run-{name}", config=settings("train.epochs=40"))
        accuracy[name] = found["accuracy"]["test"]
    assert accuracy["raw"] < accuracy["clean"] - 0.2
    assert accuracy["scaled"] > accuracy["clean"] - 0.1


@pytest.mark.parametrize(("change", "message"), [
    (lambda m: m["standardised"]["means"].pop(), "standardised has 23 means and 24 deviations of 24 dense columns"),
    (lambda m: m["standardised"]["deviations"].__setitem__(2, 0.0), "standardised has 24 means and 24 deviations"),
    (lambda m: m["standardised"]["means"].__setitem__(2, "x"), "expected numbers, deviations above 0"),
    (lambda m: m["standardised"]["means"].__setitem__(2, 10**400), "expected numbers, deviations above 0"),
    (lambda m: m["standardised"].update(means=3), "standardised"),
    (lambda m: m.update(standardised=True), "standardised"),
])
def test_a_manifest_that_is_odd(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    _made(small_graph(), tmp_path / "store")
    edit_manifest(tmp_path / "store", change)
    with pytest.raises(StoreError, match=message):
        Store.open(tmp_path / "store")


def test_what_is_refused(tmp_path: Path) -> None:
    graph = small_graph()
    for features, what in ((None, "no"), (small_graph(sparse=True).features, "sparse")):
        with pytest.raises(InputError, match=f"small has {what} features, and only dense ones are standardised"):
            _made(dataclasses.replace(graph, features=features), tmp_path / "store")
    broken = np.array(graph.features)
    broken[17, 3] = np.nan
    with pytest.raises(InputError, match=r"NaN or infinity \(first row: 17\)"):
        _made(dataclasses.replace(graph, features=broken), tmp_path / "store")
    assert not list(tmp_path.iterdir())


def test_a_run_goes_on_with_the_same_scales_alone(tmp_path: Path) -> None:
    plain, scaled = (_made(small_graph(), tmp_path / str(s), standardise=s) for s in (False, True))
    goes_on_alone(plain, scaled, tmp_path / "run", "standardised", "features of other scales")
