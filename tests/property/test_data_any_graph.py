# SPDX-License-Identifier: Apache-2.0
"""Any graph comes out of every source as it went in."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from qgnn_dist.data import Graph, SparseFeatures, load_graph
from qgnn_dist.data.synthetic import BlockModel, parse_shape


@st.composite
def graphs(draw: st.DrawFn) -> dict[str, Any]:
    nodes = draw(st.integers(1, 20))
    edges = draw(st.lists(st.tuples(st.integers(0, nodes - 1), st.integers(0, nodes - 1)), max_size=40))
    finite = st.floats(-1e6, 1e6, width=32)
    width = draw(st.integers(1, 5))
    rows = st.lists(finite, min_size=width, max_size=width)
    return {
        "edge_index": np.array(edges, np.int64).reshape(-1, 2).T,
        "x": np.array(draw(st.lists(rows, min_size=nodes, max_size=nodes)), np.float32),
        "y": np.array(draw(st.lists(st.integers(-1, nodes - 1), min_size=nodes, max_size=nodes))),
        "ids": draw(st.lists(st.integers(-(2**62), 2**62), min_size=nodes, max_size=nodes, unique=True)),
    }


def check(graph: Graph, made: dict[str, Any]) -> None:
    pieces = [np.empty((2, 0), np.int64), *graph.edges()]
    assert np.array_equal(np.concatenate(pieces, axis=1), made["edge_index"])
    assert graph.num_nodes == len(made["y"])
    labels = np.full(graph.num_nodes, -1) if graph.labels is None else graph.labels
    assert np.array_equal(labels, made["y"])
    assert graph.num_classes == made["y"].max() + 1


@settings(max_examples=40, deadline=None)
@given(made=graphs())
def test_npz(tmp_path_factory: Any, made: dict[str, Any]) -> None:
    path = Path(tmp_path_factory.mktemp("npz")) / "g.npz"
    np.savez(path, edge_index=made["edge_index"], x=made["x"], y=made["y"])
    graph = load_graph(path)
    check(graph, made)
    assert np.array_equal(graph.features, made["x"])


@settings(max_examples=40, deadline=None)
@given(made=graphs())
def test_sparse_rows(tmp_path_factory: Any, made: dict[str, Any]) -> None:
    x = made["x"]
    row, column = np.nonzero(x)
    indptr = np.searchsorted(row, np.arange(len(x) + 1))
    path = Path(tmp_path_factory.mktemp("csr")) / "g.npz"
    np.savez(
        path, edge_index=made["edge_index"], y=made["y"], x_data=x[row, column], x_indices=column, x_indptr=indptr,
        x_shape=x.shape,
    )  # fmt: skip
    features = load_graph(path).features
    assert isinstance(features, SparseFeatures)
    for wanted in (np.arange(len(x))[::-1], np.arange(len(x) // 2)):
        part = features.rows(wanted)
        dense = np.zeros((len(wanted), x.shape[1]), np.float32)
        dense[np.repeat(np.arange(len(wanted)), np.diff(part.indptr)), part.indices] = part.values
        assert np.array_equal(dense, x[wanted])
        block = features.block(0, len(x) // 2)
        assert block.indptr[-1] == len(block.values)


@settings(max_examples=40, deadline=None)
@given(made=graphs(), text=st.booleans(), parts=st.integers(1, 3))
def test_parquet(tmp_path_factory: Any, made: dict[str, Any], text: bool, parts: int) -> None:
    folder = Path(tmp_path_factory.mktemp("parquet"))
    ids = np.array([str(value) for value in made["ids"]]) if text else np.array(made["ids"])
    nodes = pa.table({"node_id": ids, "label": made["y"], "x": list(made["x"])})
    edges = pa.table({"src": ids[made["edge_index"][0]], "dst": ids[made["edge_index"][1]]})
    for name, table in (("nodes", nodes), ("edges", edges)):
        (folder / name).mkdir()
        step = -(-table.num_rows // parts) or 1
        for part in range(parts):
            pq.write_table(table.slice(part * step, step), folder / name / f"{part}.parquet")
    graph = load_graph(f"parquet:{folder}")
    check(graph, made)
    assert np.array_equal(graph.features, made["x"])
    assert graph.node_ids is not None
    assert graph.node_ids.to_pylist() == ids.tolist()


@settings(max_examples=30, deadline=None)
@given(
    classes=st.integers(2, 6), per_class=st.integers(20, 90), degree=st.integers(1, 8), seed=st.integers(0, 10**6),
    homophily=st.floats(0.1, 0.9),
)  # fmt: skip
def test_generated(classes: int, per_class: int, degree: int, seed: int, homophily: float) -> None:
    nodes = classes * per_class
    edges = nodes * degree // 2
    shape = parse_shape(
        f"sbm?nodes={nodes}&edges={edges}&classes={classes}&seed={seed}&homophily={homophily}&features=3"
    )
    model = BlockModel(shape)
    found = np.concatenate(list(model.edges()), axis=1)
    assert found.shape == (2, edges)
    keys = found.min(axis=0) * nodes + found.max(axis=0)
    assert len(np.unique(keys)) == edges
    assert (found[0] != found[1]).all()
    same = (model.labels[found[0]] == model.labels[found[1]]).sum()
    assert same == round(homophily * edges)
