# SPDX-License-Identifier: Apache-2.0
"""The finals of a search: further seeds choose among the best trials, and another row's settings have a seat."""
from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from qgnn_dist.bench import trials
from qgnn_dist.bench.cells import SCHEMA
from qgnn_dist.bench.folder import bench_folder
from qgnn_dist.bench.grid import read_grid
from qgnn_dist.bench.search import _cells, search
from qgnn_dist.bench.space import read_search
from qgnn_dist.bench.stores import dataset_store
from qgnn_dist.bench.trials import SearchCell, finished_trials, search_row
from qgnn_dist.errors import DivergedError, QgnnError
from tests.searching import SEARCH_GRID, grid_file, row_cell


def test_further_seeds_choose_among_the_best_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial that its own seeds flattered loses the final; a final that was stopped trains only what it lacks."""
    cell = dataclasses.replace(row_cell(tmp_path, trials=4), finals=2, final_seeds=3)
    trained, rates = list[int](), list[float]()

    def figure(cell: SearchCell, config: Any, seed: int, scratch: Path) -> float:
        if config.train.lr not in rates:
            rates.append(config.train.lr)
        number = rates.index(config.train.lr)
        if seed >= cell.seeds:
            trained.append(number)
            if number == 1 and seed == cell.seeds + 1:
                raise DivergedError("diverged")
        # On the trial's seeds trial 2 is the best and 1 the next; on the others 1, which then diverges once.
        return (0.6, 0.7, 0.72, 0.65)[number] if seed < cell.seeds else (0.9, 0.8, 0.69, 0.9)[number]

    monkeypatch.setattr(trials, "validation_figure", figure)
    best = search_row(cell, tmp_path)["best"]
    assert trained == [2, 2, 2, 1, 1, 1]
    assert (best["number"], best["trial_figure"], best["figures"]) == (2, 0.72, [0.69] * 3)
    assert best["figure"] == pytest.approx(0.69)
    lines = cell.final_history.read_text(encoding="utf-8").splitlines()
    cell.final_history.write_text("\n".join(lines[:4]) + "\n" + lines[4][:9], encoding="utf-8")
    trained.clear()
    assert search_row(cell, tmp_path)["best"] == best
    assert trained == [1, 1]
    assert [json.loads(line)["figure"] for line in lines[3:]] == [0.8, 0.0, 0.8]
    assert search_row(dataclasses.replace(cell, finals=0, final_seeds=0), tmp_path)["best"]["figure"] == 0.72


def _with_finalist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: float) -> tuple[SearchCell, list[Any]]:
    """A row with a finalist of learning rate 0.0625, whose figure is given; and what its final trains."""
    cell = row_cell(tmp_path, trials=4)
    leader = dataclasses.replace(cell, row="sbm/recipe/float/K2", digest="leader", file=tmp_path / "leader.json")
    best = {"params": {"train.lr": 0.0625, "model.hidden": 1024, "propagation.mu": 19.0}}
    leader.file.write_text(json.dumps({"schema": SCHEMA, "digest": "leader", "best": best}), encoding="utf-8")
    trained, rates = [], list[float]()

    def validation(cell: SearchCell, config: Any, seed: int, scratch: Path) -> float:
        if config.train.lr == 0.0625:
            trained.append((config.model.hidden, config.propagation.mu, seed))
            return figure
        if config.train.lr not in rates:
            rates.append(config.train.lr)
        if seed >= cell.seeds:
            trained.append(rates.index(config.train.lr))
        return (0.6, 0.7, 0.72, 0.65)[rates.index(config.train.lr)]

    monkeypatch.setattr(trials, "validation_figure", validation)
    return dataclasses.replace(cell, finals=2, final_seeds=2, finalist=leader), trained


@pytest.mark.parametrize(("figure", "wins"), [(0.73, True), (0.72, False)])
def test_another_rows_settings_have_the_last_seat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: float,
                                                  wins: bool) -> None:
    cell, trained = _with_finalist(tmp_path, monkeypatch, figure)
    best = search_row(cell, tmp_path)["best"]
    assert trained == [2, 2, (8, 19.0, 4), (8, 19.0, 5)]  # not the seeds that chose it; 1024 units are not of the space
    assert (best["params"]["train.lr"] == 0.0625) is wins
    assert best.get("of") == ("sbm/recipe/float/K2" if wins else None)
    assert (best["figure"], best["trial_figure"]) == ((0.73, None) if wins else (0.72, 0.72))
    trained.clear()
    assert search_row(cell, tmp_path)["best"] == best
    assert not trained, "a final's finished trainings run again"


def test_a_finalist_that_is_a_trial_takes_no_seat_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell, trained = _with_finalist(tmp_path, monkeypatch, 0.0)
    assert cell.finalist is not None
    search_row(cell, tmp_path)
    records = finished_trials(cell.history)
    for number, expected in ((2, [2, 2, 1, 1]), (3, [2, 2, 3, 3])):  # seated itself, and behind those seated
        best = {"params": records[number]["params"]}
        cell.finalist.file.write_text(json.dumps({"schema": SCHEMA, "digest": "leader", "best": best}),
                                      encoding="utf-8")
        cell.final_history.unlink()
        trained.clear()
        assert search_row(cell, tmp_path)["best"]["number"] == 2
        assert trained == expected


def test_a_final_without_its_finalist_fails_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell, trained = _with_finalist(tmp_path, monkeypatch, 0.0)
    assert cell.finalist is not None
    cell.finalist.file.unlink()
    with pytest.raises(QgnnError, match="its final waits for what the search of sbm/recipe/float/K2 finds"):
        search_row(cell, tmp_path)
    assert len(finished_trials(cell.history)) == 4
    assert not trained


_FINALIST = SEARCH_GRID.replace("seeds = 2", 'seeds = 2\nfinals = 2\nfinal_seeds = 1\nfinalist = "recipe/float"')


def test_a_search_with_a_finalist_searches_it_too(tmp_path: Path) -> None:
    """Asked for one row, it searches the finalist's too, and goes on with another row by what it found before."""
    grid, told, steps = grid_file(tmp_path, _FINALIST), list[str](), list[str]()
    result = search(grid, out=tmp_path / "out", only="recipe/int2", on_trial=lambda name, why: told.append(name),
                    on_step=steps.append)
    assert [row["name"] for row in result["rows"]] == ["sbm/recipe/int2/K2", "sbm/recipe/float/K2"]
    assert result["failed"] == 0
    assert any("searching sbm/recipe/float/K2 too" in step for step in steps)
    assert sorted(told) == sorted(f"sbm/recipe/{width}/K2 {word} {number}" for width in ("float", "int2")
                                  for word, count in (("trial", 3), ("final", 2)) for number in range(count))
    settings = tmp_path / "out" / "settings" / "sbm"
    assert {file.name for file in settings.iterdir()} == {"recipe-float.toml", "recipe-int2.toml"}
    told.clear()
    search(grid, out=tmp_path / "out", only="gcn", on_trial=lambda name, why: told.append(name))
    assert {name.rpartition(" ")[0] for name in told} == {"sbm/gcn/float/K2 trial", "sbm/gcn/float/K2 final"}


def _cells_of(grid: Path, out: Path) -> dict[str, SearchCell]:
    """The searches of a grid, in a folder that is a search's, with its store written."""
    read = read_grid(grid, search=True)
    with bench_folder(out, "search", (), overwrite=False):
        told = dataset_store(out / "stores" / "sbm", read.sources["sbm"], None, blind=True)
    return _cells(read_search(read), {"sbm": told}, out)


def test_a_finalist_that_wins_is_named_in_the_table_and_the_settings(tmp_path: Path) -> None:
    grid, out = grid_file(tmp_path, _FINALIST), tmp_path / "out"
    cells = _cells_of(grid, out)
    own = {"train.lr": 0.02, "model.hidden": 8, "model.feature_norm": "row", "propagation.mu": 9.0}
    first = {"number": 0, "figure": 0.5, "figures": [0.5, 0.5], "params": own}
    for cell in cells.values():
        guest = {"of": "sbm/recipe/float/K2", "number": "{}", "figure": 0.75, "trial_figure": None,
                 "figures": [0.75], "params": {**own, "train.lr": 0.0625}}
        best = {**first, "figure": 0.7, "trial_figure": 0.6} if cell.finalist is None else guest
        cell.file.parent.mkdir(parents=True, exist_ok=True)
        cell.file.write_text(json.dumps({
            "schema": SCHEMA, "digest": cell.digest, "best": best, "own": first, "trials": 3, "seconds": 6.0,
            "states": {"complete": 3, "skipped": 0, "diverged": 0}}), encoding="utf-8")
    search(grid, out=out)
    heads = {name: (out / "settings" / "sbm" / f"{name}.toml").read_text(encoding="utf-8").partition("Validation")[0]
             for name in ("recipe-float", "recipe-int2")}
    assert "found for sbm/recipe/float/K2" in heads["recipe-int2"]
    assert "found for" not in heads["recipe-float"]
    table = (out / "table.md").read_text(encoding="utf-8").splitlines()
    lines = {line.split(" | ")[1]: line for line in table if line.startswith("| recipe")}
    assert "| 75.00 | – |" in lines["int2"]
    assert lines["int2"].endswith("lr 0.0625; found for sbm/recipe/float/K2 |")
    assert "| 70.00 | +10.00 |" in lines["float"]


def test_a_finalist_that_fails_fails_the_others_by_name(tmp_path: Path) -> None:
    out = tmp_path / "out"
    told: list[tuple[str, str | None]] = []
    grid = grid_file(tmp_path, _FINALIST)
    for cell in _cells_of(grid, out).values():  # a history that nothing comes out of
        if cell.finalist is None:
            cell.history.parent.mkdir(parents=True, exist_ok=True)
            record = {"state": "diverged", "figure": None, "figures": [], "params": {}, "why": "the loss is nan"}
            cell.history.write_text("".join(json.dumps({"number": number, "seconds": 0.0, **record}) + "\n"
                                            for number in range(3)), encoding="utf-8")
    result = search(grid, out=out, only="recipe/", on_trial=lambda name, why: told.append((name, why)))
    rows = {row["width"]: row for row in result["rows"]}
    assert rows["float"]["why"] == "none of 3 trials came to an end, the first because the loss is nan"
    cause = rows["float"]["why"]
    assert rows["int2"]["why"] == f"its final waits for sbm/recipe/float/K2, whose search failed: {cause}"
    assert result["failed"] == 2
    assert [why for name, why in told if why] == [rows["float"]["why"], rows["int2"]["why"]]


def test_a_row_equal_to_the_finalist_is_one_search_with_it(tmp_path: Path) -> None:
    grid = grid_file(tmp_path, _FINALIST + '[methods.same]\nsettings = ["model.hidden=8"]\n')
    cells = _cells_of(grid, tmp_path / "out")
    assert cells["sbm/same/float/K2"] is cells["sbm/recipe/float/K2"]
    assert cells["sbm/same/int2/K2"].finalist is cells["sbm/recipe/float/K2"]
    assert cells["sbm/same/int2/K2"].digest == cells["sbm/recipe/int2/K2"].digest


def test_the_finalist_has_the_depth_that_is_shown(tmp_path: Path) -> None:
    grid = grid_file(tmp_path, _FINALIST.replace("layers = [2]", "layers = [2, 3]"))
    for depth in (2, 3):
        plan = read_search(read_grid(grid, search=True, only=f"recipe/int2/K{depth}"))
        assert plan.finalists["sbm"].layers == depth
