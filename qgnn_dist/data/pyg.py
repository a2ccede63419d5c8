# SPDX-License-Identifier: Apache-2.0
"""Graphs from a PyTorch Geometric `Data` object. Arrays are shared with it, not copied, wherever dtypes allow it."""
from __future__ import annotations

from typing import Any

import numpy as np
import torch

from qgnn_dist.data import checks
from qgnn_dist.data.graph import SPLITS, Graph, SparseFeatures
from qgnn_dist.data.npz import edge_passes
from qgnn_dist.errors import InputError

__all__ = ["edges_of", "features_of", "from_pyg"]

MASKS = {"train": "train_mask", "valid": "val_mask", "test": "test_mask"}
"""What PyG calls the splits."""


def from_pyg(data: Any, *, labels: bool = True) -> Graph:
    """The graph in a `torch_geometric.data.Data`.

    Args:
        data: `edge_index` int (2, E), or `adj_t` as torch_sparse.SparseTensor or a sparse torch tensor (N, N); optional
            `x` (N, F) dense or sparse, `y` (N,) or (N, 1), `train_mask`, `val_mask`, `test_mask` bool (N,).
        labels: False leaves labels and masks alone, whatever they are: prediction needs edges and features.

    Raises:
        InputError: several node types, edge weights that are not all 1, edge features, several labels a node,
            several splits, or an array that does not fit.
    """
    kinds = {kind.__name__ for kind in type(data).__mro__}
    if "HeteroData" in kinds:
        raise InputError("HeteroData: several node types are not supported; data.to_homogeneous() merges them")
    edge_index = _edge_index(data)
    for name in ("edge_weight", "edge_attr"):
        value = getattr(data, name, None)
        if value is not None and not _all_ones(value):
            raise InputError(f"data.{name}: edge weights and edge features are not supported; set data.{name} = None")
    x = getattr(data, "x", None)
    num_nodes = checks.check_num_nodes(_num_nodes(data, x, edge_index), "data.num_nodes")
    checks.check_edges(edge_index, num_nodes, "data.edge_index")
    classes, num_classes = None, 0
    y = getattr(data, "y", None) if labels else None
    if y is not None:
        classes, num_classes = checks.labels_from(_numpy(y, "data.y"), num_nodes, "data.y")
    graph = Graph(
        name="pyg",
        num_nodes=num_nodes,
        edges=edge_passes(edge_index),
        features=None if x is None else features_of(x, num_nodes, "data.x"),
        labels=classes,
        num_classes=num_classes,
        split=_split(data, num_nodes) if labels else None,
        edge_rows=edge_index.shape[1],
    )
    return checks.check_graph(graph)


def _numpy(value: Any, name: str) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    if not isinstance(value, torch.Tensor):
        raise InputError(f"{name} is {type(value).__name__}, expected a tensor")
    tensor = value.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _all_ones(value: Any) -> bool:
    if not isinstance(value, torch.Tensor) or value.dim() not in (1, 2) or value.shape[1:] not in ((), (1,)):
        return False
    return bool((value == 1).all())


def _coordinates(matrix: Any, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, tuple[int, int]]:
    """Rows, columns, values (None where all are 1 by definition) and shape of any sparse matrix PyG knows."""
    if isinstance(matrix, torch.Tensor):
        if matrix.layout == torch.strided or matrix.dim() != 2:
            raise InputError(f"{name} is a dense tensor {tuple(matrix.shape)}, expected a sparse matrix")
        coo = matrix.detach().cpu()
        coo = coo if coo.layout == torch.sparse_coo else coo.to_sparse(layout=torch.sparse_coo)
        # Not coalesced, so that a repeated edge stays two edges of weight 1 rather than one of weight 2.
        index = coo._indices()
        return index[0], index[1], coo._values(), (int(matrix.shape[0]), int(matrix.shape[1]))
    if not hasattr(matrix, "coo") or not hasattr(matrix, "sparse_sizes"):
        raise InputError(
            f"{name} is {type(matrix).__name__}, expected torch_sparse.SparseTensor or a sparse torch tensor"
        )
    row, column, values = matrix.coo()
    return row.cpu(), column.cpu(), values, tuple(matrix.sparse_sizes())


def edges_of(adjacency: Any, where: str) -> np.ndarray:
    """Edges as integers (2, E), their range not yet checked.

    Args:
        adjacency: `edge_index` (2, E), a strided tensor; or a square matrix as torch_sparse.SparseTensor or a sparse
            torch tensor, whose rows are targets as in PyG. where: its name in messages.
    Raises: InputError: another shape or type, or weights that are not all 1.
    """
    if isinstance(adjacency, np.ndarray) or (isinstance(adjacency, torch.Tensor)
                                             and adjacency.layout == torch.strided):
        edges = _numpy(adjacency, where)
        checks.check_edge_shape(edges.shape, edges.dtype, where)
        return edges
    row, column, values, shape = _coordinates(adjacency, where)
    if shape[0] != shape[1]:
        raise InputError(f"{where} has shape {shape}, expected a square matrix")
    if values is not None and not _all_ones(values):
        raise InputError(f"{where}: edge weights are not supported; use {where}.set_value(None), or a matrix of ones "
                         "before any normalisation")
    return torch.stack([column, row]).numpy()


def _edge_index(data: Any) -> np.ndarray:
    edge_index, adj_t = getattr(data, "edge_index", None), getattr(data, "adj_t", None)
    if edge_index is not None:
        edges = _numpy(edge_index, "data.edge_index")
        checks.check_edge_shape(edges.shape, edges.dtype, "data.edge_index")
        return edges
    if adj_t is None:
        raise InputError(f"{type(data).__name__} has neither edge_index nor adj_t, expected a PyG Data")
    if isinstance(adj_t, torch.Tensor) and adj_t.layout == torch.strided:
        raise InputError(f"data.adj_t is a dense tensor {tuple(adj_t.shape)}, expected a sparse matrix")
    return edges_of(adj_t, "data.adj_t")


def _num_nodes(data: Any, x: Any, edge_index: np.ndarray) -> int:
    """What the object says itself; PyG guesses from the edges with a warning, so that comes last and is done here."""
    stored = data.__dict__.get("_store", {}) if hasattr(data, "__dict__") else {}
    if "num_nodes" in stored and stored["num_nodes"] is not None:
        return int(stored["num_nodes"])
    if x is not None:
        return int(x.size(0))
    if getattr(data, "adj_t", None) is not None:
        return int(data.adj_t.size(0))
    y = getattr(data, "y", None)
    if y is not None:
        return int(y.shape[0])
    return int(edge_index.max()) + 1 if edge_index.size else 0


def features_of(x: Any, num_nodes: int, where: str) -> np.ndarray | SparseFeatures:
    """Checked features of `num_nodes` rows, from a dense or any sparse matrix that PyG knows; `where` names it."""
    if isinstance(x, torch.Tensor) and x.layout == torch.strided:
        return checks.dense_features(_numpy(x, where), num_nodes, where)
    row, column, values, shape = _coordinates(x, where)
    if shape[0] != num_nodes:
        raise InputError(f"{where} has shape {shape}, expected ({num_nodes}, number of features)")
    rows = row.numpy()
    order = np.lexsort((column.numpy(), rows))
    indptr = np.zeros(num_nodes + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=num_nodes), out=indptr[1:])
    stored = np.ones(len(rows), np.float32) if values is None else _numpy(values, where)[order]
    return checks.sparse_features(indptr, column.numpy()[order], stored, shape, where)


def _split(data: Any, num_nodes: int) -> np.ndarray | None:
    masks = {name: getattr(data, MASKS[name], None) for name in SPLITS}
    given = {name: _numpy(mask, f"data.{MASKS[name]}") for name, mask in masks.items() if mask is not None}
    return checks.split_from_masks(given, num_nodes, MASKS) if given else None
