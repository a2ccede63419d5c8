# SPDX-License-Identifier: Apache-2.0
"""Law 1: float training on 2 and 4 parts equals one part, scores and every gradient, elementwise."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qgnn_dist.data.graph import TRAIN
from tests.helpers import by_source, make_store, settings, small_graph, train_pool, worst_excess


def _two_epochs(store, config) -> tuple[np.ndarray, list[dict[str, np.ndarray]]]:
    """Scores after two epochs, and both epochs' gradients."""
    gradients = []
    with train_pool(store, config) as pool:
        for epoch in (1, 2):
            pool.call("train_epoch", epoch, False, timeout_s=60)
            on_all = pool.call("gradients", timeout_s=60)
            for other in on_all[1:]:
                for name, value in on_all[0].items():
                    np.testing.assert_array_equal(other[name], value)
            gradients.append(on_all[0])
        return by_source(pool.call("training_scores", timeout_s=60)), gradients


@pytest.mark.parametrize("kind", ["smp", "appnp"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_float_training_does_not_depend_on_the_cut(tmp_path: Path, kind: str, sparse: bool, dropout: float) -> None:
    graph = small_graph(sparse=sparse, signed=True)
    config = settings("quant.bits=32", f"propagation.kind={kind}", f"model.dropout={dropout}",
                      "propagation.alpha=0.001", "model.feature_norm=none")
    want, want_gradients = _two_epochs(make_store(graph, tmp_path / "1", 1), config)
    worst = {"scores": 0.0, "gradients": 0.0}
    for parts in (2, 4):
        for method in ("random", "metis"):
            store = make_store(graph, tmp_path / f"{parts}{method}", parts, method)
            assert store.manifest["cut_fraction"] > 0
            got, gradients = _two_epochs(store, config)
            worst["scores"] = max(worst["scores"], worst_excess(got, want))
            for epoch in (0, 1):
                assert set(gradients[epoch]) == set(want_gradients[epoch])
                for name, value in want_gradients[epoch].items():
                    assert np.abs(value).max() > 0, name
                    worst["gradients"] = max(worst["gradients"], worst_excess(gradients[epoch][name], value))
    print(f"law 1, {kind}, sparse={sparse}, dropout={dropout}: worst error over tolerance {worst}")
    assert worst["scores"] <= 1
    assert worst["gradients"] <= 1


def test_backward_is_the_transpose_of_the_forward(tmp_path: Path) -> None:
    """⟨p(Â)x, y⟩ = ⟨x, p(Â)y⟩, λ ≠ 0, both schedules: what makes the gradient exact without stored layers."""
    from qgnn_dist.comm.exchange import Exchange
    from qgnn_dist.propagation.messages import FloatMessenger
    from qgnn_dist.propagation.neighbourhood import Neighbourhood
    from qgnn_dist.propagation.smp import FrozenMultipliers, Propagation

    part = make_store(small_graph(), tmp_path / "1", 1).part(0)
    graph = Neighbourhood.of(part)
    exchange = Exchange(part.peers, part.num_local, part.num_halo, None, 0, 5.0)
    rng = np.random.default_rng(1)
    x, y = (rng.normal(size=(part.num_local, 5)).astype(np.float32) for _ in range(2))
    for rounds in ("merged", "two"):
        spec = Propagation("smp", 6, 9.0, 0.1, rounds)
        multipliers = FrozenMultipliers([-1.5, -0.7, -0.2, -0.4, -1.0, -0.3])

        def run(h: np.ndarray, spec: Propagation = spec, multipliers: FrozenMultipliers = multipliers) -> np.ndarray:
            return spec.run(graph, h, h, FloatMessenger(graph, exchange, 5, "backward"), multipliers)

        left, right = float((run(x).astype(np.float64) * y).sum()), float((run(y).astype(np.float64) * x).sum())
        assert left == pytest.approx(right, rel=1e-5)
        assert np.abs(run(x) - spec.run(graph, x, x, FloatMessenger(graph, exchange, 5, "backward"),
                                        FrozenMultipliers([]))).max() > 1e-3


@pytest.mark.parametrize("rounds", ["merged", "two"])
def test_gradients_are_autograds_through_every_layer(tmp_path: Path, rounds: str) -> None:
    """λ moves; the reference keeps all layers, in double, with a dense Â."""
    store = make_store(small_graph(signed=True), tmp_path / "s", 2)
    config = settings("quant.bits=32", f"propagation.rounds={rounds}", "model.dropout=0", "model.feature_norm=none",
                      "propagation.alpha=0.001", "propagation.eta_lambda=2")
    with train_pool(store, config) as pool:
        networks = [w._network for w in pool.workers]
        start = {name: p.detach().double().clone().requires_grad_() for name, p in networks[0].named_parameters()}
        report = pool.call("train_epoch", 1, True, timeout_s=60)[0]
        got = pool.call_one(0, "gradients", timeout_s=60)
        model = pool.workers[0]._evaluated
    multipliers = report["multipliers"]
    assert multipliers[0] == 0.0
    assert min(multipliers) < -0.1
    assert model.info.multipliers == multipliers, "the evaluated model has the multipliers of its epoch"
    adjacency, x, labels, train = _dense(store)
    hidden = torch.relu(x @ start["weight1"] + start["bias1"])
    h0 = hidden @ start["weight2"] + start["bias2"]
    state, p = h0, adjacency @ h0
    for layer in range(4):
        p, p_before = adjacency @ state, p
        half = (1 - 10 * 0.1) * state + 0.9 * p + 0.1 * h0
        change = p - p_before if rounds == "merged" else adjacency @ half - p
        state = half + 2 * 0.1 * multipliers[layer] * ((half - state) - change)
    torch.nn.functional.cross_entropy(state[train], labels[train]).backward()
    for name, value in got.items():
        want = start[name].grad.numpy()
        assert worst_excess(value, want) <= 10, f"{name}: float32 against double"
        assert np.abs(want).max() > 0


def _dense(store) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Â, features, labels and training nodes of a small store, in double and in the order of the source."""
    n = store.num_nodes
    a, x = np.eye(n), np.zeros((n, store.num_features))
    labels, split = np.zeros(n, np.int64), np.zeros(n, np.int8)
    for part in (store.part(i) for i in range(store.num_parts)):
        source = np.asarray(part.source_index)
        names = np.concatenate([source, part.halo_source_index])
        a[np.repeat(source, np.diff(part.indptr)), names[part.indices]] = 1
        x[source] = part.features_dense(0, part.num_local)
        labels[source], split[source] = part.labels, part.split
    d = a.sum(1) ** -0.5
    train = np.flatnonzero((split == TRAIN) & (labels >= 0))
    return (torch.from_numpy(d[:, None] * a * d), torch.from_numpy(x), torch.from_numpy(labels),
            torch.from_numpy(train))
