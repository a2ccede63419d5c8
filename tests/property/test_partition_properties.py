# SPDX-License-Identifier: Apache-2.0
"""Any small graph, cut any way: the parts together are the graph, and what one part sends is what the other reads."""
from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgnn_dist.data.graph import TRAIN, Graph, SparseFeatures
from qgnn_dist.partitioning import api, build, sorting, stream
from qgnn_dist.partitioning import clean as cleaning
from qgnn_dist.partitioning.api import METHODS, partition_graph
from qgnn_dist.partitioning.balance import Balance, deal, loads_of
from qgnn_dist.partitioning.clean import clean, fingerprint
from qgnn_dist.store.reader import Store

INSTALLED = [name for name in METHODS if name != "mtkahypar" or importlib.util.find_spec(name)]


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Up to 30 nodes, edges with self loops, duplicates and one-way ones, features of every kind, ids of every kind."""
    n = draw(st.integers(1, 30))
    pairs = draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=80))
    edges = np.array(pairs, np.int64).reshape(-1, 2).T
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    kind = draw(st.sampled_from(["none", "f2", "f4", "sparse"]))
    features: np.ndarray | SparseFeatures | None = None
    if kind == "sparse":
        counts = rng.integers(0, 4, n)
        features = SparseFeatures(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
                                  rng.integers(0, 5, counts.sum()).astype(np.int32),
                                  rng.random(counts.sum()).astype(np.float32), (n, 5))
    elif kind != "none":
        features = rng.normal(size=(n, 3)).astype(kind)
    labelled = draw(st.booleans())
    ids = draw(st.sampled_from([None, pa.array([f"n{i}" for i in range(n)]), pa.array(np.arange(n) * 7, pa.uint16())]))
    return Graph("any", n, lambda: iter(np.array_split(edges, 2, axis=1)), features,
                 rng.integers(-1, 3, n).astype(np.int32) if labelled else None, 3 if labelled else 0,
                 rng.integers(0, 4, n).astype(np.int8) if labelled else None, ids)


def _brute(graph: Graph) -> set[tuple[int, int]]:
    pairs = {(int(a), int(b)) for chunk in graph.edges() for a, b in chunk.T if a != b}
    return pairs | {(b, a) for a, b in pairs}


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_cleaning_is_what_sets_say(graph: Graph) -> None:
    cleaned = clean(graph)
    raw = [(int(a), int(b)) for chunk in graph.edges() for a, b in chunk.T]
    straight = [p for p in raw if p[0] != p[1]]
    want = _brute(graph)
    rows = np.repeat(np.arange(graph.num_nodes), np.diff(cleaned.indptr))
    assert list(zip(rows.tolist(), cleaned.indices.tolist())) == sorted(want)
    assert cleaned.counts == {
        "self_loops": len(raw) - len(straight), "duplicates": len(straight) - len(set(straight)),
        "one_way": sum((b, a) not in set(straight) for a, b in set(straight)),
        "isolated": graph.num_nodes - len({a for a, _ in want})}


@settings(max_examples=60, deadline=None)
@given(graphs(), st.integers(1, 200), st.integers(1, 9))
def test_cleaning_out_of_core_gives_the_same(graph: Graph, keys: int, block: int) -> None:
    """Any number of keys in memory, in any number of runs and blocks; equal keys at every border among them."""
    want = clean(graph)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sorting, "BLOCK_KEYS", block)
        patch.setattr(cleaning, "BLOCK_KEYS", block)
        got = clean(graph, Path(folder), keys)
        np.testing.assert_array_equal(got.indptr, want.indptr)
        np.testing.assert_array_equal(got.indices, want.indices)
        assert (got.indptr.dtype, got.indices.dtype) == (want.indptr.dtype, want.indices.dtype)
        assert got.counts == want.counts
        assert fingerprint(got, graph) == fingerprint(want, graph)
        left = [path.name for path in Path(folder).iterdir()]
        assert left == [cleaning.INDICES] * bool(want.num_edges), "no run stays"


@settings(max_examples=30, deadline=None)
@given(graphs(), st.integers(1, 4), st.integers(1, 12))
def test_parts_are_the_same_in_blocks_of_any_size(graph: Graph, parts: int, block: int) -> None:
    parts = min(parts, graph.num_nodes)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        found = []
        for name in ("whole", "blocks"):
            partition_graph(graph, parts=parts, out=Path(folder) / name, method="random", memory_gb=1e-9)
            found.append({file.relative_to(Path(folder) / name): file.read_bytes()
                          for file in (Path(folder) / name).rglob("*.arrow")})
            patch.setattr(build, "LEAST_EDGES", block)
            patch.setattr(api, "LEAST_KEYS", block)
        assert found[0] == found[1]


@settings(max_examples=40, deadline=None)
@given(graphs(), st.integers(1, 5), st.sampled_from(INSTALLED), st.integers(0, 3))
def test_parts_together_are_the_graph(graph: Graph, parts: int, method: str, seed: int) -> None:
    parts = min(parts, graph.num_nodes)
    with tempfile.TemporaryDirectory() as folder:
        manifest = partition_graph(graph, parts=parts, out=Path(folder) / "s", method=method, seed=seed)
        store = Store.open(Path(folder) / "s")
        assert store.verify() > 0
        _check_store(graph, store)
        assert fingerprint(clean(graph), graph) == store.fingerprint
        cut = sum(e["halo"] for e in manifest["parts"])
        assert (cut == 0) == (manifest["cut_fraction"] == 0)


def _check_store(graph: Graph, store: Store) -> None:
    parts = [store.part(i) for i in range(store.num_parts)]
    edges, seen = set(), []
    for part in parts:
        source, n = np.asarray(part.source_index), part.num_local
        seen += source.tolist()
        assert (np.diff(source[:part.num_boundary]) > 0).all()
        assert (np.diff(source[part.num_boundary:]) > 0).all()
        halo = np.full(part.num_halo, -1)
        for plan in part.peers:
            other = next(p for p in parts[plan.peer].peers if p.peer == part.index)
            sent = np.asarray(parts[plan.peer].source_index)[other.send_rows]
            assert len(sent) == plan.recv_count
            assert (np.diff(sent) > 0).all()
            halo[plan.recv_begin:plan.recv_begin + plan.recv_count] = sent
        names = np.concatenate([source, halo])
        assert (halo >= 0).all()
        for row in range(n):
            columns = part.indices[part.indptr[row]:part.indptr[row + 1]]
            assert (np.diff(names[columns]) > 0).all()
            assert (columns >= n).any() == (row < part.num_boundary)
            assert part.degree[row] == len(columns)
            edges |= {(int(source[row]), int(names[c])) for c in columns}
        _check_nodes(graph, part, source)
    assert sorted(seen) == list(range(graph.num_nodes))
    assert edges == _brute(graph)


def _check_nodes(graph: Graph, part, source: np.ndarray) -> None:
    ids = pa.array(np.arange(graph.num_nodes)) if graph.node_ids is None else graph.node_ids
    assert part.node_ids.equals(ids.take(pa.array(source)))
    for name in ("labels", "split"):
        value = getattr(graph, name)
        if value is None:
            assert getattr(part, name) is None
        else:
            np.testing.assert_array_equal(getattr(part, name), value[source])
    if isinstance(graph.features, SparseFeatures):
        got, want = part.features_sparse(0, part.num_local), graph.features.rows(source)
        for name in ("indptr", "indices", "values"):
            np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
    elif graph.features is not None:
        np.testing.assert_array_equal(part.features_dense(0, part.num_local), graph.features[source].astype(np.float32))
        if part.num_local > 1:
            np.testing.assert_array_equal(part.features_dense(1, part.num_local),
                                          graph.features[source[1:]].astype(np.float32))


@settings(max_examples=150, deadline=None)
@given(graphs(), st.integers(1, 30), st.floats(1, 3), st.floats(1, 3), st.integers(0, 5))
def test_capacities_hold(graph: Graph, parts: int, nodes: float, edges: float, seed: int) -> None:
    """Any small graph in up to as many parts as it has nodes: every node is placed and no part is over."""
    cleaned, parts = clean(graph), min(parts, graph.num_nodes)
    train = None if graph.split is None else (graph.split == TRAIN).astype(np.uint8)
    balance = Balance(nodes, edges, train)
    owners, found = stream.assign(cleaned.indptr, cleaned.indices, parts, seed, balance)
    assert owners.dtype == np.int32
    assert owners.min() >= 0
    loads = loads_of(owners, cleaned.indptr, train, parts)
    assert (loads <= balance.capacities(cleaned.indptr, parts)).all(), (loads, found)
    assert loads.sum(0)[:2].tolist() == [graph.num_nodes, len(cleaned.indices)]
    np.testing.assert_array_equal(
        owners, stream.assign(cleaned.indptr, cleaned.indices, parts, seed, balance)[0])
    dealt = loads_of(deal(cleaned.indptr, train, parts), cleaned.indptr, train, parts)
    assert (dealt <= Balance(1, 1, train).capacities(cleaned.indptr, parts)).all()


@pytest.mark.parametrize("method", INSTALLED)
def test_partitioners_balance_and_cut(method: str) -> None:
    """400 nodes in 8 dense communities: nobody is over the capacity, and all but `random` find much of it."""
    rng = np.random.default_rng(0)
    community = np.arange(400) // 50
    pairs = rng.integers(0, 400, (2, 20000))
    pairs = pairs[:, (community[pairs[0]] == community[pairs[1]]) | (rng.random(20000) < 0.05)]
    cleaned = clean(Graph("c", 400, lambda: iter([pairs])))
    owners, _ = METHODS[method](cleaned.indptr, cleaned.indices, 4, 0, Balance())
    np.testing.assert_array_equal(owners, METHODS[method](cleaned.indptr, cleaned.indices, 4, 0, Balance())[0])
    sizes = np.bincount(owners, minlength=4)
    assert sizes.max() <= (100 if method == "random" else 105)
    rows = np.repeat(np.arange(400), np.diff(cleaned.indptr))
    cut = (owners[rows] != owners[cleaned.indices]).mean()
    low, high = {"metis": (0.0, 0.3), "mtkahypar": (0.0, 0.3), "stream": (0.0, 0.3), "random": (0.65, 1.0)}[method]
    assert low < cut < high
