# SPDX-License-Identifier: Apache-2.0
"""`qgnn bench accuracy`: a grid of trainings on one part each, and one table of them.

OUT/ holds bench.json (that the folder is ours), grid.toml (the last grid), stores/DATASET, cells/DATASET/DIGEST.json,
table.json, table.md and the pictures. All but the cells can be made again from them.
"""
from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import InputError, StoreError
from ..files.read import read_json
from .cells import cells_of, read_cell, run_cells, shifted_stores
from .grid import Row, read_grid
from .group_pictures import GROUP_PICTURES, write_group_pictures
from .pictures import PICTURES, check_pictures, write_pictures

__all__ = ["accuracy"]

LARGEST_NOTE = 1 << 20
_MARKER = {"bench": "accuracy", "schema": 1}
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
    with _folder(folder, overwrite):
        (folder / "grid.toml").write_text(read.text, encoding="utf-8")
        datasets = dict.fromkeys(row.dataset for row in read.shown)
        prints = {name: _store(folder / "stores" / name, read.sources[name], data, on_step) for name in datasets}
        for name in dict.fromkeys(row.dataset for row in read.shown if row.shifts):
            _shifted(shifted_stores(folder, name), read.sources[name], data, on_step)
        _check_rows(read.shown, folder)
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
    from .table import markdown, table_rows

    found = {cell.digest: read_cell(cell) for cell in cells.values()}
    results = {digest: result for digest, result in found.items() if result is not None}
    result = envelope(table_rows(rows, shown, cells, results, failures, reference))
    result = {"schema": 1, "bench": "accuracy", **result, "failed": len(failures)}
    write_atomically(folder / "table.json", (json.dumps(result, indent=2) + "\n").encode())
    write_atomically(folder / "table.md", markdown(result).encode())
    files = [folder / "table.md", folder / "table.json"]
    if pictures:
        files += write_pictures(result["rows"], folder) + write_group_pictures(result["rows"], folder)
    return {**result, "files": [str(file) for file in files]}


@contextmanager
def _folder(folder: Path, overwrite: bool) -> Iterator[None]:
    """OUT, made or found to be ours, and locked against a second bench.

    Raises: InputError: something else lies there, or another process works in it.
    """
    marker = folder / "bench.json"
    if folder.exists() and not marker.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError("output exists and is not the folder of a `qgnn bench accuracy`; choose another --out",
                         file=str(folder))
    if marker.exists() and _read_json(marker) != _MARKER:
        raise InputError("the folder belongs to another kind or version of bench; choose another --out",
                         file=str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps(_MARKER) + "\n", encoding="utf-8")
    with open(folder / ".lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system gives it back, however this process ends
        except BlockingIOError:
            raise InputError("another `qgnn bench accuracy` works in this folder", file=str(folder)) from None
        if overwrite:
            for name in _OURS:
                place = folder / name
                if place.is_dir():
                    shutil.rmtree(place)
                else:
                    place.unlink(missing_ok=True)
        yield


def _store(store: Path, source: str, root: str | Path | None, on_step: Callable[[str], None] | None) -> str:
    """The fingerprint of the dataset's store, written first where there is none of the source as it is now."""
    from ..cluster import api
    from ..files.write import write_atomically
    from ..store.reader import Store

    note, identity = store.with_name(f"{store.name}.json"), _identity(source)
    if _read_json(note) == {"source": identity}:
        try:
            return Store.open(store).fingerprint
        except StoreError:
            pass  # damaged, or of an older version
    note.unlink(missing_ok=True)
    store.parent.mkdir(parents=True, exist_ok=True)
    if on_step is not None:
        on_step(f"partitioning {store.name}")
    api.partition(source, parts=1, out=store, root=root, overwrite=store.exists())
    write_atomically(note, (json.dumps({"source": identity}) + "\n").encode())
    return Store.open(store).fingerprint


def _shifted(stores: Path, source: str, root: str | Path | None, on_step: Callable[[str], None] | None) -> None:
    """The shifted graphs' stores, written where there are none of the source as it is now."""
    from ..files.write import write_atomically
    from .shifts import SHIFTS, write_shifted

    note, state = stores / "source.json", {"source": _identity(source), "shifts": list(SHIFTS)}
    if _read_json(note) == state:
        return
    if on_step is not None:
        on_step(f"shifting {stores.name}")
    note.unlink(missing_ok=True)
    stores.mkdir(parents=True, exist_ok=True)
    write_shifted(source, stores, root)
    write_atomically(note, (json.dumps(state) + "\n").encode())


def _identity(source: str) -> str:
    """Changes when the source does: a file's hash; the names, sizes and times of Parquet files; else the text."""
    if source.endswith(".npz"):
        digest = hashlib.sha256()
        with open(source, "rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
        return f"npz {digest.hexdigest()}"
    if source.startswith("parquet:"):
        base = Path(source.partition(":")[2])
        files = [(str(f.relative_to(base)), f.stat().st_size, f.stat().st_mtime_ns)
                 for f in sorted(base.rglob("*")) if f.is_file()]
        return f"parquet {hashlib.sha256(json.dumps(files).encode()).hexdigest()}"
    return source


def _check_rows(rows: Sequence[Row], folder: Path) -> None:
    """Refuse graphs that lack what training needs, or the classes of their metric, before the first cell."""
    from ..store.reader import Store
    from ..training.loop import check_trainable

    faults = []
    for row in rows:
        try:
            check_trainable(Store.open(folder / "stores" / row.dataset), row.config)
        except InputError as error:
            faults.append(f"datasets.{row.dataset}: {error.message}")
    if faults:
        raise InputError("; ".join(dict.fromkeys(faults)))


def _read_json(file: Path) -> Any:
    try:
        return read_json(file, LARGEST_NOTE)
    except (OSError, ValueError):
        return None
