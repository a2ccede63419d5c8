# SPDX-License-Identifier: Apache-2.0
"""Law 3: with λ ≡ 0, η = 1/(1+μ) and float messages, smp and appnp are PyG's APPNP."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qgnn_dist.comm.exchange import Exchange
from qgnn_dist.propagation.messages import FloatMessenger
from qgnn_dist.propagation.neighbourhood import Neighbourhood
from qgnn_dist.propagation.smp import FrozenMultipliers, Propagation
from tests.helpers import make_store, small_graph


@pytest.mark.parametrize(("kind", "rounds"), [("smp", "merged"), ("smp", "two"), ("appnp", "merged")])
@pytest.mark.parametrize("mu", [9.0, 4.0])
def test_equals_pyg(tmp_path: Path, kind: str, rounds: str, mu: float) -> None:
    appnp_layer = pytest.importorskip("torch_geometric.nn").APPNP
    part = make_store(small_graph(), tmp_path / "1", 1).part(0)
    graph = Neighbourhood.of(part)
    h0 = np.random.default_rng(0).normal(size=(part.num_local, 7)).astype(np.float32)
    exchange = Exchange(part.peers, part.num_local, part.num_halo, None, 0, 5.0)
    ours = Propagation(kind, 10, mu, 1 / (1 + mu), rounds).run(
        graph, h0, h0, FloatMessenger(graph, exchange, 7, "forward"), FrozenMultipliers([]))
    rows = np.repeat(np.arange(part.num_local), np.diff(part.indptr))
    edges = torch.from_numpy(np.stack([np.asarray(part.indices, np.int64), rows]))
    theirs = appnp_layer(K=10, alpha=1 / (1 + mu))(torch.from_numpy(h0).double(), edges).numpy()
    worst = float(np.abs(ours - theirs).max())
    print(f"law 3, {kind} {rounds} mu={mu:g}: worst error {worst:.2e}")
    assert worst <= 2e-6 * np.abs(theirs).max()
    assert np.abs(theirs - h0).max() > 0.1


@pytest.mark.parametrize("rounds", ["merged", "two"])
def test_the_multiplier_changes_the_way_and_not_the_end(tmp_path: Path, rounds: str) -> None:
    """Where Δ = 0 so is G: at the clamp's λ the layers end in (I + μL̃)⁻¹·H⁰, and are slower than without λ."""
    part = make_store(small_graph(nodes=150), tmp_path / "1", 1).part(0)
    graph, n = Neighbourhood.of(part), part.num_local
    h0 = np.random.default_rng(0).normal(size=(n, 4)).astype(np.float32)
    exchange = Exchange(part.peers, n, part.num_halo, None, 0, 5.0)
    dense = np.eye(n)
    dense[np.repeat(np.arange(n), np.diff(part.indptr)), part.indices] = 1
    hat = dense / np.sqrt(np.outer(dense.sum(1), dense.sum(1)))
    end = np.linalg.solve(np.eye(n) + 9 * (np.eye(n) - hat), h0.astype(np.float64))

    def error(layers: int, multiplier: float) -> float:
        state = Propagation("smp", layers, 9.0, 0.1, rounds).run(
            graph, h0, h0, FloatMessenger(graph, exchange, 4, "forward"), FrozenMultipliers([multiplier] * layers))
        return float(np.abs(state - end).max() / np.abs(end).max())

    assert error(300, -2.0) < 1e-5
    assert error(3, -2.0) > 1.2 * error(3, 0.0)
    if rounds == "merged":
        assert error(600, -4.0) < 1e-5  # two rounds diverge at −1/(4η) = −2.5
