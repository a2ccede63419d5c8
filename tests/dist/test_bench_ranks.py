# SPDX-License-Identifier: Apache-2.0
"""Benches whose workers are processes: bytes against law 5's formula, growth's figures, and shaped links (long)."""
from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qgnn_dist.bench import exchange as bench
from qgnn_dist.bench.netns import cannot
from qgnn_dist.bench.ranks import Loopback, Ranks
from qgnn_dist.cli import app
from qgnn_dist.errors import QgnnError, StoreError
from tests.helpers import make_store, settings, small_graph
from tests.processes import children, until_gone


def test_bytes_of_processes_are_the_formulas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two real processes over loopback: bytes of every kind, an evaluation's too; a width that is refused is a row."""
    monkeypatch.setattr(bench, "cannot", lambda *, shaped=False: "not here")
    monkeypatch.setattr(bench, "settings_of", _settings)
    make_store(small_graph(signed=True), tmp_path / "s", 2)
    table = bench.exchange(str(tmp_path / "s"), out=tmp_path / "out", rates=["none"], cells=[(32, 32), (2, 32), (1, 2)],
                           repeats=2, evaluate=True, time_s=0.5, hidden=8, layers=3)
    rows = {(row["forward"], row["gradients"], row["evaluation"]): row for row in table["rows"] if "epoch_s" in row}
    assert set(rows) >= {(32, 32, False), (32, 32, True), (2, 32, False), (2, 32, True)}
    for (forward, _, evaluated), row in rows.items():
        assert row["bytes_equal"], row
        assert row["bytes"] == row["formula"]
        assert (min(row["bytes"]["evaluation"]) > 0) == evaluated
        assert min(row["bytes"]["control"]) > 0
        assert row["hosts"] == "processes"
        assert row["repeats"] == 2
        assert row["epoch_s"]["p10"] <= row["epoch_s"]["median"] <= row["epoch_s"]["p90"]
        assert forward != 32 or row["speedup"] == 1.0
        assert min(row["wire_s"], row["tail_s"]) > 0
    assert rows[2, 32, False]["bytes"]["backward"] == rows[32, 32, False]["bytes"]["backward"]
    assert sum(rows[2, 32, False]["bytes"]["forward"]) < sum(rows[32, 32, False]["bytes"]["forward"]) / 5
    assert rows[2, 32, False]["epochs_in_time"] >= 1
    assert 0 < rows[2, 32, False]["test_accuracy"] <= 1
    refused = [row for row in table["rows"] if "why" in row]
    assert all(row["why"].startswith("not available: quant.gradients") for row in refused)
    assert len(refused) + len(rows) >= 5
    assert (tmp_path / "out" / "exchange.svg").exists()


def _settings(cell: tuple[int, int], hidden: int, layers: int):  # type: ignore[no-untyped-def]
    return settings(f"quant.bits={cell[0]}", f"model.hidden={hidden}", f"propagation.layers={layers}",
                    f"quant.gradients={cell[1]}")


def test_a_rank_that_fails_is_named(tmp_path: Path) -> None:
    store = make_store(small_graph(signed=True), tmp_path / "s", 2)
    with Ranks(Loopback(), 2) as ranks:
        training = ranks.training(store, settings())
        first, results = training.epoch()
        assert first > 0
        assert all(result["cpu_s"] > 0 for result in results)
        with pytest.raises(StoreError, match="this host sees graph") as caught:
            training.call("load", "0" * 64, timeout_s=30.0)
        # Both fail at once: one is named, or both where both answers are there before the first is told.
        assert caught.value.rank is not None or "ranks 0, 1" in str(caught.value)
    with Ranks(Loopback(), 2) as ranks:
        training = ranks.training(store, settings())
        ranks._processes[1].kill()
        with pytest.raises(QgnnError, match="the process ended") as caught:
            training.epoch(timeout_s=30.0)
        assert caught.value.rank == 1


def test_sigterm_leaves_no_process_and_no_namespace(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "qgnn_dist.cli", "bench", "exchange", str(make_store(
        small_graph(signed=True), tmp_path / "s", 2).path), "--workers", "2", "--rate", "none", "--cell", "2/4",
        "--hidden", "8", "--repeats", "100000", "--no-pictures", "--out", str(tmp_path / "out")]
    bench_process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert bench_process.stderr is not None
    try:
        assert any("turn 2 of" in line for line in bench_process.stderr), "it never came to its second turn"
        mine = children(bench_process.pid)
        assert mine, "its ranks are processes"
        bench_process.send_signal(signal.SIGTERM)
        _, said = bench_process.communicate(timeout=60)
    finally:
        bench_process.kill()
    assert bench_process.returncode == 1
    assert "stopped by SIGTERM; its hosts are taken down; call it again" in said
    assert until_gone(mine, 10.0) == []
    tag = f"q{bench_process.pid % 100_000:x}-"
    if not cannot():
        names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
        assert tag not in names


def test_growth_measures_memory_and_bytes(tmp_path: Path) -> None:
    words = ["bench", "growth", "--out", str(tmp_path / "g"), "--edges", "100e3", "--edges", "200e3", "--workers", "1",
             "--workers", "2", "--fixed-edges", "100e3", "--set", "model.hidden=8", "--set", "propagation.layers=2",
             "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    table = json.loads(result.stdout)
    rows = {(row["series"], row["asked_edges"], row["workers"]): row for row in table["rows"]}
    assert list(rows) == [("edges", 100000, 2), ("edges", 200000, 2), ("workers", 100000, 1), ("workers", 100000, 2)]
    assert max(rows["workers", 100000, 1]["wire_bytes"]) == 0
    assert rows["workers", 100000, 2]["wire_bytes"] == rows["edges", 100000, 2]["wire_bytes"]
    assert table["fits"]["edges"]["bytes"] > 0.3
    assert all(len(row["anon_bytes"]) == row["workers"] for row in rows.values())
    assert (tmp_path / "g" / "growth.png").exists()


@pytest.mark.long
def test_slow_links_take_what_their_rate_says(tmp_path: Path) -> None:
    """At 20 Mbit/s the wire is nearly all of a float epoch: its length is the bytes over the rate."""
    reason = cannot(shaped=True)
    if reason:
        pytest.skip(reason)
    words = ["bench", "exchange", "synthetic:sbm?nodes=20000&edges=150000&features=16&classes=40", "--out",
             str(tmp_path / "e"), "--workers", "2", "--rate", "20mbit", "--rate", "none", "--cell", "2/32", "--hidden",
             "16", "--repeats", "3", "--no-pictures", "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    rows = {(row["rate"], row["forward"]): row for row in json.loads(result.stdout)["rows"]}
    slow, free = rows["20mbit", 32], rows["none", 32]
    assert 1.0 < slow["epoch_s"]["median"] / slow["full_link_s"] < 1.25
    assert slow["link_use"] >= 0.8
    assert free["epoch_s"]["median"] < slow["epoch_s"]["median"] / 3
    assert rows["20mbit", 2]["speedup"] > 1.7
    for row in rows.values():
        assert row["bytes_equal"]
        assert 1.0 < row["interface_ratio"] < 1.05
