# SPDX-License-Identifier: Apache-2.0
"""One row's search: settings tried one after the other, in the order that Optuna's TPE suggests them, then a final.

A trial sees validation figures alone; its store has no test labels either (stores.without_test_labels). Finished trials
are lines of a file, and a trial depends on the lines before it and its number: a search that was stopped goes on to the
same settings.

This module loads nothing heavy itself, as `bench/cells.py`.
"""
from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import RunConfig
from ..errors import DivergedError, QgnnError
from .cells import SCHEMA, Cell, read_cell
from .space import Domain, configured, fitted, own_values
from .spread import mean
from .systems import OWN

if TYPE_CHECKING:
    import optuna

    from ..store.reader import Store

__all__ = ["COMPLETE", "SearchCell", "best_of", "finished_trials", "search_row", "validation_figure"]

COMPLETE, SKIPPED, DIVERGED = "complete", "skipped", "diverged"
"""States of a trial: all seeds ran; the first ones were too far below for the others; it diverged."""
RULES = 2
"""Of how trials are run and judged; a history of other rules is not gone on with."""
FIRST_SEED = 1_000_000
"""A trial's seeds begin here, so that no seed of a table has had its settings chosen by its own draws."""
STARTUP = 5
"""Trials drawn at random before TPE's model suggests them; the first of them is the row's own settings."""
FAR = 0.02
"""So far below the best mean so far, a trial's first seeds are its last. Trainings run to their end: ending those below
the median on the way kept low learning rates from being found (docs/benchmarks.md)."""
DIGITS = 4
"""Of a number drawn from a range: more would tell nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchCell(Cell):
    """The search of one row; `config` is where it starts.

    Attributes: space: key → domain. trials, seeds: the budget. finals, final_seeds: so many of the best trials are
        trained on so many further seeds, which choose among them. finalist: the search whose found settings have the
        final's last seat. history: file of its finished trials, which a larger budget goes on from.
    """

    space: dict[str, Domain] = field(default_factory=dict)
    trials: int
    seeds: int
    finals: int = 0
    final_seeds: int = 0
    finalist: SearchCell | None = None
    history: Path

    @property
    def final_history(self) -> Path:
        """File of the finals' finished trainings."""
        return self.history.with_suffix(".finals.jsonl")

    @property
    def steps(self) -> int:
        """Trials, and trainings of the finals."""
        return self.trials + self.finals * self.final_seeds


def finished_trials(history: Path) -> list[dict[str, Any]]:
    """The trials of a row so far, or the finals' trainings; what a killed process left unfinished is none."""
    try:
        lines = history.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    found: list[dict[str, Any]] = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict) or record.get("number") != len(found):
            break
        found.append(record)
    return found


def best_of(records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The complete trial of the best figure, the earliest of several; None where none is complete."""
    complete = [record for record in records if record["state"] == COMPLETE]
    return max(complete, key=lambda record: (record["figure"], -record["number"])) if complete else None


def search_row(cell: Cell, scratch: Path) -> dict[str, Any]:
    """Try settings until the budget is spent.

    Returns: the cell's result: `best` and `own` trials, `states` with their counts, seconds of all trials. The best
        of a final has the figures of its seeds, and `trial_figure`, which is None of the finalist of another row.
    Raises: QgnnError: every trial diverged; the finalist's search is not finished.
    """
    import optuna

    from ..store.reader import Store

    assert isinstance(cell, SearchCell)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    store = Store.open(cell.store)
    space, own = _resolved(cell, store)
    records = finished_trials(cell.history)
    _rewrite(cell.history, records)
    while len(records) < cell.trials:
        line = json.dumps(_trial(cell, space, own, records, scratch))
        records.append(json.loads(line))  # as a later process will see it
        _append(cell.history, line)
    records = records[:cell.trials]
    best = best_of(records)
    if best is None:
        raise QgnnError(f"none of {len(records)} trials came to an end, the first because {records[0]['why']}")
    if cell.finals:
        best = _final(cell, _seated(cell, space, own, records), scratch)
    states = [record["state"] for record in records]
    return {"schema": SCHEMA, "digest": cell.digest, "system": cell.system, "names": cell.names, "best": best,
            "own": records[0], "trials": len(records), "seeds": cell.seeds,
            "states": {state: states.count(state) for state in (COMPLETE, SKIPPED, DIVERGED)},
            "seconds": sum(record["seconds"] for record in records)}


def _seated(cell: SearchCell, space: Mapping[str, Domain], own: Mapping[str, Any],
            records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best trials, as many as a final takes; the last gives way to the finalist, unless it is among them.

    Raises: QgnnError: the finalist's search is not finished.
    """
    complete = [record for record in records if record["state"] == COMPLETE]
    ranked = sorted(complete, key=lambda record: (-record["figure"], record["number"]))
    if cell.finalist is None:
        return ranked[:cell.finals]
    result = read_cell(cell.finalist)
    if result is None:
        raise QgnnError(f"its final waits for what the search of {cell.finalist.row} finds, which is not finished")
    params = fitted(result["best"]["params"], space, own)
    if any(record["params"] == params for record in ranked[:cell.finals]):
        return ranked[:cell.finals]
    # Named by its settings: another budget of either row would give its number to a trial, or its seat to others.
    guest = {"number": json.dumps(params, sort_keys=True), "state": COMPLETE, "figure": None, "params": params,
             "of": cell.finalist.row}
    return [*ranked[:cell.finals - 1], guest]


def _final(cell: SearchCell, seated: Sequence[dict[str, Any]], scratch: Path) -> dict[str, Any]:
    """The best of those seated, by seeds that did not make them so, its figure of those alone; nor did they choose the
    finalist, whose own final had others."""
    known = finished_trials(cell.final_history)
    _rewrite(cell.final_history, known)
    figures = {(record["trial"], record["seed"]): record["figure"] for record in known}
    found = []
    first = cell.seeds + (cell.final_seeds if cell.finalist is not None else 0)
    seeds = range(first, first + cell.final_seeds)
    for record in seated:
        config = configured(cell.config, record["params"])
        for seed in seeds:
            place = record["number"], seed
            if place not in figures:
                try:
                    figures[place] = validation_figure(cell, config, seed, scratch)
                except DivergedError:
                    figures[place] = 0.0
                _append(cell.final_history, json.dumps({"number": len(figures) - 1, "trial": place[0], "seed": seed,
                                                        "figure": figures[place]}))
        fresh = [figures[record["number"], seed] for seed in seeds]
        found.append({**record, "figure": mean(fresh), "figures": fresh, "trial_figure": record["figure"]})
    return max(found, key=lambda record: record["figure"])  # of equal ones the first, which trials had ahead


def _append(history: Path, line: str) -> None:
    with open(history, "a", encoding="utf-8") as opened:
        opened.write(line + "\n")
        opened.flush()
        os.fsync(opened.fileno())


def _rewrite(history: Path, records: Sequence[dict[str, Any]]) -> None:
    """Drop half a line at the file's end, which the next one would be glued to."""
    from ..files.write import write_atomically

    history.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(history, "".join(json.dumps(record) + "\n" for record in records).encode())


def _resolved(cell: SearchCell, store: Store) -> tuple[dict[str, Domain], dict[str, Any]]:
    """The space and the row's own values in it; what is `auto` or open is what this store's rows get."""
    from .task import chosen_norm

    own, space = own_values(cell.config, cell.space), dict(cell.space)
    given = cell.config.model.feature_norm
    chosen = {given: chosen_norm(store, given), "auto": chosen_norm(store, "auto")}
    meant: dict[str, dict[Any, Any]] = {"model.feature_norm": chosen,
                                        "train.weight_decay": {None: cell.config.train.decay(chosen[given])}}
    for key, known in meant.items():
        domain = space.get(key)
        if isinstance(domain, tuple):
            space[key] = tuple(dict.fromkeys(known.get(value, value) for value in domain))
            own[key] = known.get(own[key], own[key])
    return space, own


def _trial(cell: SearchCell, space: Mapping[str, Domain], own: Mapping[str, Any], records: Sequence[dict[str, Any]],
           scratch: Path) -> dict[str, Any]:
    """Run the next trial: the row's own settings first, then what TPE suggests."""
    number, start = len(records), time.perf_counter()
    trial = _study(space, records).ask(_distributions(space))
    params = {key: _tidy(trial.params[key], domain) if number else own[key] for key, domain in space.items()}
    config, figures, best = configured(cell.config, params), list[float](), best_of(records)
    state, why = COMPLETE, ""
    try:
        for seed in range(cell.seeds):
            figures.append(validation_figure(cell, config, seed, scratch))
            if best is not None and len(figures) < cell.seeds and (mean(figures) or 0.0) < best["figure"] - FAR:
                state = SKIPPED
                break
    except DivergedError as error:
        state, why = DIVERGED, error.message
    return {"number": number, "state": state, "figure": mean(figures) if state == COMPLETE else None, "params": params,
            "figures": figures, "why": why, "seconds": round(time.perf_counter() - start, 3)}


def validation_figure(cell: SearchCell, config: RunConfig, seed: int, scratch: Path) -> float:
    """Train once; the validation figure of the best epoch, by the metric. Nothing else comes out of here.

    Args: seed: 0, 1, … of the trial's and, behind those, the finals'.
    """
    import dataclasses

    from ..cluster import api
    from ..store.reader import Store
    from .references import train_reference

    config = dataclasses.replace(config, seed=FIRST_SEED + seed)
    run = Path(tempfile.mkdtemp(prefix="trial-", dir=scratch))
    try:
        if cell.system != OWN:
            summary = train_reference(Store.open(cell.store), cell.system, config)
        else:
            summary = api.train(cell.store, out=run / "run", config=config)
    finally:
        shutil.rmtree(run, ignore_errors=True)
    return float(summary["metric"]["valid"])


def _study(space: Mapping[str, Domain], records: Sequence[dict[str, Any]]) -> optuna.Study:
    """A study that knows the finished trials, and draws as their number says: always the same for the same lines."""
    import optuna

    sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP, seed=len(records))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for record in records:
        # A diverged trial is as bad as a figure can be; one of fewer seeds counts by theirs.
        value = 0.0 if record["state"] == DIVERGED else mean(record["figures"])
        study.add_trial(optuna.trial.create_trial(params=record["params"], value=value,
                                                  distributions=_distributions(space)))
    return study


def _distributions(space: Mapping[str, Domain]) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {}
    for key, domain in space.items():
        if isinstance(domain, dict):
            ends = domain["low"], domain["high"]
            kind = IntDistribution if all(isinstance(end, int) for end in ends) else FloatDistribution
            found[key] = kind(*ends, log=domain["log"])
        else:
            found[key] = CategoricalDistribution(domain)
    return found


def _tidy(value: Any, domain: Domain) -> Any:
    """A number drawn from a range with DIGITS digits, inside it."""
    if not isinstance(domain, dict) or not isinstance(value, float):
        return value
    return min(max(float(f"{value:.{DIGITS}g}"), domain["low"]), domain["high"])
