# SPDX-License-Identifier: Apache-2.0
"""Shares of clipped values that an epoch's record has: those of the diagnosis, which counts every value in NumPy."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qgnn_dist as qgnn
from qgnn_dist.diagnosis.report import diagnose
from qgnn_dist.model.packed import PackedModel
from qgnn_dist.quant import clipped
from qgnn_dist.quant.clipped import Clipped, shares
from tests.helpers import make_store, settings, small_graph, train_pool


def _counted(found: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Stage → values outside the grid, and all values."""
    stages = {"hidden": [found["stages"]["hidden"]], "residual": [found["stages"]["residual"]],
              "messages": found["messages"]}
    return {name: (sum(round(one["clipped"] * one["count"]) for one in ones), sum(one["count"] for one in ones))
            for name, ones in stages.items()}


@pytest.mark.parametrize(("words", "sparse", "exact"), [
    ((), False, True), (("quant.bits=4", "messages.stride=2"), True, True),
    (("messages.coding=direct", "propagation.rounds=two"), False, True), (("quant.method=lsq",), True, False)],
    ids=["fixed point", "sparse, 4 bits, strided", "direct, two rounds", "float32"])
def test_counts_are_the_diagnoses(tmp_path: Path, words: tuple[str, ...], sparse: bool, exact: bool) -> None:
    """Steps that are no powers of two are rounded once more by who looks afterwards: values near an edge may differ."""
    store = make_store(small_graph(sparse=sparse), tmp_path / "s", 2)
    config = settings("train.epochs=3", "quant.residual=2", *words)
    with train_pool(store, config) as pool:
        for epoch in (1, 2, 3):
            reports = pool.call("train_epoch", epoch, True, epoch == 3, timeout_s=60)
        pool.call("keep_best", timeout_s=10)
        data = pool.call_one(0, "best_model", timeout_s=10)
        network = pool.workers[0]._network
    wanted = _counted(diagnose(store, PackedModel.from_bytes(data), "m", exchange_s=60))
    counts = [report["evaluation"]["clipped"] for report in reports]
    for stage, (outside, count) in wanted.items():
        assert sum(one[stage][1] for one in counts) == count
        assert outside > 0 or (not exact and stage != "messages")
        assert abs(sum(one[stage][0] for one in counts) - outside) <= (0 if exact else 0.002 * count)
    outside = 0
    for weight, grid in network.weight_grids():
        level = np.rint(weight.astype(np.float64) / grid.step)
        outside += int(((level < -2 ** (grid.bits - 1)) | (level > 2 ** (grid.bits - 1) - 1)).sum())
    assert counts[0]["weights"] == [outside, sum(weight.size for weight, _ in network.weight_grids())]
    assert "weights" not in counts[1]


def test_a_record_has_them_now_and_then_and_they_change_nothing(tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(small_graph(), tmp_path / "s", 1)
    records = list[dict[str, Any]]()
    config = settings("train.epochs=12", "train.eval_every=1", "train.patience=0")
    qgnn.train(store.path, out=tmp_path / "run", config=config, on_epoch=records.append)
    assert [record["epoch"] for record in records if "clipped" in record] == [1, 11]
    for record in records[::10]:
        assert record["clipped"].keys() == {"weights", "hidden", "residual", "messages"}
        assert all(0 <= share < 0.5 for share in record["clipped"].values())
    monkeypatch.setattr("qgnn_dist.training.loop.COUNT_EVERY", 1000)
    qgnn.train(store.path, out=tmp_path / "other", config=config, on_epoch=(others := list[dict[str, Any]]()).append)
    model, other = (qgnn.export(tmp_path / name, out=tmp_path / f"{name}.st") for name in ("run", "other"))
    assert (tmp_path / "run.st").read_bytes() == (tmp_path / "other.st").read_bytes()
    assert [record["loss"] for record in records] == [record["loss"] for record in others]
    assert model["epoch"] == other["epoch"]


def test_the_sample_does_not_depend_on_the_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clipped, "SAMPLE_ROWS", 10)
    source = np.random.default_rng(0).permutation(105)
    found = [part[Clipped(part, 105).rows] for part in (source, source[:40], source[40:])]
    assert sorted(found[0]) == sorted([*found[1], *found[2]]) == list(range(0, 105, 10))
    assert shares([{"a": [1, 2]}, {"a": [0, 2], "b": [0, 0]}]) == {"a": 0.25}
