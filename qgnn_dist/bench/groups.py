# SPDX-License-Identifier: Apache-2.0
"""Who pays for few bits: a cell's test nodes by degree, by class and by confidence, and rows of them over seeds.

This module loads nothing heavy itself, as `bench/cells.py`.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .spread import deviation, mean, paired, points

if TYPE_CHECKING:
    from .written import Tables

__all__ = ["LEAST_NODES", "bucket_name", "cell_groups", "group_tables", "row_groups"]

SHOWN_CLASSES = 12
"""Columns of a table by class: the rarest ones; table.json has all."""
LEAST_NODES = 10
"""Test nodes of a bucket of degree that tables and pictures show: of fewer, one node is worth over 10 points."""
_KEYS = ("method", "width", "layers")
_FIRST = ["method", "width", "K"]
_RIGHT = {"degree": ("by_degree", "accuracy"), "class": ("by_class", "recall")}
"""Kind of group → where a cell's `groups` has it, and its figure there."""


def cell_groups(store: Path, predictions: Path) -> dict[str, Any]:
    """`inference.groups.groups` of what was predicted for a store of one part.

    Args: predictions: folder that `predict` wrote, its rows by rising source index.
    """
    import numpy as np
    import pyarrow.parquet as pq

    from ..data.graph import TEST, TRAIN
    from ..inference.groups import groups
    from ..inference.output import part_file
    from ..store.reader import Store

    part = Store.open(store).part(0)
    table = pq.read_table(predictions / part_file(0), columns=["class", "confidence"])
    order = np.argsort(part.source_index, kind="stable")
    assert part.labels is not None
    assert part.split is not None
    split = part.split[order]
    return groups(table["class"].to_numpy(), table["confidence"].to_numpy(), part.labels[order], part.degree[order],
                  split == TEST, split == TRAIN)


def row_groups(done: Mapping[int, dict[str, Any]], other: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """What a row of table.json says of groups; cells without `groups` are left out.

    Args: done: seed → cell. other: the reference row's; none where there is none, or it is this row itself.
    Returns: `ece` {mean, sd, difference}; `by_degree`, a list of {from, to, nodes, mean, sd, difference}; `by_class`,
        of {class, train, train_share, nodes, mean, sd, precision, difference}, mean being of the recall; `halves`: see
        `_halves`; `reliability`: nodes, accuracy and mean confidence in each bin, all seeds together. Differences are
        {mean, se, pairs}, paired by seed, null without a reference.
    """
    own, base = ({seed: cell["groups"] for seed, cell in cells.items() if cell.get("groups")}
                 for cells in (done, other))
    if not own:
        return {"ece": None, "by_degree": [], "by_class": [], "halves": {}, "reliability": None}
    first = next(iter(own.values()))
    degrees, classes, train = first["by_degree"], first["by_class"], first["train"]
    by_degree = [{"from": low, "to": degrees["to"][i], "nodes": degrees["nodes"][i], **_figures(own, base, "degree", i)}
                 for i, low in enumerate(degrees["from"])]
    by_class = [{"class": i, "train": train[i] if train else None,
                 "train_share": train[i] / sum(train) if train else None, "nodes": nodes,
                 **_figures(own, base, "class", i),
                 "precision": mean([g["by_class"]["right"][i] / g["by_class"]["predicted"][i] for g in own.values()
                                    if g["by_class"]["predicted"][i]])} for i, nodes in enumerate(classes["nodes"])]
    # Rare is what has few training nodes; where all classes have as many, as in public splits, few in the test.
    rarity = [(train[i] if train else 0, nodes) for i, nodes in enumerate(classes["nodes"])]
    found = {"degree": _halves(own, base, "degree", [(low, 0) for low in degrees["from"]]),
             "class": _halves(own, base, "class", rarity)}
    return {"ece": _over_seeds({seed: g["ece"] for seed, g in own.items()}, {s: g["ece"] for s, g in base.items()}),
            "by_degree": by_degree, "by_class": by_class,
            "halves": {kind: half for kind, half in found.items() if half is not None},
            "reliability": _pooled([g["reliability"] for g in own.values()])}


def _over_seeds(own: Mapping[int, float], base: Mapping[int, float]) -> dict[str, Any]:
    values = list(own.values())
    return {"mean": mean(values), "sd": deviation(values), "difference": paired(own, base) if base else None}


def _figures(own: Mapping[int, Any], base: Mapping[int, Any], kind: str, index: int) -> dict[str, Any]:
    """A group's figure over seeds; nothing of a class that no test node has."""
    place, figure = _RIGHT[kind]
    mine, theirs = ({seed: g[place][figure][index] for seed, g in some.items()
                     if g[place][figure][index] is not None} for some in (own, base))
    return _over_seeds(mine, theirs)


def _halves(own: Mapping[int, Any], base: Mapping[int, Any], kind: str,
            keys: Sequence[tuple[int, int]]) -> dict[str, Any] | None:
    """The groups of the lower keys, near to half of the test nodes, against the others.

    Returns: `lower` and `upper`: {nodes, mean, sd, difference}, mean being of the share of right answers; `members`,
        the lower groups' places; `beyond`: {mean, se, pairs} of lower minus upper, less the reference's: below 0 where
        the lower half pays more. None where all groups have one key.
    """
    place = _RIGHT[kind][0]
    nodes = next(iter(own.values()))[place]["nodes"]
    total, cut = sum(nodes), None
    for key in sorted({key for key, count in zip(keys, nodes) if count})[:-1]:  # equal keys stay together
        below = sum(count for count, one in zip(nodes, keys) if one <= key)
        if cut is None or abs(2 * below - total) < abs(2 * cut[1] - total):
            cut = key, below
    if cut is None:
        return None
    sides = {name: [i for i, key in enumerate(keys) if nodes[i] and (key <= cut[0]) == (name == "lower")]
             for name in ("lower", "upper")}

    def share(some: Mapping[int, Any], name: str) -> dict[int, float]:
        return {seed: sum(g[place]["right"][i] for i in sides[name]) / sum(nodes[i] for i in sides[name])
                for seed, g in some.items()}

    def gap(some: Mapping[int, Any]) -> dict[int, float]:
        lower, upper = share(some, "lower"), share(some, "upper")
        return {seed: lower[seed] - upper[seed] for seed in lower}

    return {**{name: {"nodes": sum(nodes[i] for i in members), **_over_seeds(share(own, name), share(base, name))}
               for name, members in sides.items()},
            "members": sides["lower"], "beyond": paired(gap(own), gap(base)) if base else None}


def _pooled(bins: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All seeds' nodes in each bin together."""
    nodes = [sum(column) for column in zip(*(b["nodes"] for b in bins))]
    right = [sum(column) for column in zip(*(b["right"] for b in bins))]
    sure = [sum(n * (c or 0.0) for n, c in column)
            for column in zip(*(zip(b["nodes"], b["confidence"]) for b in bins))]
    return {"nodes": nodes, "accuracy": [r / n if n else None for r, n in zip(right, nodes)],
            "confidence": [s / n if n else None for s, n in zip(sure, nodes)]}


def bucket_name(low: int, high: int) -> str:
    """As in a heading: 0, 1, 2, 3–4, …"""
    return str(low) if low == high else f"{low}–{high}"


def group_tables(rows: Sequence[dict[str, Any]]) -> Tables:
    """Tables of one dataset's rows: calibration and halves, by degree, by class."""
    rows = [row for row in rows if row["ece"]]
    if not rows:
        return []
    degrees = [i for i, g in enumerate(rows[0]["by_degree"]) if g["nodes"] >= LEAST_NODES]
    classes = _rarest_first(rows[0]["by_class"])
    some = f" ({len(classes)} rarest of {len(rows[0]['by_class'])})" if len(classes) < len(rows[0]["by_class"]) else ""
    by_class = [_at(row["by_class"], classes) for row in rows]
    return [
        ("calibration, and who pays, points (difference to the reference)", *_summary(rows)),
        ("accuracy by degree (test nodes), points (difference to the reference)",
         [*_FIRST, *(f"{bucket_name(g['from'], g['to'])} ({g['nodes']})" for g in _at(rows[0]["by_degree"], degrees))],
         [[*_names(row), *(_text(group) for group in _at(row["by_degree"], degrees))] for row in rows]),
        (f"recall by class{some}, with its share of training (test nodes), points (difference to the reference)",
         [*_FIRST, *(_class_heading(g) for g in by_class[0])],
         [[*_names(row), *(_text(group) for group in found)] for row, found in zip(rows, by_class)])]


def _summary(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """ECE; both halves by degree and by class, and how much more the lower ones lose."""
    columns, kinds = [*_FIRST, "ECE"], list(rows[0]["halves"])
    for kind in kinds:
        half = rows[0]["halves"][kind]
        if kind == "degree":
            top = rows[0]["by_degree"][half["members"][-1]]["to"]
            names = f"degree ≤ {top}", f"degree > {top}"
        else:
            rarer = len(half["members"])
            names = f"{rarer} rarer class{'es' if rarer > 1 else ''}", "other classes"
        columns += [f"{name} ({half[side]['nodes']})" for name, side in zip(names, ("lower", "upper"))]
        columns.append("beyond")
    lines = []
    for row in rows:
        line = [*_names(row), _text(row["ece"], spread=True)]
        for kind in kinds:
            half = row["halves"][kind]
            beyond = half["beyond"] or {"mean": None, "se": None}
            line += [_text(half["lower"]), _text(half["upper"]), points(beyond["mean"], beyond["se"], sign="+")]
        lines.append(line)
    return columns, lines


def _names(row: Mapping[str, Any]) -> list[str]:
    return [str(row[key]) for key in _KEYS]


def _text(figures: dict[str, Any], spread: bool = False) -> str:
    text = points(figures["mean"], figures["sd"] if spread else None)
    difference = figures["difference"]
    if difference is None or difference["mean"] is None:
        return text
    return f"{text} ({points(difference['mean'], difference['se'], sign='+')})"


def _rarest_first(by_class: Sequence[dict[str, Any]]) -> list[int]:
    """Classes that test nodes have, in the order of `row_groups`' rarity."""
    here = [group for group in by_class if group["nodes"]]
    here.sort(key=lambda group: (group["train"] or 0, group["nodes"]))
    return [group["class"] for group in here[:SHOWN_CLASSES]]


def _at(found: Sequence[dict[str, Any]], places: Sequence[int]) -> list[dict[str, Any]]:
    return [found[place] for place in places]


def _class_heading(group: dict[str, Any]) -> str:
    share = "" if group["train_share"] is None else f", {100 * group['train_share']:.1f} %"
    return f"class {group['class']}{share} ({group['nodes']})"
