# SPDX-License-Identifier: Apache-2.0
"""`qgnn bench order` on a small graph: every order and kernel has its row, and figures follow from the times."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qgnn_dist.bench import order as bench
from qgnn_dist.cli import app
from qgnn_dist.errors import InputError
from qgnn_dist.partitioning.order import ORDERS

SOURCE = "synthetic:sbm?nodes=400&edges=1600&features=16&classes=4&seed=1"
SYSTEMS = ("qgnn-int2-layer", "qgnn-float-sum", "torch-csr")


def test_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(next(clock)) ** 2)
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["bench", "order", SOURCE, "--out", str(out), "--repeats", "3", "--order", "rcm",
                                      "--order", "random", "--columns", "7", "--json"])
    assert result.exit_code == 0, result.stderr
    table: dict[str, Any] = json.loads((out / "table.json").read_text(encoding="utf-8"))
    assert {"machine", "commit", "versions"} <= set(table)
    rows = {(row["order"], row["system"]): row for row in table["rows"]}
    assert list(rows) == [(name, system) for name in ("source", "rcm", "random") for system in SYSTEMS]
    for (name, system), row in rows.items():
        assert 0 < row["ms_min"] < row["ms_median"]
        assert (row["nodes"], row["edges"], row["columns"], row["repeats"]) == (400, 1600, 7, 3)
        assert row["order_s"] >= 0
        assert (row["speedup"] < 1) == (name != "source"), "this clock runs faster and faster"
        assert row["distance"] == rows[name, SYSTEMS[0]]["distance"], system
    assert rows["rcm", SYSTEMS[0]]["distance"] < rows["random", SYSTEMS[0]]["distance"]
    with pytest.raises(InputError, match="output exists"):
        bench.order(SOURCE, out=out)
    with pytest.raises(InputError, match=f"--order hilbert: expected {', '.join(ORDERS)}"):
        bench.order(SOURCE, out=tmp_path / "other", orders=["hilbert"])


def test_a_shown_table(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "order", SOURCE, "--out", str(tmp_path / "o"), "--repeats", "1"])
    assert result.exit_code == 0, result.stderr
    for word in ("synthetic:sbm", *ORDERS, "(1.00)", "table.json"):
        assert word in result.stdout
