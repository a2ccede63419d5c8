# SPDX-License-Identifier: Apache-2.0
"""How right and how sure predictions are: by degree, by class, by confidence.

What is counted are whole numbers, so that counts of several parts add up to the graph's, to the last node.

Buckets of degree double: 0, 1, 2, 3-4, 5-8, 9-16, … They are the same in every graph and part, where quantiles would
take a pass of their own over all parts; and the error of a mean of d messages falls with √d, so that it is the ratio of
two nodes' degrees that tells them apart.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["BINS", "BUCKETS", "Counts", "bucket_of", "bucket_range", "confusion", "count", "describe", "ece", "groups"]

BINS = 15
"""Of confidence, of equal width, as Guo et al., "On Calibration of Modern Neural Networks", ICML 2017."""
BUCKETS = 33
"""Of degree: the last one ends at 2^31."""
UNITS = 1 << 24
"""Confidences are added up in whole numbers of 1/UNITS, so that no sum depends on its order; from 0.5 on exactly."""
BLOCK_ROWS = 16384
"""Counted at a time: temporaries take about 90 bytes a row."""


def bucket_of(degree: np.ndarray) -> np.ndarray:
    """Number of each node's bucket, int64: 0, 1, 2 for degrees 0, 1, 2, then b for 2^(b−2) < degree ≤ 2^(b−1)."""
    exponent = np.frexp(np.maximum(degree, 1).astype(np.float64) - 1)[1]  # bits of degree − 1
    return np.where(degree > 0, exponent + 1, 0).astype(np.int64)


def bucket_range(bucket: int) -> tuple[int, int]:
    """Least and greatest degree of a bucket."""
    return (bucket, bucket) if bucket < 3 else ((1 << (bucket - 2)) + 1, 1 << (bucket - 1))


@dataclass(frozen=True)
class Counts:
    """Some labelled nodes' predictions; `a + b` is about the nodes of both.

    Attributes:
        by_degree: int64 (BUCKETS, 2): nodes, right answers.
        by_class: int64 (C, 3): nodes of the class, those that got it, all that got it.
        by_confidence: int64 (BINS, 3): nodes, right answers, sum of confidences in 1/UNITS. Bin i takes
            i/BINS < confidence ≤ (i+1)/BINS.
    """

    by_degree: np.ndarray
    by_class: np.ndarray
    by_confidence: np.ndarray

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.by_degree + other.by_degree, self.by_class + other.by_class,
                      self.by_confidence + other.by_confidence)

    @property
    def nodes(self) -> int:
        """All that were counted."""
        return int(self.by_class[:, 0].sum())

    @property
    def right(self) -> int:
        """Right answers among them."""
        return int(self.by_class[:, 1].sum())


def count(classes: np.ndarray, confidence: np.ndarray, labels: np.ndarray, degree: np.ndarray, rows: np.ndarray,
          num_classes: int) -> Counts:
    """Count the labelled nodes of `rows`, a block at a time.

    Args:
        classes: int (n,), predicted, in [0, num_classes). confidence: float32 (n,), the probability of that class;
            what is no number counts as 0. labels: int (n,), −1 for none. degree: int (n,), the node itself not
            counted. rows: bool (n,).
    """
    total = Counts(np.zeros((BUCKETS, 2), np.int64), np.zeros((num_classes, 3), np.int64),
                   np.zeros((BINS, 3), np.int64))
    for begin in range(0, len(classes), BLOCK_ROWS):
        block = slice(begin, begin + BLOCK_ROWS)
        some = begin + np.flatnonzero(rows[block] & (labels[block] >= 0))
        got, wanted = classes[some], labels[some]
        sure = np.nan_to_num(confidence[some].astype(np.float64))
        right = (got == wanted).astype(np.float64)  # of whole numbers below 2^53: exact
        buckets = bucket_of(degree[some])
        # 15 times a float32 is exact in float64, so that one beside a bin's edge lies on its own side.
        bins = np.clip(np.ceil(sure * BINS).astype(np.int64) - 1, 0, BINS - 1)
        total += Counts(_columns(BUCKETS, (buckets, None), (buckets, right)),
                        _columns(num_classes, (wanted, None), (wanted, right), (got, None)),
                        _columns(BINS, (bins, None), (bins, right), (bins, np.rint(sure * UNITS))))
    return total


def _columns(size: int, *columns: tuple[np.ndarray, np.ndarray | None]) -> np.ndarray:
    """int64 (size, number of columns), each a sum of weights (ones where there are none) by place."""
    return np.stack([np.bincount(places, weights, size) for places, weights in columns], axis=1).astype(np.int64)


def confusion(classes: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 (C, C), true classes by predicted ones, of the nodes that have a label."""
    known = labels >= 0
    cells = labels[known].astype(np.int64) * num_classes + classes[known]
    return np.bincount(cells, minlength=num_classes * num_classes).reshape(num_classes, num_classes)


def ece(counts: Counts) -> float | None:
    """Expected calibration error (Guo et al., ICML 2017): Σ over bins of nodes/all · |accuracy − mean confidence|.

    0 is best. None where no node was counted.
    """
    gaps = sum(abs(int(right) * UNITS - int(units)) for _, right, units in counts.by_confidence)
    return gaps / (UNITS * counts.nodes) if counts.nodes else None


def describe(counts: Counts) -> dict[str, Any]:
    """Counts as plain lists and numbers, for JSON.

    Returns: `ece`; `by_degree`: from, to, nodes, right, accuracy of the buckets that hold a node; `by_class`: nodes,
        right, predicted, recall, at a class's place; `reliability`: nodes, right, accuracy, mean confidence, at a
        bin's place. A share of nothing is null.
    """
    held = np.flatnonzero(counts.by_degree[:, 0])
    ranges = [bucket_range(int(bucket)) for bucket in held]
    nodes, right = counts.by_degree[held].T.tolist()
    own, own_right, predicted = counts.by_class.T.tolist()
    in_bin, bin_right, units = counts.by_confidence.T.tolist()
    return {
        "ece": ece(counts),
        "by_degree": {"from": [low for low, _ in ranges], "to": [high for _, high in ranges], "nodes": nodes,
                      "right": right, "accuracy": _shares(right, nodes)},
        "by_class": {"nodes": own, "right": own_right, "predicted": predicted, "recall": _shares(own_right, own)},
        "reliability": {"nodes": in_bin, "right": bin_right, "accuracy": _shares(bin_right, in_bin),
                        "confidence": _shares(units, [UNITS * n for n in in_bin])},
    }


def _shares(some: Sequence[int], all_: Sequence[int]) -> list[float | None]:
    return [part / whole if whole else None for part, whole in zip(some, all_)]


def groups(classes: np.ndarray, confidence: np.ndarray, labels: np.ndarray, degree: np.ndarray, test_mask: np.ndarray,
           train_mask: np.ndarray | None = None) -> dict[str, Any]:
    """Predictions of a graph's test nodes, whoever made them: `describe` of them, and two more.

    Args: see `count`; all int or float (N,), masks bool (N,). train_mask: the nodes that were trained on.
    Returns: with `confusion`, true classes by predicted ones, as lists; and `train`, the training nodes of every class,
        null where they are not told.
    """
    num_classes = 1 + max(int(labels.max(initial=0)), int(classes.max(initial=0)))
    counts = count(classes, confidence, labels, degree, test_mask, num_classes)
    train = None
    if train_mask is not None:
        train = np.bincount(labels[train_mask & (labels >= 0)], minlength=num_classes).tolist()
    table = confusion(classes[test_mask], labels[test_mask], num_classes)
    return {**describe(counts), "confusion": table.tolist(), "train": train}
