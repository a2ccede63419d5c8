# SPDX-License-Identifier: Apache-2.0
"""Runs that learned nothing, or began far off: what their own figures say of it, for a warning."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["doubt"]

FIRST, TIMES = 3, 10.0
"""Epochs whose loss is looked at, and how many times a guess's loss is too much: a network that starts on features of
about 1 has some twice a guess's."""
ADVICE = ("are features of very different scales? `qgnn partition --standardise` brings dense ones to one; else try "
          "another train.lr")


def doubt(records: Sequence[Mapping[str, Any]], num_classes: int, metric: str, valid: float | None,
          class_nodes: Sequence[int] | None) -> str:
    """Why a run's settings or features should be looked at, in words; empty where nothing says so.

    Args:
        records: its epochs, each with `epoch` and `loss`. metric: that chose the best epoch; accuracy alone is held
            against the most frequent class, as others are chosen where one class is nearly all.
        valid: validation accuracy at the best epoch; None before there is one. class_nodes: validation nodes of each
            class, where they are known.

    >>> doubt([{"epoch": 1, "loss": 1.7}], 5, "accuracy", 0.25, [3, 1, 1, 1, 1])[:64]
    'the best validation accuracy, 25.00 %, is no better than that of'
    >>> doubt([{"epoch": 1, "loss": 1.7}], 5, "accuracy", 0.75, [3, 1, 1, 1, 1])
    ''
    """
    found, guess = [], math.log(max(num_classes, 2))
    loss = max((one["loss"] for one in records if one["epoch"] <= FIRST), default=0.0)
    if loss > TIMES * guess:
        found.append(f"the loss was {loss:.3g} in the first epochs, where a guess among the classes has {guess:.2g}")
    share = max(class_nodes) / sum(class_nodes) if class_nodes and any(class_nodes) else 1.0
    if metric == "accuracy" and valid is not None and valid <= share < 1:
        found.append(f"the best validation accuracy, {100 * valid:.2f} %, is no better than that of naming the most "
                     f"frequent class for every node, {100 * share:.2f} %")
    return f"{', and '.join(found)}; {ADVICE}" if found else ""
