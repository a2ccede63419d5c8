# SPDX-License-Identifier: Apache-2.0
"""Graphs from PyG objects: every form of edges, features and masks, and what is refused."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qgnn_dist.data import Graph, SparseFeatures, load_graph
from qgnn_dist.errors import InputError

pyg_data = pytest.importorskip("torch_geometric.data")

EDGES = torch.tensor([[0, 1, 2, 2, 3], [1, 0, 2, 3, 0]])


def data(**changes: Any) -> Any:
    made: dict[str, Any] = {
        "edge_index": EDGES,
        "x": torch.arange(8.0).reshape(4, 2),
        "y": torch.tensor([0, 1, 1, 2]),
        "train_mask": torch.tensor([True, False, False, False]),
        "val_mask": torch.tensor([False, True, False, False]),
        "test_mask": torch.tensor([False, False, True, False]),
    }
    made.update(changes)
    return pyg_data.Data(**{key: value for key, value in made.items() if value is not None})


def edge_set(graph: Graph) -> list[tuple[int, int]]:
    return sorted(map(tuple, np.concatenate(list(graph.edges()), axis=1).T.tolist()))


def refused(source: Any, *parts: str) -> None:
    with pytest.raises(InputError) as caught:
        load_graph(source)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_whole_graph() -> None:
    graph = load_graph(data(y=torch.tensor([[0], [1], [1], [2]])))
    assert (graph.num_nodes, graph.num_classes) == (4, 3)
    assert edge_set(graph) == sorted(map(tuple, EDGES.T.tolist()))
    assert isinstance(graph.features, np.ndarray)
    assert graph.features.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert graph.labels is not None
    assert graph.labels.tolist() == [0, 1, 1, 2]
    assert graph.split is not None
    assert graph.split.tolist() == [1, 2, 3, 0]


def test_a_graph_may_have_no_test_nodes() -> None:
    for mask in (None, torch.zeros(4, dtype=torch.bool)):
        graph = load_graph(data(test_mask=mask))
        assert graph.split is not None
        assert graph.split.tolist() == [1, 2, 0, 0]


def test_edges_alone_and_isolated_nodes() -> None:
    graph = load_graph(pyg_data.Data(edge_index=EDGES, num_nodes=9))
    assert (graph.num_nodes, graph.features, graph.labels, graph.split) == (9, None, None, None)
    assert load_graph(pyg_data.Data(edge_index=EDGES)).num_nodes == 4


def test_adj_t_of_torch_sparse() -> None:
    torch_sparse = pytest.importorskip("torch_sparse", reason="extra `sparse` is not installed")
    # PyG keeps the transpose: rows are targets, columns are sources.
    adj_t = torch_sparse.SparseTensor(row=EDGES[1], col=EDGES[0], sparse_sizes=(4, 4))
    for matrix in (adj_t, adj_t.set_value(torch.ones(5))):
        graph = load_graph(data(edge_index=None, adj_t=matrix))
        assert edge_set(graph) == sorted(map(tuple, EDGES.T.tolist()))
        assert graph.num_nodes == 4
    refused(data(edge_index=None, adj_t=adj_t.set_value(torch.rand(5))), "adj_t", "edge weights are not supported")
    refused(data(edge_index=None, adj_t=adj_t.sparse_resize((4, 5))), "square")
    x = torch_sparse.SparseTensor.from_dense(torch.tensor([[0.0, 2], [0, 0], [3, 4], [0, 0]]))
    features = load_graph(data(x=x)).features
    assert isinstance(features, SparseFeatures)
    assert features.values.tolist() == [2, 3, 4]


@pytest.mark.parametrize("layout", ["coo", "csr", "csc"])
def test_adj_t_as_sparse_tensor(layout: str) -> None:
    coo = torch.sparse_coo_tensor(EDGES.flip(0), torch.ones(5), (4, 4))
    matrix = {"coo": coo, "csr": coo.to_sparse_csr(), "csc": coo.to_sparse_csc()}[layout]
    graph = load_graph(data(edge_index=None, adj_t=matrix, x=None, y=None))
    assert edge_set(graph) == sorted(map(tuple, EDGES.T.tolist()))
    assert graph.num_nodes == 4


def test_sparse_features_stay_sparse() -> None:
    x = torch.tensor([[0.0, 2, 0], [0, 0, 0], [3, 0, 4], [0, 0, 0]])
    shuffled = torch.sparse_coo_tensor(torch.tensor([[2, 0, 2], [2, 1, 0]]), torch.tensor([4.0, 2, 3]), (4, 3))
    for form in (x.to_sparse_csr(), x.to_sparse_coo(), shuffled):
        features = load_graph(data(x=form)).features
        assert isinstance(features, SparseFeatures)
        assert features.shape == (4, 3)
        assert features.indptr.tolist() == [0, 1, 1, 3, 3]
        assert features.indices.tolist() == [1, 0, 2]
        assert features.values.tolist() == [2, 3, 4]


def test_trivial_weights_pass() -> None:
    assert load_graph(data(edge_weight=torch.ones(5), edge_attr=torch.ones(5, 1))).num_nodes == 4


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"edge_index": None}, ["neither edge_index nor adj_t"]),
        ({"edge_index": EDGES.T}, ["data.edge_index", "(5, 2)", "transpose"]),
        ({"edge_index": EDGES.float()}, ["data.edge_index is float32"]),
        ({"edge_index": EDGES + 1}, ["data.edge_index names node 4", "counted from 1"]),
        ({"edge_weight": torch.rand(5)}, ["data.edge_weight", "not supported"]),
        ({"edge_attr": torch.ones(5, 3)}, ["data.edge_attr", "not supported"]),
        ({"y": torch.ones(4, 3)}, ["3 labels a node"]),
        ({"y": torch.tensor([0, 1, -2, 1])}, ["data.y is -2 in row 2"]),
        ({"x": torch.full((4, 2), float("nan"))}, ["data.x holds 8 values"]),
        ({"x": torch.ones(4, 2, dtype=torch.long)}, ["data.x is int64"]),
        ({"x": torch.ones(5, 2)}, ["data.y has shape (4,), expected (5,)"]),
        ({"train_mask": torch.ones(4, 10, dtype=torch.bool)}, ["train_mask holds 10 splits"]),
        ({"train_mask": torch.zeros(4, dtype=torch.bool)}, ["train_mask is empty"]),
        ({"train_mask": torch.ones(4, dtype=torch.bool)}, ["val_mask overlaps train_mask in 1 node"]),
        ({"train_mask": torch.ones(3, dtype=torch.bool)}, ["train_mask is bool (3,)"]),
        ({"train_mask": None}, ["train_mask is missing"]),
    ],
)
def test_wrong_data_gets_one_line(changes: dict[str, Any], parts: list[str]) -> None:
    refused(data(**changes), *parts)


def test_other_objects() -> None:
    hetero = pyg_data.HeteroData()
    hetero["paper"].x = torch.ones(3, 2)
    refused(hetero, "several node types are not supported")
    refused({"edge_index": EDGES}, "dict has neither edge_index nor adj_t")
    refused(None, "NoneType")
