# SPDX-License-Identifier: Apache-2.0
"""The grid file: which rows it means, and that every fault in it is told before anything runs."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qgnn_dist.bench.grid import BUILT_IN_WIDTHS, Grid, read_grid
from qgnn_dist.errors import ConfigError, InputError

SBM = 'source = "synthetic:sbm?nodes=100&edges=300"'


def _read(tmp_path: Path, text: str, **options: Any) -> Grid:
    file = tmp_path / "grid.toml"
    file.write_text(text, encoding="utf-8")
    return read_grid(file, **options)


def _names(grid: Grid) -> list[str]:
    return [row.name for row in grid.rows]


def test_rows_are_the_product_within_both_sides_restrictions(tmp_path: Path) -> None:
    grid = _read(tmp_path, f"""
        seeds = 3
        layers = [4, 8]
        default_widths = ["float", "int2"]
        [datasets.a]
        {SBM}
        [datasets.b]
        {SBM}
        methods = ["x"]
        widths = ["int2", "int2-m1"]
        layers = [8]
        seeds = 5
        [methods.x]
        [methods.y]
        widths = ["int2-m1", "float"]
        layers = [4]
        datasets = ["a", "c"]
        [datasets.c]
        {SBM}
        methods = ["y"]
        widths = ["float", "int2"]
        """)
    assert _names(grid) == ["a/x/float/K4", "a/x/float/K8", "a/x/int2/K4", "a/x/int2/K8", "a/y/int2-m1/K4",
                            "a/y/float/K4", "b/x/int2/K8", "b/x/int2-m1/K8", "c/y/float/K4"]
    assert [row.seeds for row in grid.rows] == [3] * 6 + [5] * 2 + [3]
    assert grid.reference == "float"
    assert grid.jobs is None
    assert all(row.seeds == 2 for row in _read(tmp_path, grid.text, seeds=2).rows)


def test_later_settings_win_and_seed_depth_and_threads_are_the_benchs(tmp_path: Path) -> None:
    grid = _read(tmp_path, f"""
        settings = ["train.lr=0.1", "train.epochs=7", "model.hidden=8"]
        layers = [3]
        [datasets.a]
        {SBM}
        settings = ["train.lr=0.2", "train.metric=macro_f1"]
        [methods.m]
        settings = ["train.lr=0.3"]
        widths = ["w"]
        [widths.w]
        settings = ["quant.bits=4", "train.lr=0.4"]
        """)
    config = grid.rows[0].at(9)
    assert (config.train.lr, config.train.epochs, config.model.hidden) == (0.4, 7, 8)
    assert (config.seed, config.propagation.layers, config.cluster.threads) == (9, 3, 1)
    assert (config.train.metric, config.quant.stages()["messages"]) == ("macro_f1", 4)


def test_built_in_widths() -> None:
    assert set(BUILT_IN_WIDTHS) == {"float", "int8", "int4", "int2", "int2-m1", "int2-strict"}


def test_built_in_widths_mean_what_their_names_say(tmp_path: Path) -> None:
    words = ", ".join(f'"{name}"' for name in BUILT_IN_WIDTHS)
    grid = _read(tmp_path, f"default_widths = [{words}]\n[datasets.a]\n{SBM}\n[methods.m]\n")
    stages = {row.width: row.config.quant.stages() for row in grid.rows}
    assert {name: s["messages"] for name, s in stages.items()} == {
        "float": 32, "int8": 8, "int4": 4, "int2": 2, "int2-m1": 1, "int2-strict": 2}
    assert {name: s["residual"] for name, s in stages.items()} == {
        "float": 32, "int8": 8, "int4": 8, "int2": 8, "int2-m1": 8, "int2-strict": 2}
    assert stages["int2-m1"]["weights"] == 2


def test_all_faults_of_shape_are_told_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        _read(tmp_path, """
            seed = 3
            jobs = 0
            layers = [4, "deep"]
            [datasets.a]
            sources = "x.npz"
            [datasets."../b"]
            source = 4
            [methods.m]
            width = ["int2"]
            """)
    text = str(error.value)
    for part in ("grid.toml", "seed: unknown key; did you mean seeds?", "jobs=0: expected a whole number of at least 1",
                 "layers=[4, 'deep']", "datasets.a.sources: unknown key; did you mean source?",
                 "datasets.a.source: missing", "datasets.../b: expected a name", "datasets.../b.source=4",
                 "methods.m.width: unknown key; did you mean widths?"):
        assert part in text, part


def test_all_faults_of_names_and_settings_are_told_together_and_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        _read(tmp_path, f"""
            reference = "flaot"
            settings = ["train.epoch=5", "seed=3"]
            [datasets.a]
            {SBM}
            methods = ["m", "recipi"]
            [datasets.b]
            source = "absent.npz"
            settings = ["train.metric=auc"]
            [methods.m]
            settings = ["propagation.layers=4", "train.metric=roc_auc"]
            widths = ["int3", "int2", "w", "int4"]
            [methods.recipe]
            settings = ["propagation.mu=100"]
            [widths.w]
            settings = ["quant.bits=3"]
            [widths.v]
            """)
    text = str(error.value)
    for part in ("reference: there is no width 'flaot'; did you mean float?",
                 "settings: train.epoch: unknown key; did you mean train.epochs?",
                 "settings: seed: the grid's `seeds` gives it", "datasets.a.methods: there is no method 'recipi'",
                 "datasets.b.source: no such file", "datasets.b: train.metric=auc: expected one of",
                 "methods.m: propagation.layers: the grid's `layers`", "methods.m: train.metric: belongs to a dataset",
                 "methods.m.widths: there is no width 'int3'; did you mean int",
                 "widths.w: quant.bits=3: expected one of", "widths.v.settings: missing"):
        assert text.count(part) == 1, (part, text)


def test_a_fault_of_settings_together_names_the_row(tmp_path: Path) -> None:
    """mu=50 is too much for the default eta and for dataset a's, and right for b's."""
    with pytest.raises(ConfigError) as error:
        _read(tmp_path, f"""
            default_widths = ["int2"]
            [datasets.a]
            {SBM}
            settings = ["propagation.eta=0.05"]
            [datasets.b]
            {SBM}
            settings = ["propagation.eta=0.01"]
            [methods.m]
            settings = ["propagation.mu=50"]
            """)
    assert "a/m/int2/K10: propagation.eta=0.05: diverges on every graph at mu=50" in str(error.value)
    assert str(error.value).count("diverges") == 1


def test_shifted_graphs_have_no_hops(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"datasets\.a\.hops: shifted graphs are made without hops"):
        _read(tmp_path, f"""
            [datasets.a]
            {SBM}
            hops = 1
            shifts = true
            [methods.m]
            """)


def test_only_ours_trains_on_more_than_one_part(tmp_path: Path) -> None:
    text = f"""
            [datasets.a]
            {SBM}
            [datasets.b]
            {SBM}
            parts = 2
            [methods.m]
            [methods.gcn]
            system = "pyg-gcn"
            datasets = DATASETS
            """
    with pytest.raises(ConfigError, match=r"datasets\.b\.parts: references train on one part; leave out gcn"):
        _read(tmp_path, text.replace("DATASETS", '["a", "b"]'))
    assert _read(tmp_path, text.replace("DATASETS", '["a"]')).parts == {"a": 1, "b": 2}


def test_unused_tables_and_empty_products_are_faults(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"widths.w: no row uses it"):
        _read(tmp_path, f'default_widths = ["int2"]\n[datasets.a]\n{SBM}\n[methods.m]\n[widths.w]\n'
                        'settings = ["quant.bits=4"]')
    with pytest.raises(ConfigError, match=r"datasets.a: no row is left"):
        _read(tmp_path, f'[datasets.a]\n{SBM}\nwidths = ["int2"]\n[methods.m]\nwidths = ["int4"]')


def test_files_are_looked_up_in_the_data_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "g.npz").touch()
    text = '[datasets.a]\nsource = "g.npz"\n[datasets.b]\nsource = "h.npz"\n[methods.m]\n'
    with pytest.raises(ConfigError, match=r"a\.source: no such file .*; datasets\.b\.source: no such file"):
        _read(tmp_path, text)
    with pytest.raises(ConfigError, match=r"datasets\.b\.source: no such file .*data/h\.npz"):
        _read(tmp_path, text, data=tmp_path / "data")
    # The other dataset's file is not needed for the rows that are asked for.
    grid = _read(tmp_path, text, data=tmp_path / "data", only="a/m/int")
    assert grid.sources["a"] == str(tmp_path / "data" / "g.npz")
    assert [row.name for row in grid.shown] == ["a/m/int8/K10", "a/m/int4/K10", "a/m/int2/K10"]
    with pytest.raises(InputError, match=r"--only zzz: no row's name contains it; names are like a/m/float/K10"):
        _read(tmp_path, text.replace("h.npz", "g.npz"), data=tmp_path / "data", only="zzz")


@pytest.mark.parametrize(("text", "match"), [("a = [", "not a TOML file"), ("", r"datasets: expected at least one .*; "
                                                                          r"methods: expected at least one")])
def test_what_is_no_grid_is_refused(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        _read(tmp_path, text)


def test_an_absent_grid_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such grid file"):
        read_grid(tmp_path / "none.toml")


def test_the_grid_in_jobs_is_right(tmp_path: Path) -> None:
    for name in ("cora", "amazon_photo", "tolokers", "fb100_johnshopkins55_year", "cora_drawn"):
        (tmp_path / f"{name}.npz").touch()
    grid = read_grid(Path(__file__).parents[2] / "jobs" / "accuracy.toml", data=tmp_path)
    assert {"cora/recipe/int2-strict/K10", "cora/degree_quant/int2/K10", "cora-depth/recipe/float/K64",
            "fb100/recipe/int2-m1/K10"} <= set(_names(grid))
    assert {row.config.train.metric for row in grid.rows if row.dataset == "tolokers"} == {"roc_auc"}
    assert {row.dataset for row in grid.rows if row.shifts} == {"cora", "fb100"}
    grid = read_grid(Path(__file__).parents[2] / "jobs" / "constraint.toml", data=tmp_path)
    assert {"cora/a0.01-e10/int2/K64", "tolokers/a0.1-two/int2-m1/K10"} <= set(_names(grid))
    grid = read_grid(Path(__file__).parents[2] / "jobs" / "groups.toml", data=tmp_path)
    assert {"cora-drawn/recipe/int4/K10", "fb100/recipe/int2-m1/K10"} <= set(_names(grid))
    assert {row.seeds for row in grid.rows} == {10}
    grid = read_grid(Path(__file__).parents[2] / "jobs" / "large.toml")
    assert grid.hops == {"arxiv": 0, "arxiv-hops": 2, "arxiv-2": 0, "arxiv-4": 0}
    assert grid.parts == {"arxiv": 1, "arxiv-hops": 1, "arxiv-2": 2, "arxiv-4": 4}
