# SPDX-License-Identifier: Apache-2.0
"""`qgnn bench search`: validation alone, own settings first, the same way after a stop, files to train with."""
from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import qgnn_dist as qgnn
from qgnn_dist.bench import trials
from qgnn_dist.bench.accuracy import accuracy
from qgnn_dist.bench.cells import train_cell
from qgnn_dist.bench.grid import read_grid
from qgnn_dist.bench.search import _Counter, search
from qgnn_dist.bench.stores import dataset_store, without_test_labels
from qgnn_dist.bench.trials import FIRST_SEED, SearchCell, finished_trials, search_row
from qgnn_dist.cli import app
from qgnn_dist.config import load_config
from qgnn_dist.errors import DivergedError, QgnnError
from qgnn_dist.store.reader import Store
from tests.helpers import small_graph
from tests.searching import SEARCH_GRID, grid_file, row_cell


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """A grid file, the folder that it was searched into, and what the command said."""
    base = tmp_path_factory.mktemp("search")
    result = CliRunner().invoke(app, ["bench", "search", str(grid_file(base)), "--out", str(base / "out"), "--json"])
    return base / "grid.toml", base / "out", result


def test_rows_are_searched_and_settings_written(done: tuple[Path, Path, Any]) -> None:
    _, out, result = done
    assert result.exit_code == 0, result.stderr
    assert "9 trials to run, 0 finished before; 1 at a time" in result.stderr
    assert "trial 9 of 9" in result.stderr
    printed, table = json.loads(result.stdout), json.loads((out / "table.json").read_text(encoding="utf-8"))
    assert {**table, "files": printed["files"]} == printed
    rows = {row["name"]: row for row in table["rows"]}
    assert list(rows) == ["sbm/recipe/float/K2", "sbm/recipe/int2/K2", "sbm/gcn/float/K2"]
    for row in rows.values():
        assert (row["trials"], sum(row["states"].values()), row["seeds"]) == (3, 3, 2)
        assert row["own"]["number"] == 0
        assert row["best"]["figure"] >= row["own"]["figure"]
        assert row["best"]["figure"] == np.mean(row["best"]["figures"])
        assert set(row["best"]["params"]) == {"train.lr", "model.hidden", "model.feature_norm"} | (
            {"propagation.mu"} if row["method"] == "recipe" else set())
    assert {f.name for f in (out / "settings" / "sbm").iterdir()} == {
        "recipe-float.toml", "recipe-int2.toml", "gcn-float.toml"}
    found = load_config(out / "settings" / "sbm" / "recipe-int2.toml")
    best = rows["sbm/recipe/int2/K2"]["best"]["params"]
    assert (found.train.lr, found.model.hidden) == (best["train.lr"], best["model.hidden"])
    assert found.propagation.eta == pytest.approx(1 / (1 + best["propagation.mu"]))
    text = (out / "settings" / "sbm" / "recipe-int2.toml").read_text(encoding="utf-8")
    assert "the best of 3 trials" in text
    assert "--set quant.bits=2" in text
    assert "epochs" not in text  # of trials alone
    assert "| recipe | int2 | 2 | 3 |" in (out / "table.md").read_text(encoding="utf-8")


def test_finished_rows_are_not_searched_again_and_a_larger_budget_goes_on(done: tuple[Path, Path, Any],
                                                                        tmp_path: Path) -> None:
    grid, out = done[0], tmp_path / "out"
    shutil.copytree(done[1], out)
    before = {file: file.read_bytes() for file in (out / "trials").rglob("*.jsonl")}
    again = CliRunner().invoke(app, ["bench", "search", str(grid), "--out", str(out)])
    assert "0 trials to run, 9 finished before" in again.stderr
    assert before == {file: file.read_bytes() for file in before}
    more = search(grid, out=out, trials=4, only="gcn")
    assert more["rows"][0]["trials"] == 4
    (longer,) = [file for file in before if len(file.read_bytes()) > len(before[file])]
    assert longer.read_bytes().startswith(before[longer])
    assert len(finished_trials(longer)) == 4


def test_the_first_trial_is_the_rows_own_settings_on_the_real_graphs_validation(done: tuple[Path, Path, Any],
                                                                              tmp_path: Path) -> None:
    """Without test labels a training is the same, and its validation figure that of `qgnn bench accuracy`."""
    grid, out, _ = done
    table = json.loads((out / "table.json").read_text(encoding="utf-8"))
    read, cell = read_grid(grid, search=True), row_cell(tmp_path)
    dataset_store(tmp_path / "real", read.sources["sbm"], None)
    assert len(read.rows) == 3
    for row, found in zip(read.rows, table["rows"]):
        assert found["name"] == row.name
        real = dataclasses.replace(cell, system=row.system, config=row.at(FIRST_SEED + 1), store=tmp_path / "real")
        result = train_cell(real, tmp_path)
        assert found["own"]["figures"][1] == result["metric"]["valid"]
        own = dict(found["own"]["params"])
        assert own.pop("model.feature_norm") == result["features"]["norm"]
        assert own["model.hidden"] == 8
        assert own["train.lr"] == 0.02


def test_a_trial_reads_no_test_label(done: tuple[Path, Path, Any]) -> None:
    """The store that trials read calls every test node class 0, whatever it is; all other labels are the graph's."""
    _, out, _ = done
    real = small_graph()
    blind = without_test_labels(real)
    assert real.labels is not None
    assert real.split is not None
    assert blind.labels is not None
    test = (real.split == 3) & (real.labels >= 0)
    assert set(blind.labels[test].tolist()) == {0}
    assert len(set(real.labels[test].tolist())) == 5
    np.testing.assert_array_equal(blind.labels[~test], real.labels[~test])
    assert blind.labels.dtype == real.labels.dtype
    part = Store.open(out / "stores" / "sbm").part(0)
    assert part.labels is not None
    assert part.split is not None
    assert set(part.labels[part.split == 3].tolist()) == {0}
    assert len(set(part.labels[part.split == 2].tolist())) == 3
    for file in (out / "trials").rglob("*.jsonl"):
        assert "test" not in file.read_text(encoding="utf-8")


@pytest.mark.parametrize(("norm", "decay"), [("none", 0.0), ("row", 1e-3), ("auto", 0.0)])
def test_what_is_open_is_what_the_store_gets(norm: str, decay: float, tmp_path: Path) -> None:
    cell = row_cell(tmp_path)
    looked = {"model.feature_norm": (norm, "l2"), "train.weight_decay": (None, 0.0, 1e-3)}
    cell = dataclasses.replace(cell, space=looked, config=load_config(overrides=[f"model.feature_norm={norm}"]))
    space, own = trials._resolved(cell, Store.open(cell.store))
    assert own == {"model.feature_norm": "none" if norm == "auto" else norm, "train.weight_decay": decay}
    assert set(space["train.weight_decay"]) == {0.0, 1e-3}
    assert space["train.weight_decay"][0] == decay


def test_a_training_gives_its_best_validation_figure_alone(tmp_path: Path) -> None:
    cell = row_cell(tmp_path)
    figure = trials.validation_figure(cell, cell.config, 0, tmp_path)
    summary = qgnn.train(cell.store, out=tmp_path / "run", config=dataclasses.replace(cell.config, seed=FIRST_SEED))
    assert isinstance(figure, float)
    assert figure == summary["metric"]["valid"] > 1 / 3
    assert not list(tmp_path.glob("trial-*")), "a trial's run is left behind"


def test_a_stopped_search_goes_on_to_the_same_settings(tmp_path: Path) -> None:
    """Half a line, as a killed process leaves one, is no trial; what follows is what would have followed."""
    whole = row_cell(tmp_path, trials=7)
    result = search_row(whole, tmp_path)
    lines = whole.history.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 7
    whole.history.write_text("\n".join(lines[:5]) + "\n" + lines[5][:40], encoding="utf-8")
    assert len(finished_trials(whole.history)) == 5
    again = search_row(whole, tmp_path)

    def timeless(record: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in record.items() if key != "seconds"}

    assert [timeless(json.loads(line)) for line in whole.history.read_text(encoding="utf-8").splitlines()] == [
        timeless(json.loads(line)) for line in lines]
    assert timeless(again["best"]) == timeless(result["best"])
    params = [json.dumps(json.loads(line)["params"]) for line in lines]
    assert len(set(params)) > 4, "trials repeat one another"


_KILLED = """
import sys
from pathlib import Path
from qgnn_dist.bench.search import search
if __name__ == "__main__":
    search({grid!r}, out={out!r}, trials=40, only="recipe/float")
"""


def test_a_killed_search_keeps_its_trials(tmp_path: Path) -> None:
    grid, out = grid_file(tmp_path), tmp_path / "out"
    (tmp_path / "script.py").write_text(_KILLED.format(grid=str(grid), out=str(out)), encoding="utf-8")
    child = subprocess.Popen([sys.executable, str(tmp_path / "script.py")], cwd=Path(__file__).parents[2])
    try:
        deadline = time.monotonic() + 120
        while sum(len(finished_trials(file)) for file in out.rglob("*.jsonl")) < 2:
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        child.kill()
        child.wait(20)
    (history,) = out.rglob("*.jsonl")
    kept = finished_trials(history)
    assert len(kept) < 40
    deadline = time.monotonic() + 20  # its worker ends after it
    while True:
        try:
            result = search(grid, out=out, trials=len(kept) + 1, only="recipe/float")
            break
        except QgnnError:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    assert result["rows"][0]["trials"] == len(kept) + 1
    assert finished_trials(history)[:len(kept)] == kept


def _scripted(monkeypatch: pytest.MonkeyPatch, figure_of: Any) -> list[tuple[int, int]]:
    """Trainings whose validation figure of (trial, seed) is given; returns (trial, seed) of those that ran."""
    ran: list[tuple[int, int]] = []

    def figure(cell: SearchCell, config: Any, seed: int, scratch: Path) -> float:
        number = len(finished_trials(cell.history))
        ran.append((number, seed))
        value = figure_of(number, seed)
        if value is None:
            raise DivergedError("the loss is nan")
        return float(value)

    monkeypatch.setattr(trials, "validation_figure", figure)
    return ran


def test_hopeless_trials_end_after_a_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    level = {0: 0.7, 1: 0.71, 2: 0.695, 3: 0.65, 4: 0.3, 5: None, 6: 0.72}
    ran = _scripted(monkeypatch, lambda trial, seed: level[trial])
    cell = row_cell(tmp_path, trials=7)
    result = search_row(cell, tmp_path)
    records = finished_trials(cell.history)
    assert [r["state"] for r in records] == ["complete"] * 3 + ["skipped", "skipped", "diverged", "complete"]
    assert (5, 0) in ran
    assert not {(3, 1), (4, 1), (5, 1)} & set(ran)
    assert records[5]["why"] == "the loss is nan"
    assert result["best"]["number"] == 6
    assert result["states"] == {"complete": 4, "skipped": 2, "diverged": 1}


def test_a_first_seed_far_below_is_the_last_and_ties_keep_the_rows_own_settings(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = row_cell(tmp_path, trials=3)
    ran = _scripted(monkeypatch, lambda trial, seed: [0.8, 0.77, 0.8][trial])
    result = search_row(cell, tmp_path)
    assert ran == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]
    assert [r["state"] for r in finished_trials(cell.history)] == ["complete", "skipped", "complete"]
    assert result["best"]["number"] == 0


def test_a_row_of_which_nothing_comes_out_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _scripted(monkeypatch, lambda trial, seed: None)
    with pytest.raises(QgnnError, match="none of 3 trials came to an end, the first because the loss is nan"):
        search_row(row_cell(tmp_path), tmp_path)


def test_progress_counts_trials_of_earlier_calls(tmp_path: Path) -> None:
    cell, told = row_cell(tmp_path), list[str]()
    cell.history.parent.mkdir(parents=True)
    line = json.dumps({"number": 0, "state": "complete"}) + "\n"
    cell.history.write_text(line, encoding="utf-8")
    counter = _Counter([cell], lambda name, why: told.append(name))
    assert counter.seen == 1
    counter.look()
    assert told == []
    cell.history.write_text(line + line.replace("0", "1", 1), encoding="utf-8")
    counter.end(cell, "odd")
    assert told == ["sbm/recipe/int2/K2 trial 1", "sbm/recipe/int2/K2"]
    told.clear()
    cell.final_history.write_text(line, encoding="utf-8")
    counter.look()
    assert told == ["sbm/recipe/int2/K2 final 0"]
    with_final = dataclasses.replace(cell, finals=2, final_seeds=5)
    assert (with_final.steps, _Counter([with_final], None).seen) == (cell.trials + 10, 3)


def test_accuracy_takes_what_was_found(done: tuple[Path, Path, Any], tmp_path: Path) -> None:
    _, out, _ = done
    folder = tmp_path / "tuned" / "sbm"
    folder.mkdir(parents=True)
    for name in ("recipe-float.toml", "recipe-int2.toml"):
        (folder / name).write_bytes((out / "settings" / "sbm" / name).read_bytes())
    (folder / "gcn-float.toml").write_text("[train]\nlr = 0.0625\n[model]\nhidden = 4\n", encoding="utf-8")
    text = SEARCH_GRID.partition("[search]")[0].replace("jobs = 1", 'jobs = 1\nseeds = 1\ntuned = "tuned"').replace(
        '"model.hidden=8"', '"model.hidden=8", "train.epochs=2"')
    result = accuracy(grid_file(tmp_path, text), out=tmp_path / "out", pictures=False)
    assert [row["tuned"] for row in result["rows"]] == [True] * 3
    cells = [json.loads(f.read_text(encoding="utf-8")) for f in (tmp_path / "out" / "cells" / "sbm").iterdir()]
    by_name = {f"{c['names']['method']}-{c['names']['width']}": c["config"] for c in cells}
    assert by_name["gcn-float"]["train"]["lr"] == 0.0625
    assert by_name["gcn-float"]["model"]["hidden"] == 4
    found = load_config(folder / "recipe-int2.toml")
    assert by_name["recipe-int2"]["train"]["lr"] == found.train.lr
    assert by_name["recipe-int2"]["train"]["epochs"] == 2
    assert by_name["recipe-int2"]["quant"]["bits"] == 2
    assert "Settings found by `qgnn bench search`: all rows." in (tmp_path / "out" / "table.md").read_text("utf-8")
    # The same file trains by itself.
    summary = qgnn.train(tmp_path / "out" / "stores" / "sbm", out=tmp_path / "run",
                         config=folder / "recipe-int2.toml", overrides=["train.epochs=2", "propagation.layers=2"])
    (cell,) = [c for c in cells if c["names"]["width"] == "int2"]
    assert summary["metric"]["valid"] == cell["metric"]["valid"]


def test_the_command_says_what_to_install_without_optuna(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qgnn_dist.bench.search.importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["bench", "search", str(grid_file(tmp_path)), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "pip install 'qgnn-dist[search]'" in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_the_module_of_the_processes_loads_nothing_heavy() -> None:
    """As bench.cells: what NumPy and torch read of the environment is set after it was imported."""
    code = ("import sys, qgnn_dist.bench.trials; "
            "sys.exit(' '.join({'numpy', 'torch', 'optuna'} & set(sys.modules)) or 0)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"loaded {done.stderr.strip()}"
