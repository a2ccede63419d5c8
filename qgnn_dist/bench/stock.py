# SPDX-License-Identifier: Apache-2.0
"""The float path that users have without us: the same model in eager torch, products with Â by one of three ways.

Legend: n nodes, m directed edges with self loops, F features, H hidden, C classes.
"""
from __future__ import annotations

import importlib.util
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, dropout

from ..config import RunConfig
from ..model.packed import PackedModel
from ..propagation.multiplier import MultiplierRule
from ..propagation.neighbourhood import Neighbourhood
from ..propagation.smp import FrozenMultipliers, Multipliers, Propagation

__all__ = ["COMPILED", "STOCK", "STOCK_TRAINING", "Operator", "StockForward", "StockTraining", "is_there",
           "operator", "product_of", "told_symmetric"]

Product = Callable[[Tensor], Tensor]
Operator = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Â in CSR form: indptr int64 (n+1,), indices int64 (m,), ascending in every row, weights float32 (m,)."""
COMPILED = "torch-compile"
"""The first stock system's forward under torch.compile: a row of its own, never what others are compared with."""


def operator(graph: Neighbourhood) -> Operator:
    """Â = D̃^-½(A + I)D̃^-½ of a graph in one part."""
    n, counts = graph.num_local, np.diff(graph.indptr)
    rows = np.repeat(np.arange(n, dtype=np.int32), counts)
    # Self loops in their place, so that columns ascend in every row: after the neighbours of a lower index.
    lower = np.concatenate([[0], np.cumsum(graph.indices < rows)])
    before = lower[graph.indptr[1:]] - lower[graph.indptr[:-1]]
    del lower
    indptr = graph.indptr + np.arange(n + 1)
    own = indptr[:-1] + before
    is_neighbour = np.ones(len(rows) + n, bool)
    is_neighbour[own] = False
    d = graph.inv_sqrt_degree
    indices, weights = np.empty(len(is_neighbour), np.int64), np.empty(len(is_neighbour), np.float32)
    indices[is_neighbour], indices[own] = graph.indices, np.arange(n)
    weights[is_neighbour], weights[own] = d[rows] * d[graph.indices], d * d
    return indptr, indices, weights


def _torch_csr(indptr: np.ndarray, indices: np.ndarray, weights: np.ndarray) -> Product:
    n = len(indptr) - 1
    with warnings.catch_warnings():  # torch calls CSR a beta, in two sentences
        warnings.simplefilter("ignore", UserWarning)
        # 32-bit indices take half the memory and are no slower.
        matrix = torch.sparse_csr_tensor(
            torch.from_numpy(indptr.astype(np.int32)), torch.from_numpy(indices.astype(np.int32)),
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
STOCK_TRAINING = {"torch-csr": ("torch-csr", True), "torch-csr-autograd": ("torch-csr", False),
                  "torch-sparse": ("torch-sparse", True), "pyg": ("pyg", False)}
"""System → whose product it takes, and whether the backward is told that Â is symmetric.

Left to themselves, torch and torch_sparse work with Âᵀ, which they make or permute anew in each backward.
"""


def is_there(system: str) -> bool:
    """Whether a system's library is installed."""
    return importlib.util.find_spec(STOCK[system][0]) is not None


def product_of(system: str, matrix: Operator) -> Product:
    """x (n, C) → Â·x as a system of STOCK does it."""
    return STOCK[system][1](*matrix)


_OPAQUE: weakref.WeakValueDictionary[int, Product] = weakref.WeakValueDictionary()


@torch.library.custom_op("qgnn_bench::product", mutates_args=())
def _opaque(x: Tensor, number: int) -> Tensor:
    """A product that the compiler takes as it is: it knows no CSR, and would give up on all that stands around one."""
    return _OPAQUE[number](x)


@_opaque.register_fake
def _(x: Tensor, number: int) -> Tensor:
    return torch.empty_like(x)


class _Symmetric(torch.autograd.Function):
    """Âᵀ = Â: the backward is the same product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Product) -> Tensor:
        ctx.product = product
        return product(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.product(grads[0].contiguous()), None


class _RuleMultipliers:
    """λ by the rule at once, as a training forward of one process finds them; no gradient flows through them."""

    live = any = True

    def __init__(self, rule: MultiplierRule, energy: float) -> None:
        start, self._slack = rule.start()
        self._rule, self._energy, self._values = rule, energy, [start]

    def value(self, layer: int) -> float:
        """λ of a layer."""
        return self._values[layer]

    def post(self, layer: int, dot: float) -> None:
        """To the next layer's λ."""
        following, self._slack, _, _ = self._rule.advance(self._values[-1], self._slack, dot, self._energy)
        self._values.append(following)


def told_symmetric(product: Product) -> Product:
    """The same product with a matrix that is its own transpose, for autograd: no transpose is made in the backward."""
    return lambda x: _Symmetric.apply(x, product)  # type: ignore[no-untyped-call]


def _propagate(product: Product, h0: Tensor, spec: Propagation, multipliers: Multipliers) -> Tensor:
    """H^K (n, C) by whole-matrix operations; what propagation.smp does, in place where autograd allows it."""
    a, b, c = 1 - (1 + spec.mu) * spec.eta, spec.mu * spec.eta, spec.eta
    smp, two = spec.kind == "smp", spec.kind == "smp" and spec.rounds == "two"
    h, before, p_before = h0, None, None
    for k in range(spec.layers):
        last = k == spec.layers - 1
        posts, force = multipliers.live and not last, 2 * spec.eta * multipliers.value(k)
        p = product(h)
        if posts and not two:
            multipliers.post(k, 0.0 if before is None or p_before is None else _change(h - before, p - p_before))
        half = (b * p).add_(h0, alpha=c)
        if abs(a) > 1e-9:  # the default step has none
            half.add_(h, alpha=a)
        if two and not (last and force == 0):
            delta, change = half - h, product(half).sub_(p)
            if posts:
                multipliers.post(k, _change(delta, change))
            half.add_(delta - change, alpha=force)
        elif smp and not two and force != 0:
            g = half - h
            half.add_(g if p_before is None else g.sub_(p - p_before), alpha=force)
        if smp and not two:
            before, p_before = h if multipliers.live else None, p
        h = half
    return h


@torch.no_grad()
def _change(delta: Tensor, change: Tensor) -> float:
    """⟨Δ, Δ − ÂΔ⟩."""
    return _dot(delta, delta - change)


@torch.no_grad()
def _dot(x: Tensor, y: Tensor) -> float:
    x, y = x.detach(), y.detach()
    return float(torch.dot(x.reshape(-1), y.reshape(-1)))


class StockForward:
    """The float model's forward to classes, everything in memory before the clock starts.

    Args:
        product: with Â. model: at 32 bits. features: float32 (n, F). compiled: by torch.compile, in the first `run`.
    """

    def __init__(self, product: Product, model: PackedModel, features: np.ndarray, *, compiled: bool = False) -> None:
        info = model.info
        self._product, self._x = product, torch.from_numpy(features)
        self._layers = [torch.from_numpy(np.ascontiguousarray(a)) for a in (
            model.weight1, model.bias1, model.weight2, model.bias2)]
        self._spec = info.propagation
        self._multipliers = FrozenMultipliers(info.multipliers)
        self._forward = self._scores
        if compiled:
            number = id(product)
            _OPAQUE[number] = product
            self._between: Product = lambda x: _opaque(x, number)
            self._forward = torch.compile(self._scores, fullgraph=True, dynamic=False)  # or fail, not fall back
        else:
            self._between = product

    @torch.no_grad()
    def run(self) -> tuple[np.ndarray, np.ndarray]:
        """Classes (n,) and scores (n, C)."""
        h = self._forward(self._x)
        return h.argmax(1).numpy(), h.numpy()

    def classes(self) -> np.ndarray:
        """Classes (n,) alone."""
        return self.run()[0]

    def first(self) -> float:
        """Seconds of a run; the first one compiles where that is asked for.

        Raises: whatever torch's compiler does.
        """
        start = time.perf_counter()
        self.run()
        return time.perf_counter() - start

    def _scores(self, x: Tensor) -> Tensor:
        w1, b1, w2, b2 = self._layers
        h0 = torch.addmm(b2, torch.relu_(torch.addmm(b1, x, w1)), w2)
        return _propagate(self._between, h0, self._spec, self._multipliers)


class StockTraining:
    """Full-batch training of the float model by autograd and Adam, masks by torch's dropout.

    Args:
        product: with Â. symmetric: whether the backward is told that it is its own transpose.
        features: float32 (n, F). labels: int64 (n,). rows: int64, those that are trained on.
        weights: name → start (weight1 (F, H), bias1, weight2 (H, C), bias2), copied.
    """

    def __init__(self, product: Product, config: RunConfig, num_edges: int, features: np.ndarray, labels: np.ndarray,
                 rows: np.ndarray, weights: dict[str, np.ndarray], *, symmetric: bool) -> None:
        self._product: Product = told_symmetric(product) if symmetric else product
        self._config, self._spec = config, Propagation.of(config)
        self._rule = MultiplierRule.of(config, num_edges)
        self._x, self._rows = torch.from_numpy(features), torch.from_numpy(rows)
        self._targets = torch.from_numpy(labels)[self._rows]
        self.weights = {name: torch.from_numpy(value.copy()).requires_grad_() for name, value in weights.items()}
        first, *rest = self.weights.values()
        decay = config.train.decay(config.model.feature_norm)
        groups: list[dict[str, Any]] = [{"params": [first], "weight_decay": decay}, {"params": rest}]
        self._optimizer = torch.optim.Adam(groups, lr=config.train.lr)

    def epoch(self) -> float:
        """Forward, backward and one step of Adam; returns the loss."""
        w1, b1, w2, b2 = self.weights.values()
        share = self._config.model.dropout
        self._optimizer.zero_grad()
        hidden = torch.relu_(torch.addmm(b1, dropout(self._x, share), w1))
        h0 = torch.addmm(b2, dropout(hidden, share), w2)
        multipliers: Multipliers = FrozenMultipliers([])
        if self._spec.kind == "smp":
            multipliers = _RuleMultipliers(self._rule, _dot(h0, h0))
        scores = _propagate(self._product, h0, self._spec, multipliers)
        loss = cross_entropy(scores[self._rows], self._targets)
        torch.autograd.backward(loss)
        self._optimizer.step()
        return float(loss.detach())
