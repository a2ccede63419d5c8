# SPDX-License-Identifier: Apache-2.0
"""Orders of rows: each is one, near ones lie near, and a store in any order is whole and names its order."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from qgnn_dist.data.graph import Graph
from qgnn_dist.errors import InputError, StoreError
from qgnn_dist.kernels import using_isa
from qgnn_dist.partitioning import order
from qgnn_dist.partitioning.api import partition_graph
from qgnn_dist.partitioning.clean import CleanGraph, clean
from qgnn_dist.partitioning.levels import Level, contract, join
from qgnn_dist.partitioning.order import ORDERS, choose_order, mean_log2_distance
from qgnn_dist.store.columns import write_columns
from qgnn_dist.store.reader import Store
from qgnn_dist.training.loop import _check_identity, _identity
from qgnn_dist.training.run_folder import RunFolder
from tests.helpers import edit_manifest, make_store, settings, small_graph


def _cliques(count: int, size: int) -> CleanGraph:
    """Cliques on a ring of cliques, nodes in drawn order."""
    rng = np.random.default_rng(77)
    number = rng.permutation(count * size)
    one, two = np.triu_indices(size, 1)
    inside = np.stack([one, two])[:, None] + size * np.arange(count)[None, :, None]
    bridge = np.stack([size * np.arange(count), (size * np.arange(1, count + 1) + 1) % (count * size)])
    edges = number[np.concatenate([inside.reshape(2, -1), bridge], axis=1)]
    return clean(Graph("cliques", count * size, lambda: iter([edges])))


@pytest.mark.parametrize("name", ORDERS)
def test_an_order_holds_every_node_once_and_repeats(name: str) -> None:
    empty, lonely = np.zeros(6, np.int64), np.empty(0, np.int32)
    assert sorted(ORDERS[name](empty, lonely, 0)) == list(range(5)), "no edges"
    assert ORDERS[name](empty[:2], lonely, 0).tolist() == [0]
    for nodes in (2, 63, 65, 700):
        graph = clean(small_graph(nodes=nodes, degree=3.0))
        found = ORDERS[name](graph.indptr, graph.indices, 5)
        np.testing.assert_array_equal(np.sort(found), np.arange(nodes))
        np.testing.assert_array_equal(found, ORDERS[name](graph.indptr, graph.indices, 5))
    assert (found != ORDERS[name](graph.indptr, graph.indices, 6)).any() == (name == "random")


def test_what_each_order_is() -> None:
    graph = _cliques(200, 20)
    n = graph.num_nodes
    distances = {name: mean_log2_distance(graph.indptr, graph.indices, made(graph.indptr, graph.indices, 0))
                 for name, made in ORDERS.items()}
    rows = np.repeat(np.arange(n), np.diff(graph.indptr))
    assert distances["source"] == pytest.approx(np.log2(np.abs(rows - graph.indices)).mean())
    assert distances["random"] == pytest.approx(np.log2(n) - 1.5 / np.log(2), abs=0.05)
    assert distances["community"] < 3.5, "cliques lie together, and next to those they are tied to"
    assert distances["rcm"] < 6
    edges = np.array([[0, 0, 1, 2, 3, 5], [1, 2, 3, 3, 4, 6]])  # two groups, of 5 nodes and of 2, and a lonely node
    small = clean(Graph("small", 8, lambda: iter([edges])))
    assert ORDERS["degree"](small.indptr, small.indices, 0).tolist() == [3, 0, 1, 2, 4, 5, 6, 7]
    assert ORDERS["community"](small.indptr, small.indices, 0).tolist() == [3, 0, 1, 2, 4, 5, 6, 7]


def test_the_sample_of_distances_is_regular(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = _cliques(100, 12)
    given = np.random.default_rng(1).permutation(graph.num_nodes)
    whole = mean_log2_distance(graph.indptr, graph.indices, given)
    monkeypatch.setattr(order, "SAMPLED_EDGES", 2000)
    assert whole != mean_log2_distance(graph.indptr, graph.indices, given) == pytest.approx(whole, abs=0.1)


def test_groups_have_room_and_their_graph_counts_edges() -> None:
    graph = _cliques(60, 10)
    n, level = graph.num_nodes, Level(graph.indptr, graph.indices)
    weights = np.random.default_rng(0).integers(1, 4, n).astype(np.int32)
    groups, count = join(level, weights, 12, 0, 7, 0)
    assert np.bincount(groups, weights=weights).max() <= 12
    assert 60 <= count == groups.max() + 1 < 180
    smaller, _ = contract(level, groups, count, 7, 1)
    dense, member = np.zeros((n, n), np.int64), np.eye(count, dtype=np.int64)[groups]
    dense[np.repeat(np.arange(n), np.diff(graph.indptr)), graph.indices] = 1
    want = member.T @ dense @ member
    np.fill_diagonal(want, 0)
    got = np.zeros_like(want)
    assert smaller.edge_weight is not None
    got[np.repeat(np.arange(count), np.diff(smaller.indptr)), smaller.indices] = smaller.edge_weight
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("parts", [1, 3])
def test_rows_follow_the_order_boundary_first(tmp_path: Path, name: str, parts: int) -> None:
    graph = small_graph()
    cleaned = clean(graph)
    store = make_store(graph, tmp_path / "s", parts, order=name, seed=4)
    assert store.manifest["format_version"] == (1 if name == "source" else 2)
    assert store.order == store.manifest["order"]["method"] == name
    place = order.places(ORDERS[name](cleaned.indptr, cleaned.indices, 4))
    pieces = [store.part(i) for i in range(parts)]
    for part in pieces:
        source, boundary = part.source_index, part.num_boundary
        names = np.concatenate([source, part.halo_source_index])
        remote = np.array([(part.indices[a:b] >= part.num_local).any() for a, b in
                           zip(part.indptr[:-1], part.indptr[1:])])
        np.testing.assert_array_equal(remote, np.arange(part.num_local) < boundary)
        for group in (source[:boundary], source[boundary:]):
            assert (np.diff(place[group]) > 0).all()
        for row, node in enumerate(source):
            got = names[part.indices[part.indptr[row]:part.indptr[row + 1]]]
            np.testing.assert_array_equal(got, cleaned.indices[cleaned.indptr[node]:cleaned.indptr[node + 1]],
                                          err_msg="the same neighbours, by rising source index")
        assert part.labels is not None
        assert graph.labels is not None
        assert isinstance(graph.features, np.ndarray)
        np.testing.assert_array_equal(part.labels, graph.labels[source])
        np.testing.assert_array_equal(part.features_dense(0, part.num_local), graph.features[source])
        for plan in part.peers:
            back = next(p for p in pieces[plan.peer].peers if p.peer == part.index)
            np.testing.assert_array_equal(pieces[plan.peer].source_index[back.send_rows],
                                          part.halo_source_index[plan.recv_begin:plan.recv_begin + plan.recv_count])
            assert (np.diff(back.send_rows) > 0).all()
    assert sum(part.num_halo for part in pieces) == store.manifest["halo_rows"]


def test_auto_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(graph: CleanGraph) -> tuple[str, str]:
        found, name, reason = choose_order("auto", graph.indptr, graph.indices, 0)
        np.testing.assert_array_equal(found, ORDERS[name](graph.indptr, graph.indices, 0))
        return name, reason

    shuffled = _cliques(100, 12)
    assert chosen(shuffled) == ("source", "1200 nodes lie in the caches together")
    monkeypatch.setattr(order, "LEAST_NODES", 1000)
    name, reason = chosen(shuffled)
    assert (name, reason[:28]) == ("community", "neighbours lie 2^8.1 apart a")
    with using_isa("reference"):
        name, reason = chosen(shuffled)
    assert (name, reason[-24:]) == ("source", "without compiled kernels")
    ring = np.stack([np.arange(1200), (np.arange(1200) + 1) % 1200])
    assert chosen(clean(Graph("ring", 1200, lambda: iter([ring]))))[0] == "source"
    assert choose_order("rcm", shuffled.indptr, shuffled.indices, 0)[1:] == ("rcm", "asked for")


def test_words_and_limits(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--order comunity: expected auto, source, .*did you mean community\?"):
        partition_graph(small_graph(), parts=1, out=tmp_path / "s", order="comunity")
    many = np.broadcast_to(np.int32(0), 2**31)
    with pytest.raises(InputError, match="--order rcm: 2147483648 directed edges, it takes at most 2147483647"):
        ORDERS["rcm"](np.zeros(2, np.int64), many, 0)


def test_stores_before_there_were_orders_open(tmp_path: Path) -> None:
    store = make_store(small_graph(), tmp_path / "s", 2)
    edit_manifest(store.path, lambda m: [m.pop(key) for key in ("order", "seconds", "checksum")])
    opened = Store.open(store.path)
    assert opened.order == "source"
    assert opened.part(1).num_local == 150


def test_a_row_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    store = make_store(small_graph(), tmp_path / "s", 2, order="community")
    path = store.path / "part-00000" / "nodes.arrow"
    batch = pa.ipc.open_file(path.read_bytes()).get_batch(0)
    columns: dict[str, Any] = {name: batch.column(name) for name in batch.schema.names}
    source = columns["source_index"].to_numpy().copy()
    source[3] = source[70]
    write_columns(path, columns | {"source_index": source})
    with pytest.raises(StoreError, match=rf"nodes.arrow: source_index holds {source[70]} twice"):
        store.part(0)


def test_runs_resume_on_their_own_order_alone(tmp_path: Path) -> None:
    there = _identity(make_store(small_graph(), tmp_path / "a", 2), settings())
    other = _identity(make_store(small_graph(), tmp_path / "b", 2, order="rcm"), settings())
    run = RunFolder(tmp_path / "run")
    _check_identity({k: v for k, v in there.items() if k != "order"}, there, run)  # of an earlier program
    _check_identity(other, other, run)
    with pytest.raises(InputError, match=r"another order of rows \(order: source, now rcm\)"):
        _check_identity(there, other, run)
