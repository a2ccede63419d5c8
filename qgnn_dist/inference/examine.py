# SPDX-License-Identifier: Apache-2.0
"""A model's last look at a graph: how right its answers are, class by class and degree by degree, and who sends whom.

Legend: n local rows, C classes, P parts.
"""
from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import kernels
from ..comm.trace import Span
from ..data.graph import SPLITS
from ..store.reader import Part
from .groups import Counts, confusion, count, describe

__all__ = ["MOST_CONFUSED", "Examined", "examine", "together"]

MOST_CONFUSED = 256
"""Classes up to which the table of true by predicted classes is kept: 65,536 numbers a split."""


@dataclass(frozen=True)
class Examined:
    """One part's share; those of all parts add up.

    Attributes:
        counts: split → Counts. tables: split → int64 (C, C), true classes by predicted ones; empty above MOST_CONFUSED
            classes. sent_rows: rows that this part sends each part in a round. spans: of the forward, where traced.
        wire: bytes that the forward sent, by kind.
    """

    counts: dict[str, Counts]
    tables: dict[str, np.ndarray]
    sent_rows: list[int]
    spans: list[Span] = field(default_factory=list)
    wire: dict[str, int] = field(default_factory=dict)


def examine(part: Part, scores: np.ndarray, num_classes: int, parts: int) -> Examined:
    """Compare a part's answers with its labels, where it has labels and splits.

    Args: scores: float32 (n, C) of the packed model. num_classes: at least C. parts: P.
    """
    sent = [0] * parts
    for plan in part.peers:
        sent[plan.peer] = len(plan.send_rows)
    if part.labels is None or part.split is None:
        return Examined({}, {}, sent)
    classes, confidence = np.empty(len(scores), np.int32), np.empty(len(scores), np.float32)
    kernels.softmax(scores, classes, confidence, None)
    counts, tables = {}, {}
    for name, number in SPLITS.items():
        rows = part.split == number
        counts[name] = count(classes, confidence, part.labels, part.degree, rows, num_classes)
        if num_classes <= MOST_CONFUSED:
            tables[name] = confusion(classes[rows], part.labels[rows], num_classes)
    return Examined(counts, tables, sent)


def together(parts: Sequence[Examined]) -> dict[str, Any]:
    """All parts' shares, for JSON.

    Returns: `splits`: of each that has a labelled node, `nodes`, `right`, what groups.describe tells, and `confusion`,
        lists (C, C) or null. `sent_rows`: lists (P, P), rows that a part (first) sends another one in a round.
    """
    splits = {}
    for name in parts[0].counts:
        counts = functools.reduce(operator.add, (one.counts[name] for one in parts))
        if counts.nodes:
            table = np.sum([one.tables[name] for one in parts], 0).tolist() if parts[0].tables else None
            splits[name] = {"nodes": counts.nodes, "right": counts.right, **describe(counts), "confusion": table}
    return {"splits": splits, "sent_rows": [one.sent_rows for one in parts]}
