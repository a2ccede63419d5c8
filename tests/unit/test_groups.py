# SPDX-License-Identifier: Apache-2.0
"""Counts by degree, class and confidence against a slow reference that looks at one node after the other."""
from __future__ import annotations

import functools
import itertools
import json
import operator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qgnn_dist.comm.pool import LocalPool
from qgnn_dist.config import TimeoutsConfig
from qgnn_dist.inference.batch import run_prediction
from qgnn_dist.inference.groups import (
    BINS,
    BLOCK_ROWS,
    BUCKETS,
    UNITS,
    Counts,
    bucket_of,
    bucket_range,
    confusion,
    count,
    describe,
    ece,
    groups,
)
from qgnn_dist.inference.worker import PredictWorker
from qgnn_dist.store.reader import Store
from tests.helpers import make_store, small_graph, untrained_model


def _drawn(nodes: int, classes: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    confidence = rng.random(nodes).astype(np.float32)
    edges = np.arange(BINS + 1, dtype=np.float32) / np.float32(BINS)  # on the bins' edges, and a hair beside them
    near = np.concatenate([edges, np.nextafter(edges, np.float32(0)), np.nextafter(edges[:-1], np.float32(1))])
    confidence[:len(near)] = near
    confidence[len(near)] = np.nan
    labels = rng.integers(-1, classes, nodes).astype(np.int32)
    guessed = rng.integers(0, classes, nodes)
    return {"classes": np.where(rng.random(nodes) < 0.5, np.maximum(labels, 0), guessed).astype(np.int32),
            "confidence": confidence, "labels": labels, "rows": rng.random(nodes) < 0.7,
            "degree": np.minimum(rng.integers(0, 12, nodes) * rng.integers(0, 200, nodes), 2**31 - 1).astype(np.int32)}


def _slowly(classes: np.ndarray, confidence: np.ndarray, labels: np.ndarray, degree: np.ndarray, rows: np.ndarray,
            num_classes: int) -> Counts:
    """One node after the other, in whole numbers and fractions alone."""
    ranges = [bucket_range(b) for b in range(BUCKETS)]
    by_degree, by_confidence = np.zeros((BUCKETS, 2), np.int64), np.zeros((BINS, 3), np.int64)
    by_class = np.zeros((num_classes, 3), np.int64)
    for i in np.flatnonzero(rows):
        if labels[i] < 0:
            continue
        right = int(classes[i] == labels[i])
        (bucket,) = [b for b, (low, high) in enumerate(ranges) if low <= int(degree[i]) <= high]
        sure = Fraction(0) if np.isnan(confidence[i]) else Fraction(float(confidence[i]))
        inside = [b for b in range(BINS) if Fraction(b, BINS) < sure <= Fraction(b + 1, BINS)]
        by_degree[bucket] += (1, right)
        by_class[labels[i], :2] += (1, right)
        by_class[classes[i], 2] += 1
        by_confidence[inside[0] if inside else 0] += (1, right, round(sure * UNITS))
    return Counts(by_degree, by_class, by_confidence)


def _assert_equal(got: Counts, want: Counts) -> None:
    for name in ("by_degree", "by_class", "by_confidence"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)


@pytest.mark.parametrize(("nodes", "classes"), [(60, 1), (500, 2), (3000, 7), (BLOCK_ROWS + 5, 40)])
def test_counts_equal_the_slow_reference(nodes: int, classes: int) -> None:
    drawn = _drawn(nodes, classes)
    got = count(**drawn, num_classes=classes)
    want = _slowly(**drawn, num_classes=classes)
    _assert_equal(got, want)
    known = drawn["rows"] & (drawn["labels"] >= 0)
    assert got.nodes == known.sum()
    assert got.right == (drawn["classes"] == drawn["labels"])[known].sum()


def test_buckets_of_degree() -> None:
    """Degrees up to 2000, and both sides of every power of two, lie in the range that their bucket says."""
    degree = np.array([*range(2001), *(2**k + d for k in range(11, 31) for d in (-1, 0, 1)), 2**31 - 1], np.int64)
    ends = [bucket_range(b) for b in range(BUCKETS)]
    assert ends[:6] == [(0, 0), (1, 1), (2, 2), (3, 4), (5, 8), (9, 16)]
    assert ends[-1] == (2**30 + 1, 2**31)
    assert all(high + 1 == low for (_, high), (low, _) in itertools.pairwise(ends))
    for value, bucket in zip(degree, bucket_of(degree)):
        assert ends[bucket][0] <= value <= ends[bucket][1]
    np.testing.assert_array_equal(bucket_of(degree.astype(np.int32)), bucket_of(degree))


def test_parts_add_up_to_the_whole() -> None:
    drawn = _drawn(2000, 6)
    whole = count(**drawn, num_classes=6)
    owner = np.random.default_rng(1).integers(0, 5, 2000)
    parts = [count(**{key: values[owner == part] for key, values in drawn.items()}, num_classes=6)
             for part in (3, 0, 4, 2, 1)]
    summed = functools.reduce(operator.add, parts)
    _assert_equal(summed, whole)
    assert describe(summed) == describe(whole)


def test_nothing_to_count() -> None:
    none = np.zeros(0, np.int32)
    empty = count(none, none.astype(np.float32), none, none, none.astype(bool), 3)
    assert (empty.nodes, empty.right, ece(empty)) == (0, 0, None)
    told = describe(empty)
    assert told["by_degree"] == {"from": [], "to": [], "nodes": [], "right": [], "accuracy": []}
    assert told["by_class"]["recall"] == [None] * 3
    assert told["reliability"]["confidence"] == [None] * BINS


def test_calibration_error_by_hand() -> None:
    """Four nodes at .9 of which two are right, and one at .3 that is: (4·|.5 − .9| + 1·|1 − .3|)/5 = .46."""
    labels = np.zeros(5, np.int32)
    found = count(np.array([0, 0, 1, 1, 0]), np.array([.9, .9, .9, .9, .3], np.float32), labels, labels,
                  np.ones(5, bool), 2)
    assert ece(found) == pytest.approx(0.46, abs=1e-7)
    told = describe(found)
    assert told["reliability"]["nodes"] == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0]  # .3 is below 5/15
    assert told["reliability"]["accuracy"][13] == 0.5
    assert told["reliability"]["confidence"][13] == pytest.approx(0.9, abs=1e-7)
    # Sure and always right, however many: no error at all.
    sure = count(labels, np.ones(5, np.float32), labels, labels, np.ones(5, bool), 1)
    assert ece(sure) == 0.0


def test_confusion() -> None:
    drawn = _drawn(500, 4)
    table = confusion(drawn["classes"], drawn["labels"], 4)
    for true in range(4):
        for got in range(4):
            assert table[true, got] == ((drawn["labels"] == true) & (drawn["classes"] == got)).sum()


def test_groups_of_a_graphs_test_nodes() -> None:
    drawn = _drawn(400, 5)
    test = drawn.pop("rows")
    train = ~test
    found = groups(**drawn, test_mask=test, train_mask=train)
    assert json.loads(json.dumps(found)) == found
    counts = count(**drawn, rows=test, num_classes=5)
    assert {key: found[key] for key in describe(counts)} == describe(counts)
    table = np.array(found["confusion"])
    np.testing.assert_array_equal(table.diagonal(), found["by_class"]["right"])
    np.testing.assert_array_equal(table.sum(1), found["by_class"]["nodes"])
    np.testing.assert_array_equal(table.sum(0), found["by_class"]["predicted"])
    assert found["train"] == [int((drawn["labels"][train] == c).sum()) for c in range(5)]
    assert groups(**drawn, test_mask=test)["train"] is None


def _predicted(store: Store, out: Path, bits: int) -> dict[str, Any]:
    pool = LocalPool(PredictWorker, {"store": str(store.path), "exchange_s": 60.0}, store.num_parts, timeout_s=60)
    try:
        return run_prediction(pool, store, untrained_model(store, bits=bits), out, scores=False,
                              timeouts=TimeoutsConfig())
    finally:
        pool.close()


@pytest.mark.parametrize("bits", [2, 32])
def test_the_summary_of_a_prediction_counts_what_was_written(tmp_path: Path, bits: int) -> None:
    """Equal on 1 and 3 parts, and equal to counting the rows that lie in the Parquet files."""
    graph = small_graph(700)
    summaries = [_predicted(make_store(graph, tmp_path / str(parts), parts), tmp_path / f"out{parts}", bits)
                 for parts in (1, 3)]
    for key in ("accuracy", "ece", "accuracy_by_degree", "accuracy_by_class", "reliability"):
        assert summaries[0][key] == summaries[1][key], key
        assert list(summaries[0][key]) == ["train", "valid", "test"]
    summary = json.loads((tmp_path / "out3" / "summary.json").read_text(encoding="utf-8"))
    table = pa.concat_tables([pq.read_table(f) for f in sorted((tmp_path / "out3").glob("part-*.parquet"))])
    table = table.sort_by("node_id")
    part = Store.open(tmp_path / "1").part(0)
    assert graph.split is not None
    assert graph.labels is not None
    degree = np.zeros(700, np.int32)
    degree[part.source_index] = part.degree
    found = groups(table["class"].to_numpy(), table["confidence"].to_numpy(), graph.labels, degree, graph.split == 3)
    assert summary["accuracy_by_degree"]["test"] == found["by_degree"]
    assert summary["accuracy_by_class"]["test"] == found["by_class"]
    assert summary["reliability"]["test"] == found["reliability"]
    assert summary["ece"]["test"] == found["ece"]
    assert 0 in found["by_degree"]["from"], "the graph has isolated nodes"
    assert summary["accuracy"]["test"] == sum(found["by_class"]["right"]) / sum(found["by_class"]["nodes"])
