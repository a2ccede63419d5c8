# SPDX-License-Identifier: Apache-2.0
"""What `qgnn bench search` looks through: the `[search]` table of a grid file, and the space of each of its rows.

    [search]
    trials = 20                          # of every row, the same budget for all
    seeds = 2                            # of a trial; its figure is their mean
    finals = 4                           # so many of the best trials meet again on further seeds
    final_seeds = 5
    finalist = "recipe/float"            # METHOD/WIDTH: what its search found has the last seat in the others' finals
    settings = ["train.epochs=100"]      # of trials alone, after all others
    [search.space]                       # key → choices, or a range; without this table: DEFAULT_SPACE
    "train.lr" = {low = 0.003, high = 0.1, log = true}
    "model.hidden" = [64, 128, 256]        # or hidden = … in a table [search.space.model]
    [datasets.tolokers.space]            # a dataset, after it a method, replaces keys, adds some, or drops one by []
    "model.feature_norm" = ["none", "l2"]

A row's own value of each key is where its search starts, so it has to lie in the range; among choices it is put first
where it is absent. Keys that a row has no use for are left out of its space. `propagation.eta` follows `propagation.mu`
(systems.step_of), which without a multiplier is APPNP with teleport 1/(1 + mu).
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..config import RunConfig, known_keys, load_config
from ..errors import ConfigError
from .grid import Grid, Row
from .systems import OWN, REFERENCES, step_of

__all__ = ["DEFAULT_SPACE", "Domain", "Search", "configured", "fitted", "own_values", "read_search", "with_step"]

Domain = tuple[Any, ...] | dict[str, Any]
"""Choices, or {low, high, log} of a range, ends included."""
DEFAULT_SPACE: dict[str, Domain] = {
    "train.lr": {"low": 0.003, "high": 0.1, "log": True},
    "train.weight_decay": (0.0, 1e-4, 5e-4, 1e-3, 2e-3, 5e-3),
    "model.dropout": {"low": 0.2, "high": 0.8, "log": False},
    "model.hidden": (64, 128, 256),
    "model.feature_norm": ("row", "l2", "none"),
    "propagation.mu": tuple(1 / teleport - 1 for teleport in (0.3, 0.2, 0.15, 0.1, 0.05)),
}
"""Teleports 0.3 … 0.05 in `mu`."""
TRIALS, SEEDS, FINALS, FINAL_SEEDS = 20, 2, 0, 5
_FIXED = {"seed": "a trial's seeds are 0, 1, …", "propagation.layers": "the grid's `layers` gives it",
          "propagation.eta": "it follows propagation.mu, as 1/(1 + mu)",
          "quant.bits": "a row's width gives it", "train.metric": "figures of two metrics cannot be compared",
          "train.epochs": "more epochs never do worse; `settings` of [search] sets them for all trials"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """A checked search, with equal budgets for all rows.

    Attributes: rows: those shown, then finalists' own that are not. spaces: row's name → key → domain. finalists:
        dataset → the row whose found settings the finals of its other rows end with; empty where the table names none.
    """

    trials: int
    seeds: int
    finals: int
    final_seeds: int
    rows: tuple[Row, ...]
    finalists: dict[str, Row]
    spaces: dict[str, dict[str, Domain]]


def read_search(grid: Grid, *, trials: int | None = None, seeds: int | None = None) -> Search:
    """The search of the grid's shown rows.

    Args: grid: read for a search, see `read_grid`. trials, seeds: instead of the file's.
    Raises: ConfigError: names every fault of the tables and of what the rows make of them.
    """
    table, faults = grid.table.get("search", {}), list[str]()
    common = _domains("search.space", table["space"], faults) if "space" in table else dict(DEFAULT_SPACE)
    more = {(kind, name): _domains(f"{kind}.{name}.space", inner.get("space", {}), faults)
            for kind in ("datasets", "methods") for name, inner in grid.table[kind].items()}
    spaces: dict[str, dict[str, Domain]] = {}
    places: dict[tuple[str, str, str], Row] = {}
    finalists = _finalists(grid, table, faults)
    rows = (*grid.shown, *(row for row in finalists.values() if row not in grid.shown))
    for row in rows if not faults else ():
        space = {**common, **more["datasets", row.dataset], **more["methods", row.method]}
        spaces[row.name] = _fit(row, space, faults)
        other = places.setdefault((row.dataset, row.method, row.width), row)
        if other is not row:
            faults.append(f"{row.dataset}/{row.method}/{row.width}: has depths {other.layers} and {row.layers}; a "
                          "search is of one, restrict `layers`")
    if "final_seeds" in table and "finals" not in table:
        faults.append("search.final_seeds: there is no final; say how many trials it has by search.finals")
    if faults:
        raise ConfigError("; ".join(dict.fromkeys(faults)), file=grid.file)
    finals = table.get("finals", FINALS)
    return Search(trials=trials or table.get("trials", TRIALS), seeds=seeds or table.get("seeds", SEEDS), rows=rows,
                  finalists=finalists, spaces=spaces, finals=finals,
                  final_seeds=table.get("final_seeds", FINAL_SEEDS) if finals else 0)


def _finalists(grid: Grid, table: Mapping[str, Any], faults: list[str]) -> dict[str, Row]:
    """Each shown dataset's row of the name METHOD/WIDTH that `finalist` gives."""
    if "finalist" not in table:
        return {}
    named = table["finalist"]
    if table.get("finals", FINALS) < 2:
        faults.append(f"search.finalist={named}: has the last seat of a final, which takes search.finals of at least 2")
    found: dict[str, Row] = {}
    for dataset in dict.fromkeys(row.dataset for row in grid.shown):
        depths = {row.layers for row in grid.shown if row.dataset == dataset}
        rows = [row for row in grid.rows if (row.dataset, f"{row.method}/{row.width}") == (dataset, named)]
        if rows:
            found[dataset] = next((row for row in rows if row.layers in depths), rows[0])
        else:
            faults.append(f"search.finalist={named}: datasets.{dataset} has no such row; expected METHOD/WIDTH, e.g. "
                          f"{grid.shown[0].method}/{grid.shown[0].width}")
    return found


def _domains(place: str, table: Mapping[str, Any], faults: list[str]) -> dict[str, Domain]:
    """Keys of a space's table, dotted or in tables of their sections, and their domains; () drops a key."""
    found: dict[str, Domain] = {}
    for name, value in table.items():
        inner = {f"{name}.{key}": one for key, one in value.items()} if "." not in name and isinstance(
            value, dict) else {name: value}
        for key, one in inner.items():
            if key in _FIXED:
                faults.append(f"{place}: {key}: {_FIXED[key]}")
            elif key not in known_keys():
                faults.append(f"{place}: {_refused(key, 0)}")
            else:
                found[key] = _domain(f"{place}: {key}", key, one, faults)
    return found


def _domain(place: str, key: str, value: Any, faults: list[str]) -> Domain:
    if isinstance(value, list):
        wrong = [text for text in (_refused(key, one) for one in value) if text]
        faults += [f"{place}: {text}" for text in wrong]
        return () if wrong else tuple(dict.fromkeys(_typed(key, one) for one in value))
    expected = f"{place}: expected a list of values, or {{low, high, log}} with numbers low < high"
    if not isinstance(value, dict) or set(value) - {"low", "high", "log"}:
        faults.append(expected)
        return ()
    low, high, log = value.get("low"), value.get("high"), value.get("log", False)
    numbers = all(isinstance(end, (int, float)) and not isinstance(end, bool) for end in (low, high))
    if not numbers or not low < high or not isinstance(log, bool) or (log and low <= 0):  # type: ignore[operator]
        faults.append(expected + (" and above 0 for log" if log else ""))
        return ()
    wrong = [text for text in (_refused(key, end) for end in (low, high)) if text]
    faults += [f"{place}: {text}" for text in wrong]
    return () if wrong else {"low": _typed(key, low), "high": _typed(key, high), "log": log}


def _fit(row: Row, space: Mapping[str, Domain], faults: list[str]) -> dict[str, Domain]:
    """The space without what the row has no use for, its own values among the choices."""
    found: dict[str, Domain] = {}
    for key, own in own_values(row.config, space).items():
        domain, useless = space[key], row.config.propagation.kind == "none" and key.startswith("propagation.")
        if not domain or (useless if row.system == OWN else not REFERENCES[row.system].uses(key)):
            continue
        if isinstance(domain, dict):
            if own is None:
                faults.append(f"{row.name}: {key} is open in the row itself, so that no search in a range can start "
                              "there; set it, or list choices")
            elif not domain["low"] <= own <= domain["high"]:
                faults.append(f"{row.name}: {key}={own} of the row itself is where the search starts; the range "
                              f"{domain['low']}…{domain['high']} does not hold it")
        else:
            there = any(_near(own, choice) for choice in domain)
            domain = tuple(own if _near(own, choice) else choice for choice in (domain if there else (own, *domain)))
        found[key] = domain
    p = row.config.propagation
    if "propagation.mu" in found and row.system == OWN and not _near(p.eta, step_of(p.mu)):
        faults.append(f"{row.name}: propagation.eta={p.eta:g} is not 1/(1 + mu) = {step_of(p.mu):g}, which a search "
                      "over propagation.mu sets; leave mu out of its space by \"propagation.mu\" = []")
    return found


def own_values(config: RunConfig, keys: Iterable[str]) -> dict[str, Any]:
    """What a configuration has for some dotted keys."""
    return {key: getattr(getattr(config, key.partition(".")[0]), key.partition(".")[2]) for key in keys}


def configured(config: RunConfig, params: Mapping[str, Any]) -> RunConfig:
    """A configuration with some keys set; the step size follows `mu`."""
    values: dict[str, Any] = config.to_dict()
    for section, inner in _nested(with_step(params)).items():
        values[section] |= inner
    return load_config(values=values)


def fitted(params: Mapping[str, Any], space: Mapping[str, Domain], own: Mapping[str, Any]) -> dict[str, Any]:
    """Another row's settings in this row's space: its own value where the other has none, or one from outside."""
    return {key: params[key] if key in params and _holds(domain, params[key]) else own[key]
            for key, domain in space.items()}


def _holds(domain: Domain, value: Any) -> bool:
    if isinstance(domain, dict):
        return bool(domain["low"] <= value <= domain["high"])
    return any(_near(value, choice) for choice in domain)


def with_step(params: Mapping[str, Any]) -> dict[str, Any]:
    """Found settings with the step size that goes with them."""
    if "propagation.mu" not in params:
        return dict(params)
    return {**params, "propagation.eta": step_of(params["propagation.mu"])}


def _near(first: Any, second: Any) -> bool:
    """The same number, but for how it was written."""
    if not all(isinstance(v, float) for v in (first, second)):
        return bool(first == second)
    return bool(abs(first - second) <= 1e-9 * max(abs(first), abs(second)))


def _typed(key: str, value: Any) -> Any:
    """A fitting value as the settings have it: a whole number may stand for a float."""
    return own_values(load_config(values=_nested(with_step({key: value}))), (key,))[key]


def _refused(key: str, value: Any) -> str | None:
    """What `load_config` says against a value alone."""
    sound = key == "propagation.mu" and isinstance(value, (int, float)) and value > 0
    try:
        load_config(values=_nested(with_step({key: value}) if sound else {key: value}))
    except ConfigError as error:
        return error.message.replace(" (config)", "")
    return None


def _nested(params: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for key, value in params.items():
        section, _, leaf = key.partition(".")
        found.setdefault(section, {})[leaf] = value
    return found
