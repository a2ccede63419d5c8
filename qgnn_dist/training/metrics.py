# SPDX-License-Identifier: Apache-2.0
"""From the workers' counts to the figures of an epoch."""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["accuracy", "cross_entropy", "evaluation", "figures", "loss_gradient", "macro_f1", "roc_auc", "valid_loss"]

LOSS_ROWS = 4096
"""Rows that the loss is computed of at a time."""
LARGEST_LOSS = 1e30
"""Stands for a loss that is no number: metrics.jsonl stays JSON, and such an epoch wins no tie."""


def accuracy(confusion: np.ndarray) -> float:
    """Share of right answers. confusion: int64 (C, C), rows true, columns predicted; 0 for no nodes."""
    return float(np.trace(confusion)) / max(int(confusion.sum()), 1)


def macro_f1(confusion: np.ndarray) -> float:
    """Mean F1 over the classes that occur or were predicted."""
    right = np.diag(confusion).astype(np.float64)
    both = confusion.sum(0) + confusion.sum(1)
    seen = both > 0
    return float((2 * right[seen] / both[seen]).mean()) if seen.any() else 0.0


def roc_auc(margins: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve of class 1 against class 0, ties counted half; 0.5 where a class is missing."""
    positive = labels == 1
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if num_positive == 0 or num_negative == 0:
        return 0.5
    _, inverse, counts = np.unique(margins, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts - 1) / 2
    total = float(mean_rank[inverse][positive].sum())
    return (total - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)


def evaluation(scores: np.ndarray, classes: np.ndarray, labels: np.ndarray, rows: Mapping[str, np.ndarray],
               num_classes: int, metric: str) -> dict[str, Any]:
    """One worker's counts, as `figures` and `valid_loss` take them.

    Args:
        scores: float32 (n, C). classes: int (n,), what they say. labels: int64 (n,). rows: split → its labelled rows.
    Returns: `confusion`, split → int64 (C, C); `valid_loss`, sum and count; for roc_auc `margins`, split → scores of
        class 1 less those of class 0, and labels.
    """
    confusion = {name: np.bincount(labels[some] * num_classes + classes[some], minlength=num_classes**2).reshape(
        num_classes, num_classes) for name, some in rows.items()}
    valid = rows["valid"]
    result: dict[str, Any] = {"confusion": confusion, "valid_loss": cross_entropy(scores[valid], labels[valid])}
    if metric == "roc_auc":
        margin = scores[:, 1] - scores[:, 0]
        result["margins"] = {name: (margin[some], labels[some]) for name, some in rows.items()}
    return result


def figures(evaluations: Sequence[dict[str, Any]], metric: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Accuracy and the chosen metric of every split, floats, from all workers' evaluations in rank order; None of test
    where no test node has a label."""
    accuracies, chosen = dict[str, Any](), dict[str, Any]()
    for name in evaluations[0]["confusion"]:
        confusion = sum(e["confusion"][name] for e in evaluations)
        if name == "test" and not confusion.any():
            accuracies[name] = chosen[name] = None
            continue
        accuracies[name] = accuracy(confusion)
        if metric == "roc_auc":
            margins = np.concatenate([e["margins"][name][0] for e in evaluations])
            labels = np.concatenate([e["margins"][name][1] for e in evaluations])
            chosen[name] = roc_auc(margins, labels)
        else:
            chosen[name] = macro_f1(confusion) if metric == "macro_f1" else accuracies[name]
    return accuracies, chosen


def cross_entropy(scores: np.ndarray, labels: np.ndarray) -> tuple[float, int]:
    """Sum over the rows of −log softmax(scores)[label], in double, and the number of rows.

    Args: scores float32 (n, C); labels int64 (n,), in [0, C).
    """
    with np.errstate(invalid="ignore"):
        x = scores.astype(np.float64)
        x -= x.max(axis=1, keepdims=True, initial=-math.inf)
        own = x[np.arange(len(x)), labels]
        return float((np.log(np.exp(x).sum(1)) - own).sum()), len(x)


def loss_gradient(scores: np.ndarray, rows: np.ndarray, labels: np.ndarray,
                  count: int) -> tuple[float, np.ndarray]:
    """Σ over `rows` of −log softmax(scores)[label] over `count`, and its gradient, float32 of the shape of `scores`.

    Args: rows int64 (m,), each once; labels int64 (m,), theirs. count: training nodes of all workers.
    """
    grad = np.zeros_like(scores)
    total = 0.0
    with np.errstate(invalid="ignore"):  # of scores that diverged: the loss says so
        for begin in range(0, len(rows), LOSS_ROWS):
            some, own = rows[begin:begin + LOSS_ROWS], labels[begin:begin + LOSS_ROWS]
            x = scores[some]
            x -= x.max(axis=1, keepdims=True)
            at = np.arange(len(x)), own
            right = x[at].astype(np.float64)
            np.exp(x, out=x)
            sums = x.sum(axis=1, keepdims=True)
            total += float((np.log(sums[:, 0].astype(np.float64)) - right).sum())
            x *= np.float32(1 / count) / sums
            x[at] -= np.float32(1 / count)
            grad[some] = x
    return total / count, grad


def valid_loss(evaluations: Iterable[dict[str, Any]]) -> float:
    """Mean cross entropy of the validation nodes, of all workers together; LARGEST_LOSS where scores diverged."""
    sums = [e["valid_loss"] for e in evaluations]
    mean = sum(s[0] for s in sums) / max(sum(s[1] for s in sums), 1)
    return mean if math.isfinite(mean) else LARGEST_LOSS
