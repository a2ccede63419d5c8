# SPDX-License-Identifier: Apache-2.0
"""Which runs are told to have learned nothing, or to have begun far off."""
from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from qgnn_dist.training.chance import FIRST, TIMES, doubt

EVEN, ONE = (25, 25, 25, 25), (100, 0, 0, 0)


def _doubt(*losses: float, metric: str = "accuracy", valid: float | None = 0.5,
           nodes: Sequence[int] | None = EVEN) -> str:
    return doubt([{"epoch": at, "loss": loss} for at, loss in enumerate(losses, 1)], 4, metric, valid, nodes)


@pytest.mark.parametrize(("metric", "valid", "nodes", "told"), [
    ("accuracy", 0.26, EVEN, False), ("accuracy", 0.25, EVEN, True), ("accuracy", 0.70, (80, 10, 5, 5), True),
    ("roc_auc", 0.70, (80, 10, 5, 5), False), ("accuracy", 1.0, ONE, False), ("accuracy", None, EVEN, False),
    ("accuracy", 0.1, None, False), ("accuracy", 0.0, (0, 0, 0, 0), False)])
def test_the_most_frequent_class_is_what_accuracy_is_held_against(metric: str, valid: float | None,
                                                                  nodes: Sequence[int] | None, told: bool) -> None:
    assert ("most frequent class" in _doubt(1.4, metric=metric, valid=valid, nodes=nodes)) is told


def test_an_enormous_loss_counts_in_the_first_epochs_alone() -> None:
    limit = TIMES * math.log(4)
    calm = [1.4] * FIRST
    assert _doubt() == _doubt(*calm) == _doubt(0.99 * limit) == _doubt(*calm, 1e6) == ""
    for losses in ([1.01 * limit], [*calm[1:], 1e6]):
        assert _doubt(*losses).startswith(f"the loss was {losses[-1]:.3g} in the first epochs")
    assert _doubt(1e6, valid=0.2).count("are features of very different scales?") == 1
