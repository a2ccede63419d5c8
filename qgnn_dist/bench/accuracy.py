# SPDX-License-Identifier: Apache-2.0
"""`qgnn bench accuracy`: a grid of trainings on one part each, and one table of them.

OUT/ holds bench.json (that the folder is ours), grid.toml (the last grid), stores/DATASET, cells/DATASET/DIGEST.json,
table.json, table.md and the pictures. All but the cells can be made again from them.
"""
from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from .cells import cells_of, read_cell, run_cells, shifted_stores
from .folder import bench_folder
from .grid import Row, read_grid
from .group_pictures import GROUP_PICTURES, write_group_pictures
from .pictures import PICTURES, check_pictures, write_pictures
from .stores import dataset_store, write_shifted_stores

__all__ = ["accuracy", "check_rows"]

_OURS = ("cells", "stores", "grid.toml", "table.json", "table.md",
         *(f"{name}.{ending}" for name in (*PICTURES, *GROUP_PICTURES) for ending in ("svg", "png")))


def accuracy(grid: str | Path, *, out: str | Path, data: str | Path | None = None, seeds: int | None = None,
             jobs: int | None = None, only: str | None = None, pictures: bool = True, overwrite: bool = False,
             on_step: Callable[[str], None] | None = None, on_start: Callable[[int, int, int], None] | None = None,
             on_cell: Callable[[str, str | None], None] | None = None) -> dict[str, Any]:
    """Run a grid's cells that are not finished yet, and write the table of all that are.

    Args:
        grid: TOML file, see `bench/grid.py`. out: folder of cells and table; one of ours is continued.
        data: folder of relative sources, default the grid's. seeds: replaces the file's numbers of seeds.
        jobs: trainings at a time, one thread each; default the file's, else the cores.
        only: run and show the rows whose name (`dataset/method/width/K10`) contains it.
        overwrite: forget the cells and stores of an earlier bench in `out`.
        on_step: called with each step before the cells; on_start(to run, finished before, jobs); on_cell(name, why it
            failed or None).
    Returns: table.json, with `failed` (cells) and `files`.
    Raises: InputError before anything is written: the grid's faults, a folder that is not ours. InputError too where
        a graph is refused, or does not fit its settings.
    """
    read = read_grid(grid, data=data, seeds=seeds, only=only)
    if pictures:
        check_pictures()
    folder = Path(out)
    with bench_folder(folder, "accuracy", _OURS, overwrite):
        (folder / "grid.toml").write_text(read.text, encoding="utf-8")
        datasets = dict.fromkeys(row.dataset for row in read.shown)
        prints = {name: dataset_store(folder / "stores" / name, read.sources[name], data, on_step, hops=read.hops[name],
                                      parts=read.parts[name])
                  for name in datasets}
        for name in dict.fromkeys(row.dataset for row in read.shown if row.shifts):
            write_shifted_stores(shifted_stores(folder, name), read.sources[name], data, on_step)
        check_rows(read.shown, folder)
        rows = [row for row in read.rows if row.dataset in datasets]
        cells = cells_of(rows, prints, folder)
        names = {row.name for row in read.shown}
        wanted = {cell.digest: cell for (name, _), cell in cells.items() if name in names}
        missing = [cell for cell in wanted.values() if read_cell(cell) is None]
        number = jobs or read.jobs or os.cpu_count() or 1
        if on_start is not None:
            on_start(len(missing), len(wanted) - len(missing), min(number, max(len(missing), 1)))
        failures = run_cells(missing, number, on_end=lambda cell, failure: on_cell(
            f"{cell.row} seed {cell.seed}", failure) if on_cell is not None else None)
        return _write(folder, read.shown, rows, cells, failures, read.reference, pictures)


def _write(folder: Path, shown: Sequence[Row], rows: Sequence[Row], cells: dict[Any, Any], failures: dict[str, str],
           reference: str, pictures: bool) -> dict[str, Any]:
    from ..files.write import write_atomically
    from .machine import envelope
    from .table import cell_commits, markdown, table_rows

    found = {cell.digest: read_cell(cell) for cell in cells.values()}
    results = {digest: result for digest, result in found.items() if result is not None}
    result = envelope(table_rows(rows, shown, cells, results, failures, reference))
    result = {"schema": 1, "bench": "accuracy", **result, "failed": len(failures),
              "cell_commits": cell_commits(results[cells[row.name, seed].digest] for row in shown
                                           for seed in range(row.seeds) if cells[row.name, seed].digest in results)}
    write_atomically(folder / "table.json", (json.dumps(result, indent=2) + "\n").encode())
    write_atomically(folder / "table.md", markdown(result).encode())
    files = [folder / "table.md", folder / "table.json"]
    if pictures:
        files += write_pictures(result["rows"], folder) + write_group_pictures(result["rows"], folder)
    return {**result, "files": [str(file) for file in files]}


def check_rows(rows: Sequence[Row], folder: Path) -> None:
    """Refuse graphs that lack what training needs, their metric's classes, or test nodes, before the first cell."""
    from ..store.reader import Store
    from ..training.loop import check_trainable
    from .source import has_test

    faults = []
    for row in rows:
        store = Store.open(folder / "stores" / row.dataset)
        try:
            check_trainable(store, row.config)
            if not has_test(store):
                raise InputError("no test node has a label, and rows are compared by those; call some valid nodes test")
        except InputError as error:
            faults.append(f"datasets.{row.dataset}: {error.message}")
    if faults:
        raise InputError("; ".join(dict.fromkeys(faults)))
