# SPDX-License-Identifier: Apache-2.0
"""The backward through clipped messages, against autograd in float64 over a dense adjacency that keeps every layer."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qgnn_dist.comm.exchange import Exchange
from qgnn_dist.config import load_config
from qgnn_dist.model.perceptron import Perceptron
from qgnn_dist.propagation.elastic import Projected
from qgnn_dist.propagation.neighbourhood import Neighbourhood
from qgnn_dist.propagation.smp import FrozenMultipliers
from qgnn_dist.quant.learned import gradient_share
from qgnn_dist.quant.ranges import Range
from qgnn_dist.training.affine import AffineTraining
from tests.helpers import make_store, small_graph

CLASSES = 5
LAMBDA1 = 1.5


class _Reference:
    """The same straight-through rule, written for autograd: rounding adds a constant, clipped elements are bounds."""

    def __init__(self, dense: np.ndarray, codes: list[np.ndarray], ends: dict[str, tuple[float, float]],
                 low: torch.Tensor, high: torch.Tensor, names: list[str], bits: dict[str, int]) -> None:
        self.adjacency = torch.from_numpy(dense)
        self.d = (self.adjacency.sum(1, keepdim=True) + 1) ** -0.5
        self.codes, self.ends, self.low, self.high, self.names, self.bits = codes, ends, low, high, names, bits
        self.at = 0

    def coded(self, x: torch.Tensor, name: str, codes: np.ndarray) -> torch.Tensor:
        at, top = self.names.index(name), 2 ** self.bits[name] - 1
        lower, upper = self.low[at] * self.ends[name][0], self.high[at] * self.ends[name][1]
        position = (x - lower) / (upper - lower) * top
        rounding = (torch.from_numpy(codes.astype(np.float64)) - position).detach()
        inside = lower + (position + rounding) * (upper - lower) / top
        return torch.where(x < lower, lower, torch.where(x > upper, upper, inside))

    def around(self, h: torch.Tensor) -> torch.Tensor:
        delivered = self.coded(self.d * h, f"news/{self.at}", self.codes[self.at])
        self.at += 1
        return self.d * (self.adjacency @ delivered) + self.d**2 * h

    def run(self, h0: torch.Tensor, residual: torch.Tensor, kind: str, rounds: str, layers: int,
            multipliers: list[float], mu: float, eta: float) -> torch.Tensor:
        if kind == "elastic":
            return self.elastic(h0, residual, layers)
        state, p = h0, torch.zeros(())
        for k in range(layers):
            p, p_before = self.around(state), p
            half = (1 - (1 + mu) * eta) * state + mu * eta * p + eta * residual
            if kind == "appnp" or (rounds == "two" and k == layers - 1 and multipliers[k] == 0):
                state = half
                continue
            change = self.around(half) - p if rounds == "two" else p - p_before if k else 0
            state = half + 2 * eta * multipliers[k] * ((half - state) - change)
        return state

    def elastic(self, h0: torch.Tensor, residual: torch.Tensor, layers: int) -> torch.Tensor:
        """λ₁ = LAMBDA1, λ₂ = 3, rows onto the ball."""
        ends = torch.argwhere(torch.triu(self.adjacency))
        delta = torch.zeros(len(ends), len(h0), dtype=torch.float64)
        for side, sign in ((0, 1), (1, -1)):
            delta[torch.arange(len(ends)), ends[:, side]] = sign * self.d[ends[:, side], 0]
        state, z = h0, torch.zeros(len(ends), h0.shape[1], dtype=torch.float64)
        for _ in range(layers):
            y = 0.25 * residual + 0.75 * self.around(state)
            z = z + 2 * (delta @ (y - 0.25 * (delta.T @ z)))
            norms = (z * z).sum(1, keepdim=True).clamp(min=1e-30).sqrt()
            z = torch.where(norms > LAMBDA1, z * (LAMBDA1 / norms), z)
            state = y - 0.25 * (delta.T @ z)
        return state


@pytest.mark.parametrize("method", ["qlr", "bt"])
@pytest.mark.parametrize("multipliers", [[0.0] * 4, [0.0, -1.2, -0.5, -0.8], [-0.7, -1.5, 0.0, 0.0]])
@pytest.mark.parametrize(("kind", "rounds"), [("smp", "merged"), ("smp", "two"), ("appnp", "merged"),
                                              ("elastic", "merged")])
def test_masked_backward_is_autograds(tmp_path: Path, kind: str, rounds: str, multipliers: list[float],
                                      method: str) -> None:
    part = make_store(small_graph(nodes=200), tmp_path / "s", 1).part(0)
    graph = Neighbourhood.of(part)
    n = graph.num_local
    dense = np.zeros((n, n))
    dense[np.repeat(np.arange(n), np.diff(graph.indptr)), graph.indices] = 1
    config = load_config(overrides=[f"quant.method={method}", "messages.coding=direct", f"propagation.kind={kind}",
                                    f"propagation.rounds={rounds}", "propagation.layers=4", "quant.residual=4",
                                    "propagation.eta=0.08", "propagation.mu=4", f"propagation.lambda1={LAMBDA1}"])
    network = Perceptron(config, 24, CLASSES)
    stages = network.ranges
    assert stages is not None
    rng = np.random.default_rng(3)
    with torch.no_grad():  # uneven bounds, which clip a good share on both sides
        stages.low.copy_(torch.from_numpy(rng.uniform(0.4, 0.7, len(stages.names)).astype(np.float32)))
        stages.high.copy_(torch.from_numpy(rng.uniform(0.3, 0.6, len(stages.names)).astype(np.float32)))
    exchange = Exchange(part.peers, n, part.num_halo, None, 0, 5.0)
    training = AffineTraining(config, stages, graph, exchange, None, source_index=part.source_index, num_nodes=n)
    ranges = {name: Range(1.0, 0.8, 2.0, -2.0 - 0.1 * i, 2.2 + 0.1 * i) for i, name in enumerate(stages.names)}
    grids = training.grids(ranges)
    h0, grad = (rng.normal(size=(n, CLASSES)).astype(np.float32) for _ in range(2))
    seen = []

    residual = training.residual(h0, grids, train=True)
    messenger = training.messenger(CLASSES, grids, train=True, protected=None)
    gather = messenger.gather

    def watch(h: np.ndarray, layer: int) -> np.ndarray:
        result = gather(h, layer)
        seen.append(messenger._codes.copy())
        return result

    messenger.gather = watch  # type: ignore[method-assign]
    frozen = FrozenMultipliers(multipliers if kind == "smp" else [])
    kept: list[Projected] = []
    out = training._propagation.run(graph, h0, residual, messenger, frozen, keep=kept)
    projected = sum(len(k.at) for k in kept)
    got, (got_low, got_high) = training.backward(grad, multipliers if kind == "smp" else [], ranges, grids,
                                                 projected=kept)

    low, high = (t.detach().double().requires_grad_() for t in (stages.low, stages.high))
    ends = {name: stages.ends(name, ranges[name]) for name in stages.names}
    reference = _Reference(dense, seen, ends, low, high, stages.names, stages.bits)
    state = torch.from_numpy(h0).double().requires_grad_()
    coded = reference.coded(state, "residual", grids["residual"].codes(h0, 4))
    want = reference.run(state, coded, kind, rounds, 4, multipliers, 4.0, 0.08)
    assert reference.at == len(seen), "the reference has the same rounds"
    (want * torch.from_numpy(grad)).sum().backward()

    np.testing.assert_allclose(out, want.detach().numpy(), rtol=1e-4, atol=1e-5, err_msg="the forward")
    # float32 over 8 rounds: some 1e-6 of the largest gradient.
    np.testing.assert_allclose(got, state.grad.numpy(), rtol=1e-4, atol=3e-6 * float(np.abs(grad).max()))
    share = np.array([gradient_share(n * CLASSES, stages.bits[name]) for name in stages.names])
    used = np.array([name == "residual" or name in {f"news/{k}" for k in range(len(seen))} for name in stages.names])
    for mine, theirs in ((got_low, low.grad.numpy()), (got_high, high.grad.numpy())):
        np.testing.assert_allclose(mine[used], (theirs * share)[used], rtol=1e-3, atol=1e-5 * np.abs(mine).max())
        assert (mine[~used] == 0).all()
        assert (np.abs(mine[used]) > 0).sum() > used.sum() / 2  # a second round counts for nothing where λ = 0
    clipped = [float((c.sides != 0).mean()) for c in messenger.clipped]
    assert max(clipped) > (0.01 if kind == "elastic" else 0.02), "the masks are at work"
    assert (projected > 0) == (kind == "elastic"), "and so are the projections"

