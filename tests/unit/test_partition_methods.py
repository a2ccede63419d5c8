# SPDX-License-Identifier: Apache-2.0
"""Who owns a node: choice of the method, balance, cut, seeds, and what `partition_graph` refuses."""
from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from qgnn_dist.data.graph import Graph, SparseFeatures
from qgnn_dist.errors import InputError
from qgnn_dist.partitioning import api
from qgnn_dist.partitioning.api import METHODS, partition_graph
from qgnn_dist.partitioning.balance import Balance
from qgnn_dist.partitioning.clean import CleanGraph, _add_edges, clean
from qgnn_dist.partitioning.sorting import KeySorter
from tests.helpers import small_graph


def _ring(nodes: int, reach: int = 3, shuffle: int | None = None) -> CleanGraph:
    """Each node with its `reach` next ones; in the order of the ring, or shuffled by a seed."""
    source = np.repeat(np.arange(nodes), reach)
    edges = np.stack([source, (source + np.tile(np.arange(1, reach + 1), nodes)) % nodes])
    if shuffle is not None:
        edges = np.random.default_rng(shuffle).permutation(nodes)[edges]
    return clean(Graph("ring", nodes, lambda: iter([edges])))


def _cut(graph: CleanGraph, owners: np.ndarray) -> float:
    rows = np.repeat(np.arange(graph.num_nodes), np.diff(graph.indptr))
    return float((owners[rows] != owners[graph.indices]).mean())


INSTALLED = [name for name in METHODS if name != "mtkahypar" or importlib.util.find_spec(name)]


def _owners(method: str, graph: CleanGraph, parts: int, seed: int = 0) -> np.ndarray:
    return METHODS[method](graph.indptr, graph.indices, parts, seed, Balance())[0]


@pytest.mark.parametrize("nodes", [5, 8, 64, 1001])
@pytest.mark.parametrize("parts", [2, 3, 5])
@pytest.mark.parametrize("method", INSTALLED)
def test_owners_are_int32_in_range_balanced_and_seeded(method: str, parts: int, nodes: int) -> None:
    graph = _ring(nodes, reach=min(3, nodes // 2))
    owners = _owners(method, graph, parts, 7)
    assert owners.dtype == np.int32
    assert owners.shape == (nodes,)
    sizes = np.bincount(owners, minlength=parts)
    assert len(sizes) == parts
    if method == "random":
        assert sizes.max() - sizes.min() <= 1
    else:
        assert sizes.max() <= np.ceil(1.05 * nodes / parts) + (method != "stream")
    np.testing.assert_array_equal(owners, _owners(method, graph, parts, 7))


def test_random_depends_on_its_seed() -> None:
    graph = _ring(64)
    first, second = (_owners("random", graph, 4, seed) for seed in (0, 1))
    assert (first != second).any()


@pytest.mark.parametrize("method", INSTALLED)
def test_graphs_without_edges_and_a_node_a_part(method: str) -> None:
    empty = CleanGraph(np.zeros(41, np.int64), np.empty(0, np.int32), {})
    assert np.bincount(_owners(method, empty, 4), minlength=4).max() <= 11
    ring = _ring(12)
    assert np.bincount(_owners(method, ring, 12), minlength=12).max() <= 2


def test_stream_finds_a_ring_in_any_order() -> None:
    """In its own order or shuffled, a ring is cut in few places."""
    for ring in (_ring(20_000), _ring(20_000, shuffle=1)):
        assert _cut(ring, _owners("stream", ring, 4)) < 0.02
        assert _cut(ring, _owners("metis", ring, 4)) < 0.02


def test_auto_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(parts: int = 2, **options: Any) -> tuple[str, str]:
        how = partition_graph(small_graph(nodes=60), parts=parts, out=tmp_path / "s", overwrite=True, **options)
        assert how["partitioner"]["requested"] == options.get("method", "auto")
        return how["partitioner"]["method"], how["partitioner"]["reason"]

    assert chosen()[0] == "metis"
    assert chosen(method="stream") == ("stream", "asked for")
    assert chosen(parts=1) == ("random", "one part holds everything")
    for option in ("balance", "edge_balance"):
        assert chosen(**{option: 1.5}) == ("stream", "METIS keeps no balance of edges and training nodes")
    method, reason = chosen(memory_gb=1e-9)
    assert (method, "--memory is 1e-09" in reason) == ("stream", True)
    monkeypatch.setattr(api, "METIS_EDGES", 10)
    method, reason = chosen()
    assert (method, "are more than METIS does" in reason) == ("stream", True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert chosen() == ("stream", "pymetis is not installed")


def test_metis_faults_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import pymetis

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("METIS_ERROR_MEMORY")

    monkeypatch.setattr(pymetis, "part_graph", fail)
    ring = _ring(10)
    with pytest.raises(InputError, match=r"METIS gave up on 10 nodes in 2 parts \(METIS_ERROR_MEMORY\); use --method"):
        _owners("metis", ring, 2)
    for name in ("pymetis", "mtkahypar"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(InputError, match=r"needs mtkahypar; `pip install 'qgnn-dist\[quality\]'`"):
        _owners("mtkahypar", ring, 2)
    with pytest.raises(InputError, match="needs pymetis"):
        _owners("metis", ring, 2)


@pytest.mark.parametrize(("options", "text"), [
    ({"method": "metiss"}, "--method metiss: expected auto, metis, mtkahypar, stream, random; did you mean metis?"),
    ({"method": "xyz"}, "--method xyz: expected auto, metis, mtkahypar, stream, random"),
    ({"parts": 0}, "--parts 0: expected 1 to 60, the number of nodes"),
    ({"parts": -3}, "--parts -3: expected 1 to 60"),
    ({"parts": 61}, "--parts 61: expected 1 to 60"),
    ({"seed": -1}, "--seed -1: expected 0 to 2147483647"),
    ({"balance": 0.9}, "--balance 0.9: expected 1 or more"),
    ({"edge_balance": float("nan")}, "--edge-balance nan: expected 1 or more"),
    ({"balance": 1.2, "method": "metis"}, "--balance 1.2 is kept by --method stream alone, not by metis"),
    ({"edge_balance": 3, "method": "random"}, "--edge-balance 3 is kept by --method stream alone, not by random"),
])
def test_wrong_use_is_refused(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError) as caught:
        partition_graph(small_graph(nodes=60), **{"parts": 2, "out": tmp_path / "deep" / "s", **options})
    assert str(caught.value).startswith(text)
    assert list(tmp_path.iterdir()) == []


def _features(**change: Any) -> SparseFeatures:
    given = small_graph(nodes=60, sparse=True).features
    assert isinstance(given, SparseFeatures)
    return dataclasses.replace(given, **change)


@pytest.mark.parametrize(("change", "text"), [
    ({"edges": lambda: iter([np.array([[0, 1], [1, 60]])])}, "small: edge 1 – 60 names a node that is not in 0…59"),
    ({"edges": lambda: iter([np.array([[0], [1]]), np.array([[-1], [1]])])}, "small: edge -1 – 1 names a node"),
    ({"labels": np.zeros(59, np.int32)}, "small: labels is int32 (59,), expected int32 (60,)"),
    ({"labels": np.zeros(60, np.int64)}, "small: labels is int64 (60,), expected int32 (60,)"),
    ({"labels": np.full(60, 5, np.int32)}, "small: labels is 5 in row 0, expected -1 to 4"),
    ({"split": np.full(60, 4, np.int8)}, "small: split is 4 in row 0, expected 0 to 3"),
    ({"features": np.zeros((59, 2), np.float32)}, "small: features have shape (59, 2), expected (60, at least 1)"),
    ({"features": np.zeros((60, 0), np.float32)}, "small: features have shape (60, 0)"),
    ({"features": np.zeros((60, 2))}, "small: features are float64, expected float16 or float32"),
    ({"features": np.full((60, 2), np.nan, np.float32)}, "small: features hold NaN or infinity (first row: 0)"),
    ({"features": _features(values=np.full(1, np.inf, np.float32))}, "small: features hold NaN or infinity"),
    ({"class_names": ["one"]}, "small: 1 class names for 5 classes"),
    ({"node_ids": pa.array(range(59))}, "small: 59 node ids, 0 of them null, expected 60 without null"),
    ({"node_ids": pa.array([None, *range(59)])}, "small: 60 node ids, 1 of them null"),
])
def test_hand_made_graphs_are_checked(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    graph = dataclasses.replace(small_graph(nodes=60), **change)
    with pytest.raises(InputError) as caught:
        partition_graph(graph, parts=2, out=tmp_path / "s")
    assert str(caught.value).startswith(text)
    assert list(tmp_path.iterdir()) == []


def test_cleaning_keeps_large_node_numbers_apart() -> None:
    """Node numbers near 2³¹ fit the 63 bits of a key; the arrays of N numbers are not built here."""
    n = 2**31 - 1
    ends = np.array([[n - 1, n - 2, 0, n - 1], [n - 2, n - 1, n - 1, n - 1]])
    sorter = KeySorter()
    assert _add_edges(Graph("huge", n, lambda: iter([ends])), sorter) == (3, 1)
    keys = np.concatenate(list(sorter.blocks()))
    assert [(int(k) >> 32, int(k) >> 1 & n, int(k) & 1) for k in keys] == [
        (0, n - 1, 0), (n - 2, n - 1, 0), (n - 2, n - 1, 1), (n - 1, 0, 1), (n - 1, n - 2, 0), (n - 1, n - 2, 1)]
    with pytest.raises(InputError, match="at most 2147483647 are supported"):
        clean(Graph("huge", 2**31, lambda: iter([ends])))


def test_real_graph_cut(data_dir: Path) -> None:
    """cora in 4 parts: METIS 0.061, stream 0.07, chance 0.75."""
    edges = np.load(data_dir / "cora.npz")["edge_index"].astype(np.int64)
    graph = clean(Graph("cora", int(edges.max()) + 1, lambda: iter([edges])))
    assert graph.num_edges == 5278
    cuts = {name: _cut(graph, _owners(name, graph, 4)) for name in INSTALLED}
    print("cut of cora in 4 parts:", {name: round(value, 3) for name, value in cuts.items()})
    assert cuts["metis"] < 0.08
    assert cuts["stream"] < 0.1
    assert 0.72 < cuts["random"] < 0.78
