# SPDX-License-Identifier: Apache-2.0
"""`qgnn bench inference` on a small graph: all systems do the same computation, and the table says what they took."""
from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from qgnn_dist.bench import footprint
from qgnn_dist.bench.beside import KINDS
from qgnn_dist.bench.inference import WIDTHS, OwnForward, inference, layer_bytes
from qgnn_dist.bench.source import dense_features
from qgnn_dist.bench.stock import COMPILED, STOCK, StockForward, is_there, operator, product_of
from qgnn_dist.cli import app
from qgnn_dist.comm.exchange import Exchange
from qgnn_dist.errors import InputError, QgnnError
from qgnn_dist.model.forward import PackedForward, model_reader
from qgnn_dist.propagation.neighbourhood import Neighbourhood
from tests.helpers import make_store, small_graph, untrained_model

SOURCE = "synthetic:sbm?nodes=400&edges=1600&features=16&classes=4&seed=1"
INSTALLED = [system for system in STOCK if is_there(system)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("system", STOCK)
def test_stock_computes_what_we_do(tmp_path: Path, kind: str, system: str) -> None:
    if not is_there(system):
        pytest.skip(f"{STOCK[system][0]} is not installed")
    store = make_store(small_graph(signed=True), tmp_path / "s", 1)
    part = store.part(0)
    name, _, rounds = kind.partition("-")
    model = untrained_model(store, bits=32, residual=32, kind=name, rounds=rounds or "merged", signed=True)
    model = dataclasses.replace(model, info=dataclasses.replace(model.info, feature_norm="none"))
    assert name == "appnp" or any(model.info.multipliers)
    graph, features = Neighbourhood.of(part), dense_features(part)
    classes, scores = StockForward(product_of(system, operator(graph)), model, features).run()
    exchange = Exchange(part.peers, part.num_local, part.num_halo, None, 0, 5.0)
    ours = PackedForward(graph, exchange, None, "evaluation").run(model, model_reader(part, model))
    np.testing.assert_allclose(scores, ours, rtol=1e-4, atol=1e-5 * np.abs(ours).max())
    assert (classes == OwnForward(model, part, graph, features).run()).mean() > 0.99


def test_operator_is_the_normalised_adjacency(tmp_path: Path) -> None:
    graph = Neighbourhood.of(make_store(small_graph(), tmp_path / "s", 1).part(0))
    n = graph.num_local
    dense = np.eye(n)
    rows = np.repeat(np.arange(n), np.diff(graph.indptr))
    dense[rows, graph.indices] = 1
    scale = 1 / np.sqrt(dense.sum(1))
    indptr, indices, weights = operator(graph)
    found = np.zeros((n, n))
    heads = np.repeat(np.arange(n), np.diff(indptr))
    found[heads, indices] = weights
    np.testing.assert_allclose(found, scale[:, None] * dense * scale, rtol=1e-6)
    assert len(indices) == len(graph.indices) + n
    assert (np.diff(heads.astype(np.int64) * n + indices) > 0).all()


def test_layer_bytes(tmp_path: Path) -> None:
    store = make_store(small_graph(classes=5), tmp_path / "s", 1)
    info = untrained_model(store, bits=2, layers=4).info
    # A round: 7 edges of an index and ⌈5·2/8⌉ = 2 bytes, 3 rows of 2, and 4 arrays of 3 x 20; a layer: 3 such arrays.
    assert layer_bytes(info, 3, 7) == 4 * (7 * 6 + 3 * 2 + 4 * 60) + 4 * 3 * 60
    info = untrained_model(store, bits=32, layers=4, rounds="two").info
    assert layer_bytes(info, 3, 7) == 8 * (7 * 24 + 3 * 20) + 4 * 3 * 60


def test_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def run_here(prepare: footprint.Prepare, *args: Any, modules: list[str]) -> dict[str, Any]:
        measured.append(prepare.__name__)
        found = prepare(*args)()
        return {"input_bytes": 1 << 20, "peak_bytes": len(measured) << 20, **(found if isinstance(found, dict) else {})}

    monkeypatch.setattr("qgnn_dist.bench.inference.measure_apart", run_here)
    monkeypatch.setattr(StockForward, "first", _no_compiler)
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["bench", "inference", SOURCE, "--out", str(out), "--repeats", "2", "--hidden", "8",
                                      "--threads", "1", "--layers", "3", "--kind", "smp-merged", "--kind", "smp-two", "--epochs", "1",
                                      "--keep", str(tmp_path / "keep"), "--json"])
    assert result.exit_code == 0, result.stderr
    table = json.loads((out / "table.json").read_text(encoding="utf-8"))
    assert {"machine", "commit", "versions"} <= set(table)
    assert table["stream_copy_bytes_per_s"] > 1e8
    rows = {(row["kind"], row["system"]): row for row in table["rows"]}
    ours = [f"qgnn-{w}" for w in WIDTHS]
    assert set(rows) == {(kind, system) for kind in ("smp-merged", "smp-two")
                         for system in (*INSTALLED, COMPILED, *ours)}
    for (kind, system), row in rows.items():
        if system == COMPILED:
            assert (row["ms_median"], row["why"]) == (None, "failed: no compiler")
            assert row["memory_why"].startswith("no compiler")
            continue
        fastest = min(rows[kind, s]["ms_median"] for s in INSTALLED)
        assert row["speedup"] == pytest.approx(fastest / row["ms_median"])
        assert row["repeats"] == 2
        assert 0 < row["ms_p10"] <= row["ms_median"] <= row["ms_p90"]
    # Of the first system its forward was measured first and `predict` second.
    assert measured[:2] == ["_prepare_own", "_prepare_predict"]
    first = rows["smp-merged", "qgnn-fp32"]
    assert (first["input_bytes"], first["peak_bytes"], first["predict_bytes"]) == (1 << 20, 1 << 20, 2 << 20)
    assert measured.count("_prepare_stock") == 2 * len(INSTALLED) + 2
    two = min(rows["smp-two", s]["ms_median"] for s in INSTALLED)
    int2 = rows["smp-merged", "qgnn-int2"]
    assert int2["speedup_over_two"] == pytest.approx(two / int2["ms_median"])
    assert [rows["smp-merged", s]["message_bytes_per_node"] for s in ours] == [48, 12, 6, 3, 3]
    assert int2["tensor_bytes"] == 16 * 8 // 4 + 8 * 4 // 4 + 4 * (8 + 4)
    twin = 4 * (16 * 8 + 8 * 4 + 8 + 4)
    assert int2["model_ratio"] == pytest.approx(twin / int2["tensor_bytes"])
    assert int2["state_bytes"] > 4 * 400 * 4
    assert int2["bandwidth_bytes_per_s"] > 0
    for system in INSTALLED:
        assert rows["smp-merged", system]["agreement"] > 0.99
    assert rows["smp-merged", "qgnn-fp32"]["agreement"] == 1
    assert "does not fit" not in (out / "table.md").read_text(encoding="utf-8")
    assert {"times.svg", "times.png"} <= {file.name for file in out.iterdir()}
    with np.load(tmp_path / "keep" / "graph.npz") as arrays:
        assert arrays["edge_index"].shape == (2, 1600)


def _no_compiler(self: StockForward) -> float:
    if self._forward != self._scores:
        raise QgnnError("no compiler\nin many words")
    return 0.0


def test_what_does_not_fit_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = footprint.Sizes(nodes=400, edges=3200, features=16, hidden=8, classes=4)
    enough = footprint.need("torch-csr", sizes, training=False).total
    monkeypatch.setattr("qgnn_dist.bench.inference.available_bytes", lambda: enough + 20000)
    result = inference(SOURCE, out=tmp_path / "out", kinds=["appnp"], repeats=1, threads=1, hidden=8, layers=2, epochs=1,
                       memory=False, pictures=False)
    rows = {row["system"]: row for row in result["rows"]}
    assert rows["qgnn-int2"]["ms_median"] > 0
    assert rows["pyg"]["ms_median"] is None
    assert "does not fit: needs about" in rows["pyg"]["why"]
    assert rows["pyg"]["estimate_bytes"] > enough + 20000
    text = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert "| pyg | does not fit" in text


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "table.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="output exists"):
        inference(SOURCE, out=tmp_path / "out")
    with pytest.raises(InputError, match="--kind elastic"):
        inference(SOURCE, out=tmp_path / "other", kinds=["elastic"])
    make_store(small_graph(), tmp_path / "two", 2)
    with pytest.raises(InputError, match="has 2 parts"):
        inference(str(tmp_path / "two"), out=tmp_path / "other")
    make_store(small_graph(sparse=True), tmp_path / "sparse", 1)
    with pytest.raises(InputError, match="sparse features"):
        inference(str(tmp_path / "sparse"), out=tmp_path / "other")
