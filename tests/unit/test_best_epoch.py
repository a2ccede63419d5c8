# SPDX-License-Identifier: Apache-2.0
"""Which epoch is the best one: the validation figure, then the lower validation loss, then the earlier."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qgnn_dist.config import load_config
from qgnn_dist.training.checkpoint import Progress
from qgnn_dist.training.loop import _run_epoch


class _Pool:
    """A worker whose epochs are given: right answers of ten validation nodes, and their mean loss."""

    size = 1

    def __init__(self, epochs: list[tuple[int, float]]) -> None:
        self._epochs, self.kept = epochs, list[int]()
        self._epoch = 0

    def call(self, method: str, *args: Any, timeout_s: float) -> list[Any]:
        if method == "keep_best":
            self.kept.append(self._epoch)
            return [None]
        self._epoch = args[0]
        right, loss = self._epochs[self._epoch - 1]
        confusion = np.array([[right, 10 - right], [0, 0]])
        evaluation = {"confusion": dict.fromkeys(("train", "valid", "test"), confusion), "valid_loss": (10 * loss, 10),
                      "clipped": {}}
        return [{"loss": 1.0, "evaluation": evaluation, "multipliers": [], "residuals": [], "clamps": 0,
                 "wire_bytes": {}, "train_s": 0.0, "wait_s": {}, "leaving": False}]


@pytest.mark.parametrize(("epochs", "kept"), [
    ([(5, 1.0), (6, 2.0), (6, 1.5), (6, 1.7), (5, 0.1)], [1, 2, 3]),
    ([(7, 1.0), (7, 1.0), (7, 1.0)], [1]),
    ([(0, 3.0), (0, 2.0)], [1, 2]),
    ([(4, float("inf")), (4, 9.0), (4, float("nan"))], [1, 2]),
])
def test_the_lower_validation_loss_decides_ties(epochs: list[tuple[int, float]], kept: list[int]) -> None:
    pool, progress = _Pool(epochs), Progress()
    for _ in epochs:
        _run_epoch(pool, load_config(), progress)  # type: ignore[arg-type]
    assert pool.kept == kept
    assert progress.best_epoch == kept[-1]
    assert progress.best_accuracy["valid"] == epochs[kept[-1] - 1][0] / 10
