# SPDX-License-Identifier: Apache-2.0
"""`qgnn bench inference` on a small graph: all systems do the same computation, and the table says what they took."""
from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from qgnn_dist.bench.inference import KINDS, WIDTHS, _InMemory, _own, inference
from qgnn_dist.bench.stock import STOCK, StockForward
from qgnn_dist.cli import app
from qgnn_dist.comm.exchange import Exchange
from qgnn_dist.errors import InputError
from qgnn_dist.model.forward import PackedForward, model_reader
from qgnn_dist.propagation.neighbourhood import Neighbourhood
from tests.helpers import make_store, small_graph, untrained_model

SOURCE = "synthetic:sbm?nodes=400&edges=1600&features=16&classes=4&seed=1"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("system", STOCK)
def test_stock_computes_what_we_do(tmp_path: Path, kind: str, system: str) -> None:
    if not StockForward.is_there(system):
        pytest.skip(f"{STOCK[system][0]} is not installed")
    store = make_store(small_graph(signed=True), tmp_path / "s", 1)
    part = store.part(0)
    name, _, rounds = kind.partition("-")
    model = untrained_model(store, bits=32, residual=32, kind=name, rounds=rounds or "merged", signed=True)
    model = dataclasses.replace(model, info=dataclasses.replace(model.info, feature_norm="none"))
    assert name == "appnp" or any(model.info.multipliers)
    graph, memory = Neighbourhood.of(part), _InMemory(part)
    classes, scores = StockForward(system, graph, model, memory.x).run()
    exchange = Exchange(part.peers, part.num_local, part.num_halo, None, 0, 5.0)
    ours = PackedForward(graph, exchange, None, "evaluation").run(model, model_reader(part, model))
    np.testing.assert_allclose(scores, ours, rtol=1e-4, atol=1e-5 * np.abs(ours).max())
    assert (classes == _own(model, graph, part, memory)).mean() > 0.99


def test_a_table(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["bench", "inference", SOURCE, "--out", str(out), "--repeats", "2", "--hidden", "8",
                                      "--layers", "3", "--kind", "smp-merged", "--kind", "smp-two", "--json"])
    assert result.exit_code == 0, result.stderr
    table = json.loads((out / "table.json").read_text(encoding="utf-8"))
    assert {"machine", "commit", "versions"} <= set(table)
    rows = {(row["kind"], row["system"]): row for row in table["rows"]}
    stock = [s for s in STOCK if StockForward.is_there(s)]
    assert set(rows) == {(kind, system) for kind in ("smp-merged", "smp-two")
                         for system in (*stock, *(f"qgnn-{w}" for w in WIDTHS))}
    for (kind, _), row in rows.items():
        fastest = min(rows[kind, s]["ms_median"] for s in stock)
        assert row["speedup"] == pytest.approx(fastest / row["ms_median"])
        assert row["repeats"] == 2
        assert 0 < row["ms_p10"] <= row["ms_median"] <= row["ms_p90"]
    assert rows["smp-merged", "qgnn-int2"]["message_bytes_per_node"] == 3
    assert rows["smp-merged", "qgnn-fp32"]["agreement"] > 0.99
    assert "speedup_over_two" in rows["smp-merged", "qgnn-int2"]
    with pytest.raises(InputError, match="output exists"):
        inference(SOURCE, out=out)
    with pytest.raises(InputError, match="--kind elastic"):
        inference(SOURCE, out=tmp_path / "other", kinds=["elastic"])
