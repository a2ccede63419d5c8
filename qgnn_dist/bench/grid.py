# SPDX-License-Identifier: Apache-2.0
"""The grid file of `qgnn bench accuracy`: which settings are compared on which graphs, checked before anything runs.

    seeds = 20                  # of every row: 0 … 19
    layers = [10]               # depths
    reference = "float"         # the width that differences are taken against
    settings = []               # of every row
    [datasets.cora]             # rows: datasets x methods x widths x layers
    source = "cora.npz"
    shifts = true               # predict the graph with other feature scales, and without some edges, too
    hops = 2                    # of neighbours' features in the store, see `partitioning/hops.py`
    parts = 4                   # of the store: so many workers train it, which only ours can
    [methods.lsq]
    settings = ["quant.method=lsq"]
    widths = ["float", "int2"]  # a dataset or a method may restrict the other lists
    [methods.gcn]
    system = "pyg-gcn"          # a reference, see `bench/systems.py`: one row, under the width "float"
    [widths.int2-m1]
    settings = ["quant.bits=2", "quant.messages=1"]

A row's settings are the grid's, the dataset's, the method's, the width's, in this order; a later one wins. Of the
grid's and the dataset's a reference takes those that it has a use for; in its method others are refused. With

    tuned = "tuned"             # a folder beside the grid file

the last word has TUNED/DATASET/METHOD-WIDTH.toml, which `qgnn bench search` wrote; a row without that file is refused,
unless its dataset or method says `tuned = false`. `[search]` and `space` are for that command, see `bench/space.py`.
"""
from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import RunConfig, known_keys, load_config
from ..errors import ConfigError, InputError
from ..files.read import LARGEST_TOML, parse_toml, read_bytes, reason
from ..files.read import shown as short
from .systems import OWN, REFERENCE_WIDTH, REFERENCES, used_words
from .tuned import read_tuned, tuned_file

__all__ = ["BUILT_IN_WIDTHS", "Grid", "Row", "read_grid"]

BUILT_IN_WIDTHS = {
    "float": ("quant.bits=32",), "int8": ("quant.bits=8",), "int4": ("quant.bits=4",), "int2": ("quant.bits=2",),
    "int2-m1": ("quant.bits=2", "quant.messages=1"), "int2-strict": ("quant.bits=2", "quant.residual=2"),
}
"""Widths that need no table of their own: INT2 with 1-bit messages, and INT2 with the local term at 2 bits too."""
_DEFAULT_WIDTHS = ("float", "int8", "int4", "int2")

# One part, one thread; a cell that stops is run again from its start, so checkpoints on the way are lost time.
_EVERY_CELL = ("cluster.threads=1", "train.checkpoint_every=1000000")

# Of references, for the record: float, and no layer of ours, whose step size would restrict `mu`.
_REFERENCE_WORDS = ("quant.bits=32", "propagation.kind=none")
MOST_FAULTS, LONGEST_FAULT = 12, 400
"""Of a file's: so many are told, each cut."""

_LIST, _WHOLE, _WORD, _DEPTHS = "a list of words", "a whole number of at least 1", "a word", "a list of whole numbers"
_FLAG = "true or false"
_KEYS = {
    "the grid": {"seeds": _WHOLE, "jobs": _WHOLE, "layers": _DEPTHS, "reference": _WORD, "settings": _LIST,
                 "default_widths": _LIST, "tuned": _WORD, "search": "tables", "datasets": "tables",
                 "methods": "tables", "widths": "tables"},
    "datasets": {"source": _WORD, "settings": _LIST, "seeds": _WHOLE, "methods": _LIST, "widths": _LIST,
                 "layers": _DEPTHS, "hops": _WHOLE, "parts": _WHOLE, "shifts": _FLAG, "tuned": _FLAG,
                 "space": "tables"},
    "methods": {"system": _WORD, "settings": _LIST, "datasets": _LIST, "widths": _LIST, "layers": _DEPTHS,
                "tuned": _FLAG, "space": "tables"},
    "widths": {"settings": _LIST},
    "search": {"trials": _WHOLE, "seeds": _WHOLE, "finals": _WHOLE, "final_seeds": _WHOLE, "finalist": _WORD,
               "settings": _LIST, "space": "tables"},
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")  # datasets become folders
_ORIGIN = " (--set)"
"""What `load_config` says of a setting that is wrong by itself; not of settings that don't go together."""
_OWN = {"seed": "the grid's `seeds` gives it", "propagation.layers": "the grid's `layers` gives it",
        "cluster.threads": "every cell has one thread", "train.checkpoint_every": "cells are not resumed"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the table: the same settings under several seeds.

    Attributes:
        seeds: their number; they are 0 … seeds-1. config: resolved, with seed 0.
        shifts: predict shifted graphs too, see `bench/shifts.py`; references don't. system: `qgnn`, or one of
            REFERENCES. tuned: whether a search found its settings.
    """

    dataset: str
    method: str
    width: str
    layers: int
    seeds: int
    config: RunConfig
    shifts: bool = False
    system: str = OWN
    tuned: bool = False

    @property
    def name(self) -> str:
        """As `--only` looks at it, e.g. `cora/recipe/int2/K10`."""
        return f"{self.dataset}/{self.method}/{self.width}/K{self.layers}"

    def at(self, seed: int) -> RunConfig:
        """The settings of one seed."""
        return dataclasses.replace(self.config, seed=seed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """A checked grid.

    Attributes:
        sources: dataset → graph source; a file's path is whole. hops, parts: dataset → those of its store.
        rows: all, in the order of the file.
        shown: those that `only` leaves; the others can still be what differences are taken against.
        reference: name of the width of the differences. jobs: processes at a time, None where the file is silent.
        text: the file, as read. table: what it says, of the right shape. file: its path.
    """

    sources: dict[str, str]
    hops: dict[str, int]
    parts: dict[str, int]
    rows: tuple[Row, ...]
    shown: tuple[Row, ...]
    reference: str
    jobs: int | None
    text: str
    table: dict[str, Any]
    file: str


def read_grid(path: str | Path, *, data: str | Path | None = None, seeds: int | None = None,
              only: str | None = None, search: bool = False) -> Grid:
    """Read a grid file and check every row's settings.

    Args:
        data: folder of relative sources, default the grid file's. seeds: replaces every number of seeds in the file.
        only: show the rows whose name contains this text; other rows' sources need not exist, and rows without tuned
            settings are left out.
        search: for `qgnn bench search`: with the settings of its table, without tuned ones.
    Raises:
        ConfigError: names *every* fault of the file: unknown keys and names (with the near one), values that don't
            fit, sources that are not there, settings that `qgnn train` would refuse.
        InputError: there is no such file, or `only` leaves no row.
    """
    path = Path(path)
    try:
        text = read_bytes(path, LARGEST_TOML).decode("utf-8")
        table = parse_toml(text)
    except (FileNotFoundError, IsADirectoryError):
        raise InputError("no such grid file", file=str(path)) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"not a TOML file: {reason(error)}", file=str(path)) from None
    faults = _faults_of_shape(table)
    if faults:  # the rows cannot be told from a file whose tables are not what they should be
        raise ConfigError(_told(faults), file=str(path))
    reader = _Reader(table, path, Path(data) if data is not None else path.parent, seeds, only or "", search)
    grid = reader.read(text)
    if reader.faults:
        raise ConfigError(_told(reader.faults), file=str(path))
    if not grid.shown:
        like = f"; names are like {grid.rows[0].name}" if grid.rows else ""
        raise InputError(f"--only {only}: no row's name contains it{like}", file=str(path))
    return grid


def _told(faults: list[str]) -> str:
    """As many faults as a message has room for, however long the names in them are."""
    more = [f"and {len(faults) - MOST_FAULTS} more"] if len(faults) > MOST_FAULTS else []
    return "; ".join([short(fault, LONGEST_FAULT) for fault in faults[:MOST_FAULTS]] + more)


def _faults_of_shape(table: dict[str, Any]) -> list[str]:
    """Keys that are not known, and values of the wrong type."""
    faults = _unfit("the grid", "", table) + _unfit("search", "search.", _tables(table, "search"))
    for kind in ("datasets", "methods", "widths"):
        for name, inner in _tables(table, kind).items():
            if not isinstance(inner, dict):
                faults.append(f"{kind}.{name}: expected a table, [{kind}.{name}]")
            else:
                faults += _unfit(kind, f"{kind}.{name}.", inner)
            if not _NAME.fullmatch(name):
                faults.append(f"{kind}.{name}: expected a name of letters, digits and - _ . + alone")
    for kind in ("datasets", "methods"):
        if not _tables(table, kind):
            faults.append(f"{kind}: expected at least one table [{kind}.NAME]")
    return faults


def _tables(table: dict[str, Any], kind: str) -> dict[str, Any]:
    inner = table.get(kind, {})
    return inner if isinstance(inner, dict) else {}


def _unfit(kind: str, prefix: str, table: dict[str, Any]) -> list[str]:
    faults = []
    for key, value in table.items():
        expected = _KEYS[kind].get(key)
        if expected is None:
            faults.append(f"{prefix}{short(key)}: unknown key" + _near(short(key), _KEYS[kind]))
        elif not _fits(expected, value):
            got = repr(value) if isinstance(value, str) else value
            faults.append(f"{prefix}{key}={short(got)}: expected {expected}" +
                          (" of at least 1" if expected == _DEPTHS else ""))
    if kind == "datasets" and "source" not in table:
        faults.append(f"{prefix}source: missing; e.g. source = \"graph.npz\"")
    return faults


def _fits(expected: str, value: Any) -> bool:
    if expected == "tables":
        return isinstance(value, dict)
    if expected == _FLAG:
        return isinstance(value, bool)
    if expected == _WORD:
        return isinstance(value, str) and bool(value)
    if expected == _LIST:
        return isinstance(value, list) and all(isinstance(v, str) for v in value)
    if expected == _DEPTHS:
        return isinstance(value, list) and bool(value) and all(_fits(_WHOLE, v) for v in value)
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _near(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""


class _Reader:
    """From well-formed tables to rows; `faults` collects what is wrong with their names and settings."""

    def __init__(self, table: dict[str, Any], file: Path, data: Path, seeds: int | None, only: str,
                 search: bool) -> None:
        self.faults: list[str] = []
        self._table, self._file, self._data, self._seeds, self._only = table, file, data, seeds, only
        self._tuned = file.parent / table["tuned"] if "tuned" in table and not search else None
        self._untuned: list[Path] = []
        self._left_out: set[tuple[str, str]] = set()
        self._last = table.get("search", {}).get("settings", []) if search else []
        self._datasets, self._methods = table["datasets"], table["methods"]
        own = {name: inner["settings"] for name, inner in table.get("widths", {}).items() if "settings" in inner}
        self._widths: dict[str, Sequence[str]] = {**BUILT_IN_WIDTHS, **own}
        for name in set(table.get("widths", {})) - set(self._widths):
            self._fault(f"widths.{name}.settings: missing; only {', '.join(BUILT_IN_WIDTHS)} have their own")
        self._usual = table.get("default_widths", list(dict.fromkeys([*_DEFAULT_WIDTHS, *table.get("widths", {})])))
        self._reference = table.get("reference", "float")
        self._known = {"methods": self._methods, "widths": self._widths, "datasets": self._datasets}

    def read(self, text: str) -> Grid:
        self._check_names()
        for place, words in self._lists():
            self._check_words(place, words)
        rows = [row for name in self._datasets for row in self._rows_of(name)]
        if self._untuned:
            self._fault(f"tuned: no settings of {len(self._untuned)} rows, e.g. no file {self._untuned[0]}; `qgnn "
                        "bench search` writes them, and `tuned = false` of a dataset or method takes none")
        self._check_use(rows)
        shown = tuple(row for row in rows if self._only in row.name)
        wanted = {row.dataset for row in shown} if not self.faults else self._datasets
        sources = {name: self._source(name, inner["source"], name in wanted)
                   for name, inner in self._datasets.items()}
        hops, parts = ({name: inner.get(key, usual) for name, inner in self._datasets.items()}
                       for key, usual in (("hops", 0), ("parts", 1)))
        return Grid(sources=sources, hops=hops, parts=parts, rows=tuple(rows), shown=shown, reference=self._reference,
                    jobs=self._table.get("jobs"), text=text, table=self._table, file=str(self._file))

    def _fault(self, text: str) -> None:
        if text not in self.faults:
            self.faults.append(text)

    def _lists(self) -> list[tuple[str, Sequence[str]]]:
        """Every list of settings, and what it is called."""
        named = [(f"{kind}.{name}", inner.get("settings", [])) for kind in ("datasets", "methods")
                 for name, inner in self._table[kind].items()]
        return [("settings", self._table.get("settings", [])), ("search", self._last), *named,
                *((f"widths.{name}", words) for name, words in self._widths.items())]

    def _check_names(self) -> None:
        """Names in restriction lists that nobody defines, and keys that don't go together."""
        for name, inner in self._datasets.items():
            if inner.get("shifts", False) and "hops" in inner:
                self._fault(f"datasets.{name}.hops: shifted graphs are made without hops; leave shifts out")
            references = [method for method in inner.get("methods", self._methods) if self._refers(method, name)]
            if inner.get("parts", 1) > 1 and references:
                self._fault(f"datasets.{name}.parts: references train on one part; leave out {', '.join(references)}, "
                            f"by datasets.{name}.methods")
        places = [("default_widths", "widths", self._usual), ("reference", "widths", [self._reference])]
        places += [(f"{kind}.{name}.{key}", key, inner[key]) for kind in ("datasets", "methods")
                   for name, inner in self._table[kind].items() for key in self._known if key in inner]
        for place, kind, names in places:
            for name in names:
                if name not in self._known[kind]:
                    self._fault(f"{place}: there is no {kind[:-1]} {name!r}{_near(name, self._known[kind])}")
        for name, inner in self._methods.items():
            system = inner.get("system", OWN)
            if system in REFERENCES:
                self._check_reference(name, system, inner)
            elif system != OWN:
                self._fault(f"methods.{name}.system={system}: expected {', '.join((OWN, *REFERENCES))}"
                            f"{_near(system, (OWN, *REFERENCES))}")

    def _refers(self, method: str, dataset: str) -> bool:
        inner = self._methods.get(method, {})
        return inner.get("system", OWN) != OWN and dataset in inner.get("datasets", [dataset])

    def _check_reference(self, name: str, system: str, inner: dict[str, Any]) -> None:
        """What a method says that its reference has no use for."""
        if inner.get("widths", [REFERENCE_WIDTH]) != [REFERENCE_WIDTH]:
            self._fault(f"methods.{name}.widths: {system} has {REFERENCE_WIDTH} alone")
        if "layers" in inner and REFERENCES[system].depth is not None:
            self._fault(f"methods.{name}.layers: {system} always has {REFERENCES[system].depth}: "
                        f"{REFERENCES[system].about}")
        for word in inner.get("settings", []):
            key = word.partition("=")[0].strip()
            if key in known_keys() and key not in _OWN and not REFERENCES[system].uses(key):
                self._fault(f"methods.{name}: {key}: {system} has no use for it; it is {REFERENCES[system].about}")

    def _check_words(self, place: str, words: Sequence[str]) -> None:
        """What is wrong with each setting alone, even where a later one hides it from every row."""
        for word in words:
            key = word.partition("=")[0].strip()
            if key in _OWN:
                self._fault(f"{place}: {key}: {_OWN[key]}")
            elif key == "train.metric" and place.partition(".")[0] in ("methods", "widths"):
                self._fault(f"{place}: train.metric: belongs to a dataset, or to the grid's settings")
            else:
                wrong = _refused([word])
                if wrong and _ORIGIN in wrong:
                    self._fault(f"{place}: {wrong.replace(_ORIGIN, '')}")

    def _rows_of(self, name: str) -> list[Row]:
        dataset = self._datasets[name]
        seeds = self._seeds or dataset.get("seeds", self._table.get("seeds", 20))
        rows = []
        for method, inner in self._methods.items():
            if method not in dataset.get("methods", self._methods) or name not in inner.get("datasets", [name]):
                continue
            own = inner.get("system", OWN)
            depths = _both(inner.get("layers"), dataset.get("layers"), self._table.get("layers", [10]))
            if own == OWN:
                widths = _both(inner.get("widths"), dataset.get("widths"), self._usual)
            else:
                widths, depth = [REFERENCE_WIDTH], REFERENCES[own].depth if own in REFERENCES else None
                depths = depths if depth is None else [depth]
            for width in widths:
                for layers in depths:
                    row = f"{name}/{method}/{width}/K{layers}"
                    found = self._tuned_words(name, method, width, row)
                    config = self._resolve(name, method, width, layers, found or []) if found is not None else None
                    if config is not None:
                        rows.append(Row(dataset=name, method=method, width=width, layers=layers, seeds=seeds,
                                        config=config, system=own, tuned=bool(found),
                                        shifts=own == OWN and dataset.get("shifts", False)))
        if not rows and not self.faults and ("datasets", name) not in self._left_out:
            self._fault(f"datasets.{name}: no row is left; its lists and the methods' have nothing in common")
        return rows

    def _tuned_words(self, dataset: str, method: str, width: str, row: str) -> list[str] | None:
        """What a search found for a row: [] where the row takes nothing, None where there is no file to take it of."""
        wanted = (inner.get("tuned", True) for inner in (self._datasets[dataset], self._methods[method]))
        if self._tuned is None or not all(wanted):
            return []
        file = tuned_file(self._tuned, dataset, method, width)
        try:
            words = read_tuned(file)
        except ConfigError as error:
            self._fault(str(error))
            return None
        if words is None:
            self._left_out |= {("datasets", dataset), ("methods", method), ("widths", width)}
            if self._only in row:
                self._untuned.append(file)
            return None
        self._check_words(str(file), words)
        return words

    def _resolve(self, dataset: str, method: str, width: str, layers: int, tuned: list[str]) -> RunConfig | None:
        system = self._methods[method].get("system", OWN)
        if width not in self._widths or system not in (OWN, *REFERENCES):
            return None  # named by _check_names
        words = [*used_words(system, [*self._table.get("settings", []), *self._datasets[dataset].get("settings", [])]),
                 *self._methods[method].get("settings", [])]
        words += [*(self._widths[width] if system == OWN else _REFERENCE_WORDS), *used_words(system, self._last),
                  *used_words(system, tuned), f"propagation.layers={max(layers, 1)}", *_EVERY_CELL]
        wrong = _refused(words)
        if wrong is None:
            return load_config(overrides=words)
        if _ORIGIN not in wrong:  # else _check_words has told it, with its place
            self._fault(f"{dataset}/{method}/{width}/K{layers}: {wrong}")
        return None

    def _check_use(self, rows: list[Row]) -> None:
        """A method or width that no row uses is a slip of the pen; so are faults in one."""
        if self.faults:
            return
        used = {("methods", row.method) for row in rows} | {("widths", row.width) for row in rows} | self._left_out
        for kind in ("methods", "widths"):
            for name in self._table.get(kind, {}):
                if (kind, name) not in used:
                    self._fault(f"{kind}.{name}: no row uses it")

    def _source(self, name: str, source: str, wanted: bool) -> str:
        """The source with a relative path set under the data folder, where it has to be if it is wanted."""
        kind, colon, rest = source.partition(":")
        prefix, place = ("parquet:", rest) if colon and kind == "parquet" else ("", source)
        if not prefix and not source.endswith(".npz"):
            return source
        full = self._data / place  # an absolute place stays what it is
        if wanted and not full.exists():
            self._fault(f"datasets.{name}.source: no such file {full}; --data names the folder of the grid's files")
        return f"{prefix}{full.resolve()}"


def _both(first: list[Any] | None, second: list[Any] | None, usual: Sequence[Any]) -> list[Any]:
    """What both lists allow, each once, in the first one's order; a list that is not given allows everything."""
    chosen = first if first is not None else second if second is not None else usual
    return [v for v in dict.fromkeys(chosen) if second is None or v in second]


def _refused(words: Sequence[str]) -> str | None:
    try:
        load_config(overrides=list(words))
    except ConfigError as error:
        return error.message
    return None
