# SPDX-License-Identifier: Apache-2.0
"""A round and its layer in one pass give the bits of the kernels that do one thing each, at every level."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qgnn_dist import kernels
from qgnn_dist.comm.exchange import Exchange
from qgnn_dist.diagnosis.report import diagnose
from qgnn_dist.propagation.fused import FusedLayers
from qgnn_dist.propagation.messages import CodedMessenger
from qgnn_dist.propagation.neighbourhood import Neighbourhood
from qgnn_dist.propagation.smp import FrozenMultipliers, Propagation
from qgnn_dist.quant.packed import row_bytes
from tests.helpers import make_store, small_graph, untrained_model
from tests.parity.test_kernels_levels import _everywhere, _graph
from tests.parity.test_predict_bits import bits_of, predictions

STEP, NEXT = 0.25, 0.125


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("columns", [1, 2, 7, 16, 33, 40, 64, 130, 512])
@pytest.mark.parametrize("case", ["plain", "constrained", "first", "direct", "unsent", "odd step"])
def test_one_pass_is_the_kernels_in_turn(bits: int, columns: int, case: str) -> None:
    rng = np.random.default_rng(columns)
    indptr, indices, buffer = _graph(rng, 120)
    n = len(indptr) - 1
    degree = np.diff(indptr).astype(np.int32)
    d = (1 / np.sqrt(degree + 1)).astype(np.float32)
    payload = rng.integers(0, 256, (buffer, row_bytes(columns, bits))).astype(np.uint8)
    h, h0, r, before, known = (rng.normal(size=(n, columns)).astype(np.float32) for _ in range(5))
    a, b, c = np.float32(0.05), np.float32(0.9), np.float32(0.1)
    constrained, coefficient = case in ("constrained", "first"), -0.3 if case in ("constrained", "first") else 0.0
    step = 0.0 if case == "unsent" else STEP
    following = 0.0 if case == "unsent" else 0.1 if case == "odd step" else NEXT
    innovation = case != "direct"
    begin, end = 3, n - 2

    def whole() -> dict[str, np.ndarray]:
        out = {"h": h.copy(), "r": r.copy(), "known": known.copy(), "p": before.copy(), "moments": np.zeros((n, 3)),
               "next": np.full((n, payload.shape[1]), 77, np.uint8)}
        kernels.layer(indptr, indices, payload, bits, step, degree, d, h0, out["r"], out["h"],
                      out["p"] if constrained else None, case == "first", coefficient, a, b, c,
                      out["known"] if innovation else None, following, out["next"], out["moments"], begin, end)
        return out

    got = _everywhere(whole)
    want_r, sums, p = r.copy(), np.zeros((n, columns), np.int32), np.zeros_like(h)
    if step:
        kernels.aggregate_codes(indptr, indices, payload, bits, begin, end, sums)
        kernels.add_news(sums, degree, step, bits, innovation, begin, end, want_r)
    kernels.propagated(want_r, h, d, begin, end, p)
    half = np.empty_like(h)
    kernels.half_step(h, p, h0, a, b, c, half)
    if constrained:
        kernels.apply_multiplier(h, half, p if case == "first" else before, p, coefficient, half, None)
    want_next, want_known, moments = np.full_like(got["next"], 77), known.copy(), np.zeros((n, 3))
    if following:
        kernels.code_news(half, d, want_known if innovation else None, following, bits, begin, end, want_next, moments)
    rows = slice(begin, end)
    for name, want in (("h", half), ("r", want_r), *((("p", p),) if constrained else ())):
        np.testing.assert_array_equal(got[name][rows], want[rows], err_msg=name)
    for name, want in (("next", want_next), ("known", want_known), ("moments", moments)):
        np.testing.assert_array_equal(got[name], want, err_msg=name)
    for name, start in (("h", h), ("r", r), ("p", before)):  # rows outside are left alone
        outside = [*range(begin), *range(end, n)]
        np.testing.assert_array_equal(got[name][outside], start[outside])
    assert (got["h"][rows] != h[rows]).any()


def test_too_wide_a_row_is_refused() -> None:
    columns = kernels.LAYER_COLUMNS + 1
    wide, payload = np.zeros((1, columns), np.float32), np.zeros((1, row_bytes(columns, 2)), np.uint8)
    assert not FusedLayers.can_run(Propagation("appnp", 1, 9.0, 0.1, "merged"), columns)
    if kernels.isa() != "reference":
        with pytest.raises(ValueError, match="layer: h has 4097 columns, expected at most 4096"):
            kernels.layer(np.zeros(2, np.int64), np.zeros(0, np.int32), payload, 2, 1.0, np.zeros(1, np.int32),
                          np.ones(1, np.float32), wide, wide.copy(), wide.copy(), None, True, 0.0, 0.0, 0.9, 0.1, None,
                          0.0, payload.copy(), None, 0, 1)


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_a_row_of_millions_of_neighbours(bits: int) -> None:
    """Past 4,000,000 neighbours twice the sum of 8-bit codes leaves 32 bits."""
    degree = 4_300_000
    indptr, indices = np.array([0, degree]), np.zeros(degree, np.int32)
    payload = np.full((1, 1), 255, np.uint8)
    h, r = np.zeros((1, 8 // bits), np.float32), np.zeros((1, 8 // bits), np.float32)
    for level in ("scalar", "avx2") if kernels.isa() == "avx2" else ("scalar",):
        with kernels.using_isa(level):
            kernels.layer(indptr, indices, payload, bits, 1.0, np.array([degree], np.int32), np.ones(1, np.float32),
                          h.copy(), r, h, None, True, 0.0, 0.0, 1.0, 0.0, None, 0.0, np.zeros((1, 1), np.uint8), None,
                          0, 1)
        assert (r == np.float32(0.5 * (2**bits - 1) * degree)).all()


@pytest.mark.parametrize("words", [
    {}, {"bits": 4}, {"bits": 1, "kind": "appnp"}, {"bits": 8}, {"coding": "direct"}, {"method": "minmax"}], ids=str)
@pytest.mark.parametrize("multipliers", [[], [0.0, -1.2, 0.0, -0.8], [-0.7, 0.0, -1.5, 0.0]], ids=str)
def test_layers_are_the_messengers(tmp_path: Path, words: dict[str, Any], multipliers: list[float]) -> None:
    part = make_store(small_graph(), tmp_path / "s", 1).part(0)
    graph = Neighbourhood.of(part)
    info = untrained_model(make_store(small_graph(), tmp_path / "m", 1), **words).info
    steps = list(info.message_steps)
    if info.coding == "innovation":
        steps[2] = 0.0
    spec = Propagation(info.kind, info.layers, info.mu, info.eta, info.rounds)
    h0, residual = (np.random.default_rng(k).normal(size=(graph.num_local, 5)).astype(np.float32) for k in range(2))
    exchange = Exchange(part.peers, graph.num_local, part.num_halo, None, 0, 5.0)
    multipliers = multipliers if info.kind == "smp" else []
    messenger = CodedMessenger(graph, exchange, 5, "evaluation", bits=info.bits["messages"], steps=steps,
                               innovation=info.coding == "innovation", record=True)
    want = spec.run(graph, h0, residual, messenger, FrozenMultipliers(multipliers))
    layers = FusedLayers(spec, graph, exchange, "evaluation", bits=info.bits["messages"], steps=steps,
                         innovation=info.coding == "innovation", multipliers=multipliers, record=True)
    got = layers.run(h0, residual)
    np.testing.assert_array_equal(got, want)
    assert layers.moments == messenger.moments
    assert len(layers.moments) == len(steps) - steps.count(0.0)


def test_prediction_takes_it_where_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways end in the same bits on two parts; the diagnosis looks at each step, two rounds have no such pass."""
    store = make_store(small_graph(), tmp_path / "s", 2)
    runs: list[Propagation] = []
    original = FusedLayers.run

    def watch(self: FusedLayers, h0: np.ndarray, residual: np.ndarray) -> np.ndarray:
        runs.append(self._spec)
        return original(self, h0, residual)

    monkeypatch.setattr(FusedLayers, "run", watch)
    for rounds, kind, count in (("merged", "smp", 2), ("merged", "appnp", 2), ("two", "smp", 0)):
        model = untrained_model(store, rounds=rounds, kind=kind)
        got = bits_of(predictions(store, model, tmp_path / f"{rounds}{kind}")[0])
        assert len(runs) == count
        with monkeypatch.context() as each:
            each.setattr(FusedLayers, "can_run", staticmethod(lambda *_: False))
            want = bits_of(predictions(store, model, tmp_path / f"{rounds}{kind}-each")[0])
        assert len(runs) == count
        for name, value in want.items():
            np.testing.assert_array_equal(got[name], value)
        diagnose(store, model, "m", exchange_s=60)
        assert len(runs) == count
        runs.clear()
