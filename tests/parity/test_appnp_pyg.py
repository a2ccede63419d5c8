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
