# SPDX-License-Identifier: Apache-2.0
"""A round of float messages and its layer in one pass give the bits of the kernels in turn, at every level."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qgnn_dist import kernels
from qgnn_dist.comm.exchange import Exchange
from qgnn_dist.propagation.fused_float import MOMENT_COLUMNS, FusedFloatLayers, float_moments
from qgnn_dist.propagation.messages import FloatMessenger
from qgnn_dist.propagation.multiplier import InProcessServer, MultiplierRule, MultiplierServer
from qgnn_dist.propagation.neighbourhood import Neighbourhood
from qgnn_dist.propagation.smp import FrozenMultipliers, LiveMultipliers, Multipliers, Propagation
from tests.helpers import make_store, settings, small_graph, untrained_model
from tests.parity.test_kernels_levels import _everywhere, _graph
from tests.parity.test_predict_bits import bits_of, predictions

COLUMNS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 33, 40, 64, 65, 100, 130)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("case", ["plain", "constrained", "first", "live", "second", "second live", "last"])
def test_one_pass_is_the_kernels_in_turn(columns: int, case: str) -> None:
    rng = np.random.default_rng(columns)
    indptr, indices, buffer = _graph(rng, 120)
    n = len(indptr) - 1
    d = (1 / np.sqrt(np.diff(indptr) + 1)).astype(np.float32)
    y = rng.normal(size=(buffer, columns)).astype(np.float32)
    h, h0, held, before = (rng.normal(size=(n, columns)).astype(np.float32) for _ in range(4))
    a, b, c = np.float32(0.05), np.float32(0.9), np.float32(0.1)
    second, live, first = case.startswith("second"), case.endswith("live"), case == "first"
    coefficient = 0.0 if case in ("plain", "last") else -0.3
    begin, end = 3, n - 2

    def whole() -> dict[str, np.ndarray]:
        out = {"out": np.full_like(h, 7), "p": held.copy(), "dots": np.full(n, 7.0), "next": np.full_like(y, 77)}
        back = before.copy() if second or live else None
        target = {"second": h.copy(), "live": back}.get(case, out["out"])  # it may be where h or before is
        kernels.layer_float(indptr, indices, y, d, h0, target if case == "second" else h, back, target,
                            None if case == "plain" else out["p"], first, second, coefficient, a, b, c,
                            None if case == "last" else out["next"], out["dots"] if live else None, begin, end)
        if target is not out["out"]:
            out["out"][begin:end] = target[begin:end]
            start = h if case == "second" else before
            np.testing.assert_array_equal(target[:begin], start[:begin])
            np.testing.assert_array_equal(target[end:], start[end:])
        return out

    got = _everywhere(whole)
    sums, p, half, dots = np.zeros_like(h), np.zeros_like(h), np.empty_like(h), np.zeros(n)
    kernels.aggregate_float(indptr, indices, y, begin, end, sums)
    kernels.propagated(sums, h, d, begin, end, p)
    if second:
        kernels.apply_multiplier(before, h, held, p, coefficient, half, dots)
    else:
        kernels.half_step(h, p, h0, a, b, c, half)
        if live:
            kernels.apply_multiplier(before, h, held, p, 0.0, np.empty_like(h), dots)
        if coefficient:
            kernels.apply_multiplier(h, half, p if first else held, p, coefficient, half, None)
    follow = np.empty_like(h)
    kernels.scale_rows(half, d, 0, n, follow)
    rows, outside = slice(begin, end), [*range(begin), *range(end, n)]
    want = {"out": half, "p": held if second or case == "plain" else p, "dots": dots if live else np.full(n, 7.0),
            "next": np.full_like(h, 77) if case == "last" else follow}
    start = {"out": np.full_like(h, 7), "p": held, "dots": np.full(n, 7.0), "next": np.full_like(h, 77)}
    for name, value in want.items():
        np.testing.assert_array_equal(got[name][:n][rows], value[rows], err_msg=name)
        np.testing.assert_array_equal(got[name][:n][outside], start[name][outside], err_msg=name)
    assert (got["out"][rows] != h[rows]).any()


@pytest.mark.parametrize("columns", COLUMNS)
def test_sums_are_those_of_doubles(columns: int) -> None:
    rng = np.random.default_rng(columns)
    indptr, indices, buffer = _graph(rng)
    x, n = rng.normal(size=(buffer, columns)).astype(np.float32), len(indptr) - 1

    def call() -> dict[str, np.ndarray]:
        sums = np.full((n, columns), 7, np.float32)
        kernels.aggregate_float(indptr, indices, x, 2, n - 1, sums)
        return {"sums": sums}

    got = _everywhere(call)["sums"]
    for row in range(2, n - 1):
        want = x[indices[indptr[row]:indptr[row + 1]]].sum(0, dtype=np.float64)
        np.testing.assert_allclose(got[row], want, rtol=1e-5, atol=1e-4)
    assert (got[[0, 1, n - 1]] == 7).all()


def test_a_multiplier_without_its_arrays_is_refused() -> None:
    one = np.ones((1, 1), np.float32)
    for level in ("reference", kernels.isa()):
        for dots, second, coefficient, p in ((np.zeros(1), False, 0.0, one.copy()), (None, True, 0.0, one.copy()),
                                             (None, False, 0.5, None)):
            with kernels.using_isa(level), pytest.raises(ValueError, match="layer_float: a multiplier needs p"):
                kernels.layer_float(np.zeros(2, np.int64), np.zeros(0, np.int32), one, one[0], one, one, None,
                                    one.copy(), p, False, second, coefficient, 0.0, 0.9, 0.1, None, dots, 0, 1)


@pytest.mark.parametrize(("kind", "rounds"), [("smp", "merged"), ("smp", "two"), ("appnp", "merged"),
                                              ("none", "merged")])
@pytest.mark.parametrize("values", [[], [0.0, -1.2, 0.0, -0.8], [-0.7, 0.0, -1.5, 0.0], "live"], ids=str)
def test_layers_are_the_messengers(tmp_path: Path, kind: str, rounds: str, values: list[float] | str) -> None:
    store = make_store(small_graph(), tmp_path / "s", 1)
    part, graph = store.part(0), Neighbourhood.of(store.part(0))
    spec = Propagation(kind, 4, 9.0, 0.1, rounds)
    h0, residual = (np.random.default_rng(k).normal(size=(graph.num_local, 5)).astype(np.float32) for k in range(2))
    exchange = Exchange(part.peers, graph.num_local, part.num_halo, None, 0, 5.0)
    server = InProcessServer(MultiplierServer(1, MultiplierRule.of(settings(
        "propagation.alpha=0.001", "propagation.eta_lambda=2"), store.num_edges)))

    def multipliers(epoch: int) -> Multipliers:
        if values == "live" and kind == "smp":
            return LiveMultipliers(server.client(0), epoch, 0.0, float((h0.astype(np.float64) ** 2).sum()), 5.0)
        return FrozenMultipliers(values if kind == "smp" and values != "live" else [])

    try:
        ones, others = multipliers(1), multipliers(2)
        want = spec.run(graph, h0, residual, FloatMessenger(graph, exchange, 5, "forward"), ones)
        rounds_before = exchange.exchange_rounds
        got = FusedFloatLayers(spec, graph, exchange, "forward").run(h0.copy(), residual, others)
    finally:
        server.close()
    np.testing.assert_array_equal(got, want)
    assert exchange.exchange_rounds == 2 * rounds_before
    if isinstance(ones, LiveMultipliers) and isinstance(others, LiveMultipliers):
        assert others.values == ones.values
        assert min(ones.values) < -0.1


@pytest.mark.parametrize("innovation", [True, False])
@pytest.mark.parametrize("rounds", ["merged", "two"])
def test_moments_are_the_messengers(tmp_path: Path, rounds: str, innovation: bool) -> None:
    part = make_store(small_graph(), tmp_path / "s", 1).part(0)
    graph, spec = Neighbourhood.of(part), Propagation("smp", 4, 9.0, 0.1, rounds)
    h0 = np.random.default_rng(0).normal(size=(graph.num_local, 5)).astype(np.float32)
    exchange = Exchange(part.peers, graph.num_local, part.num_halo, None, 0, 5.0)
    messenger = FloatMessenger(graph, exchange, 5, "forward", record=True, innovation=innovation)
    want = spec.run(graph, h0, h0, messenger, FrozenMultipliers([]), all_rounds=True)
    layers = FusedFloatLayers(spec, graph, exchange, "forward", record=True, innovation=innovation)
    np.testing.assert_array_equal(layers.run(h0, h0, FrozenMultipliers([])), want)
    assert layers.moments == messenger.moments
    assert len(layers.moments) == spec.num_rounds


@pytest.mark.parametrize("columns", [MOMENT_COLUMNS, MOMENT_COLUMNS + 1, 3 * MOMENT_COLUMNS])
def test_moments_by_blocks_of_columns_are_those_of_all(tmp_path: Path, columns: int) -> None:
    part = make_store(small_graph(), tmp_path / "s", 1).part(0)
    g, exchange = Neighbourhood.of(part), Exchange(part.peers, part.num_local, 0, None, 0, 1.0)
    state = np.random.default_rng(4).normal(size=(part.num_local, columns)).astype(np.float32)
    spec = Propagation("smp", 4, 9.0, 0.1, "merged")
    whole = FusedFloatLayers(spec, g, exchange, "forward", record=True)
    whole.run(state, state, FrozenMultipliers([]))
    got = float_moments(spec, g, exchange, state, innovation=True)
    assert list(got) == [f"news/{k}" for k in range(4)]
    for name, want in whole.moments.items():
        assert got[name][2:] == want[2:], "the largest and the count are exact"
        np.testing.assert_allclose(got[name][:2], want[:2], rtol=0 if columns == MOMENT_COLUMNS else 1e-13)


@pytest.mark.parametrize("words", [{"bits": 32}, {"bits": 32, "rounds": "two"}, {"bits": 32, "kind": "appnp"}], ids=str)
def test_the_float_models_prediction_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              words: dict[str, Any]) -> None:
    """And gives the bits of the kernels in turn, on two parts."""
    store = make_store(small_graph(), tmp_path / "s", 2)
    model, runs = untrained_model(store, **words), []
    original = FusedFloatLayers.run

    def watch(self: FusedFloatLayers, state: np.ndarray, *rest: Any) -> np.ndarray:
        runs.append(state.shape)
        return original(self, state, *rest)

    def in_turn(self: FusedFloatLayers, state: np.ndarray, residual: np.ndarray, multipliers: Any) -> np.ndarray:
        messenger = FloatMessenger(self._graph, self._exchange, state.shape[1], self._direction)
        return self._spec.run(self._graph, state, residual, messenger, multipliers)

    monkeypatch.setattr(FusedFloatLayers, "run", watch)
    got = bits_of(predictions(store, model, tmp_path / "fused")[0])
    assert len(runs) == 2
    monkeypatch.setattr(FusedFloatLayers, "run", in_turn)
    want = bits_of(predictions(store, model, tmp_path / "turn")[0])
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value)
