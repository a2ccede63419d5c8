# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch

from qgnn_dist.training.metrics import (
    LARGEST_LOSS,
    LOSS_ROWS,
    accuracy,
    cross_entropy,
    figures,
    loss_gradient,
    macro_f1,
    roc_auc,
    valid_loss,
)


def test_accuracy_and_f1() -> None:
    confusion = np.array([[3, 1, 0], [0, 2, 0], [0, 0, 0]])
    assert accuracy(confusion) == pytest.approx(5 / 6)
    assert macro_f1(confusion) == pytest.approx((6 / 7 + 4 / 5) / 2)
    assert accuracy(np.zeros((2, 2), np.int64)) == 0.0


def test_roc_auc_counts_pairs() -> None:
    rng = np.random.default_rng(0)
    margins, labels = rng.integers(0, 6, 60).astype(np.float32), rng.integers(0, 2, 60)
    positive, negative = margins[labels == 1], margins[labels == 0]
    pairs = (positive[:, None] > negative).mean() + 0.5 * (positive[:, None] == negative).mean()
    assert roc_auc(margins, labels) == pytest.approx(pairs)
    assert roc_auc(margins, np.ones(60, np.int64)) == 0.5


def test_figures_add_up_workers() -> None:
    parts = [{"confusion": {"valid": np.array([[1, 0], [1, 0]])}}, {"confusion": {"valid": np.array([[0, 0], [0, 2]])}}]
    accuracies, chosen = figures(parts, "macro_f1")
    assert accuracies == {"valid": 0.75}
    assert chosen == {"valid": pytest.approx((2 / 3 + 4 / 5) / 2)}


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1", "roc_auc"])
def test_there_is_no_figure_of_test_where_no_test_node_has_a_label(metric: str) -> None:
    one = {"confusion": {"train": np.eye(2, dtype=int), "test": np.zeros((2, 2), int)},
           "margins": {name: (np.array([-1.0, 1.0]), np.array([0, 1])) for name in ("train", "test")}}
    assert figures([one, one], metric) == ({"train": 1.0, "test": None}, {"train": 1.0, "test": None})


def test_validation_loss_is_the_mean_cross_entropy_of_all_workers() -> None:
    rng = np.random.default_rng(1)
    scores, labels = (30 * rng.normal(size=(9, 4))).astype(np.float32), rng.integers(0, 4, 9)
    parts = [{"valid_loss": cross_entropy(scores[rows], labels[rows])} for rows in (slice(0, 4), slice(4, 9))]
    wanted = torch.nn.functional.cross_entropy(torch.from_numpy(scores).double(), torch.from_numpy(labels))
    assert valid_loss(parts) == pytest.approx(float(wanted), rel=1e-12)
    assert cross_entropy(scores[:0], labels[:0]) == (0.0, 0)
    scores[3, 1] = np.inf
    assert valid_loss([{"valid_loss": cross_entropy(scores, labels)}]) == LARGEST_LOSS


def test_loss_and_its_gradient_are_torchs() -> None:
    """Over several blocks of rows, of which some are left out; of no rows; of scores that diverged."""
    rng = np.random.default_rng(0)
    scores = (5 * rng.normal(size=(2 * LOSS_ROWS + 900, 7))).astype(np.float32)
    rows = np.sort(rng.choice(len(scores), LOSS_ROWS + 700, replace=False))
    labels = rng.integers(0, 7, len(rows))
    loss, grad = loss_gradient(scores, rows, labels, 9000)
    exact = torch.from_numpy(scores).double().requires_grad_()
    want = torch.nn.functional.cross_entropy(exact[rows], torch.from_numpy(labels), reduction="sum") / 9000
    want.backward()
    assert exact.grad is not None
    assert loss == pytest.approx(want.item(), rel=1e-6)
    assert grad.dtype == np.float32
    np.testing.assert_allclose(grad, exact.grad.numpy(), rtol=1e-5, atol=1e-9)
    nothing, zeros = loss_gradient(scores, rows[:0], labels[:0], 9000)
    assert nothing == 0.0
    assert not zeros.any()
    scores[rows[3], 2], scores[rows[4], 1] = np.nan, np.inf
    assert np.isnan(loss_gradient(scores, rows, labels, 9000)[0])
