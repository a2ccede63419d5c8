# SPDX-License-Identifier: Apache-2.0
"""Grids of `qgnn bench accuracy` whose stores have several parts: workers of a local Ray train them."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from qgnn_dist.bench.accuracy import accuracy
from qgnn_dist.store.reader import Store


def test_a_dataset_in_parts_trains_as_one_part_does(tmp_path: Path) -> None:
    """Float: what differs is the order of sums."""
    grid = tmp_path / "grid.toml"
    grid.write_text("""
        seeds = 1
        layers = [2]
        default_widths = ["float"]
        settings = ["train.epochs=3"]
        [datasets.one]
        source = "SBM"
        [datasets.two]
        source = "SBM"
        parts = 2
        [methods.m]
        """.replace("SBM", "synthetic:sbm?nodes=300&edges=1500&features=8&classes=3&seed=1"))
    result = accuracy(grid, out=tmp_path / "out", jobs=1, pictures=False)
    assert result["failed"] == 0
    assert [Store.open(tmp_path / "out" / "stores" / name).num_parts for name in ("one", "two")] == [1, 2]
    one, two = result["rows"]
    assert one["test_mean"] == pytest.approx(two["test_mean"], abs=0.02)
    cells = [json.loads(next((tmp_path / "out" / "cells" / name).iterdir()).read_text()) for name in ("one", "two")]
    assert cells[0]["digest"] != cells[1]["digest"]
