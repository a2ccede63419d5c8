# SPDX-License-Identifier: Apache-2.0
"""Elastic message passing against dense float64 arithmetic, another solver, PyG's APPNP and finite differences."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from qgnn_dist import kernels
from qgnn_dist.cli import app
from qgnn_dist.comm.exchange import Exchange
from qgnn_dist.errors import InputError
from qgnn_dist.model.packed import PackedModel
from qgnn_dist.propagation.elastic import Elastic, Projected
from qgnn_dist.propagation.incidence import Incidence
from qgnn_dist.propagation.messages import FloatMessenger
from qgnn_dist.propagation.neighbourhood import Neighbourhood
from qgnn_dist.propagation.reverse import Reverse
from qgnn_dist.propagation.smp import FrozenMultipliers, Propagation
from qgnn_dist.store.reader import Part
from qgnn_dist.training.loop import check_trainable, device_can_train
from tests.helpers import by_source, make_store, settings, small_graph, train_pool
from tests.parity.test_predict_bits import bits_of, predictions, trained_model

SPECS = [Elastic(0.4, 3.0, "l21"), Elastic(0.2, 3.0, "l1"), Elastic(3.0, 3.0, "l21"), Elastic(0.3, 0.5, "l21"),
         Elastic(0.1, 0.0, "l1")]


class _Dense:
    """The problem and the layers, written down a second time, in float64 with a dense incidence matrix."""

    def __init__(self, part: Part, spec: Elastic) -> None:
        n = part.num_local
        self.adjacency = np.zeros((n, n))
        self.adjacency[np.repeat(np.arange(n), np.diff(part.indptr)), part.indices] = 1
        d = self.adjacency.sum(1) + 1
        ends = np.argwhere(np.triu(self.adjacency))
        self.delta = np.zeros((len(ends), n))
        self.delta[np.arange(len(ends)), ends[:, 0]] = d[ends[:, 0]] ** -0.5
        self.delta[np.arange(len(ends)), ends[:, 1]] = -d[ends[:, 1]] ** -0.5
        self.laplacian, self.n, self.spec = self.delta.T @ self.delta, n, spec

    def project(self, z: np.ndarray) -> np.ndarray:
        if self.spec.norm == "l1":
            return np.clip(z, -self.spec.lambda1, self.spec.lambda1)
        norms = np.linalg.norm(z, axis=1, keepdims=True)
        return z * np.minimum(1, self.spec.lambda1 / np.maximum(norms, 1e-300))

    def run(self, h0: np.ndarray, residual: np.ndarray, layers: int) -> np.ndarray:
        gamma = 1 / (1 + self.spec.lambda2)
        f, z = h0, np.zeros((len(self.delta), h0.shape[1]))
        for _ in range(layers):
            y = gamma * residual + (1 - gamma) * (f - self.laplacian @ f)
            z = self.project(z + self.delta @ (y - gamma * self.delta.T @ z) / (2 * gamma))
            f = y - gamma * self.delta.T @ z
        return f

    def objective(self, f: np.ndarray, h0: np.ndarray) -> float:
        jumps = self.delta @ f
        edge = np.abs(jumps).sum() if self.spec.norm == "l1" else np.linalg.norm(jumps, axis=1).sum()
        smooth = np.einsum("ic,ij,jc->", f, self.laplacian, f)
        return float(self.spec.lambda1 * edge + self.spec.lambda2 / 2 * smooth + ((f - h0) ** 2).sum() / 2)

    def minimum(self, h0: np.ndarray, rho: float = 2.0) -> np.ndarray:
        """By another way: the alternating direction method of multipliers, u = Δ̃F."""
        u = w = np.zeros((len(self.delta), h0.shape[1]))
        system = np.linalg.inv(np.eye(self.n) + (self.spec.lambda2 + rho) * self.laplacian)
        for _ in range(3000):
            f = system @ (h0 + self.delta.T @ (rho * u - w))
            v = self.delta @ f + w / rho
            u = v - self.project(rho * v) / rho  # Moreau: the proximal map is what the dual ball's projection leaves
            w = w + rho * (self.delta @ f - u)
        return np.asarray(f)


def _problem(path: Path, spec: Elastic, nodes: int = 120, columns: int = 4, degree: float = 6.0,
             ) -> tuple[Part, Neighbourhood, np.ndarray, Callable[[int], Propagation]]:
    part = make_store(small_graph(nodes=nodes, degree=degree), path / "s", 1).part(0)
    h0 = np.random.default_rng(1).normal(size=(nodes, columns)).astype(np.float32)
    return part, Neighbourhood.of(part), h0, lambda layers: Propagation("elastic", layers, 9.0, 0.1, "merged", spec)


def _messenger(part: Part, graph: Neighbourhood, columns: int, direction: str = "forward") -> FloatMessenger:
    exchange = Exchange(part.peers, part.num_local, part.num_halo, None, 0, 5.0)
    return FloatMessenger(graph, exchange, columns, direction)


def test_incidence_is_the_dense_one(tmp_path: Path) -> None:
    part, graph, h0, _ = _problem(tmp_path, SPECS[0])
    dense, found = _Dense(part, SPECS[0]), graph.incidence
    assert found is graph.incidence, "made once"
    assert found.num_edges == len(dense.delta) == graph.degree.sum() // 2
    assert (graph.degree == 0).any(), "an isolated node is there"
    got = found.differences(np.eye(part.num_local, dtype=np.float32), np.empty((found.num_edges, 120), np.float32))
    order = np.lexsort((found.nodes[1::2], found.nodes[::2]))
    assert (np.diff(order) == 1).all()
    np.testing.assert_allclose(got, dense.delta, rtol=1e-6)
    z = np.random.default_rng(2).normal(size=(found.num_edges, 4)).astype(np.float32)
    np.testing.assert_allclose(found.gathered(z, np.empty_like(h0)), dense.delta.T @ z, rtol=1e-5, atol=1e-6)


def test_incidence_refuses_half_a_graph(tmp_path: Path) -> None:
    one = Neighbourhood.of(make_store(small_graph(), tmp_path / "1", 1).part(0))
    whole = one.indices.copy()
    whole[0] = (whole[0] + 1) % one.num_local
    odd = Neighbourhood(one.indptr, whole, one.inv_sqrt_degree, 0, 0)
    with pytest.raises(ValueError, match="without its reverse"):
        Incidence.of(odd)
    with pytest.raises(ValueError, match="rows lie in other parts"):
        Incidence.of(Neighbourhood.of(make_store(small_graph(), tmp_path / "2", 2).part(0)))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("layers", [1, 10])
def test_layers_are_the_dense_ones(tmp_path: Path, spec: Elastic, layers: int) -> None:
    part, graph, h0, of = _problem(tmp_path, spec)
    residual = np.random.default_rng(5).normal(size=h0.shape).astype(np.float32)
    kept: list[Projected] = []
    got = of(layers).run(graph, h0, residual, _messenger(part, graph, 4), FrozenMultipliers([]), keep=kept)
    want = _Dense(part, spec).run(h0.astype(np.float64), residual, layers)
    # float32 over ten layers, each a contraction but for Z, which adds up what the layers find.
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=3e-6 * np.abs(want).max())
    assert len(kept) == layers
    moved = [len(k.at) if spec.norm == "l21" else int(k.at.sum()) for k in kept]
    if spec.lambda1 < 1 and layers > 1:
        most = layers * graph.incidence.num_edges * (4 if spec.norm == "l1" else 1)
        assert 0 < sum(moved) < most, "some are outside, not all"


@pytest.mark.parametrize("spec", [s for s in SPECS if s.lambda2 > 0], ids=str)
def test_the_end_is_the_minimum(tmp_path: Path, spec: Elastic) -> None:
    """Against another solver, and the way there goes down: by tens of layers, since Z overshoots in single ones."""
    part, graph, h0, of = _problem(tmp_path, spec)
    dense, exact = _Dense(part, spec), h0.astype(np.float64)

    def after(layers: int) -> np.ndarray:
        return of(layers).run(graph, h0, h0, _messenger(part, graph, 4), FrozenMultipliers([]))

    best = dense.minimum(exact)
    end = after(3000)
    np.testing.assert_allclose(end, best, atol=2e-3 * np.abs(best).max())
    values = [dense.objective(f.astype(np.float64), exact) for f in (h0, after(1), after(10), after(100), end)]
    lowest = dense.objective(best, exact)
    assert values[0] > values[1] > values[2] > values[3] * (1 - 1e-6)
    assert values[-1] == pytest.approx(lowest, rel=1e-5)
    assert values[0] > 1.5 * lowest


@pytest.mark.parametrize("lambda2", [3.0, 9.0, 1.7])
def test_without_an_edge_term_it_is_appnp(tmp_path: Path, lambda2: float) -> None:
    """PyG's layer with teleport 1/(1+λ₂), and our own to the last bit."""
    appnp_layer = pytest.importorskip("torch_geometric.nn").APPNP
    part, graph, h0, of = _problem(tmp_path, Elastic(0.0, lambda2, "l21"), columns=7)
    got = of(10).run(graph, h0, h0, _messenger(part, graph, 7), FrozenMultipliers([]))
    edges = np.stack([part.indices, np.repeat(np.arange(part.num_local), np.diff(part.indptr))]).astype(np.int64)
    theirs = appnp_layer(K=10, alpha=1 / (1 + lambda2))(torch.from_numpy(h0).double(), torch.from_numpy(edges)).numpy()
    assert np.abs(got - theirs).max() <= 2e-6 * np.abs(theirs).max()
    if lambda2 == 3.0:  # γ is a power of two, and nothing is left of 1 − (1 + μ)η
        own = Propagation("appnp", 10, lambda2, 1 / (1 + lambda2), "merged").run(
            graph, h0, h0, _messenger(part, graph, 7), FrozenMultipliers([]))
        np.testing.assert_array_equal(got, own)
    l1 = Propagation("elastic", 10, 9.0, 0.1, "merged", Elastic(0.0, lambda2, "l1")).run(
        graph, h0, h0, _messenger(part, graph, 7), FrozenMultipliers([]))
    np.testing.assert_array_equal(got, l1)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gradients_are_finite_differences(tmp_path: Path, spec: Elastic) -> None:
    """Of the dense layers in double, all elements of both inputs: H⁰ at the start, and the H⁰ term of every layer."""
    part, graph, h0, of = _problem(tmp_path, spec, nodes=24, columns=3, degree=5.0)
    rng, layers, dense = np.random.default_rng(8), 6, _Dense(part, spec)
    residual, grad = (rng.normal(size=h0.shape).astype(np.float32) for _ in range(2))
    kept: list[Projected] = []
    of(layers).run(graph, h0, residual, _messenger(part, graph, 3), FrozenMultipliers([]), keep=kept)
    outside = sum(len(k.at) if spec.norm == "l21" else int(k.at.sum()) for k in kept)
    reverse = Reverse(of(layers), graph, _messenger(part, graph, 3, "backward"), [], [], kept)
    first = reverse.run(grad)
    assert kept == [], "used up"

    def loss(start: np.ndarray, term: np.ndarray) -> float:
        return float((dense.run(start, term, layers) * grad).sum())

    start, term, step = h0.astype(np.float64), residual.astype(np.float64), 1e-6
    for got, place in ((first, 0), (reverse.residual, 1)):
        want = np.empty_like(start)
        for at in np.ndindex(*start.shape):
            moved = np.zeros_like(start)
            moved[at] = step
            up, down = ((loss(start + s * moved, term) if place == 0 else loss(start, term + s * moved))
                        for s in (1, -1))
            want[at] = (up - down) / (2 * step)
        # Central differences are off by 1e-9 between kinks; float32 over six layers by some 1e-6.
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
        assert np.abs(want).max() > 1e-3 or spec.lambda2 == 0, "there is something to compare"
    if spec.lambda1 < 1:
        assert outside > 0, "projections are at work"


@pytest.mark.parametrize("words", [
    ("quant.bits=32",), ("quant.bits=2",), ("quant.bits=4", "messages.coding=direct"),
    ("quant.messages=1", "propagation.elastic_norm=l1"), ("quant.bits=8", "quant.gradients=4"),
    ("messages.stride=2", "propagation.layers=9"), ("quant.residual=2", "quant.method=minmax")])
def test_training_learns_and_packs_what_it_trained(tmp_path: Path, words: tuple[str, ...]) -> None:
    store = make_store(small_graph(nodes=400), tmp_path / "s", 1)
    config = settings("propagation.kind=elastic", "propagation.lambda1=0.5", "model.feature_norm=l2", *words)
    with train_pool(store, config) as pool:
        losses = [sum(r["loss"] for r in pool.call("train_epoch", epoch, epoch == 12, timeout_s=60))
                  for epoch in range(1, 13)]
        want = by_source(pool.call("training_scores", timeout_s=60))
        got = by_source(pool.call("packed_scores", timeout_s=60))
        pool.call("keep_best", timeout_s=60)
        data = pool.call_one(0, "best_model", timeout_s=60)
        assert pool.workers[0]._layers._projected == [], "nothing is left of the forward"
    assert losses[-1] < 0.95 * losses[0]
    if config.quant.bits == 32:
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    else:
        np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))
    model = PackedModel.from_bytes(data)
    assert model.info.elastic == Elastic(0.5, 3.0, config.propagation.elastic_norm)
    assert model.info.multipliers == []
    assert model.to_bytes() == data


def test_the_whole_gradient_is_autograds(tmp_path: Path) -> None:
    """Weights' gradients of one float step, against torch's over dense float64 layers."""
    store = make_store(small_graph(nodes=150), tmp_path / "s", 1)
    spec = Elastic(0.05, 3.0, "l21")  # H⁰ of fresh weights is small
    config = settings("propagation.kind=elastic", f"propagation.lambda1={spec.lambda1}", "quant.bits=32",
                      "model.feature_norm=l2", "model.dropout=0")
    with train_pool(store, config) as pool:
        worker = pool.workers[0]
        weights = {name: p.detach().double().clone().requires_grad_() for name, p in
                   worker._network.named_parameters() if p.requires_grad}
        pool.call("train_epoch", 1, False, timeout_s=60)
        got = pool.call_one(0, "gradients", timeout_s=60)
        rows, labels = worker._split_rows["train"], worker._labels
    part = store.part(0)
    x = torch.from_numpy(part.features_dense(0, part.num_local).astype(np.float64))
    x = x / x.norm(dim=1, keepdim=True).clamp(min=1e-30)
    h0 = torch.relu(x @ weights["weight1"] + weights["bias1"]) @ weights["weight2"] + weights["bias2"]
    dense = _Dense(part, spec)
    delta = torch.from_numpy(dense.delta)
    f, z, outside = h0, torch.zeros(len(delta), h0.shape[1], dtype=torch.float64), 0
    for _ in range(config.propagation.layers):
        y = 0.25 * h0 + 0.75 * (f - delta.T @ (delta @ f))
        z = z + 2 * (delta @ (y - 0.25 * (delta.T @ z)))
        norms = (z * z).sum(1, keepdim=True).clamp(min=1e-30).sqrt()
        outside += int((norms > spec.lambda1).sum())
        z = torch.where(norms > spec.lambda1, z * (spec.lambda1 / norms), z)
        f = y - 0.25 * (delta.T @ z)
    torch.nn.functional.cross_entropy(f[rows], torch.from_numpy(labels[rows])).backward()
    assert 0 < outside < config.propagation.layers * len(delta)
    for name, value in weights.items():
        assert value.grad is not None
        want = value.grad.numpy()
        np.testing.assert_allclose(got[name], want, rtol=1e-3, atol=1e-5 * np.abs(want).max(), err_msg=name)


@pytest.mark.parametrize("words", [("quant.bits=2",), ("quant.bits=32",), ("propagation.elastic_norm=l1",),
                                   ("quant.method=bt_star",)])
def test_predictions_do_not_depend_on_how_they_are_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       words: tuple[str, ...]) -> None:
    """Laws 2 and 8 on one part: levels, threads and orders of rows, while torch's float products are forbidden."""
    graph = small_graph(nodes=700)
    one = make_store(graph, tmp_path / "1", 1)
    model = trained_model(one, "propagation.kind=elastic", "propagation.lambda1=0.5", "model.feature_norm=l2", *words)
    reordered = {order: make_store(graph, tmp_path / order, 1, order=order) for order in ("rcm", "random")}

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a float product of torch ran during predict")

    for holder, names in ((torch, ("mm", "matmul", "addmm", "index_add")), (torch.sparse, ("mm", "addmm")),
                          (torch.Tensor, ("__matmul__", "matmul", "mm", "index_add_", "scatter_add_"))):
        for name in names:
            monkeypatch.setattr(holder, name, refuse)
    kernels.set_threads(1)
    want = bits_of(predictions(one, model, tmp_path / "want")[0])
    assert len(np.unique(want["class"])) > 1
    got = {}
    for level in ("scalar", "reference"):
        with kernels.using_isa(level):
            got[level] = bits_of(predictions(one, model, tmp_path / f"out-{level}")[0])
    kernels.set_threads(3)
    for name, store in {"threads": one, **reordered}.items():
        got[name] = bits_of(predictions(store, model, tmp_path / f"out-{name}")[0])
    for name, table in got.items():
        for column, values in want.items():
            np.testing.assert_array_equal(table[column], values, err_msg=f"{name} {column}")


def test_what_it_does_not_take_is_refused_in_a_sentence(tmp_path: Path) -> None:
    one, two = (make_store(small_graph(), tmp_path / str(parts), parts) for parts in (1, 2))
    model = tmp_path / "model"
    trained_model(one, "propagation.kind=elastic", "model.feature_norm=l2").save(model)
    for words in (("train", two.path, "--out", tmp_path / "run", "--set", "propagation.kind=elastic"),
                  ("predict", two.path, "--model", model, "--out", tmp_path / "p"),
                  ("inspect", model, "--store", two.path)):
        result = CliRunner().invoke(app, [str(w) for w in words])
        assert result.exit_code == 2, result.output
        assert "propagation.kind=elastic takes one part, this is 2" in " ".join(result.output.split())
    assert not list(tmp_path.glob("[rp]*"))
    config = settings("propagation.kind=elastic", "cluster.device=cuda")
    assert not device_can_train(config)
    with pytest.raises(InputError, match=r"propagation\.kind=elastic trains on the CPU only"):
        check_trainable(one, config)
