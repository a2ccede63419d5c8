# SPDX-License-Identifier: Apache-2.0
"""What a search looks through, row by row, and the folder of found settings; faults are told before anything runs."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qgnn_dist.bench.grid import read_grid
from qgnn_dist.bench.space import DEFAULT_SPACE, Search, configured, fitted, read_search
from qgnn_dist.bench.systems import REFERENCES, step_of
from qgnn_dist.bench.tuned import read_tuned, tuned_file, tuned_text
from qgnn_dist.config import load_config
from qgnn_dist.errors import ConfigError, InputError

SBM = 'source = "synthetic:sbm?nodes=100&edges=300"'
ROOT = Path(__file__).parents[2]


def _search(folder: Path, text: str, **options: Any) -> Search:
    (folder / "grid.toml").write_text(text, encoding="utf-8")
    return read_search(read_grid(folder / "grid.toml", search=True), **options)


def test_each_row_has_the_keys_it_has_a_use_for(tmp_path: Path) -> None:
    methods = "".join(f'[methods.{name}]\nsystem = "{name}"\n' for name in REFERENCES)
    found = _search(tmp_path, f'default_widths = ["int2"]\n[datasets.a]\n{SBM}\n[methods.ours]\n[methods.alone]\n'
                              f'settings = ["propagation.kind=none"]\n{methods}')
    assert (found.trials, found.seeds) == (20, 2)
    keys = {name.split("/")[1]: set(space) for name, space in found.spaces.items()}
    everywhere = set(DEFAULT_SPACE) - {"propagation.mu"}
    assert keys == {"ours": set(DEFAULT_SPACE), "alone": everywhere, "pyg-gcn": everywhere,
                    "pyg-appnp": set(DEFAULT_SPACE), "torch-sign": everywhere, "torch-mlp": everywhere}


def test_datasets_and_methods_replace_add_and_drop_and_own_values_are_choices(tmp_path: Path) -> None:
    found = _search(tmp_path, f"""
        default_widths = ["int2"]
        [search]
        trials = 5
        seeds = 3
        [search.space]
        "train.lr" = {{low = 0.01, high = 0.1}}
        "model.hidden" = [8, 16]
        model.dropout = [0.5, 0.25]
        "propagation.mu" = [4, 9]
        [datasets.a]
        {SBM}
        settings = ["model.hidden=12"]
        [datasets.a.space]
        "train.lr" = {{low = 0.001, high = 1, log = true}}
        "model.dropout" = []
        [datasets.b]
        {SBM}
        [methods.m]
        [methods.m.space]
        "quant.gradients" = [8]
        """, trials=7)
    assert (found.trials, found.seeds) == (7, 3)
    assert found.spaces["a/m/int2/K10"] == {
        "train.lr": {"low": 0.001, "high": 1.0, "log": True}, "model.hidden": (12, 8, 16), "propagation.mu": (4.0, 9.0),
        "quant.gradients": (4, 8)}
    assert found.spaces["b/m/int2/K10"] == {
        "train.lr": {"low": 0.01, "high": 0.1, "log": False}, "model.hidden": (64, 8, 16), "model.dropout": (0.5, 0.25),
        "propagation.mu": (4.0, 9.0), "quant.gradients": (4, 8)}


def test_all_faults_are_told_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        _search(tmp_path, f"""
            default_widths = ["int2"]
            [search.space]
            "train.lr" = {{low = 0.1, high = 0.01}}
            "train.weight_decay" = {{low = 0, high = 1, log = true}}
            "model.hiden" = [8]
            "model.hidden" = [8, "wide", 0]
            "model.dropout" = 0.5
            "propagation.layers" = [2]
            "propagation.eta" = [0.1]
            "train.epochs" = [3]
            [datasets.a]
            {SBM}
            [methods.m]
            [methods.m.space]
            "propagation.mu" = [-1]
            """)
    for part in ("grid.toml", "search.space: train.lr: expected a list of values, or {low, high, log}",
                 "train.weight_decay: expected a list", "and above 0 for log", "did you mean model.hidden",
                 "search.space: model.hidden: model.hidden=wide: expected", "model.hidden=0: expected",
                 "model.dropout: expected a list", "propagation.layers: the grid's `layers` gives it",
                 "propagation.eta: it follows propagation.mu", "train.epochs: more epochs",
                 "methods.m.space: propagation.mu: propagation.mu=-1"):
        assert part in str(error.value), (part, str(error.value))


@pytest.mark.parametrize(("settings", "layers", "match"), [
    ('["train.lr=0.5"]', "[10]", r"a/m/int2/K10: train.lr=0.5 of the row itself is where the search starts"),
    ('["propagation.eta=0.05"]', "[10]", r"propagation.eta=0.05 is not 1/\(1 \+ mu\) = 0.1"),
    ("[]", "[4, 10]", r"a/m/int2: has depths 4 and 10; a search is of one"),
])
def test_rows_that_do_not_go_with_the_space_are_faults(tmp_path: Path, settings: str, layers: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        _search(tmp_path, f'default_widths = ["int2"]\nlayers = {layers}\nsettings = {settings}\n[datasets.a]\n{SBM}\n'
                          "[methods.m]\n")


def test_an_open_value_is_among_the_choices_but_starts_no_range(tmp_path: Path) -> None:
    table = f'default_widths = ["int2"]\n[datasets.a]\n{SBM}\n[methods.m]\n[search.space]\n"train.weight_decay" = '
    assert _search(tmp_path, table + "[0.0, 1e-3]").spaces["a/m/int2/K10"] == {"train.weight_decay": (None, 0.0, 1e-3)}
    with pytest.raises(ConfigError, match=r"K10: train.weight_decay is open in the row itself, .*; set it, or list"):
        _search(tmp_path, table + "{low = 0, high = 0.1}")


@pytest.mark.parametrize(("table", "match"), [
    ("final_seeds = 3", "search.final_seeds: there is no final"),
    ('finals = 1\nfinalist = "m/float"', "search.finalist=m/float: has the last seat .* search.finals of at least 2"),
    ('finals = 2\nfinalist = "m/flaot"', "search.finalist=m/flaot: datasets.a has no such row; .* e.g. m/float"),
    ("finals = 0", "search.finals=0: expected a whole"),
    ("trials = 0", "search.trials=0: expected a whole number of at least 1"), ("trial = 3", "did you mean trials"),
    ('settings = ["train.epoch=3"]', "search: train.epoch: unknown key"), ("space = 3", "search.space=3: expected")])
def test_faults_of_the_search_table(tmp_path: Path, table: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        _search(tmp_path, f"[search]\n{table}\n[datasets.a]\n{SBM}\n[methods.m]\n")


def test_another_rows_settings_fit_into_a_space() -> None:
    space = {"train.lr": {"low": 0.01, "high": 0.1, "log": True}, "model.hidden": (8, 16), "model.dropout": (0.5,),
             "propagation.mu": (4.0, 1 / 0.15 - 1)}
    own = {"train.lr": 0.02, "model.hidden": 8, "model.dropout": 0.5, "propagation.mu": 4.0}
    found = {"train.lr": 0.1, "model.hidden": 16, "propagation.mu": 1 / 0.15 - 1, "train.weight_decay": 1.0}
    assert fitted(found, space, own) == {"train.lr": 0.1, "model.hidden": 16, "model.dropout": 0.5,
                                         "propagation.mu": 1 / 0.15 - 1}
    assert fitted({"train.lr": 0.11, "model.hidden": 12, "propagation.mu": 9.0}, space, own) == own


def test_the_step_follows_mu() -> None:
    config = load_config(overrides=["quant.bits=4", "model.hidden=8"])
    for mu in DEFAULT_SPACE["propagation.mu"]:
        found = configured(config, {"propagation.mu": mu, "train.lr": 0.5})
        assert found.propagation.eta == step_of(mu) == 1 / (1 + mu)
        assert (found.train.lr, found.model.hidden, found.quant) == (0.5, 8, config.quant)
    assert [round(step_of(mu), 9) for mu in DEFAULT_SPACE["propagation.mu"]] == [0.3, 0.2, 0.15, 0.1, 0.05]
    assert configured(config, {}) == config


def _tuned_grid(folder: Path, more: str = "") -> Path:
    (folder / "grid.toml").write_text(f"""
        tuned = "found"
        default_widths = ["int2"]
        settings = ["train.lr=0.04"]
        [datasets.a]
        {SBM}
        [datasets.b]
        {SBM}
        {more}
        [methods.m]
        [methods.gcn]
        system = "pyg-gcn"
        """, encoding="utf-8")
    return folder / "grid.toml"


def test_found_settings_win_and_rows_without_are_refused_unless_told(tmp_path: Path) -> None:
    file = tuned_file(tmp_path / "found", "a", "m", "int2")
    file.parent.mkdir(parents=True)
    file.write_text(tuned_text({"train.lr": 0.0625, "model.hidden": 8, "train.patience": 7}, ["why"]), encoding="utf-8")
    assert read_tuned(file) == ["train.lr=0.0625", "train.patience=7", "model.hidden=8"]
    assert load_config(file).train.patience == 7
    with pytest.raises(ConfigError, match=r"tuned: no settings of 3 rows, e.g. no file .*found/a/gcn-float.toml; `qgnn "
                                          r"bench search` writes them, and `tuned = false`"):
        read_grid(_tuned_grid(tmp_path))
    grid = read_grid(_tuned_grid(tmp_path), only="a/m/")  # the others are not asked for, and cannot be told
    assert [row.name for row in grid.rows] == ["a/m/int2/K10"]
    assert (grid.rows[0].config.train.lr, grid.rows[0].config.model.hidden, grid.rows[0].tuned) == (0.0625, 8, True)
    with pytest.raises(InputError, match="--only zzz: no row's name contains it; names are like a/m"):
        read_grid(_tuned_grid(tmp_path), only="zzz")
    tuned_file(tmp_path / "found", "a", "gcn", "float").write_text("[train]\nlr = 0.125\n", encoding="utf-8")
    grid = read_grid(_tuned_grid(tmp_path, "tuned = false"))
    assert {row.name: (row.config.train.lr, row.tuned) for row in grid.rows} == {
        "a/m/int2/K10": (0.0625, True), "a/gcn/float/K2": (0.125, True), "b/m/int2/K10": (0.04, False),
        "b/gcn/float/K2": (0.04, False)}
    # A search starts from the row's own settings, whatever an earlier one found.
    assert {row.config.train.lr for row in read_grid(_tuned_grid(tmp_path), search=True).rows} == {0.04}


@pytest.mark.parametrize(("text", "match"), [
    ("lr = 3", "lr: expected settings in tables"), ("[train]\nrl = 3", "train.rl: unknown key"),
    ("[", "not a TOML file"),
    ("[train]\nlr = -1", "train.lr=-1.0: expected a number above 0"),
    ("[propagation]\nlayers = 4", "propagation.layers: the grid's `layers` gives it")])
def test_a_faulty_file_of_settings_is_refused(tmp_path: Path, text: str, match: str) -> None:
    file = tuned_file(tmp_path / "found", "a", "m", "int2")
    file.parent.mkdir(parents=True)
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=match):
        read_grid(_tuned_grid(tmp_path), only="a/m")


def test_the_grids_in_jobs_are_right(tmp_path: Path) -> None:
    for name in ("cora", "amazon_photo", "tolokers", "fb100_johnshopkins55_year", "coauthor_physics", "github_musae"):
        (tmp_path / f"{name}.npz").touch()
    grid = read_grid(ROOT / "jobs" / "search.toml", data=tmp_path, search=True)
    plan = read_search(grid)
    assert (plan.trials, plan.seeds, plan.finals, plan.final_seeds) == (20, 2, 4, 5)
    assert {row.name for row in plan.finalists.values()} == {f"{name}/recipe/float/K10" for name in plan.finalists}
    names = {row.name for row in grid.rows}
    assert {"cora/recipe/int2-m1/K10", "tolokers/direct/int2/K10", "fb100/gcn/float/K2", "cora/mlp/float/K0"} <= names
    assert {row.dataset for row in grid.rows} == {"cora", "amazon_photo", "tolokers", "fb100"}, "held out graphs"
    assert {row.config.train.metric for row in grid.rows if row.dataset == "tolokers"} == {"roc_auc"}
    held_out = ("coauthor_physics", "github_musae")
    only = read_grid(ROOT / "jobs" / "benchmark.toml", data=tmp_path, only="coauthor_physics/")
    assert not any(row.tuned for row in only.rows if row.dataset in held_out)
    published = next(row for row in only.rows if row.name == "coauthor_physics/appnp-published/float/K10").config
    assert (published.propagation.mu, published.model.hidden, published.model.dropout, published.train.lr,
            published.train.weight_decay) == (9.0, 64, 0.5, 0.01, 5e-3)
    assert {row.config.train.lr for row in only.rows if row.dataset in held_out and row.method == "recipe"} == {0.02}
    assert {row.seeds for row in only.rows} == {10}
    # Every row that takes found settings is one that the search looks for, started from the same.
    folder = tmp_path / "jobs" / "tuned"
    for row in grid.rows:
        file = tuned_file(folder, row.dataset, row.method, row.width)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("[train]\nlr = 0.0625\n", encoding="utf-8")
    (tmp_path / "jobs" / "benchmark.toml").write_bytes((ROOT / "jobs" / "benchmark.toml").read_bytes())
    whole = read_grid(tmp_path / "jobs" / "benchmark.toml", data=tmp_path)
    assert {row.name for row in whole.rows if row.tuned} == names
    assert {row.name for row in whole.rows if not row.tuned} == {row.name for row in only.rows if
                                                                 row.dataset in held_out} | {
        row.name for row in whole.rows if row.dataset in held_out}
