# SPDX-License-Identifier: Apache-2.0
"""How fast a machine runs the kernels: measured once, kept in a small JSON file, read with distrust."""
from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files.read import read_json, reason
from ..files.write import make_folder, write_atomically
from ..quant.packed import row_bytes

__all__ = ["LayerRate", "PerceptronRate", "Rates", "cache_file", "load_rates", "save_rates"]

FORMAT_VERSION = 3
LARGEST_FILE = 1 << 20
NEAR_BYTES, FAR_BYTES, LINE_BYTES = 4 << 20, 256 << 20, 64
KINDS = ("training", "frozen", "gradient")
"""Of layers: a training forward (moments recorded, multipliers live), a frozen one, and a backward."""
PERCEPTRON_KINDS = ("forward", "backward", "packed")


@dataclass(frozen=True)
class LayerRate:
    """Nanoseconds of the layers of one kind and width, at one number of columns and rows.

    Attributes:
        start_ns: a row, once a forward. row_ns, edge_ns: a row and a directed edge, in every round.
    """

    kind: str
    bits: int
    columns: int
    rows: int
    start_ns: float
    row_ns: float
    edge_ns: float


@dataclass(frozen=True)
class PerceptronRate:
    """Nanoseconds of the perceptron of one kind and width: forward and backward are training's.

    Attributes:
        value_ns: a row's input or hidden value. weight_ns: a row and weight that meet.
    """

    kind: str
    bits: int
    value_ns: float
    weight_ns: float


@dataclass(frozen=True)
class Rates:
    """What the probe found on one machine.

    Attributes:
        ragged: kind of layers → how much longer rows take that fill no whole vectors of 8 columns.
        threads: that all rates hold for.
        serial: kind of layers or of the perceptron → share of the work that more threads do not speed up.
        far_ns: a neighbour's cache line, more where the messages take FAR_BYTES than where they take NEAR_BYTES.
        read_ns: a feature value, read and coded. score_ns: a score, through softmax and its moments.
        exchange_ns: a byte of a round over loopback, packed, checked and received. round_s: a round of no bytes.
    """

    machine: str
    threads: int
    serial: dict[str, float]
    versions: dict[str, str]
    layers: tuple[LayerRate, ...]
    ragged: dict[str, float]
    perceptron: tuple[PerceptronRate, ...]
    far_ns: float
    read_ns: float
    score_ns: float
    exchange_ns: float
    round_s: float

    def layer(self, kind: str, bits: int, columns: int, rows: int, near: float = 0.0) -> LayerRate:
        """At any number of columns (in proportion) and rows (by the logarithm of the bytes that neighbours lie in).

        Args: near: share of the neighbours that are still in a core's own memory.
        """
        found, size = self._layer(kind, bits, columns, rows), row_bytes(columns, bits)
        measured = [r for r in self.layers if r.kind == kind and r.bits == bits]
        least, most = min(r.rows for r in measured), max(r.rows for r in measured)
        # What lies farther away than the probe's own rows did.
        probed = max(row_bytes(min(r.columns for r in measured), bits) * most, NEAR_BYTES)
        farther = math.log(max(rows * size / probed, 1.0)) / math.log(FAR_BYTES / NEAR_BYTES)
        far_ns = found.edge_ns + self.far_ns * -(-size // LINE_BYTES) * min(farther, 1.0)
        near_ns = min(self._layer(kind, bits, columns, least).edge_ns, far_ns)
        ragged = self.ragged[kind] if columns % 8 else 1.0
        return dataclasses.replace(found, row_ns=found.row_ns * ragged, edge_ns=near * near_ns + (1 - near) * far_ns)

    def _layer(self, kind: str, bits: int, columns: int, rows: int) -> LayerRate:
        """Between what was measured, and beyond in columns."""
        near = [r for r in self.layers if r.kind == kind and r.bits == bits]
        by_columns = []
        for width in sorted({r.columns for r in near}):
            low, high = sorted((r for r in near if r.columns == width), key=lambda r: r.rows)
            at = math.log(max(rows * columns / width, 1) / low.rows) / math.log(high.rows / low.rows)
            by_columns.append(_between(low, high, min(max(at, 0.0), 1.0)))
        few, many = by_columns
        return _between(few, many, (columns - few.columns) / (many.columns - few.columns))

    def perceptron_ns(self, kind: str, bits: int, values: float, weights: float) -> float:
        """A row with so many input and hidden values, and weights that meet it."""
        found = next(r for r in self.perceptron if r.kind == kind and r.bits == bits)
        return found.value_ns * values + found.weight_ns * weights

    def speedup(self, kind: str, threads: int) -> float:
        """Of so many threads over one, of a kind of layers or of the perceptron (Amdahl's law)."""
        return threads / (1 + self.serial[kind] * (threads - 1))


def _between(low: LayerRate, high: LayerRate, at: float) -> LayerRate:
    """Between and beyond two rates; a slope that noise has turned round is not followed beyond them."""
    mixed = {}
    for name in ("start_ns", "row_ns", "edge_ns"):
        a, b = getattr(low, name), getattr(high, name)
        mixed[name] = max(a + (b - a) * at, 0.0) if b > a or 0 <= at <= 1 else min(a, b)
    return dataclasses.replace(low, **mixed)


def cache_file() -> Path:
    """Where `--calibrate` keeps what it found: the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qgnn" / "calibration.json"


def save_rates(rates: Rates, file: Path) -> None:
    """Write a calibration; the folder is made where it is missing."""
    make_folder(file.parent, "the calibration")
    text = json.dumps({"format_version": FORMAT_VERSION, **dataclasses.asdict(rates)}, indent=1) + "\n"
    write_atomically(file, text.encode())


def load_rates(file: Path) -> Rates:
    """Read a calibration.

    Raises: InputError: no such file, or it is damaged or of another version.
    """
    try:
        found = read_json(file, LARGEST_FILE)
        if not isinstance(found, dict) or found.pop("format_version", None) != FORMAT_VERSION:
            raise ValueError(f"not of version {FORMAT_VERSION}")
        return _checked(found)
    except FileNotFoundError:
        raise InputError("no such calibration; --calibrate makes one", file=str(file)) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise InputError(f"not a calibration ({reason(error)}); make a new one with --calibrate",
                         file=str(file)) from None


def _checked(found: dict[str, Any]) -> Rates:
    layers = tuple(LayerRate(**entry) for entry in found.pop("layers"))
    perceptron = tuple(PerceptronRate(**entry) for entry in found.pop("perceptron"))
    rates = Rates(layers=layers, perceptron=perceptron, **found)
    if not isinstance(rates.machine, str) or not isinstance(rates.versions, dict):
        raise ValueError("machine or versions are missing")
    entries: list[Any] = [rates, *layers, *perceptron]
    for entry in entries:
        for field in dataclasses.fields(entry):
            value = getattr(entry, field.name)
            if field.type in ("int", "float") and not (
                    isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e12):
                raise ValueError(f"{field.name} is {value!r}")
    for name, kinds, least, most in (("ragged", KINDS, 1, 100), ("serial", (*KINDS, *PERCEPTRON_KINDS), 0, 1)):
        shares = getattr(rates, name)
        if set(shares) != set(kinds) or not all(type(v) in (int, float) and least <= v <= most
                                                for v in shares.values()):
            raise ValueError(f"{name} is {str(shares)[:60]}")
    for kind in KINDS:
        for bits in (1, 2, 4, 8, 32) if kind != "gradient" else (32,):
            grid = [(r.columns, r.rows) for r in layers if r.kind == kind and r.bits == bits]
            widths, sizes = {c for c, _ in grid}, {n for _, n in grid}
            if len(grid) != 4 or len(set(grid)) != 4 or len(widths) != 2 or len(sizes) != 2 or min(sizes) < 1:
                raise ValueError(f"layers of {bits} bits ({kind}) are missing, or there twice")
    wanted = {(kind, bits) for kind in PERCEPTRON_KINDS for bits in (2, 4, 8, 32)}
    if not wanted <= {(r.kind, r.bits) for r in perceptron} or rates.threads < 1:
        raise ValueError("rates of the perceptron are missing, or the threads are odd")
    return rates
