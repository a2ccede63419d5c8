# SPDX-License-Identifier: Apache-2.0
"""Sections about a model's answers: by degree, by class, calibration, and which classes are taken for which."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from ..inference.examine import MOST_CONFUSED
from .blocks import Bar, BarRow, Bars, Plot, Section, Table, Words
from .curves import Chart, Series
from .draw import figure, matrix, plot_of
from .measure import Looks
from .runs import RunData

__all__ = ["FINAL", "MAKE", "answers_section"]

FINAL = "final.json"
MOST_ROWS, MOST_SMALL, MOST_DRAWN = 24, 12, 40
"""Classes whose bars are shown at once; that fit a small matrix; that a matrix is drawn of."""
MOST_PAIRS = 15
"""Of classes taken for one another, where no matrix is drawn."""
LACKING = "Answers by class and degree are written when training ends (final.json), and this run has none."
MAKE = "qgnn report RUN --store STORE"


def split_of(looks: Looks) -> str:
    """The split that is told of: test, or the best there is."""
    return next((name for name in ("test", "valid", "train") if name in looks.splits), "")


def answers_section(runs: Sequence[RunData], looks: Sequence[Looks]) -> tuple[Section, list[Chart]]:
    """Accuracy by degree and class, confusion, and how far confidences can be trusted; the chart of that beside it."""
    known = [(at, run, one) for at, (run, one) in enumerate(zip(runs, looks)) if one.splits]
    section = Section("answers", "Answers", "Of the nodes of the test split, at the best epoch. In the confusion matrix"
                                            " a cell is as strong as its share of the row; blue is right, orange not.")
    if not known:
        section.blocks.append(Words(LACKING, MAKE))
        return section, []
    keys = [(run.name, at, 0) for at, run, _ in known] if len(runs) > 1 else []
    splits = {split_of(one) for _, _, one in known} - {"test"}
    note = f"Of the {', '.join(sorted(splits))} split where there is no test node." if splits else ""
    told = [(at, one.splits[split_of(one)]) for at, _, one in known]
    section.blocks.append(Bars("Accuracy by degree of the node", _rows([
        (at, [(_range(low, high), share, nodes) for low, high, share, nodes in zip(*(
            split["by_degree"][key] for key in ("from", "to", "accuracy", "nodes")))]) for at, split in told]),
        note, keys))
    by_class = _rows([(at, [(class_label(one, number), share, nodes) for number, (share, nodes) in enumerate(zip(
        one.splits[split_of(one)]["by_class"]["recall"], one.splits[split_of(one)]["by_class"]["nodes"]))])
        for at, _, one in known])
    title, folded = "Share of each class that is found", list[BarRow]()
    if len(by_class) > MOST_ROWS:  # the hardest first
        by_class = sorted(by_class, key=lambda row: min(sum(p[0] for p in bar.pieces) for bar in row.bars))
        by_class, folded = by_class[:MOST_ROWS], by_class[MOST_ROWS:]
        title += f": the {MOST_ROWS} lowest"
    section.blocks.append(Bars(title, by_class, "", keys, folded))
    for run, one in zip(runs, looks):
        section.blocks.append(_confusion(one, f"{run.name}: confusion" if len(runs) > 1 else "Confusion"))
    chart = calibration(runs, looks)
    eces = ", ".join(f"{run.name + ' ' if len(runs) > 1 else ''}{one.splits[split_of(one)]['ece']:.3f}"
                     for _, run, one in known)
    note = f"on the dotted line confidences are right; expected calibration error: {eces}"
    section.blocks.append(plot_of(chart, len(runs) > 1, note))
    return section, [chart]


def calibration(runs: Sequence[RunData], looks: Sequence[Looks]) -> Chart:
    """Accuracy over mean confidence, of the bins that hold a node."""
    series = []
    for at, (run, one) in enumerate(zip(runs, looks)):
        if one.splits:
            bins = one.splits[split_of(one)]["reliability"]
            held = [i for i, nodes in enumerate(bins["nodes"]) if nodes]
            key = ("splits", split_of(one), "reliability", "accuracy")
            series.append(Series(
                run.name if len(runs) > 1 else "measured", at, FINAL, key,
                [bins["confidence"][i] for i in held], [bins["accuracy"][i] for i in held], None, at))
    series.append(Series("right", -1, "", (), [0.0, 1.0], [0.0, 1.0], None, 8, 2))
    return Chart("calibration", "Accuracy by confidence", "confidence", "share", series, dots=True, whole=False)


def _rows(found: Sequence[tuple[int, list[tuple[str, float | None, int]]]]) -> list[BarRow]:
    """A row a label, with a bar of every run that has it."""
    labels = list(dict.fromkeys(label for _, entries in found for label, _, _ in entries))
    by_run = [(at, {label: (share, nodes) for label, share, nodes in entries}) for at, entries in found]
    rows = []
    for label in labels:
        bars, counts = [], set[int]()
        for at, entries in by_run:
            share, nodes = entries.get(label, (None, 0))
            bars.append(Bar([(share or 0.0, at)], figure(share, "share")))
            counts.add(nodes)
        nodes = max(counts)
        rows.append(BarRow(label, bars, f"{nodes:,} node{'s' * (nodes != 1)}"))
    return rows


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}–{high}"


def class_label(looks: Looks, number: int) -> str:
    """A class as a row has it: its number, and its name where there is one."""
    names = looks.class_names
    return f"{number} {names[number]}" if names is not None and number < len(names) else f"class {number}"


def _confusion(looks: Looks, title: str) -> Plot | Table | Words:
    """Which classes are taken for which."""
    if not looks.splits:
        return Words(LACKING, MAKE)
    name = split_of(looks)
    table: list[list[int]] | None = looks.splits[name]["confusion"]
    if table is None:
        return Words(f"There are {len(looks.splits[name]['by_class']['nodes'])} classes; the table of true by "
                     f"predicted ones is kept up to {MOST_CONFUSED}.")
    labels = [class_label(looks, number) for number in range(len(table))]
    if len(table) > MOST_DRAWN:
        return _pairs(table, labels, title)
    tips = [[f"{labels[row]} taken for {labels[column]}: {count:,} of {sum(counts):,}" if row != column else
             f"{labels[row]}: {count:,} of {sum(counts):,} are right" for column, count in enumerate(counts)]
            for row, counts in enumerate(table)]
    svg: Markup = matrix(title, table, "predicted", "true", tips, by_row=True)
    span = 1 if len(table) <= MOST_SMALL else 2
    return Plot(title, svg, f"{sum(map(sum, table)):,} nodes of the {name} split", span=span)


def _pairs(table: list[list[int]], labels: list[str], title: str) -> Table:
    """The most frequent mistakes, where there are too many classes for a picture."""
    wrong: list[tuple[int, int, int]] = sorted(
        ((count, row, column) for row, counts in enumerate(table) for column, count in enumerate(counts)
         if row != column and count), reverse=True)[:MOST_PAIRS]
    rows: list[list[Any]] = [[labels[row], labels[column], f"{count:,}", figure(count / sum(table[row]), "share")]
                             for count, row, column in wrong]
    return Table(f"{title}: the {len(rows)} most frequent mistakes",
                 ["true class", "taken for", "nodes", "of the class"], rows, left=(1,))
