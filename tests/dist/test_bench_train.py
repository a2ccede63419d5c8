# SPDX-License-Identifier: Apache-2.0
"""`qgnn bench train` on a small graph: stock trains the same model as ours, and the table says what both took."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from qgnn_dist.bench import footprint
from qgnn_dist.bench.beside import KINDS, SETTINGS
from qgnn_dist.bench.source import dense_features
from qgnn_dist.bench.stock import STOCK_TRAINING, StockTraining, is_there, operator, product_of
from qgnn_dist.bench.training import TRAIN_WIDTHS, OwnTraining
from qgnn_dist.cli import app
from qgnn_dist.data.graph import SPLITS
from qgnn_dist.propagation.neighbourhood import Neighbourhood
from tests.helpers import make_store, settings, small_graph

SOURCE = "synthetic:sbm?nodes=400&edges=8000&features=16&classes=4&seed=1"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("system", STOCK_TRAINING)
def test_stock_trains_as_we_do(tmp_path: Path, kind: str, system: str) -> None:
    stock, symmetric = STOCK_TRAINING[system]
    if not is_there(stock):
        pytest.skip(f"{stock} is not installed")
    store = make_store(small_graph(signed=True), tmp_path / "s", 1)
    part = store.part(0)
    # The multiplier at work and free of its bounds, no dropout, and steps small enough for Adam to follow in float.
    config = settings(*SETTINGS, *KINDS[kind], "propagation.alpha=0.0", "propagation.eta_lambda=3.0",
                      "quant.bits=32", "model.dropout=0.0", "train.lr=0.01")
    ours = OwnTraining(store, config, 1)
    try:
        assert part.labels is not None
        rows = np.flatnonzero((part.split == SPLITS["train"]) & (part.labels >= 0))
        theirs = StockTraining(product_of(stock, operator(Neighbourhood.of(part))), config, store.num_edges,
                               dense_features(part), part.labels.astype(np.int64), rows, ours.weights(),
                               symmetric=symmetric)
        for _ in range(3):
            assert theirs.epoch() == pytest.approx(ours.epoch(), rel=2e-5)
        found = ours.weights()
    finally:
        ours.close()
    for name, weight in theirs.weights.items():
        # Adam divides by the size of a gradient: where that is nearly 0 a rounding error can move a weight.
        np.testing.assert_allclose(weight.detach().numpy(), found[name], rtol=1e-3, atol=2e-4, err_msg=name)


def test_the_multiplier_matters_there(tmp_path: Path) -> None:
    """The comparison above would not notice a stock that leaves λ out if it were 0."""
    store = make_store(small_graph(signed=True), tmp_path / "s", 1)
    losses = []
    for alpha in ("0.0", "1000.0"):
        ours = OwnTraining(store, settings(*SETTINGS, f"propagation.alpha={alpha}", "propagation.eta_lambda=3.0",
                                           "quant.bits=32", "model.dropout=0.0"), 1)
        losses.append(ours.epoch())
        ours.close()
    assert abs(losses[0] - losses[1]) > 1e-4 * losses[1]  # five times what the comparison allows


def test_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_here(prepare: footprint.Prepare, *args: Any, modules: list[str]) -> dict[str, Any]:
        assert modules[0] == "torch"
        prepare(*args)()
        return {"input_bytes": args[2].propagation.layers << 20, "peak_bytes": 10 << 20}

    monkeypatch.setattr("qgnn_dist.bench.training.measure_apart", run_here)
    sizes = footprint.Sizes(nodes=400, edges=16000, features=16, hidden=8, classes=4)
    available = footprint.need("pyg", sizes, training=True).total - 1
    monkeypatch.setattr("qgnn_dist.bench.training.available_bytes", lambda: available)
    names = [name for name, (stock, _) in STOCK_TRAINING.items() if is_there(stock)]
    result = CliRunner().invoke(app, ["bench", "train", SOURCE, "--out", str(tmp_path / "out"), "--repeats", "2",
                                      "--hidden", "8", "--layers", "2", "--depth", "2", "--depth", "5", "--kind",
                                      "smp-merged", "--no-pictures", "--json"])
    assert result.exit_code == 0, result.stderr
    table = json.loads((tmp_path / "out" / "table.json").read_text(encoding="utf-8"))
    rows = {row["system"]: row for row in table["rows"]}
    assert list(rows) == [*names, *(f"qgnn-{width}" for width in TRAIN_WIDTHS)]
    timed = {name: row for name, row in rows.items() if row["ms_median"] is not None}
    assert {"torch-csr", "qgnn-fp32", "qgnn-int2"} <= set(timed)
    fastest = min((name for name in names if name in timed), key=lambda name: timed[name]["ms_median"])
    for row in timed.values():
        assert row["stock"] == fastest
        assert row["speedup"] == pytest.approx(timed[fastest]["ms_median"] / row["ms_median"])
        assert row["repeats"] == 2
        assert {depth: found["input_bytes"] >> 20 for depth, found in row["memory"].items()} == {"2": 2, "5": 5}
    assert "pyg" not in timed
    assert rows["pyg"]["why"].startswith("does not fit")
    assert rows["pyg"]["memory"]["5"]["why"].startswith("does not fit")
    assert rows["pyg"]["estimate_bytes"] == available + 1
    text = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert "K = 5: inputs" in text
    assert "| qgnn-int2 | 2.0 | 10.0 | 1.00 | 5.0 | 10.0 | 1.00 |" in text
    assert "| pyg | does not fit" in text
