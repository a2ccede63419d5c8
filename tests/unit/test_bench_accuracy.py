# SPDX-License-Identifier: Apache-2.0
"""`qgnn bench accuracy` as a user runs it: a small grid to its table, again, narrowed, and what it refuses."""
from __future__ import annotations

import dataclasses
import fcntl
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import qgnn_dist as qgnn
from qgnn_dist.bench.accuracy import _OURS, accuracy
from qgnn_dist.bench.baselines import baselines
from qgnn_dist.bench.cells import cells_of, train_cell
from qgnn_dist.bench.folder import bench_folder
from qgnn_dist.bench.grid import Row
from qgnn_dist.bench.shifts import SHIFTS, scaled, without_edges
from qgnn_dist.bench.source import write_npz
from qgnn_dist.bench.stores import dataset_store
from qgnn_dist.cli import app
from qgnn_dist.config import load_config
from qgnn_dist.data.graph import NO_SPLIT, TEST, SparseFeatures
from qgnn_dist.errors import InputError
from qgnn_dist.store.reader import Store
from tests.helpers import make_store, small_graph

GRID = """
seeds = 2
jobs = 1
layers = [2]
default_widths = ["float", "int2"]
settings = ["train.epochs=2", "model.hidden=8"]
[datasets.sbm]
source = "synthetic:sbm?nodes=300&edges=1500&features=8&classes=3&seed=1"
shifts = true
[methods.recipe]
[methods.wild]
settings = ["train.lr=1e30"]
widths = ["float"]
[methods.again]
settings = ["quant.method=recipe"]
"""


def _run(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["bench", "accuracy", *(str(w) for w in words)])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """A grid file, the folder that it was run into, and what the command said."""
    base = tmp_path_factory.mktemp("bench")
    grid = base / "grid.toml"
    grid.write_text(GRID, encoding="utf-8")
    return grid, base / "out", _run(grid, "--out", base / "out", "--json")


def test_a_grid_becomes_a_table(done: tuple[Path, Path, Any]) -> None:
    _, out, result = done
    assert result.exit_code == 1, result.stderr  # two cells diverged
    assert "failed: sbm/wild/float/K2 seed 0: the gradient of" in result.stderr
    printed, table = json.loads(result.stdout), json.loads((out / "table.json").read_text(encoding="utf-8"))
    assert {**table, "files": printed["files"]} == printed
    assert {"machine", "commit", "versions", "rows"} <= set(table)
    assert table["machine"]["cores"] >= 1
    assert table["cell_commits"] == [table["commit"] or "unknown"]
    rows = {row["name"]: row for row in table["rows"]}
    assert [(r["repeats"], r["failed"]) for r in rows.values()] == [(2, 0), (2, 0), (0, 2), (2, 0), (2, 0)]
    assert table["failed"] == 2
    # Equal settings under another name: the same cells, the same figures.
    assert rows["sbm/again/int2/K2"]["by_seed"] == rows["sbm/recipe/int2/K2"]["by_seed"]
    cells = [json.loads(f.read_text(encoding="utf-8")) for f in (out / "cells" / "sbm").iterdir()]
    assert len(cells) == 4
    for cell in cells:
        row = rows[f"sbm/recipe/{cell['names']['width']}/K2"]
        (mine,) = [entry for entry in row["by_seed"] if entry["seed"] == cell["seed"]]
        assert (mine["test"], mine["valid"]) == (cell["metric"]["test"], cell["metric"]["valid"])
        assert cell["epochs"] == 2
        # 3 classes, 2 rounds: a byte a row at 2 bits, 12 at float.
        assert cell["message_bytes_per_row"] == {"float": 24, "int2": 2}[cell["names"]["width"]]
        assert 0 < cell["states"]["dirichlet"] < 2
        assert 0 < cell["states"]["mad"] < 2
        assert (cell["states"]["error"] == 0) == (cell["names"]["width"] == "float")
        assert list(cell["shifts"]) == list(SHIFTS)
        by_class, by_degree = cell["groups"]["by_class"], cell["groups"]["by_degree"]
        assert sum(by_class["right"]) / sum(by_class["nodes"]) == cell["accuracy"]["test"]
        assert sum(by_degree["right"]) / sum(by_degree["nodes"]) == cell["accuracy"]["test"]
        assert 0 < cell["groups"]["ece"] < 1
        if cell["names"]["width"] == "int2":  # prediction divides by the power of two
            assert cell["shifts"]["features x 2"] == cell["shifts"]["features x 0.5"] == cell["accuracy"]["test"]
    assert rows["sbm/recipe/int2/K2"]["test_mean"] == pytest.approx(
        np.mean([c["metric"]["test"] for c in cells if c["names"]["width"] == "int2"]))
    assert any(cell["shifts"]["10 % of edges removed"] != cell["accuracy"]["test"] for cell in cells)
    stores = [Store.open(out / "stores" / "_shifted" / "sbm" / str(k)) for k in range(3)]
    own = Store.open(out / "stores" / "sbm")
    assert stores[0].num_edges == stores[1].num_edges == own.num_edges
    assert 0.85 < stores[2].num_edges / own.num_edges < 0.95
    assert "| recipe | int2 | 2 | 2 | – |" in (out / "table.md").read_text(encoding="utf-8")
    assert rows["sbm/recipe/int2/K2"]["ece"]["difference"]["pairs"] == 2
    for heading in ("calibration, and who pays", "accuracy by degree", "recall by class"):
        assert f"### sbm: {heading}" in (out / "table.md").read_text(encoding="utf-8")
    for picture in ("accuracy_by_bits", "accuracy_by_degree", "reliability"):
        assert (out / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    assert not (out / "accuracy_by_depth.png").exists()


def test_finished_cells_are_not_run_again_and_only_narrows(done: tuple[Path, Path, Any]) -> None:
    grid, out, _ = done
    before = {f: f.stat().st_mtime_ns for f in [*sorted((out / "cells").rglob("*.json")), out / "stores" / "sbm.json"]}
    again = _run(grid, "--out", out, "--only", "recipe/int2", "--no-pictures")
    assert again.exit_code == 0, again.stderr
    assert "0 cells to run, 2 finished before" in again.stderr
    assert "partitioning" not in again.stderr
    assert "shifting" not in again.stderr
    assert "int2" in again.stdout
    assert "wild" not in again.stdout
    (row,) = json.loads((out / "table.json").read_text(encoding="utf-8"))["rows"]
    assert row["difference"]["pairs"] == 2  # to a row that is not shown
    assert before == {f: f.stat().st_mtime_ns for f in before}


def test_the_epoch_is_chosen_on_validation_never_on_test(tmp_path: Path) -> None:
    store = make_store(small_graph(), tmp_path / "stores" / "d", 1)
    config = load_config(overrides=["train.epochs=12", "model.hidden=8", "propagation.layers=2", "train.lr=0.05",
                                    "cluster.threads=1"])
    row = Row(dataset="d", method="m", width="int2", layers=2, seeds=3, config=config)
    chosen = []
    for cell in cells_of([row], {"d": store.fingerprint}, tmp_path).values():
        records: list[dict[str, Any]] = []
        qgnn.train(store.path, out=tmp_path / f"run{cell.seed}", config=cell.config, on_epoch=records.append)
        best = max(records, key=lambda r: (r["accuracy"]["valid"], -r["valid_loss"]))
        result = train_cell(cell, tmp_path)
        assert result["best_epoch"] == best["epoch"]
        assert result["metric"] == {"name": "accuracy", **best["accuracy"]}
        chosen.append(best["accuracy"]["test"] < max(r["accuracy"]["test"] for r in records))
    assert any(chosen), "no seed has a better test epoch elsewhere: this test could not tell"
    assert not list(tmp_path.glob("run-*")), "a cell's run is left behind"


def test_a_changed_file_is_partitioned_again(tmp_path: Path) -> None:
    rng, file, steps = np.random.default_rng(0), tmp_path / "g.npz", []

    def write(nodes: int) -> None:
        np.savez(file, edge_index=rng.integers(0, nodes, (2, 90)), x=rng.random((nodes, 4)), train_idx=np.arange(9),
                 y=rng.integers(0, 3, nodes), valid_idx=np.arange(9, 18), test_idx=np.arange(18, nodes))

    write(30)
    prints = [dataset_store(tmp_path / "stores" / "g", str(file), None, steps.append) for _ in range(2)]
    assert prints[0] == prints[1]
    assert steps == ["partitioning g"]
    write(31)
    assert dataset_store(tmp_path / "stores" / "g", str(file), None, steps.append) != prints[0]
    assert Store.open(tmp_path / "stores" / "g").num_nodes == 31


@pytest.mark.parametrize(("grid", "texts"), [
    (GRID.replace("seeds", "seed").replace("recipe]", 'recipe]\nsetings = ["a=1"]'), ["did you mean seeds?",
                                                                                     "did you mean settings?"]),
    # Every width's own bits would hide it.
    (GRID.replace("[methods.recipe]", '[methods.recipe]\nsettings = ["quant.bits=3"]'),
     ["methods.recipe: quant.bits=3: expected one of 1, 2"]),
])
def test_a_faulty_grid_is_refused_and_nothing_written(tmp_path: Path, grid: str, texts: list[str]) -> None:
    (tmp_path / "grid.toml").write_text(grid, encoding="utf-8")
    result = _run(tmp_path / "grid.toml", "--out", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (2, "")
    for text in texts:
        assert text in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_metric_that_does_not_fit_is_refused_before_the_cells(tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_text(GRID.replace("[methods.recipe]", 'settings = ["train.metric=roc_auc"]\n'
                                                                         "[methods.recipe]"), encoding="utf-8")
    started: list[Any] = []
    with pytest.raises(InputError, match=r"datasets.sbm: train.metric=roc_auc: expected 2 classes"):
        accuracy(tmp_path / "grid.toml", out=tmp_path / "out", on_start=lambda *counts: started.append(counts))
    assert not started


def test_a_graph_without_labelled_test_nodes_is_refused_before_anything_trains(tmp_path: Path) -> None:
    graph = small_graph()
    assert graph.labels is not None
    assert graph.split is not None
    graph.split[graph.labels < 0] = NO_SPLIT
    graph.labels[graph.split == TEST] = -1
    file = tmp_path / "g.npz"
    write_npz(make_store(graph, tmp_path / "s", 1), file)
    source = GRID.partition("source = ")[2].partition("\n")[0]
    (tmp_path / "grid.toml").write_text(GRID.replace(source, f'"{file}"'), encoding="utf-8")
    started: list[Any] = []
    with pytest.raises(InputError, match=r"datasets.sbm: no test node has a label"):
        accuracy(tmp_path / "grid.toml", out=tmp_path / "out", on_start=lambda *counts: started.append(counts))
    with pytest.raises(InputError, match=r"store: no test node has a label"):
        baselines(str(file), seconds=1.0, out=tmp_path / "b", on_step=started.append)
    assert not [word for word in started if "training" in word]


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_foreign_folder_is_refused_and_left_alone(done: tuple[Path, Path, Any], tmp_path: Path,
                                                   overwrite: list[str]) -> None:
    (tmp_path / "cells").mkdir()
    result = _run(done[0], "--out", tmp_path, *overwrite)
    assert result.exit_code == 2
    assert "choose another --out" in result.stderr
    assert [f.name for f in tmp_path.iterdir()] == ["cells"]
    (tmp_path / "bench.json").write_text('{"bench": "train", "schema": 1}', encoding="utf-8")
    assert _run(done[0], "--out", tmp_path, *overwrite).exit_code == 2


def test_a_folder_in_use_is_refused_and_overwrite_forgets_what_is_ours(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with bench_folder(out, "accuracy", _OURS, False):
        (out / "cells" / "d").mkdir(parents=True)
        (out / "table.md").touch()
        (out / "notes.txt").touch()
        with (pytest.raises(InputError, match="another `qgnn bench accuracy` works"),
              bench_folder(out, "accuracy", _OURS, True)):
            pass
    with bench_folder(out, "accuracy", _OURS, False):
        assert (out / "cells" / "d").exists()
    with bench_folder(out, "accuracy", _OURS, True):
        assert sorted(f.name for f in out.iterdir()) == [".lock", "bench.json", "notes.txt"]
    with open(out / ".lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given back


def test_shifted_graphs() -> None:
    for graph in (small_graph(sparse=True), small_graph(signed=True)):
        half = scaled(graph, 0.5).features
        if isinstance(graph.features, SparseFeatures):
            assert isinstance(half, SparseFeatures)
            np.testing.assert_array_equal(half.values, graph.features.values / 2)
            np.testing.assert_array_equal(half.indices, graph.features.indices)
        else:
            np.testing.assert_array_equal(half, graph.features / 2)
    edges = np.array([[0, 1, 5, 5, 7], [1, 0, 9, 9, 7]])
    many = np.random.default_rng(0).integers(0, 1000, (2, 50_000))
    graph = dataclasses.replace(small_graph(1000), edges=lambda: iter([edges, many, many[::-1]]))
    kept = list(without_edges(graph, 0.3).edges())
    assert 0.69 < kept[1].shape[1] / 50_000 < 0.71
    np.testing.assert_array_equal(kept[1], kept[2][::-1], err_msg="both directions go together")
    pairs = {tuple(pair) for pair in kept[0].T}
    assert ((0, 1) in pairs) == ((1, 0) in pairs)


def test_hops_are_those_of_the_datasets_own_store(tmp_path: Path) -> None:
    source = "synthetic:sbm?nodes=300&edges=1500&features=8&classes=3&seed=1"
    plain, mixed = (dataset_store(tmp_path / name, source, None, hops=hops) for name, hops in (("a", 0), ("b", 2)))
    assert mixed == f"{plain} with 2 hops"
    assert [Store.open(tmp_path / name).num_features for name in "ab"] == [8, 24]
    assert dataset_store(tmp_path / "b", source, None, hops=2) == mixed
    assert dataset_store(tmp_path / "b", source, None, hops=1) == f"{plain} with 1 hops"
    assert Store.open(tmp_path / "b").num_features == 16
