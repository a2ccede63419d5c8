# SPDX-License-Identifier: Apache-2.0
"""References of a grid: the same numbers as plain PyG, as our own APPNP, and the protocol of `qgnn train`."""
from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pytest
import torch
from torch_geometric.nn import APPNP, GCNConv

import qgnn_dist as qgnn
from qgnn_dist.bench.accuracy import accuracy
from qgnn_dist.bench.grid import read_grid
from qgnn_dist.bench.references import reference, train_reference
from qgnn_dist.bench.sign import mixed_features
from qgnn_dist.bench.systems import REFERENCES
from qgnn_dist.bench.task import Task, csr_tensor, dropped
from qgnn_dist.config import RunConfig, load_config
from qgnn_dist.errors import ConfigError, DivergedError, InputError
from qgnn_dist.model.packed import PackedModel
from qgnn_dist.store.reader import Store
from tests.helpers import make_store, small_graph

SBM = 'source = "synthetic:sbm?nodes=300&edges=1500&features=8&classes=3&seed=1"'


def _settings(*words: str) -> RunConfig:
    return load_config(overrides=["quant.bits=32", "model.hidden=16", "train.epochs=40", "train.lr=0.05",
                                  "propagation.kind=appnp", "propagation.layers=4", "cluster.threads=1", *words])


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "sparse"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(small_graph(sparse=request.param), tmp_path_factory.mktemp("store") / "1", 1)


def _edges(task: Task) -> torch.Tensor:
    """As PyG's users have them."""
    heads = np.repeat(np.arange(task.graph.num_local), np.diff(task.graph.indptr))
    return torch.from_numpy(np.stack([task.graph.indices.astype(np.int64), heads]))


@pytest.mark.parametrize(("mu", "eta"), [(9.0, 0.1), (4.0, 0.2)])
def test_appnp_with_our_weights_has_our_scores(store: Store, tmp_path: Path, mu: float, eta: float) -> None:
    config = _settings("train.epochs=5", f"propagation.mu={mu}", f"propagation.eta={eta}")
    qgnn.train(store.path, out=tmp_path / "run", config=config)
    qgnn.export(tmp_path / "run", out=tmp_path / "model")
    qgnn.predict(store.path, model=tmp_path / "model", out=tmp_path / "out", scores=True)
    rows = ds.dataset(str(tmp_path / "out"), exclude_invalid_files=True).to_table().sort_by("node_id")
    ours = np.stack(rows["scores"].to_pylist())
    model = PackedModel.load(tmp_path / "model")
    theirs = reference("pyg-appnp", Task(store, "auto"), config)
    theirs.load_state_dict({"first.weight": torch.from_numpy(model.weight1.T), "first.bias": torch.from_numpy(
        model.bias1), "second.weight": torch.from_numpy(model.weight2.T), "second.bias": torch.from_numpy(model.bias2)})
    assert np.abs(theirs.scores().numpy() - ours).max() <= 1e-5 * np.abs(ours).max()
    assert np.abs(ours - ours.mean(0)).max() > 0.01


def test_appnp_is_about_as_accurate_as_ours(store: Store, tmp_path: Path) -> None:
    found = []
    for config in (_settings(f"seed={seed}") for seed in range(4)):
        ours = qgnn.train(store.path, out=tmp_path / str(config.seed), config=config)
        found.append((train_reference(store, "pyg-appnp", config)["metric"]["test"], ours["metric"]["test"]))
    print("PyG's and ours, four seeds:", np.round(found, 3).tolist())
    assert np.min(found) > 0.6
    assert abs(np.diff(np.mean(found, 0))[0]) < 0.03


def test_layers_give_plain_pygs_scores_and_gradients(store: Store) -> None:
    task, config = Task(store, "l2"), _settings("model.dropout=0")
    x, edges, rows = task.x.to_dense(), _edges(task), torch.from_numpy(task.rows["train"])
    gcn, appnp = reference("pyg-gcn", task, config), reference("pyg-appnp", task, config)
    first, second, spread = GCNConv(x.shape[1], 16), GCNConv(16, task.classes), APPNP(4, 0.1)
    first.load_state_dict(gcn.first.state_dict())
    second.load_state_dict(gcn.second.state_dict())
    plain = second(torch.relu(first(x, edges)), edges)
    torch.testing.assert_close(gcn.scores(), plain.detach(), rtol=1e-5, atol=1e-6)
    gcn.loss(rows, task.y[rows]).backward()
    torch.nn.functional.cross_entropy(plain[rows], task.y[rows]).backward()
    torch.testing.assert_close(gcn.first.lin.weight.grad, first.lin.weight.grad, rtol=1e-4, atol=1e-7)
    h = torch.relu(x @ appnp.first.weight.t() + appnp.first.bias)
    plain = spread(appnp.second(h), edges)
    torch.testing.assert_close(appnp.scores(), plain.detach(), rtol=1e-5, atol=1e-6)
    torch.nn.functional.cross_entropy(plain[rows], task.y[rows]).backward()
    expected = appnp.first.weight.grad.clone()
    appnp.zero_grad()
    appnp.loss(rows, task.y[rows]).backward()
    torch.testing.assert_close(appnp.first.weight.grad, expected, rtol=1e-4, atol=1e-7)
    assert expected.abs().max() > 1e-3


def test_decay_is_for_the_first_weights_alone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[list[dict[str, Any]]] = []
    adam = torch.optim.Adam

    def note(params: list[dict[str, Any]], **options: Any) -> torch.optim.Adam:
        groups.append(params)
        return adam(params, **options)

    monkeypatch.setattr(torch.optim, "Adam", note)
    for system in REFERENCES:
        train_reference(store, system, _settings("train.epochs=1", "train.weight_decay=0.125"))
        decayed, rest = groups[-1]
        assert decayed["weight_decay"] == 0.125
        assert rest["weight_decay"] == 0
        assert all(store.num_features in p.shape for p in decayed["params"])
        assert not any(store.num_features in p.shape and p.dim() == 2 for p in rest["params"])
        assert len(decayed["params"]) == (5 if system == "torch-sign" else 1)
    for norm, decay in (("none", 0.0), ("l2", 1e-3)):  # left open, as in our own training
        train_reference(store, "torch-mlp", _settings("train.epochs=1", f"model.feature_norm={norm}"))
        assert groups[-1][0]["weight_decay"] == decay


def test_the_best_validation_epoch_is_kept_and_patience_ends(store: Store) -> None:
    for system in REFERENCES:
        records: list[dict[str, Any]] = []
        config = _settings("train.patience=5", "train.epochs=60", "train.metric=macro_f1")
        found = train_reference(store, system, config, on_epoch=records.append)
        figures = [record["macro_f1"]["valid"] for record in records]
        assert found["metric"]["valid"] == max(figures), system
        assert found["metric"] == {"name": "macro_f1", **records[found["best_epoch"] - 1]["macro_f1"]}
        assert found["accuracy"] == records[found["best_epoch"] - 1]["accuracy"]
        assert found["epochs"] == len(records) == min(60, found["best_epoch"] + 5)
        again = train_reference(store, system, config)
        assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in found.items() if k != "seconds"}


def test_what_references_learn_from(tmp_path: Path) -> None:
    """A perceptron sees no edge; the others do better on a graph whose neighbours are alike and whose features tell
    little."""
    graph = small_graph(800, degree=14.0, signed=True)
    noise = np.random.default_rng(1).normal(size=(800, 24)).astype(np.float32)
    store = make_store(dataclasses.replace(graph, features=np.asarray(graph.features) + 4 * noise), tmp_path / "1", 1)
    figure = {system: train_reference(store, system, _settings("model.dropout=0.3"))["accuracy"]["test"]
              for system in REFERENCES}
    assert min(figure[name] for name in REFERENCES if name != "torch-mlp") > figure["torch-mlp"] > 0.4, figure


def test_a_diverging_reference_says_so(store: Store) -> None:
    with pytest.raises(DivergedError, match=r"the loss is (nan|inf) at epoch \d+; lower train.lr"):
        train_reference(store, "torch-mlp", _settings("train.lr=1e30"))


def test_mixed_features_are_products_and_refused_where_memory_ends(store: Store,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task(store, "l2")
    n = task.graph.num_local
    dense = torch.eye(n)
    dense[tuple(_edges(task).flip(0))] = 1
    hat = dense / (dense.sum(1)[:, None] * dense.sum(1)).sqrt()
    x = task.x.to_dense()
    for mine, expected in zip(mixed_features(task, 2), (x, hat @ x, hat @ (hat @ x))):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr("qgnn_dist.bench.sign.available_bytes", lambda: 1000)
    with pytest.raises(InputError, match=r"SIGN's mixed features take .* KiB .*1000 B are free"):
        mixed_features(task, 2)


def test_dropout_scales_what_stays(store: Store) -> None:
    x = Task(store, "l2").x
    assert dropped(x, 0.5, False) is x
    torch.manual_seed(0)
    before, after = x.to_dense(), dropped(x, 0.5, True).to_dense()
    kept = after != 0
    torch.testing.assert_close(after[kept], 2 * before[kept])
    assert 0.4 < kept.sum() / (before != 0).sum() < 0.6


def test_dropout_of_many_stored_values_is_strided() -> None:
    """The same numbers are drawn, and a column that a row names twice adds up."""
    indptr, indices = torch.tensor([0, 3, 3, 7]), torch.tensor([0, 2, 4, 1, 2, 2, 3])
    x = csr_tensor(indptr, indices, torch.arange(1.0, 8.0), (3, 5))
    torch.manual_seed(1)
    got = dropped(x, 0.5, True)
    torch.manual_seed(1)
    values = torch.nn.functional.dropout(x.values(), 0.5)
    expected = torch.zeros(3, 5)
    for row in range(3):
        for e in range(int(indptr[row]), int(indptr[row + 1])):
            expected[row, indices[e]] += values[e]
    assert got.layout == torch.strided
    torch.testing.assert_close(got, expected)
    assert 0 < (values != 0).sum() < 7


GRID = f"""
seeds = 2
jobs = 1
layers = [3]
default_widths = ["float", "int2"]
settings = ["train.epochs=3", "model.hidden=8", "quant.hidden=8", "propagation.mu=4"]
[datasets.sbm]
{SBM}
shifts = true
[methods.ours]
[methods.gcn]
system = "pyg-gcn"
[methods.appnp]
system = "pyg-appnp"
settings = ["propagation.mu=19"]
[methods.sign]
system = "torch-sign"
layers = [2]
[methods.mlp]
system = "torch-mlp"
"""


def test_references_are_rows_of_the_table(tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_text(GRID, encoding="utf-8")
    result = accuracy(tmp_path / "grid.toml", out=tmp_path / "out")
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["sbm/ours/float/K3", "sbm/ours/int2/K3", "sbm/gcn/float/K2", "sbm/appnp/float/K3",
                          "sbm/sign/float/K2", "sbm/mlp/float/K0"]
    assert {(r["repeats"], r["failed"]) for r in rows.values()} == {(2, 0)}
    assert [r["system"] for r in rows.values()] == ["qgnn-ours", "qgnn-ours", *REFERENCES]
    for name in list(rows)[2:]:
        row = rows[name]
        assert row["difference"]["against"] == "sbm/ours/float/K3"
        assert row["difference"]["pairs"] == 2
        assert 0 < row["ece"]["mean"] < 1
        assert (row["bits"], row["shifts"], row["message_bytes_per_row"], row["kind"]) == (32, {}, None, None)
    text = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert "to ours/float/K3 |" in text
    states = text.partition("the state after K layers")[2].partition("###")[0]
    assert "| ours | int2 | 3 |" in states
    assert "gcn" not in states
    assert (tmp_path / "out" / "accuracy_by_bits.svg").exists()
    assert not (tmp_path / "out" / "accuracy_by_depth.svg").exists()
    cells = {}
    for file in (tmp_path / "out" / "cells" / "sbm").iterdir():
        cell = json.loads(file.read_text(encoding="utf-8"))
        cells[cell["names"]["method"], cell["seed"]] = cell
    assert cells["appnp", 0]["config"]["propagation"]["mu"] == 19
    assert cells["gcn", 0]["config"]["propagation"]["mu"] == 9  # not what the grid says for those that have one
    assert cells["gcn", 1]["config"]["quant"]["hidden"] == 32
    assert {cell["epochs"] for cell in cells.values()} == {3}
    for cell in cells.values():
        right, nodes = (sum(cell["groups"]["by_degree"][key]) for key in ("right", "nodes"))
        assert right / nodes == cell["accuracy"]["test"]
    assert cells["gcn", 0]["versions"]["torch_geometric"]


def test_what_a_reference_has_no_use_for_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "grid.toml"
    file.write_text(f"""
        [datasets.a]
        {SBM}
        [methods.gcn]
        system = "pyg-gcn"
        layers = [2]
        widths = ["int2"]
        settings = ["propagation.mu=4", "train.lr=0.1", "model.hiden=3"]
        [methods.b]
        system = "pyg-gnc"
        """, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        read_grid(file)
    for part in ("methods.gcn.widths: pyg-gcn has float alone", "methods.gcn.layers: pyg-gcn always has 2",
                 "methods.gcn: propagation.mu: pyg-gcn has no use for it", "model.hiden: unknown key",
                 "methods.b.system=pyg-gnc: expected qgnn, pyg-gcn", "did you mean pyg-gcn?"):
        assert str(error.value).count(part) == 1, part
    assert "train.lr" not in str(error.value)
