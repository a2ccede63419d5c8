# SPDX-License-Identifier: Apache-2.0
"""The passes that cut a graph: the compiled ones do what the NumPy ones say, to the last node."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qgnn_dist import kernels
from qgnn_dist.kernels import using_isa
from qgnn_dist.partitioning import stream
from qgnn_dist.partitioning.balance import Balance
from qgnn_dist.partitioning.clean import clean
from tests.helpers import small_graph

LEVELS = ("reference", "scalar", "avx2")


def _graph(nodes: int, seed: int, weighted: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """With hubs, so that rows longer than a sample are there, and isolated nodes."""
    rng = np.random.default_rng(seed)
    ends = (nodes * rng.random((2, 5 * nodes)) ** 3).astype(np.int32)
    rows, columns = np.unique(ends[:, ends[0] != ends[1]], axis=1)
    indptr = np.searchsorted(rows, np.arange(nodes + 1)).astype(np.int64)
    return indptr, columns.astype(np.int32), rng.integers(1, 9, len(columns)) if weighted else None


def _each(run: Any) -> list[Any]:
    found = []
    for level in LEVELS:
        with using_isa(level):
            found.append(run())
    return found


def _assert_same(found: list[Any]) -> None:
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(one, two)
            if isinstance(one, np.ndarray):
                assert one.dtype == two.dtype


@pytest.mark.parametrize("nodes", [1, 2, 60, 300])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("most", [0, 3, 16])
@pytest.mark.parametrize("gather", [False, True])
def test_join_clusters(nodes: int, weighted: bool, most: int, gather: bool) -> None:
    indptr, indices, edge_weight = _graph(nodes, nodes + most, weighted)
    weight = np.random.default_rng(3).integers(1, 6, nodes, np.int32)

    def run() -> tuple[Any, ...]:
        labels, sizes = np.arange(nodes, dtype=np.int32), weight.copy()
        moved = [kernels.join_clusters(indptr, indices, edge_weight, weight, 40, most, salt, gather, labels, sizes)
                 for salt in (5, 2**32 - 1)]
        np.testing.assert_array_equal(sizes, np.bincount(labels, weight, nodes))
        assert sizes.max() <= 40
        return labels, sizes, *moved

    found = _each(run)
    _assert_same(found)
    assert nodes < 60 or found[0][2] > 0


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("most", [0, 3])
def test_contract(weighted: bool, most: int) -> None:
    indptr, indices, edge_weight = _graph(300, 1, weighted)
    labels = np.random.default_rng(0).integers(0, 23, 300, np.int32)
    found = _each(lambda: kernels.contract(indptr, indices, edge_weight, labels, 23, most, 9, 23 * 22))
    _assert_same(found)
    starts, columns, weights = found[0]
    if most == 0:
        member = np.eye(23, dtype=np.int64)[labels]
        dense = np.zeros((300, 300), np.int64)
        dense[np.repeat(np.arange(300), np.diff(indptr)), indices] = 1 if edge_weight is None else edge_weight
        want = member.T @ dense @ member
        np.fill_diagonal(want, 0)
        got = np.zeros((23, 23), np.int64)
        got[np.repeat(np.arange(23), np.diff(starts)), columns] = weights
        np.testing.assert_array_equal(got, want)
    assert _each(lambda: kernels.contract(indptr, indices, edge_weight, labels, 23, most, 9, len(columns) - 1)) == [
        None] * len(LEVELS)
    assert None not in _each(lambda: kernels.contract(indptr, indices, edge_weight, labels, 23, most, 9, len(columns)))


def test_contract_keeps_many_pairs() -> None:
    """Far more than the table begins with, and than one node has."""
    indptr, indices, _ = _graph(6000, 4, False)
    labels = np.arange(6000, dtype=np.int32)
    _assert_same(_each(lambda: kernels.contract(indptr, indices, None, labels, 6000, 0, 0, len(indices))))


@pytest.mark.parametrize("parts", [1, 3, 254, 255, 300])
@pytest.mark.parametrize("kind", ["whole", "small"])
@pytest.mark.parametrize("tight", [1.0, 1.3])
def test_place_nodes(parts: int, kind: str, tight: float) -> None:
    nodes = 200
    indptr, indices, edge_weight = _graph(nodes, parts, kind == "small")
    rng = np.random.default_rng(2)
    train = rng.integers(0, 2, nodes, np.uint8) if kind == "whole" else None
    node_weight = rng.integers(0, 9, (nodes, 3)) if kind == "small" else None
    loads = np.stack([np.ones(nodes, np.int64), np.diff(indptr), train.astype(np.int64)], 1) if train is not None else (
        node_weight)
    assert loads is not None
    capacity = np.ceil(tight * loads.sum(0) / parts).astype(np.int64)
    order = rng.permutation(nodes).astype(np.int32)
    frozen = (rng.random(nodes) < 0.1).astype(np.uint8)

    def run() -> tuple[Any, ...]:
        owners, held = np.full(nodes, -1, np.int32), np.zeros((parts, 3), np.int64)
        first = kernels.place_nodes(indptr, indices, edge_weight, node_weight, train, order, None, capacity, 1.0,
                                    owners, held)
        before = owners.copy()
        moved = [kernels.place_nodes(indptr, indices, edge_weight, node_weight, train, None, frozen, capacity, pull,
                                     owners, held) for pull in (0.3, 0.0)]
        np.testing.assert_array_equal(owners[frozen == 1], before[frozen == 1])
        for load in range(3):
            np.testing.assert_array_equal(held[:, load], np.bincount(owners, loads[:, load], parts))
        return owners, held, first, *moved

    found = _each(run)
    _assert_same(found)
    assert found[0][2] == nodes


def test_whole_cuts_are_the_same() -> None:
    graph = clean(small_graph(nodes=700, degree=9.0))
    train = (np.arange(700) % 3 == 0).astype(np.uint8)
    found = _each(lambda: stream.assign(graph.indptr, graph.indices, 3, 1, Balance(1.05, 1.2, train)))
    assert found[0][1]["levels"][0] == 700
    assert len(found[0][1]["levels"]) > 1
    for owners, told in found[1:]:
        np.testing.assert_array_equal(owners, found[0][0])
        assert told == found[0][1]


def test_arguments_are_checked_by_name() -> None:
    indptr, indices, _ = _graph(5, 0, False)
    owners, loads = np.zeros(5, np.int32), np.zeros((2, 3), np.int64)
    for pull, capacity, text in ((1.5, np.ones(3, np.int64), "pull is 1.5, expected 0 to 1"),
                                 (0.5, np.ones(2, np.int64), r"capacity has shape \(2,\), expected 3")):
        with pytest.raises(ValueError, match=text):
            kernels.place_nodes(indptr, indices, None, None, None, None, None, capacity, pull, owners, loads)
    with pytest.raises(TypeError, match="labels is int64"):
        kernels.contract(indptr, indices, None, np.zeros(5, np.int64), 1, 0, 0, 9)
