# SPDX-License-Identifier: Apache-2.0
"""Cells: one training each, in processes of their own; a finished one is a file and is not run again.

This module loads nothing heavy itself: it is what a worker process imports before it knows its number of threads.
"""
from __future__ import annotations

import collections
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..config import RunConfig
from ..files.read import read_json
from .grid import Row
from .systems import OWN

__all__ = ["Cell", "cells_of", "read_cell", "run_cells", "shifted_stores", "train_cell"]

LARGEST_CELL = 16 << 20
SCHEMA = 3
ATTEMPTS = 2
"""How often a cell is begun when the processes die under it: one that took the others along fails at last."""
_POLL_S = 0.5
_STATES = ("dirichlet", "mad", "error")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One training.

    Attributes:
        row: of the first row that asks for it; equal settings under two names are one cell.
        digest: of the settings with the seed, the graph and the package's version. file: of its result.
        shifted: folder of the shifted graphs' stores; None where there are none. system: what trains, see systems.py.
    """

    row: str
    names: dict[str, Any]
    seed: int
    digest: str
    file: Path
    store: Path
    config: RunConfig
    shifted: Path | None = None
    system: str = OWN


def cells_of(rows: Iterable[Row], fingerprints: Mapping[str, str], out: Path) -> dict[tuple[str, int], Cell]:
    """(row's name, seed) → its cell, seed by seed, so that all rows fill evenly.

    Args:
        fingerprints: dataset → graph fingerprint of its store, OUT/stores/DATASET.
    """
    rows = list(rows)
    found: dict[tuple[str, int], Cell] = {}
    by_digest: dict[tuple[str, str], Cell] = {}
    for seed in range(max((row.seeds for row in rows), default=0)):
        for row in rows:
            if seed >= row.seeds:
                continue
            config = row.at(seed)
            known = [config.digest(), fingerprints[row.dataset], __version__, *(["shifts"] if row.shifts else []),
                     *([row.system] if row.system != OWN else [])]
            digest = hashlib.sha256(" ".join(known).encode()).hexdigest()[:24]
            names = {"dataset": row.dataset, "method": row.method, "width": row.width, "layers": row.layers}
            cell = Cell(row=row.name, names=names, seed=seed, digest=digest, store=out / "stores" / row.dataset,
                        file=out / "cells" / row.dataset / f"{digest}.json", config=config,
                        shifted=shifted_stores(out, row.dataset) if row.shifts else None, system=row.system)
            found[row.name, seed] = by_digest.setdefault((row.dataset, digest), cell)
    return found


def shifted_stores(out: Path, dataset: str) -> Path:
    """Folder of a dataset's shifted stores; no dataset's name begins with a line."""
    return out / "stores" / "_shifted" / dataset


def read_cell(cell: Cell) -> dict[str, Any] | None:
    """The result of a finished cell; None where there is none, or none that can be read."""
    try:
        result = read_json(cell.file, LARGEST_CELL)
    except (OSError, ValueError):
        return None
    whole = isinstance(result, dict) and result.get("schema") == SCHEMA and result.get("digest") == cell.digest
    return result if whole else None


def train_cell(cell: Cell, scratch: Path) -> dict[str, Any]:
    """Train in this process and return the cell's result, figures as shares (0-1).

    `states` is about H^K of the packed model, see diagnosis.report.combine; `groups` about its predictions, see
    inference.groups.groups; `shifts` has the accuracy on the test nodes of each shifted graph. A reference's cell has
    neither states nor shifts, and no message bytes.

    Args:
        scratch: an existing folder; the run lies there only while it is trained.
    Raises: QgnnError, e.g. where the loss diverged.
    """
    if cell.system != OWN:
        return _reference_cell(cell)
    from ..cluster import api
    from ..store.reader import Store
    from .groups import cell_groups
    from .shifts import SHIFTS

    run = Path(tempfile.mkdtemp(prefix="run-", dir=scratch))
    try:
        summary = api.train(cell.store, out=run / "run", config=cell.config)
        api.export(run / "run", out=run / "model")
        last = api.inspect(run / "model", store=cell.store)["diagnosis"]["layers"][-1]
        api.predict(cell.store, model=run / "model", out=run / "own", config=cell.config)
        groups = cell_groups(cell.store, run / "own")
        shifts = {}
        if cell.shifted is not None:
            for number, name in enumerate(SHIFTS):
                found = api.predict(cell.shifted / str(number), model=run / "model", out=run / str(number),
                                    config=cell.config)
                shifts[name] = found["accuracy"]["test"]
    finally:
        shutil.rmtree(run, ignore_errors=True)
    return _result(cell, summary, {key: last[key] for key in _STATES}, groups, shifts,
                   _message_bytes(cell.config, Store.open(cell.store).num_classes))


def _reference_cell(cell: Cell) -> dict[str, Any]:
    from ..store.reader import Store
    from .references import train_reference

    summary = train_reference(Store.open(cell.store), cell.system, cell.config)
    return _result(cell, summary, dict.fromkeys(_STATES), summary["groups"], {}, None)


def _result(cell: Cell, summary: dict[str, Any], states: dict[str, float | None], groups: dict[str, Any],
            shifts: dict[str, float], message_bytes: int | None) -> dict[str, Any]:
    from .machine import commit

    keys = ("accuracy", "metric", "best_epoch", "epochs", "seconds", "bits", "features", "multipliers", "warnings",
            "graph", "fingerprint", "versions")
    return {"schema": SCHEMA, "digest": cell.digest, "system": cell.system, "names": cell.names, "seed": cell.seed,
            **{key: summary[key] for key in keys}, "states": states, "groups": groups, "shifts": shifts,
            "message_bytes_per_row": message_bytes, "commit": commit(),
            "config_digest": cell.config.digest(), "config": cell.config.to_dict()}


def _message_bytes(config: RunConfig, classes: int) -> int:
    """What a forward sends of one row to one peer, by DESIGN.md's formula, headers aside."""
    from ..propagation.smp import Propagation
    from ..quant.ranges import is_sent

    rounds = Propagation.of(config).num_rounds
    sent = sum(is_sent(k, rounds, config.messages.stride) for k in range(rounds))
    return sent * -(-classes * int(config.quant.messages or 32) // 8)


def run_cells(cells: Iterable[Cell], jobs: int, *, work: Callable[[Cell, Path], dict[str, Any]] = train_cell,
              on_end: Callable[[Cell, str | None], None] | None = None,
              on_wait: Callable[[], None] | None = None) -> dict[str, str]:
    """Run what is not finished, `jobs` processes at a time, and write each result as it comes.

    Args:
        work: what a process does; picklable. on_end: called after each cell with its failure, or None.
        on_wait: called now and then while cells run.
    Returns: digest → why, of the cells that failed; nothing is written for them, so the next call tries again.
    Raises: KeyboardInterrupt; finished cells stay, processes are ended.
    """
    waiting = collections.deque({cell.digest: cell for cell in cells if read_cell(cell) is None}.values())
    begun: collections.Counter[str] = collections.Counter()
    failures: dict[str, str] = {}

    def end(cell: Cell, failure: str | None) -> None:
        if failure is not None:
            failures[cell.digest] = failure
        if on_end is not None:
            on_end(cell, failure)

    with tempfile.TemporaryDirectory(prefix="qgnn-bench-", ignore_cleanup_errors=True) as scratch:
        while waiting:
            lost = _run_with_one_pool(waiting, min(jobs, len(waiting)), work, Path(scratch), end,
                                      on_wait)
            begun.update(cell.digest for cell in lost)
            for cell in reversed(lost):
                if begun[cell.digest] < ATTEMPTS:
                    waiting.appendleft(cell)
                else:
                    end(cell, "its process died, perhaps out of memory; use fewer --jobs")
    return failures


def _run_with_one_pool(waiting: collections.deque[Cell], jobs: int, work: Callable[[Cell, Path], dict[str, Any]],
                       scratch: Path, end: Callable[[Cell, str | None], None],
                       on_wait: Callable[[], None] | None) -> list[Cell]:
    """Work `waiting` off; returns the cells that were running when a process died, for there is no more pool then."""
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_start_process)
    running: dict[Future[dict[str, Any]], Cell] = {}
    lost: list[Cell] = []
    try:
        while (waiting or running) and not lost:
            while waiting and len(running) < jobs:
                # Not queued further ahead, so that a broken pool loses only what was running.
                running[pool.submit(work, waiting[0], scratch)] = waiting[0]
                waiting.popleft()
            done, _ = wait(running, timeout=_POLL_S, return_when=FIRST_COMPLETED)
            if on_wait is not None:
                on_wait()
            for future in done:
                cell = running.pop(future)
                try:
                    _write(cell.file, future.result())
                except BrokenProcessPool:
                    lost.append(cell)
                except Exception as error:  # one cell's fault is that row's alone
                    name = "" if hasattr(error, "exit_code") else f"{type(error).__name__}: "
                    end(cell, f"{name}{error}")
                else:
                    end(cell, None)
        lost += running.values()
    except BrokenProcessPool:  # raised by submit
        lost += running.values()
    finally:
        if running or lost:  # interrupted, or a dead process: nobody waits for what still runs
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
        pool.shutdown(wait=True, cancel_futures=True)
    return lost


def _write(file: Path, result: dict[str, Any]) -> None:
    from ..files.write import write_atomically

    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, (json.dumps(result, indent=2) + "\n").encode())


def _start_process() -> None:
    """One thread a process, whatever the libraries think; Ctrl-C is the parent's; no process outlives its parent."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)  # stdout is for the parent's result alone
    threading.Thread(target=_end_with_parent, name="qgnn-bench-parent", daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
