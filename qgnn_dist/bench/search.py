# SPDX-License-Identifier: Apache-2.0
"""`qgnn bench search`: for each row of a grid, settings found by validation figures alone, the same budget for all.

OUT/ holds bench.json, grid.toml, stores/DATASET (without test labels), trials/DATASET/*.jsonl, rows/DATASET/*.json,
settings/DATASET/METHOD-WIDTH.toml, table.json and table.md. All but the trials can be made again from them.
"""
from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..config import RunConfig
from ..errors import InputError
from .accuracy import check_rows
from .cells import read_cell, run_cells
from .folder import bench_folder
from .grid import Row, read_grid
from .space import Search, own_values, read_search, with_step
from .spread import points
from .stores import dataset_store
from .systems import OWN
from .trials import RULES, SearchCell, finished_trials, search_row
from .tuned import tuned_file, tuned_text
from .written import Tables, write_bench

__all__ = ["search", "tables"]

_OURS = ("grid.toml", "stores", "trials", "rows", "settings", "table.json", "table.md")


def search(grid: str | Path, *, out: str | Path, data: str | Path | None = None, trials: int | None = None,
           seeds: int | None = None, jobs: int | None = None, only: str | None = None, overwrite: bool = False,
           on_step: Callable[[str], None] | None = None, on_start: Callable[[int, int, int], None] | None = None,
           on_trial: Callable[[str, str | None], None] | None = None) -> dict[str, Any]:
    """Search the rows of a grid that are not searched yet, write the settings of all that are, and a table of them.

    Args:
        grid: TOML file, see `bench/grid.py` and `bench/space.py`. out: folder; one of ours is continued.
        data: folder of relative sources, default the grid's. trials, seeds: instead of the file's.
        jobs: rows at a time, one thread each; default the file's, else the cores.
        only: rows whose name (`dataset/method/width/K10`) contains it.
        overwrite: forget the trials of an earlier search in `out`.
        on_step: called with each step before the trials; on_start(trials and trainings of finals to run, finished
            before, rows at a time); on_trial(row, why the row failed or None).
    Returns: table.json, with `failed` (rows) and `files`.
    Raises: InputError before anything is written: the grid's faults, a folder that is not ours, no Optuna.
    """
    if importlib.util.find_spec("optuna") is None:
        raise InputError("`qgnn bench search` needs Optuna: pip install 'qgnn-dist[search]'")
    read = read_grid(grid, data=data, only=only, search=True)
    plan = read_search(read, trials=trials, seeds=seeds)
    folder = Path(out)
    with bench_folder(folder, "search", _OURS, overwrite):
        (folder / "grid.toml").write_text(read.text, encoding="utf-8")
        prints = {name: dataset_store(folder / "stores" / name, read.sources[name], data, on_step,
                                      hops=read.hops[name], parts=read.parts[name], blind=True)
                  for name in dict.fromkeys(row.dataset for row in plan.rows)}
        check_rows(plan.rows, folder)
        if on_step is not None:
            for row in plan.rows[len(read.shown):]:
                on_step(f"searching {row.name} too: what it finds has a seat in the other rows' finals")
        cells = _cells(plan, prints, folder)
        waiting = list({cell.digest: cell for cell in cells.values() if read_cell(cell) is None}.values())
        number = min(jobs or read.jobs or os.cpu_count() or 1, max(len(waiting), 1))
        counter = _Counter(waiting, on_trial)
        if on_start is not None:
            to_run = sum(cell.steps for cell in waiting) - counter.seen
            on_start(to_run, sum(cell.steps for cell in cells.values()) - to_run, number)
        failures = _run_trials(waiting, number, counter)
        left = [cell for cell in waiting if cell.digest not in failures and cell.finalist is not None]
        failures |= run_cells(left, number, work=search_row, on_end=counter.end, on_wait=counter.look)
        rows = [_row(row, cells[row.name], read_cell(cells[row.name]), failures) for row in plan.rows]
        words = read.table.get("search", {}).get("settings", [])
        for row, found in zip(plan.rows, rows):
            if found["best"] is not None:
                _write_settings(folder, row, cells[row.name], found, [word.partition("=")[0].strip() for word in words])
        result = write_bench("search", folder, rows, "Settings by search", _INTRO, tables(rows), None,
                             trials=plan.trials, seeds=plan.seeds, finals=plan.finals, final_seeds=plan.final_seeds,
                             failed=len(failures))
        return {**result, "files": [*result["files"], str(folder / "settings")]}


_INTRO = ("All rows tried as many settings, the first being their own, and trained each on as many seeds, none of a "
          "table's, on a graph whose test nodes' labels were taken out. Figures are of validation, means over the "
          "seeds, in points; the best of many is somewhat too good, which test figures don't inherit. Where there was "
          "a final, the best figure is of its seeds, which did not choose the finalists; the gain is of the trials' "
          "seeds, and there is none where another row's settings won, which is told. Ended: the first seeds were far "
          "below the best; diverged: no number came out.")


def _cells(plan: Search, prints: dict[str, str], out: Path) -> dict[str, SearchCell]:
    """Row's name → its search, finalists' first."""
    leaders = {name: _cell(row, plan, prints[name], out) for name, row in plan.finalists.items()}
    found = {cell.row: cell for cell in leaders.values()}
    for row in plan.rows:
        leader = leaders.get(row.dataset)
        if row.name not in found:
            found[row.name] = _cell(row, plan, prints[row.dataset], out, leader)
            if leader is not None and found[row.name].history == leader.history:  # the same search under two names
                found[row.name] = leader
    return found


def _run_trials(waiting: Sequence[SearchCell], number: int, counter: _Counter) -> dict[str, str]:
    """All that no row waits for another with: searches without a finalist whole, and of the others the trials.

    Returns: digest of a search → why it failed, or its finalist's.
    """
    trials = {_trials_alone(cell).digest: cell for cell in waiting if cell.finalist is not None}

    def end(cell: Any, failure: str | None) -> None:
        if cell.digest not in trials or failure is not None:
            counter.end(trials.get(cell.digest, cell), failure)

    cells = [cell if cell.finalist is None else _trials_alone(cell) for cell in waiting]
    failures = {trials[digest].digest if digest in trials else digest: why for digest, why in run_cells(
        cells, number, work=search_row, on_end=end, on_wait=counter.look).items()}
    for cell in waiting:
        if cell.finalist is not None and cell.finalist.digest in failures and cell.digest not in failures:
            failures[cell.digest] = (f"its final waits for {cell.finalist.row}, whose search failed: "
                                     f"{failures[cell.finalist.digest]}")
            counter.end(cell, failures[cell.digest])
    return failures


def _trials_alone(cell: SearchCell) -> SearchCell:
    digest = hashlib.sha256(f"{cell.history.stem} {cell.trials}".encode()).hexdigest()[:24]
    return dataclasses.replace(cell, finals=0, final_seeds=0, finalist=None, digest=digest,
                               file=cell.file.with_name(f"{digest}.json"))


def _cell(row: Row, plan: Search, fingerprint: str, out: Path, finalist: SearchCell | None = None) -> SearchCell:
    space = plan.spaces[row.name]
    known = [row.config.digest(), fingerprint, __version__, row.system, str(plan.seeds), json.dumps(space), str(RULES)]
    trials = hashlib.sha256(" ".join(known).encode()).hexdigest()[:24]
    budget = f"{trials} {plan.trials}" + (f" {plan.finals} {plan.final_seeds}" if plan.finals else "") + (
        f" {finalist.digest}" if finalist else "")
    digest = hashlib.sha256(budget.encode()).hexdigest()[:24]
    return SearchCell(row=row.name, names={"dataset": row.dataset, "method": row.method, "width": row.width,
                                           "layers": row.layers}, seed=0, digest=digest, system=row.system,
                      config=row.config, store=out / "stores" / row.dataset, space=space, trials=plan.trials,
                      file=out / "rows" / row.dataset / f"{digest}.json", seeds=plan.seeds,
                      finals=plan.finals, final_seeds=plan.final_seeds, finalist=finalist,
                      history=out / "trials" / row.dataset / f"{trials}.jsonl")


class _Counter:
    """Tells of trials as processes finish them."""

    def __init__(self, cells: Sequence[SearchCell], on_trial: Callable[[str, str | None], None] | None) -> None:
        self._tell = on_trial or (lambda name, why: None)
        self._names = {file: f"{cell.row} {word}" for cell in cells
                       for file, word in ((cell.history, "trial"), (cell.final_history, "final"))}
        self._done = {file: len(finished_trials(file)) for file in self._names}
        self.seen = sum(min(self._done[cell.history], cell.trials) + min(
            self._done[cell.final_history], cell.steps - cell.trials) for cell in cells)

    def look(self) -> None:
        """Count what is new."""
        for file, name in self._names.items():
            count = len(finished_trials(file))
            for number in range(self._done[file], count):
                self._tell(f"{name} {number}", None)
            self._done[file] = count

    def end(self, cell: Any, failure: str | None) -> None:
        """A row is through."""
        self.look()
        if failure is not None:
            self._tell(cell.row, failure)


def _row(row: Row, cell: SearchCell, result: dict[str, Any] | None, failures: dict[str, str]) -> dict[str, Any]:
    """One line of table.json; figures as shares (0-1)."""
    head = {"system": row.system, "shape": row.dataset, "name": row.name, "method": row.method, "width": row.width,
            "layers": row.layers, "metric": row.config.train.metric, "threads": 1, "seeds": cell.seeds,
            "space": {key: list(domain) if isinstance(domain, tuple) else domain for key, domain in cell.space.items()}}
    if result is None:
        return {**head, "best": None, "why": failures.get(cell.digest, "not finished")}
    return {**head, **{key: result[key] for key in ("best", "own", "states", "trials", "seconds")},
            "changed": _changed(cell, result)}


def _changed(cell: SearchCell, result: dict[str, Any]) -> dict[str, Any]:
    """What of the best settings the row did not have itself."""
    own = result["own"]["params"]
    return {key: value for key, value in result["best"]["params"].items() if value != own[key]}


def _write_settings(out: Path, row: Row, cell: SearchCell, found: dict[str, Any], trials_only: Sequence[str]) -> None:
    from ..files.write import write_atomically

    params = found["best"]["params"]
    if row.system == OWN:
        params = with_step(params)
    own = found["own"]["figure"]
    budget = f"{found['trials']} trials" + (f" and a final of {cell.finals}" if cell.finals else "")
    found_by = f", found for {found['best']['of']}" if "of" in found["best"] else ""
    notes = [f"{row.name}: the best of {budget} by `qgnn bench search` (qgnn-dist {__version__})"
             f"{found_by}.",
             f"Validation {row.config.train.metric} {points(found['best']['figure'])}, mean of "
             f"{len(found['best']['figures'])} seeds; {points(own)} by the row's own settings, of {cell.seeds}.",
             f"Beside these: {_others(row.config, params, trials_only)}" if row.system == OWN else
             f"For the reference {row.system} of `qgnn bench accuracy`."]
    file = tuned_file(out / "settings", row.dataset, row.method, row.width)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, tuned_text(params, notes).encode())


_DECIDING = ("model.", "propagation.", "messages.", "quant.", "train.")


def _others(config: RunConfig, params: dict[str, Any], trials_only: Sequence[str]) -> str:
    """As `--set` words, a row's settings that differ from the defaults, were not searched, and aren't trials' alone."""
    from ..config import known_keys, load_config

    skip = (*params, "train.checkpoint_every", "train.keep_checkpoints", *trials_only)
    keys = [key for key in known_keys() if key.startswith(_DECIDING) and key not in skip]
    plain = load_config(overrides=[f"quant.bits={config.quant.bits}",
                                   f"propagation.layers={config.propagation.layers}"])
    own, usual = own_values(config, keys), own_values(plain, keys)
    words = [f"quant.bits={config.quant.bits}", *(f"{key}={own[key]}" for key in keys if own[key] != usual[key])]
    return " ".join(f"--set {word}" for word in words)


def tables(rows: Sequence[dict[str, Any]]) -> Tables:
    """One table a dataset, and in it what was found."""
    found: Tables = []
    columns = ["method", "width", "K", "trials", "ended", "diverged", "own", "best", "gain", "s a trial", "found"]
    for dataset in dict.fromkeys(row["shape"] for row in rows):
        lines = []
        for row in (row for row in rows if row["shape"] == dataset):
            head = [row["method"], row["width"], str(row["layers"])]
            if row["best"] is None:
                lines.append([*head, *["–"] * (len(columns) - len(head) - 1), row["why"]])
                continue
            own, best, states = row["own"]["figure"], row["best"]["figure"], row["states"]
            before = row["best"].get("trial_figure", best)
            gain = None if own is None or before is None else before - own
            lines.append([*head, str(row["trials"]), str(states["skipped"]), str(states["diverged"]),
                          points(own), points(best), points(gain, sign="+"),
                          f"{row['seconds'] / row['trials']:.1f}",
                          _found(row)])
        found.append((dataset, columns, lines))
    return found


def _found(row: dict[str, Any]) -> str:
    words = ", ".join(f"{key.partition('.')[2]} {_short(value)}" for key, value in row["changed"].items())
    return (words or "its own settings") + (f"; found for {row['best']['of']}" if "of" in row["best"] else "")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
