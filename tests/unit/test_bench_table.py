# SPDX-License-Identifier: Apache-2.0
"""The table against figures worked out by hand: means, deviations, paired differences, text."""
from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qgnn_dist.bench import show
from qgnn_dist.bench.cells import Cell, cells_of
from qgnn_dist.bench.grid import Row
from qgnn_dist.bench.table import cell_commits, failure_lines, headings, line, markdown, table_rows
from qgnn_dist.config import load_config


def _bench_row(method: str, width: str, seeds: int = 3, layers: int = 10, metric: str = "accuracy") -> Row:
    bits = {"float": 32, "int2": 2, "int4": 4}[width]
    words = [f"quant.bits={bits}", f"propagation.layers={layers}", f"train.metric={metric}",
             f"train.lr=0.0{1 + len(method)}"]
    return Row(dataset="d", method=method, width=width, layers=layers, seeds=seeds, config=load_config(overrides=words))


def _result(test: float, valid: float = 0.5, *, best_epoch: int = 4, seconds: float = 2.0,
            shifts: dict[str, float] | None = None) -> dict[str, Any]:
    return {"accuracy": {"train": 1.0, "valid": valid, "test": test / 2},
            "metric": {"name": "accuracy", "train": 1.0, "valid": valid, "test": test}, "best_epoch": best_epoch,
            "epochs": 9, "seconds": seconds, "message_bytes_per_row": 22, "warnings": [],
            "states": {"dirichlet": test / 4, "mad": 0.25, "error": None}, "shifts": shifts or {}}


def _table(rows: list[Row], figures: dict[str, list[float | None]], *, shown: list[Row] | None = None,
           failures: dict[tuple[str, int], str] | None = None, reference: str = "float") -> list[dict[str, Any]]:
    cells = cells_of(rows, {"d": "f"}, Path("out"))
    results = {cells[name, seed].digest: _result(value) for name, values in figures.items()
               for seed, value in enumerate(values) if value is not None}
    failed = {cells[key].digest: why for key, why in (failures or {}).items()}
    return table_rows(rows, rows if shown is None else shown, cells, results, failed, reference)


FLOAT, INT2, INT2_LSQ = _bench_row("recipe", "float"), _bench_row("recipe", "int2"), _bench_row("lsq", "int2")
FIGURES: dict[str, list[float | None]] = {
    "d/recipe/float/K10": [0.80, 0.82, 0.84], "d/recipe/int2/K10": [0.79, 0.80, 0.81],
    "d/lsq/int2/K10": [0.70, None, 0.78]}


def test_mean_and_deviation_by_hand() -> None:
    first, second, _ = _table([FLOAT, INT2, INT2_LSQ], FIGURES)
    assert first["test_mean"] == pytest.approx(0.82)
    assert first["test_sd"] == pytest.approx(0.02)  # sqrt((0.02² + 0 + 0.02²) / 2)
    assert (first["valid_mean"], first["valid_sd"]) == (0.5, 0.0)
    assert second["test_sd"] == pytest.approx(0.01)
    assert first["accuracy_test_mean"] == pytest.approx(0.41)
    assert (first["repeats"], first["seeds"], first["bits"], first["system"]) == (3, 3, 32, "qgnn-recipe")


def test_differences_are_paired_by_seed() -> None:
    first, second, third = _table([FLOAT, INT2, INT2_LSQ], FIGURES)
    assert first["difference"] is None
    assert first["reference"]
    # −.01 −.02 −.03: mean −.02, deviation .01, over √3.
    assert second["difference"] == {"against": "d/recipe/float/K10", "mean": pytest.approx(-0.02), "pairs": 3,
                                    "se": pytest.approx(0.01 / math.sqrt(3))}
    # lsq has no float: the first method's; seed 1 is not finished, so (−.10 −.06): mean −.08, deviation .02828, √2.
    assert third["difference"] == {"against": "d/recipe/float/K10", "mean": pytest.approx(-0.08), "pairs": 2,
                                   "se": pytest.approx(0.02)}


def test_a_methods_own_reference_comes_first_and_depths_are_kept_apart() -> None:
    own, deep, deep_float = (_bench_row("lsq", "float"), _bench_row("recipe", "int2", layers=20),
                             _bench_row("lsq", "float", layers=20))
    rows = [FLOAT, INT2, INT2_LSQ, own, deep, deep_float]
    table = _table(rows, {row.name: [0.5, 0.6, 0.7] for row in rows})
    assert [row["difference"]["against"] if row["difference"] else None for row in table] == [
        None, "d/recipe/float/K10", "d/lsq/float/K10", None, "d/lsq/float/K20", None]
    assert _table(rows, {}, reference="int4")[0]["difference"] is None


def test_differences_reach_rows_that_are_not_shown() -> None:
    (only,) = _table([FLOAT, INT2], FIGURES | {"d/lsq/int2/K10": []}, shown=[INT2])
    assert only["difference"]["mean"] == pytest.approx(-0.02)


def test_rows_stay_in_the_grids_order_whatever_they_score() -> None:
    """Nothing is ranked or dropped by a figure: swapping the test figures moves no row and no other figure."""
    rows = [FLOAT, INT2, INT2_LSQ]
    table = _table(rows, FIGURES)
    swapped = _table(rows, dict(zip(FIGURES, reversed(FIGURES.values()))))
    assert [row["name"] for row in table] == [row["name"] for row in swapped] == [row.name for row in rows]


def test_one_seed_has_no_deviation_and_none_no_figure() -> None:
    first, second, third = _table([FLOAT, INT2, INT2_LSQ], {"d/recipe/float/K10": [0.8], "d/recipe/int2/K10": [0.7]},
                                  failures={("d/lsq/int2/K10", 1): "diverged"})
    columns = headings([first, second, third])
    assert (first["test_sd"], second["difference"]["se"]) == (None, None)
    assert line(first, columns) == ["recipe", "float", "10", "1/3", "–", "50.00", "80.00", "reference", "4", "2.0"]
    assert line(second, columns)[-3] == "−10.00"
    assert line(third, columns) == ["lsq", "int2", "10", "0/3", "1", "–", "–", "–", "–", "–"]


def _envelope(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"machine": {"cpu": "A CPU", "cores": 2, "memory_gib": 8.0}, "commit": None, "versions": {"torch": "2"},
            "rows": rows, "failed": 2, "files": ["out/table.md"], "cell_commits": ["unknown"]}


def test_markdown() -> None:
    rows = _table([FLOAT, INT2, INT2_LSQ], FIGURES, failures={("d/lsq/int2/K10", 1): "the loss is nan"})
    text = markdown(_envelope(rows)).partition("\n### ")[0]
    assert text.splitlines()[4:] == [
        "A CPU, 2 cores, 8 GiB; commit unknown; torch 2.", "", "## d: accuracy, %", "",
        "| method | width | K | n | failed | valid | test | difference | best epoch | time, s |",
        "| :--- | :--- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| recipe | float | 10 | 3 | – | 50.00 | 82.00 ± 2.00 | reference | 4 | 2.0 |",
        "| recipe | int2 | 10 | 3 | – | 50.00 | 80.00 ± 1.00 | −2.00 ± 0.58 | 4 | 2.0 |",
        "| lsq | int2 | 10 | 2/3 | 1 | 50.00 | 74.00 ± 5.66 | −8.00 ± 2.00 to recipe/float | 4 | 2.0 |", "",
        "- failed: d/lsq/int2/K10 seed 1: the loss is nan"]


def test_a_table_tells_by_which_commits_its_cells_were_trained() -> None:
    assert cell_commits([{"commit": "b2"}, {"commit": None}, {"commit": "a1"}, {"commit": "b2"}, {}]) == [
        "a1", "b2", "unknown"]
    rows = _table([FLOAT, INT2, INT2_LSQ], FIGURES)
    assert "Trained by" not in markdown({**_envelope(rows), "commit": "a1", "cell_commits": ["a1"]})
    assert "\nTrained by commit a1.\n" in markdown({**_envelope(rows), "commit": "b2", "cell_commits": ["a1"]})
    assert "\nTrained by commits a1, b2.\n" in markdown({**_envelope(rows), "commit": "b2",
                                                         "cell_commits": ["a1", "b2"]})


def test_states_and_shifts_by_hand() -> None:
    """Accuracies on the rows' own graph are half the test figures: .40 .41 .42 and .395 .40 .405."""
    rows = [FLOAT, INT2]
    cells = cells_of(rows, {"d": "f"}, Path("out"))
    shifted = {"recipe/float": [0.39, 0.40, 0.41], "recipe/int2": [0.375, 0.38, 0.395]}
    results = {cells[row.name, seed].digest: _result(
        FIGURES[row.name][seed] or 0, shifts={"half": shifted[f"{row.method}/{row.width}"][seed]})
        for row in rows for seed in range(3)}
    first, second = table_rows(rows, rows, cells, results, {}, "float")
    assert first["states"]["dirichlet"] == {"mean": pytest.approx(0.205), "sd": pytest.approx(0.005)}
    assert first["states"]["error"] == {"mean": None, "sd": None}
    assert first["shifts"]["half"]["mean"] == pytest.approx(-0.01)
    assert first["shifts"]["half"]["beyond"] == {"mean": None, "se": None}
    # −.02 −.02 −.01, and less float's −.01: −.01 −.01 0, deviation .00577, over √3.
    assert second["shifts"]["half"] == {
        "mean": pytest.approx(-0.05 / 3), "se": pytest.approx(0.01 / 3),
        "beyond": {"mean": pytest.approx(-0.02 / 3), "se": pytest.approx(0.01 / 3)}}
    text = markdown(_envelope([first, second]))
    assert "| recipe | int2 | 10 | 22 | 0.2 ± 0.0025 | 0.25 ± 0 | – |" in text
    assert "| recipe | float | 10 | −1.00 ± 0.00 |" in text
    assert "| recipe | int2 | 10 | −1.67 ± 0.33 (−0.67 ± 0.33) |" in text


def test_equal_failures_are_told_once() -> None:
    rows = _table([FLOAT, INT2], {}, failures={(row.name, seed): "nan" for row in (FLOAT, INT2) for seed in range(3)})
    assert failure_lines(rows) == ["failed: d/recipe/float/K10 seed 0, d/recipe/float/K10 seed 1, "
                                   "d/recipe/float/K10 seed 2 and 3 more: nan"]


def test_the_terminals_table_has_all_figures() -> None:
    out = io.StringIO()
    show.accuracy(_envelope(_table([FLOAT, INT2, INT2_LSQ], FIGURES)), Console(file=out, width=80))
    for text in ("82.00 ± 2.00", "−2.00 ± 0.58", "to recipe/float", "2/3", "2 cells failed", "out/table.md"):
        assert text in out.getvalue()


def test_rows_are_plain_json_and_figures_shares() -> None:
    rows = json.loads(json.dumps(_table([FLOAT, INT2, INT2_LSQ], FIGURES)))
    assert rows[1]["by_seed"][2] == {"seed": 2, "valid": 0.5, "test": 0.81, "best_epoch": 4}
    assert {"system", "shape", "kind", "rounds", "coding", "bits", "threads", "scope", "ms_median", "ms_p10", "ms_p90",
            "repeats"} <= set(rows[0])
    assert rows[0]["ms_median"] == 2000.0


def test_a_metrics_name_heads_its_dataset() -> None:
    rows = _table([_bench_row("recipe", "int2", metric="roc_auc")], {"d/recipe/int2/K10": [0.7, 0.7, 0.7]})
    assert "## d: ROC AUC, points" in markdown(_envelope(rows))


def test_cells_interleave_seeds_and_share_equal_settings() -> None:
    twin = Row(dataset="d", method="recipe", width="two", layers=10, seeds=3, config=INT2.config)
    cells: dict[tuple[str, int], Cell] = cells_of([FLOAT, INT2, twin], {"d": "f"}, Path("out"))
    assert [seed for _, seed in cells] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert cells[twin.name, 1] is cells[INT2.name, 1]
    assert len({cell.digest for cell in cells.values()}) == 6
    elsewhere = cells_of([INT2], {"d": "g"}, Path("out"))
    assert elsewhere[INT2.name, 0].digest != cells[INT2.name, 0].digest
