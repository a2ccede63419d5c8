# SPDX-License-Identifier: Apache-2.0
"""A small search: its grid, and one row of it."""
from __future__ import annotations

from pathlib import Path

from qgnn_dist.bench.grid import read_grid
from qgnn_dist.bench.search import _cell
from qgnn_dist.bench.space import read_search
from qgnn_dist.bench.stores import dataset_store
from qgnn_dist.bench.trials import SearchCell

__all__ = ["SEARCH_GRID", "grid_file", "row_cell"]

SEARCH_GRID = """
jobs = 1
layers = [2]
default_widths = ["float", "int2"]
settings = ["model.hidden=8"]
[datasets.sbm]
source = "synthetic:sbm?nodes=300&edges=1500&features=8&classes=3&seed=1"
[methods.recipe]
[methods.gcn]
system = "pyg-gcn"
[search]
trials = 3
seeds = 2
settings = ["train.epochs=2"]
[search.space]
"train.lr" = {low = 0.003, high = 0.1, log = true}
"model.hidden" = [4, 8, 16]
"propagation.mu" = [4, 9, 19]
"model.feature_norm" = ["row", "l2"]
"""


def grid_file(folder: Path, text: str = SEARCH_GRID) -> Path:
    (folder / "grid.toml").write_text(text, encoding="utf-8")
    return folder / "grid.toml"


def row_cell(folder: Path, only: str = "recipe/int2", **budget: int) -> SearchCell:
    """A row's search, with its store written."""
    grid = read_grid(grid_file(folder), only=only, search=True)
    store = folder / "out" / "stores" / "sbm"
    fingerprint = dataset_store(store, grid.sources["sbm"], None, blind=True)
    return _cell(grid.shown[0], read_search(grid, **budget), fingerprint, folder / "out")
