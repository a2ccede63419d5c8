# SPDX-License-Identifier: Apache-2.0
"""Coded gradient messages in training: no cut changes them, on average they are float's, and the bytes are law 5's."""
from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qgnn_dist import kernels
from qgnn_dist.comm.exchange import Exchange
from qgnn_dist.comm.wire import HEADER_BYTES
from qgnn_dist.errors import InputError
from qgnn_dist.model.row_blocks import RowBlocks
from qgnn_dist.propagation.fused_float import FusedFloatLayers
from qgnn_dist.propagation.messages import FloatMessenger, GradientCoding, GradientMessenger
from qgnn_dist.propagation.neighbourhood import Neighbourhood
from qgnn_dist.propagation.reverse import Reverse
from qgnn_dist.propagation.smp import FrozenMultipliers, LiveMultipliers, Propagation
from qgnn_dist.training.loop import check_trainable
from tests.helpers import make_store, settings, small_graph, train_pool, worst_excess

MULTIPLIERS = [0.0, -1.2, -0.4, -0.8]


def one_part(tmp_path: Path, nodes: int = 300) -> tuple[Neighbourhood, Exchange, np.ndarray]:
    part = make_store(small_graph(nodes=nodes), tmp_path / "one", 1).part(0)
    graph = Neighbourhood.of(part)
    return graph, Exchange(part.peers, graph.num_local, 0, None, 0, 5.0), np.asarray(part.source_index)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("kind", "rounds"), [("smp", "merged"), ("smp", "two"), ("appnp", "merged"),
                                              ("none", "merged")])
@pytest.mark.parametrize("multipliers", [[], MULTIPLIERS, [-0.7, 0.0, -1.5, 0.0]], ids=str)
def test_layers_are_the_messengers(tmp_path: Path, bits: int, kind: str, rounds: str,
                                   multipliers: list[float]) -> None:
    graph, exchange, places = one_part(tmp_path)
    spec, coding = Propagation(kind, 4, 9.0, 0.1, rounds), GradientCoding(bits, 7, 3, places)
    grad = np.random.default_rng(0).normal(size=(graph.num_local, 5)).astype(np.float32)
    frozen = FrozenMultipliers(multipliers if kind == "smp" else [])
    messenger = GradientMessenger(graph, exchange, 5, coding)
    want = spec.run(graph, grad, grad, messenger, frozen)
    rounds_before = exchange.exchange_rounds
    got = FusedFloatLayers(spec, graph, exchange, "backward", coding=coding).run(grad, grad, frozen)
    np.testing.assert_array_equal(got, want)
    assert exchange.exchange_rounds == 2 * rounds_before
    plain = FusedFloatLayers(spec, graph, exchange, "backward").run(grad, grad, frozen)
    assert (plain != got).any() == (kind != "none")


@pytest.mark.parametrize(("bits", "rounds"), [(2, "merged"), (2, "two"), (4, "merged"), (8, "two")])
def test_on_average_the_gradient_is_floats(tmp_path: Path, bits: int, rounds: str) -> None:
    """400 epochs' keys of one backward, λ ≠ 0: the mean error over its standard deviation is a standard normal's."""
    graph, exchange, places = one_part(tmp_path)
    spec, frozen, draws = Propagation("smp", 4, 9.0, 0.1, rounds), FrozenMultipliers(MULTIPLIERS), 400
    grad = np.random.default_rng(1).normal(size=(graph.num_local, 5)).astype(np.float32)
    want = FusedFloatLayers(spec, graph, exchange, "backward").run(grad, grad, frozen).astype(np.float64)
    errors = np.stack([FusedFloatLayers(spec, graph, exchange, "backward", coding=GradientCoding(
        bits, 11, epoch, places)).run(grad, grad, frozen) - want for epoch in range(draws)])
    mean, deviation = errors.mean(0), errors.std(0)
    reached = deviation > 1e-5
    assert reached.mean() > 0.9
    score = mean[reached] / deviation[reached] * np.sqrt(draws)
    print(f"{bits} bits, {rounds}: rms of the mean error over its deviation {np.sqrt((score**2).mean()):.3f}, worst "
          f"{np.abs(score).max():.2f}; one backward's error {np.sqrt((errors**2).mean() / (want**2).mean()):.3f}")
    # A bias of a tenth of the deviation would add 4. Rows share their neighbours' draws, so few scores are independent:
    # over 400 draws the mean lies between 0.96 and 1.30, over 4,000 it is 0.93 to 1.00.
    assert abs((score**2).mean() - 1) <= 0.5
    assert np.abs(score).max() <= 5.5
    assert np.abs(errors[:, ~reached]).max(initial=0) <= 1e-4


def first_gradient(monkeypatch: pytest.MonkeyPatch, store: Any, config: Any) -> tuple[np.ndarray, dict[str, Any], Any]:
    """∂L/∂H⁰ of the first epoch in the order of the source, the weights' gradients, and each worker's report."""
    seen: dict[int, np.ndarray] = {}
    original = RowBlocks.backward

    def watch(self: RowBlocks, grad: np.ndarray) -> None:
        seen[id(self)] = grad.copy()
        original(self, grad)

    monkeypatch.setattr(RowBlocks, "backward", watch)
    with train_pool(store, config) as pool:
        reports = pool.call("train_epoch", 1, False, timeout_s=60)
        order = np.argsort(np.concatenate([w._part.source_index for w in pool.workers]))
        whole = np.concatenate([seen[id(w._blocks)] for w in pool.workers])[order]
        gradients = pool.call_one(0, "gradients", timeout_s=60)
        formula = [w._exchange.expected_bytes(config.quant.gradients, store.num_classes, "backward")
                   for w in pool.workers]
        rows = [sum(len(p.send_rows) for p in w._part.peers) for w in pool.workers]
        peers = [sum(len(p.send_rows) > 0 for p in w._part.peers) for w in pool.workers]
    monkeypatch.setattr(RowBlocks, "backward", original)
    return whole, gradients, [(r["wire_bytes"]["backward"] if r["wire_bytes"] else 0, *figures)
                              for r, figures in zip(reports, zip(formula, rows, peers))]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("words", [(), ("propagation.rounds=two",), ("propagation.kind=appnp", "quant.messages=1")])
def test_no_cut_changes_the_gradient_and_bytes_are_the_formulas(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                                bits: int, words: tuple[str, ...]) -> None:
    """Law 5 and law 1's rule: ∂L/∂H⁰ of the first epoch has the same bits on every cut."""
    graph = small_graph(nodes=900, classes=7)
    config = settings("quant.bits=2", f"quant.gradients={bits}", "model.feature_norm=l2", "propagation.alpha=0.001",
                      "propagation.eta_lambda=2", *words)
    want, want_weights, _ = first_gradient(monkeypatch, make_store(graph, tmp_path / "1", 1), config)
    assert np.isfinite(want).all()
    assert (want != 0).mean() > 0.5
    for parts, method in ((2, "metis"), (2, "random"), (4, "random")):
        store = make_store(graph, tmp_path / f"{parts}{method}", parts, method)
        got, weights, sent = first_gradient(monkeypatch, store, config)
        np.testing.assert_array_equal(got, want)
        for name, value in want_weights.items():
            assert np.abs(value).max() > 0
            assert worst_excess(weights[name], value) <= 1, name
        for counted, formula, rows, peers in sent:
            assert formula == rows * (-(-7 * bits // 8) + 1) + HEADER_BYTES * peers
            rounds = {4 * formula, 8 * formula, 7 * formula} if "propagation.rounds=two" in words else {4 * formula}
            assert counted in rounds
            assert rows > 0


def test_the_draws_follow_the_run_and_the_epoch(tmp_path: Path) -> None:
    graph, exchange, places = one_part(tmp_path)
    spec, frozen = Propagation("appnp", 4, 9.0, 0.1, "merged"), FrozenMultipliers([])
    grad = np.random.default_rng(1).normal(size=(graph.num_local, 5)).astype(np.float32)
    runs = [FusedFloatLayers(spec, graph, exchange, "backward", coding=GradientCoding(2, seed, epoch, places)).run(
        grad, grad, frozen) for seed, epoch in ((0, 1), (0, 2), (1, 1), (0, 1))]
    assert (runs[0] != runs[1]).mean() > 0.5
    assert (runs[0] != runs[2]).mean() > 0.5
    np.testing.assert_array_equal(runs[0], runs[3])
    keys = {GradientCoding(2, 0, 1, places).key(layer, second) for layer in range(4) for second in (False, True)}
    assert len(keys) == 8


@pytest.mark.parametrize("words", [("quant.method=qlr", "messages.coding=direct", "propagation.rounds=two"),
                                   ("quant.method=bt",)])
def test_the_other_methods_take_them(tmp_path: Path, words: tuple[str, ...]) -> None:
    graph, losses, weights = small_graph(nodes=600), {}, {}
    config = settings("quant.bits=4", "quant.gradients=4", "model.feature_norm=l2", *words)
    for parts in (1, 2):
        with train_pool(make_store(graph, tmp_path / str(parts), parts), config) as pool:
            first = pool.call("train_epoch", 1, False, timeout_s=60)
            weights[parts] = pool.call_one(0, "gradients", timeout_s=60)
            runs = [first, *(pool.call("train_epoch", e, False, timeout_s=60) for e in range(2, 21))]
            if parts == 2:
                formula = [w._exchange.expected_bytes(4, 5, "backward") for w in pool.workers]
                for report, one in zip(first, formula):
                    assert report["wire_bytes"]["backward"] % one == 0
                    assert 4 <= report["wire_bytes"]["backward"] // one <= 8
        losses[parts] = np.array([sum(r["loss"] for r in epoch) for epoch in runs])
    assert losses[1][-1] < 0.8 * losses[1][0]
    assert (np.abs(losses[2] - losses[1]) / losses[1]).mean() <= 0.01
    for name in ("weight1", "weight2"):
        assert worst_excess(weights[2][name], weights[1][name]) <= 30, name


def test_masked_backward_takes_both_messengers(tmp_path: Path) -> None:
    """Reverse with nothing clipped is the propagation itself, whichever messenger carries it, on average."""
    graph, exchange, places = one_part(tmp_path, 200)
    spec = Propagation("smp", 3, 9.0, 0.1, "two")
    grad = np.random.default_rng(1).normal(size=(graph.num_local, 5)).astype(np.float32)

    def run(messenger: Any) -> np.ndarray:
        reverse = Reverse(spec, graph, messenger, MULTIPLIERS[1:], [])
        return reverse.run(grad) + reverse.residual

    want = run(FloatMessenger(graph, exchange, 5, "backward"))
    draws = np.stack([run(GradientMessenger(graph, exchange, 5, GradientCoding(4, 5, epoch, places)))
                      for epoch in range(200)]) - want
    assert np.abs(draws).max() > 1e-3
    assert np.abs(draws.mean(0)).max() <= 5.5 * (draws.std(0).max() / np.sqrt(200))


def test_more_classes_than_the_kernel_takes_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store = make_store(small_graph(), tmp_path / "s", 1)
    monkeypatch.setattr(kernels, "LAYER_COLUMNS", 4)
    with pytest.raises(InputError, match=r"quant\.gradients=2: the store has 5 classes, expected at most 4") as caught:
        check_trainable(store, settings("quant.gradients=2"))
    assert caught.value.exit_code == 2
    check_trainable(store, settings("quant.gradients=32"))


def test_live_multipliers_are_refused(tmp_path: Path) -> None:
    graph, exchange, places = one_part(tmp_path)
    grad = np.ones((graph.num_local, 5), np.float32)
    live = LiveMultipliers(None, 1, 0.0, 1.0, 1.0)  # type: ignore[arg-type]
    layers = FusedFloatLayers(Propagation("smp", 2, 9.0, 0.1, "merged"), graph, exchange, "backward",
                              coding=GradientCoding(2, 0, 1, places))
    with pytest.raises(ValueError, match="the multipliers of a backward are those of its forward"):
        layers.run(grad, grad, live)


def test_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    """Law 9 of the backward: K = 64 takes what K = 4 does, and less than float rows."""
    graph, exchange, places = one_part(tmp_path, 5000)
    grad = np.random.default_rng(1).normal(size=(graph.num_local, 40)).astype(np.float32)

    def peak(layers: int, coding: GradientCoding | None) -> int:
        run = FusedFloatLayers(Propagation("smp", layers, 9.0, 0.1, "merged"), graph, exchange, "backward",
                               coding=coding)
        tracemalloc.start()
        run.run(grad.copy(), grad, FrozenMultipliers([-0.5] * layers))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    coding = GradientCoding(2, 0, 1, places)
    assert peak(64, coding) <= 1.01 * peak(4, coding)
    assert peak(64, coding) < 0.7 * peak(64, None)


def test_a_diverged_gradient_shows(tmp_path: Path) -> None:
    graph, exchange, places = one_part(tmp_path)
    grad = np.ones((graph.num_local, 5), np.float32)
    bad = int(np.argmax(graph.degree))
    grad[bad, 2] = np.inf
    out = FusedFloatLayers(Propagation("appnp", 1, 9.0, 0.1, "merged"), graph, exchange, "backward",
                           coding=GradientCoding(4, 0, 1, places)).run(grad, grad, FrozenMultipliers([]))
    near = graph.indices[graph.indptr[bad]:graph.indptr[bad + 1]]
    assert np.isnan(out[near]).all()
    rest = np.setdiff1d(np.arange(len(grad)), [*near, bad])
    assert np.isfinite(out[rest]).all()
