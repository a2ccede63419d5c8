# SPDX-License-Identifier: Apache-2.0
"""`qgnn bench partition`: a small table of every method, and what it refuses."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qgnn_dist.bench import partition as bench
from qgnn_dist.cli import app
from qgnn_dist.errors import InputError, QgnnError

SOURCE = "synthetic:sbm?nodes=2000&edges=12000&features=4&classes=4&seed=1"


def test_a_table(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    words = ["bench", "partition", SOURCE, "--out", str(out), "--seeds", "2", "--parts", "4", "--edge-balance", "1.5"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    for word in ("METIS", *bench._installed(), "2000 nodes, 12000 edges, 4 parts", "cuts.svg"):
        assert word in result.stdout
    table: dict[str, Any] = json.loads((out / "table.json").read_text(encoding="utf-8"))
    assert {"machine", "commit", "versions"} <= set(table)
    rows = {row["method"]: row for row in table["rows"]}
    assert list(rows) == bench._installed()
    for name, row in rows.items():
        assert row["repeats"] == 2
        assert 0 < row["cut"] <= row["cut_max"] < 1
        assert row["seconds_min"] <= row["seconds_median"]
        assert row["cut_ratio"] == pytest.approx(row["cut"] / rows["metis"]["cut"])
        assert 1 <= row["balance_nodes"] <= 1.06, name
        assert row["balance_edges"] > 1
    assert rows["random"]["cut"] == pytest.approx(0.75, abs=0.03)
    assert rows["stream"]["cut_ratio"] < 1.3
    assert rows["stream"]["balance_edges"] <= 1.51
    assert "| stream |" in (out / "table.md").read_text(encoding="utf-8")
    with pytest.raises(InputError, match="output exists"):
        bench.partition(SOURCE, out=out)
    for options, text in (({"methods": ["metiss"]}, "--method metiss: expected metis, mtkahypar, stream, random"),
                          ({"parts": 2001}, "--parts 2001: expected 2 to 2000"),
                          ({"balance": 0.5}, "--balance 0.5: expected 1 or more")):
        with pytest.raises(InputError, match=text):
            bench.partition(SOURCE, out=tmp_path / "other", pictures=False, **options)


def test_a_method_that_fails_is_a_row_that_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def measured(prepare: Any, scratch: str, method: str, parts: int, seed: int, asked: Any, modules: Any) -> Any:
        calls.append((method, seed))
        if method == "metis":
            raise QgnnError("failed: out of memory")
        return {"peak_bytes": 1, "input_bytes": 1, **prepare(scratch, method, parts, seed, asked)()}

    monkeypatch.setattr(bench, "measure_apart", measured)
    result = bench.partition(SOURCE, out=tmp_path / "o", methods=["metis", "random"], seeds=2, pictures=False)
    assert calls == [("metis", 0), ("random", 0), ("random", 1)]
    failed, other = result["rows"]
    assert (failed["why"], other["repeats"], "cut_ratio" in other) == ("failed: out of memory", 2, False)
    assert "| metis | failed: out of memory |" in (tmp_path / "o" / "table.md").read_text(encoding="utf-8")
