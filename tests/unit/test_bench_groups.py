# SPDX-License-Identifier: Apache-2.0
"""Rows of groups over seeds against figures worked out by hand, their tables, and their pictures."""
from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from qgnn_dist.bench.group_pictures import draw_degrees, draw_reliability, write_group_pictures
from qgnn_dist.bench.groups import cell_groups, group_tables, row_groups
from qgnn_dist.comm.pool import LocalPool
from qgnn_dist.config import TimeoutsConfig
from qgnn_dist.inference.batch import run_prediction
from qgnn_dist.inference.worker import PredictWorker
from tests.helpers import make_store, small_graph, untrained_model


def _cell(degree_right: list[int], class_right: list[int], ece: float = 0.1, train: list[int] | None = None,
          predicted: list[int] | None = None) -> dict[str, Any]:
    """100 test nodes: 10 of degree 0, 30 of 1, 60 of 3-4; 20 of class 0, 80 of class 1, none of class 2."""
    classes = [20, 80, 0]
    return {"groups": {
        "ece": ece, "train": train,
        "by_degree": {"from": [0, 1, 3], "to": [0, 1, 4], "nodes": [10, 30, 60], "right": degree_right,
                      "accuracy": [r / n for r, n in zip(degree_right, [10, 30, 60])]},
        "by_class": {"nodes": classes, "right": class_right, "predicted": predicted or [25, 75, 0],
                     "recall": [r / n if n else None for r, n in zip(class_right, classes)]},
        "reliability": {"nodes": [0, 40, 60], "right": [0, class_right[0], class_right[1]],
                        "accuracy": [None, class_right[0] / 40, class_right[1] / 60],
                        "confidence": [None, 0.5, 0.5 + ece]}}}


BASE = {0: _cell([6, 24, 48], [10, 68, 0], 0.10, [5, 15, 0]), 1: _cell([8, 27, 54], [12, 77, 0], 0.20, [5, 15, 0])}
OWN = {0: _cell([4, 21, 48], [8, 65, 0], 0.14, [5, 15, 0]), 1: _cell([6, 24, 57], [10, 77, 0], 0.28, [5, 15, 0])}


def test_figures_and_differences_by_hand() -> None:
    row = row_groups(OWN, BASE)
    # Degree 0: .4 .6 against .6 .8: −.2 twice.
    assert row["by_degree"][0] == {
        "from": 0, "to": 0, "nodes": 10, "mean": pytest.approx(0.5), "sd": pytest.approx(math.sqrt(0.02)),
        "difference": {"mean": pytest.approx(-0.2), "se": pytest.approx(0, abs=1e-12), "pairs": 2}}
    # Degree 3-4: .8 .95 against .8 .9: 0 and .05.
    assert row["by_degree"][2]["difference"] == {"mean": pytest.approx(0.025), "se": pytest.approx(0.025), "pairs": 2}
    # Class 0: .4 .5 against .5 .6; 8 and 10 of the 25 that got it.
    assert row["by_class"][0] == {
        "class": 0, "train": 5, "train_share": 0.25, "nodes": 20, "mean": pytest.approx(0.45),
        "sd": pytest.approx(0.1 / math.sqrt(2)), "precision": pytest.approx(0.36),
        "difference": {"mean": pytest.approx(-0.1), "se": pytest.approx(0, abs=1e-12), "pairs": 2}}
    assert row["by_class"][2]["mean"] is None
    assert row["by_class"][2]["difference"] is None
    assert row["ece"]["mean"] == pytest.approx(0.21)
    assert row["ece"]["difference"] == {"mean": pytest.approx(0.06), "se": pytest.approx(0.02), "pairs": 2}
    assert row["reliability"]["nodes"] == [0, 80, 120]
    assert row["reliability"]["accuracy"] == [None, pytest.approx(18 / 80), pytest.approx(142 / 120)]
    assert row["reliability"]["confidence"] == [None, pytest.approx(0.5), pytest.approx(0.71)]


def test_halves_and_who_pays_more() -> None:
    """Degrees 0 and 1 are 40 of 100 nodes, degree 0 alone 10: cut after 1. .625 .75 against .75 .875, above .8 .95."""
    half = row_groups(OWN, BASE)["halves"]["degree"]
    assert (half["members"], half["lower"]["nodes"], half["upper"]["nodes"]) == ([0, 1], 40, 60)
    assert half["lower"]["mean"] == pytest.approx(0.6875)
    assert half["lower"]["difference"]["mean"] == pytest.approx(-0.125)
    assert half["upper"]["difference"]["mean"] == pytest.approx(0.025)
    # (−.125 − 0) and (−.125 − .05).
    assert half["beyond"] == {"mean": pytest.approx(-0.15), "se": pytest.approx(0.025), "pairs": 2}
    assert row_groups(BASE, {})["halves"]["degree"]["beyond"] is None


def test_rare_is_what_has_few_training_nodes_then_few_test_nodes() -> None:
    def rarer(train: list[int] | None) -> Any:
        return row_groups({0: _cell([6, 24, 48], [10, 68, 0], 0.1, train)}, {})["halves"]["class"]["members"]

    assert rarer([5, 15, 9]) == [0]
    assert rarer([15, 5, 9]) == [1]  # against the test's frequencies
    assert rarer([20, 20, 20]) == [0]
    assert rarer(None) == [0]
    assert rarer([9, 0, 0]) == [1], "a class that no test node has is in neither half"


def test_groups_of_one_key_have_no_halves_and_no_cell_no_figures() -> None:
    cell = _cell([6, 24, 48], [10, 68, 0])
    for key in ("from", "to", "nodes", "right", "accuracy"):
        cell["groups"]["by_degree"][key] = cell["groups"]["by_degree"][key][:1]
    assert "degree" not in row_groups({0: cell}, {})["halves"]
    assert row_groups({}, BASE) == {"ece": None, "by_degree": [], "by_class": [], "halves": {}, "reliability": None}
    without: dict[str, Any] = {"metric": {}}  # of a system that told nothing by node
    assert row_groups({0: without}, BASE)["ece"] is None
    assert row_groups({0: without, **{2: OWN[0]}}, BASE)["ece"]["difference"]["pairs"] == 0


def _rows() -> list[dict[str, Any]]:
    return [{"shape": "d", "method": "recipe", "width": width, "layers": 10, **row_groups(done, other)}
            for width, done, other in (("float", BASE, {}), ("int2", OWN, BASE))]


@pytest.mark.parametrize("order", ["source", "random"])
def test_a_cells_groups_are_those_of_its_predictions(tmp_path: Path, order: str) -> None:
    """Read from the Parquet file, they equal what the workers counted, whatever order the store's rows have."""
    store = make_store(small_graph(500), tmp_path / "s", 1, order=order)
    pool = LocalPool(PredictWorker, {"store": str(store.path), "exchange_s": 60.0}, 1, timeout_s=60)
    try:
        summary = run_prediction(pool, store, untrained_model(store), tmp_path / "out", scores=False,
                                 timeouts=TimeoutsConfig())
    finally:
        pool.close()
    found = cell_groups(store.path, tmp_path / "out")
    assert found["by_degree"] == summary["accuracy_by_degree"]["test"]
    assert found["by_class"] == summary["accuracy_by_class"]["test"]
    assert found["reliability"] == summary["reliability"]["test"]
    assert found["ece"] == summary["ece"]["test"]
    assert found["train"] == summary["accuracy_by_class"]["train"]["nodes"]


def test_tables() -> None:
    summary, degrees, classes = group_tables(_rows())
    assert summary[1] == ["method", "width", "K", "ECE", "degree ≤ 1 (40)", "degree > 1 (60)", "beyond",
                          "1 rarer class (20)", "other classes (80)", "beyond"]
    assert summary[2][0][3:7] == ["15.00 ± 7.07", "81.25", "85.00", "–"]
    assert summary[2][1][3:7] == ["21.00 ± 9.90 (+6.00 ± 2.00)", "68.75 (−12.50 ± 0.00)", "87.50 (+2.50 ± 2.50)",
                                  "−15.00 ± 2.50"]
    assert degrees[1] == ["method", "width", "K", "0 (10)", "1 (30)", "3–4 (60)"]
    assert degrees[2][1] == ["recipe", "int2", "10", "50.00 (−20.00 ± 0.00)", "75.00 (−10.00 ± 0.00)",
                             "87.50 (+2.50 ± 2.50)"]
    assert classes[1] == ["method", "width", "K", "class 0, 25.0 % (20)", "class 1, 75.0 % (80)"]
    assert group_tables([{"ece": None}]) == []


def test_the_rarest_classes_are_shown_where_there_are_many() -> None:
    sizes = list(range(40, 0, -1))
    cell = _cell([6, 24, 48], [10, 68, 0], 0.1, sizes)
    cell["groups"]["by_class"] = {"nodes": sizes, "right": sizes, "predicted": sizes, "recall": [1.0] * 40}
    title, columns, _ = group_tables([{"method": "m", "width": "w", "layers": 2, **row_groups({0: cell}, {})}])[2]
    assert "12 rarest of 40" in title
    assert columns[3].startswith("class 39, 0.1 %")
    assert len(columns) == 15


def test_pictures(tmp_path: Path) -> None:
    rows = _rows()
    rows.append({**rows[1], "method": "lsq"})  # the first method alone is drawn
    figure = draw_degrees(rows)
    assert figure is not None
    upper, lower = (axes for axes in figure.axes if axes.get_visible())
    assert [tick.get_text() for tick in lower.get_xticklabels()] == ["0", "1", "3–4"]
    assert [bar.get_height() for bar in lower.patches] == [10, 30, 60]
    assert len(upper.containers) == 2
    assert list(upper.containers[1].lines[0].get_ydata()) == pytest.approx([50, 75, 87.5])
    low, high = upper.containers[1].lines[2][0].get_segments()[0][:, 1]
    assert (low, high) == (pytest.approx(50 - 100 * math.sqrt(0.02)), pytest.approx(50 + 100 * math.sqrt(0.02)))
    reliability = draw_reliability(rows)
    assert reliability is not None
    line = reliability.axes[0].lines[2]  # after the diagonal and float
    assert line.get_label() == "int2: ECE 21.0"
    assert list(line.get_xdata()) == pytest.approx([50, 71])
    files = write_group_pictures(rows, tmp_path)
    assert {f.name for f in files} == {"accuracy_by_degree.svg", "accuracy_by_degree.png", "reliability.svg",
                                       "reliability.png"}
    assert all(f.stat().st_size > 5000 for f in files)
    assert write_group_pictures([{**rows[0], "ece": None}], tmp_path) == []
    assert not list(tmp_path.iterdir())
