# SPDX-License-Identifier: Apache-2.0
"""The float path that users have without us: the same model in eager torch, products with Â by one of three ways."""
from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable

import numpy as np
import torch

from ..model.packed import PackedModel
from ..propagation.neighbourhood import Neighbourhood

__all__ = ["STOCK", "StockForward"]

Product = Callable[[torch.Tensor], torch.Tensor]


def _torch_csr(indptr: np.ndarray, indices: np.ndarray, weights: np.ndarray) -> Product:
    n = len(indptr) - 1
    with warnings.catch_warnings():  # torch calls CSR a beta, in two sentences
        warnings.simplefilter("ignore", UserWarning)
        matrix = torch.sparse_csr_tensor(torch.from_numpy(indptr), torch.from_numpy(indices),
                                         torch.from_numpy(weights), size=(n, n), check_invariants=False)
    return lambda x: matrix @ x


def _torch_sparse(indptr: np.ndarray, indices: np.ndarray, weights: np.ndarray) -> Product:
    from torch_sparse import SparseTensor, matmul

    n = len(indptr) - 1
    matrix = SparseTensor(rowptr=torch.from_numpy(indptr), col=torch.from_numpy(indices),
                          value=torch.from_numpy(weights), sparse_sizes=(n, n), is_sorted=True, trust_data=True)
    return lambda x: matmul(matrix, x)


def _pyg(indptr: np.ndarray, indices: np.ndarray, weights: np.ndarray) -> Product:
    from torch_geometric.nn import APPNP

    rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    edges, values = torch.from_numpy(np.stack([indices, rows])), torch.from_numpy(weights)
    layer = APPNP(K=1, alpha=0.1)  # for its message passing alone
    return lambda x: layer.propagate(edges, x=x, edge_weight=values)


STOCK: dict[str, tuple[str, Callable[[np.ndarray, np.ndarray, np.ndarray], Product]]] = {
    "torch-csr": ("torch", _torch_csr), "torch-sparse": ("torch_sparse", _torch_sparse),
    "pyg": ("torch_geometric", _pyg)}
"""System → the module it needs, and how it makes a product with Â."""


class StockForward:
    """The float model's forward to classes, everything in memory before the clock starts.

    Args:
        model: at 32 bits. features: float32 (n, F).
    """

    def __init__(self, system: str, graph: Neighbourhood, model: PackedModel, features: np.ndarray) -> None:
        n, info = graph.num_local, model.info
        rows = np.repeat(np.arange(n), np.diff(graph.indptr))
        # Self loops in their place, so that columns ascend in every row.
        both = np.concatenate([rows, np.arange(n)]), np.concatenate([graph.indices.astype(np.int64), np.arange(n)])
        order = np.lexsort((both[1], both[0]))
        heads, indices = both[0][order], both[1][order]
        d = graph.inv_sqrt_degree
        weights = d[heads] * d[indices]
        indptr = np.concatenate([[0], np.cumsum(np.bincount(heads, minlength=n))])
        self._product = STOCK[system][1](indptr, indices, weights)
        self._x = torch.from_numpy(features)
        self._layers = [torch.from_numpy(np.ascontiguousarray(a)) for a in (
            model.weight1, model.bias1, model.weight2, model.bias2)]
        self._kind, self._depth, self._mu, self._eta = info.kind, info.layers, info.mu, info.eta
        self._two = info.kind == "smp" and info.rounds == "two"
        self._multipliers = [*info.multipliers, *[0.0] * info.layers]

    @staticmethod
    def is_there(system: str) -> bool:
        """Whether its library is installed."""
        return importlib.util.find_spec(STOCK[system][0]) is not None

    @torch.no_grad()
    def run(self) -> tuple[np.ndarray, np.ndarray]:
        """Classes (n,) and scores (n, C)."""
        w1, b1, w2, b2 = self._layers
        h0 = torch.addmm(b2, torch.relu_(torch.addmm(b1, self._x, w1)), w2)
        a, b, c = 1 - (1 + self._mu) * self._eta, self._mu * self._eta, self._eta
        h, before = h0, h0
        for k in range(self._depth):
            p = self._product(h)
            half = (b * p).add_(h0, alpha=c)
            if abs(a) > 1e-9:  # the default step has none
                half.add_(h, alpha=a)
            force = 2 * self._eta * self._multipliers[k]
            if self._kind == "smp" and (self._two or force != 0):
                delta = half - h
                change = self._product(half) - p if self._two else p - before if k else 0
                half.add_(delta - change, alpha=force)
            h, before = half, p
        return h.argmax(1).numpy(), h.numpy()
