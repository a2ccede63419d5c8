# SPDX-License-Identifier: Apache-2.0
"""The diagnosis of a packed model on 1 and 2 parts, against dense NumPy on the whole graph."""
from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qgnn_dist.comm.exchange import Exchange
from qgnn_dist.diagnosis import layers
from qgnn_dist.diagnosis.report import diagnose
from qgnn_dist.model.forward import PackedForward, model_reader
from qgnn_dist.model.packed import PackedModel
from qgnn_dist.propagation.messages import Messenger
from qgnn_dist.propagation.neighbourhood import Neighbourhood
from qgnn_dist.quant.grids import AffineGrid
from qgnn_dist.store.reader import Store
from tests.helpers import make_store, small_graph, untrained_model

SAME = 1e-9
"""Relative; both sides are float64 sums of the same float32 states, a few thousand terms in another order: 1e-13 or so,
with room for I − Â's cancellation on the dense side."""


@dataclass
class Recorder:
    """An observer that keeps the states."""

    states: list[np.ndarray] = field(default_factory=list)
    halves: list[np.ndarray] = field(default_factory=list)

    def start(self, h0: np.ndarray, residual: np.ndarray, gain: int, messenger: Messenger) -> Messenger:
        self.h0, self.residual = h0.copy(), residual.copy()
        return messenger

    def layer(self, layer: int, state: np.ndarray, half: np.ndarray) -> None:
        assert layer == len(self.states)
        self.states.append(state.copy())
        self.halves.append(half.copy())


def recorded(store: Store, model: PackedModel) -> tuple[Recorder, np.ndarray]:
    """States of a packed forward on a one-part store, H^K last, and the dense adjacency."""
    part = store.part(0)
    graph, watch = Neighbourhood.of(part), Recorder()
    forward = PackedForward(graph, Exchange([], part.num_local, 0, None, 0, 60.0), None, "evaluation", watch)
    watch.states.append(forward.run(model, model_reader(part, model)))
    adjacency = np.zeros((part.num_local, part.num_local))
    adjacency[np.repeat(np.arange(part.num_local), np.diff(part.indptr)), part.indices] = 1.0
    return watch, adjacency


def dense_layers(watch: Recorder, adjacency: np.ndarray, model: PackedModel) -> list[dict[str, Any]]:
    """What the diagnosis should say of every layer, but for the error."""
    n = len(adjacency)
    degree = adjacency.sum(1) + 1
    laplacian = np.eye(n) - (adjacency + np.eye(n)) / np.sqrt(np.outer(degree, degree))
    start = np.linalg.norm(watch.h0.astype(np.float64))
    result = []
    for k, state in enumerate(watch.states):
        h = state.astype(np.float64)
        unit = h / np.linalg.norm(h, axis=1, keepdims=True)
        some = adjacency.sum(1) > 0
        distances = (adjacency * (1 - unit @ unit.T)).sum(1)[some] / adjacency.sum(1)[some]
        entry: dict[str, Any] = {"dirichlet": np.trace(h.T @ laplacian @ h) / (h * h).sum(), "mad": distances.mean()}
        if k < len(watch.halves):
            delta = watch.halves[k].astype(np.float64) - h
            entry |= {"constraint": np.trace(delta.T @ laplacian @ delta) / start**2,
                      "change": np.linalg.norm(delta) / start}
            entry["multiplier"] = (model.info.multipliers + [0.0] * n)[k]
        result.append(entry)
    return result


def dense_twin(watch: Recorder, adjacency: np.ndarray, model: PackedModel) -> list[np.ndarray]:
    """H^0 … H^K of the float twin in float64; merged rounds."""
    info, n = model.info, len(adjacency)
    degree = adjacency.sum(1) + 1
    hat = (adjacency + np.eye(n)) / np.sqrt(np.outer(degree, degree))
    h0 = watch.h0.astype(np.float64)
    states, p = [h0], hat @ h0
    for k in range(info.layers):
        p, p_before = hat @ states[-1], p
        half = (1 - (1 + info.mu) * info.eta) * states[-1] + info.mu * info.eta * p + info.eta * h0
        states.append(half + 2 * info.eta * info.multipliers[k] * (half - states[-1] - (p - p_before)))
    return states


CASES = [{}, {"rounds": "two", "bits": 4}, {"kind": "appnp", "bits": 1}, {"coding": "direct"}, {"bits": 32},
         {"bits": 8, "signed": True}, {"method": "bt_star", "bits": 4}]


@pytest.mark.parametrize("words", CASES, ids=str)
@pytest.mark.parametrize("parts", [1, 2])
def test_layers_are_dense_numpys(tmp_path: Path, words: dict[str, Any], parts: int) -> None:
    graph = small_graph(nodes=200, signed=bool(words.get("signed")))
    one = make_store(graph, tmp_path / "one", 1)
    model = untrained_model(one, **words)
    watch, adjacency = recorded(one, model)
    assert (adjacency == adjacency.T).all()
    assert (adjacency.sum(1) == 0).any(), "an isolated node is there"
    store = one if parts == 1 else make_store(graph, tmp_path / "many", parts)
    result = diagnose(store, model, "m", exchange_s=60)
    wanted = dense_layers(watch, adjacency, model)
    assert [entry["layer"] for entry in result["layers"]] == list(range(model.info.layers + 1)) == [
        *range(len(wanted))]
    for got, want in zip(result["layers"], wanted):
        for key, value in want.items():
            assert got[key] == pytest.approx(value, rel=SAME, abs=0), f"layer {got['layer']} {key}"
    assert [result["layers"][-1][k] for k in ("constraint", "change", "multiplier")] == [None] * 3
    json.dumps(result, allow_nan=False)


def test_blocks_of_edges_and_zero_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = make_store(small_graph(nodes=120, degree=20.0), tmp_path / "s", 1).part(0)
    graph = Neighbourhood.of(part)
    rows = np.random.default_rng(0).normal(size=(120, 3)).astype(np.float32)
    empty = int(np.argmax(part.degree))
    rows[empty] = 0
    whole = layers.dirichlet_sum(graph, part.degree + 1.0, rows), *layers.cosine_distances(graph, rows)
    for values in (1, 37, 300):  # below one row's edges, and between
        monkeypatch.setattr(layers, "BLOCK_VALUES", values)
        got = layers.dirichlet_sum(graph, part.degree + 1.0, rows), *layers.cosine_distances(graph, rows)
        assert got == pytest.approx(whole, rel=1e-12)
    alone = layers.cosine_distances(graph, np.zeros_like(rows))
    assert alone == (int((part.degree > 0).sum()),) * 2


@pytest.mark.parametrize("parts", [1, 2])
def test_errors_are_against_the_float_twin(tmp_path: Path, parts: int) -> None:
    graph = small_graph(nodes=200)
    one = make_store(graph, tmp_path / "one", 1)
    model = untrained_model(one)
    watch, adjacency = recorded(one, model)
    store = one if parts == 1 else make_store(graph, tmp_path / "many", parts)
    result = diagnose(store, model, "m", exchange_s=60)
    twins = dense_twin(watch, adjacency, model)
    assert result["layers"][0]["error"] == 0.0
    for entry, state, twin in zip(result["layers"][1:], watch.states[1:], twins[1:]):
        want = np.linalg.norm(state - twin) / np.linalg.norm(twin)
        assert want > 0.01
        # The twin runs in float32, some 1e-7 a layer of states whose error is above 1 %.
        assert entry["error"] == pytest.approx(want, rel=1e-4), f"layer {entry['layer']}"
    same = watch.states[-1].argmax(1) == twins[-1].argmax(1)
    assert result["overall"]["agreement"] == pytest.approx(same.mean(), abs=1 / 200)
    assert result["overall"]["worst_difference"] == pytest.approx(np.abs(watch.states[-1] - twins[-1]).max(), rel=1e-4)


@pytest.mark.parametrize("kind", ["smp", "appnp", "elastic", "none"])
def test_a_float_model_is_its_own_twin(tmp_path: Path, kind: str) -> None:
    store = make_store(small_graph(nodes=150), tmp_path / "s", 1 if kind == "elastic" else 2)
    result = diagnose(store, untrained_model(store, bits=32, kind=kind), "m", exchange_s=60)
    assert [entry["error"] for entry in result["layers"]] == [0.0] * (1 if kind == "none" else 5)
    assert result["overall"] == {"nodes": 150, "agreement": 1.0, "worst_difference": 0.0}
    assert result["messages"] == []
    assert {stage["bits"] for stage in result["stages"].values()} == {32}
    assert all(stage["rms"] > 0 and stage["histogram"] is None for stage in result["stages"].values())


def test_stages_are_dense_numpys(tmp_path: Path) -> None:
    graph = small_graph(nodes=200, signed=True)
    one, two = make_store(graph, tmp_path / "one", 1), make_store(graph, tmp_path / "two", 2)
    model = untrained_model(one, signed=True)
    info, watch = model.info, recorded(one, model)[0]
    result = diagnose(two, model, "m", exchange_s=60)
    stages = result["stages"]

    x = one.part(0).features_dense(0, 200).astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    scale = np.sqrt((x**2).mean(1, keepdims=True))
    level = np.clip(np.rint(x / scale), -2, 1)
    _expect(stages["features"], x, level + 2, level * scale, (x / scale > 1.5) | (x / scale < -2.5))
    assert stages["features"]["step"] == pytest.approx(scale.mean(), rel=1e-5)

    active = np.maximum(level * scale @ (model.weight1 * info.weight_steps[0]) + model.bias1, 0)
    level = np.clip(np.rint(active / info.hidden_step), 0, 3)
    _expect(stages["hidden"], active, level, level * info.hidden_step, active > 3.5 * info.hidden_step)
    h0 = level * info.hidden_step @ (model.weight2 * info.weight_steps[1]) + model.bias2

    step = info.residual_step
    level = np.clip(np.floor(h0 / step), -128, 127)
    _expect(stages["residual"], h0, level + 128, (level + 0.5) * step, np.abs(h0) > 128 * step)
    assert stages["weights1"]["histogram"] == [int((model.weight1 == code).sum()) for code in range(-2, 2)]
    assert stages["weights2"]["at_ends"] == np.isin(model.weight2, (-2, 1)).mean()
    assert stages["weights1"]["snr_db"] is stages["weights1"]["clipped"] is None

    # Rounds in float64 on the recorded states: round k sends H^k.
    degree = np.diff(one.part(0).indptr) + 1.0
    believed = np.zeros_like(h0)
    assert len(result["messages"]) == 4
    for entry, h, step in zip(result["messages"], watch.states, info.message_steps):
        y = h / np.sqrt(degree)[:, None]
        news = y - believed
        level = np.clip(np.floor(news / step), -2, 1)
        _expect(entry, news, level + 2, (level + 0.5) * step, (news < -2 * step) | (news >= 2 * step))
        believed += (level + 0.5) * step
        want = np.linalg.norm(y - believed) / np.linalg.norm(y)
        assert entry["believed_error"] == pytest.approx(want, rel=1e-3), entry["round"]
        assert entry["step"] == step


def _expect(got: dict[str, Any], x: np.ndarray, codes: np.ndarray, decoded: np.ndarray, outside: np.ndarray) -> None:
    """Of 1000 or more values at most two may fall into the next cell: float32 there, float64 here."""
    count = np.bincount(codes.astype(int).ravel(), minlength=len(got["histogram"]))
    assert got["count"] == x.size
    assert np.abs(count - got["histogram"]).sum() <= 4
    assert abs(got["clipped"] * x.size - outside.sum()) <= 2
    assert got["rms"] == pytest.approx(np.sqrt((x**2).mean()), rel=1e-5)
    assert got["snr_db"] == pytest.approx(10 * np.log10((x**2).sum() / ((x - decoded) ** 2).sum()), rel=1e-3)


@pytest.mark.parametrize("method", ["qlr", "bt", "percentile"])
@pytest.mark.parametrize("coding", ["innovation", "direct"])
def test_affine_stages_are_dense_numpys(tmp_path: Path, method: str, coding: str) -> None:
    graph = small_graph(nodes=200)
    one, two = make_store(graph, tmp_path / "one", 1), make_store(graph, tmp_path / "two", 2)
    model = untrained_model(one, method=method, coding=coding)
    info, watch = model.info, recorded(one, model)[0]
    result = diagnose(two, model, "m", exchange_s=60)
    stages, grids = result["stages"], {name: AffineGrid(*four) for name, four in info.grids.items()}
    assert {s["grid"] for name, s in stages.items() if name != "features"} == {"affine"}

    def coded(x: np.ndarray, name: str, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Codes, what they mean, what is clipped: from the definition, in float64."""
        grid, top = grids[name], 2**bits - 1
        level = np.floor((x - grid.low) * grid.scale + grid.bias)
        codes = np.clip(level, 0, top)
        return codes, grid.low + codes * grid.step, level != codes

    x = one.part(0).features_dense(0, 200).astype(np.float64)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)
    scale = x.max(1, keepdims=True) / 3
    scale[scale == 0] = 1
    first, second = ((grids[n].low + (w.astype(np.float64) + 2) * grids[n].step)
                     for n, w in (("weights1", model.weight1), ("weights2", model.weight2)))
    active = np.maximum(np.rint(x / scale) * scale @ first + model.bias1, 0)
    _expect(stages["hidden"], active, *coded(active, "hidden", 2))
    assert stages["weights2"]["rms"] == pytest.approx(np.sqrt((second**2).mean()), rel=1e-9)
    _expect(stages["residual"], watch.h0.astype(np.float64), *coded(watch.h0.astype(np.float64), "residual", 8))

    assert len(result["messages"]) == len(watch.halves) == 4
    degree, believed = np.diff(one.part(0).indptr) + 1.0, np.zeros(watch.h0.shape)
    for k, (entry, h) in enumerate(zip(result["messages"], watch.states)):
        y = h / np.sqrt(degree)[:, None]
        codes, decoded, outside = coded(y - believed, f"news/{k}", 2)
        _expect(entry, y - believed, codes, decoded, outside)
        if coding == "direct":
            assert entry["believed_error"] is None
            continue
        believed += decoded
        want = np.linalg.norm(y - believed) / np.linalg.norm(y)
        assert entry["believed_error"] == pytest.approx(want, rel=1e-3), k


def test_sparse_features_are_measured_where_they_are_stored(tmp_path: Path) -> None:
    store = make_store(small_graph(nodes=200, sparse=True), tmp_path / "s", 2)
    result = diagnose(store, untrained_model(store), "m", exchange_s=60)["stages"]["features"]
    stored = [store.part(p).features_sparse(0, store.part(p).num_local).values for p in (0, 1)]
    # All ones: a row of m of them has the norm 1/√m at the top code, which is exact but for float32's own rounding.
    assert result["histogram"] == [0, 0, 0, sum(map(len, stored))]
    assert result["count"] == sum(map(len, stored)) > 500
    assert result["clipped"] == 0
    assert result["snr_db"] > 140
    assert result["step_range"][0] < result["step"] < result["step_range"][1]


def test_rounds_that_are_not_sent_are_not_measured(tmp_path: Path) -> None:
    store = make_store(small_graph(nodes=150), tmp_path / "s", 2)
    model = untrained_model(store)
    steps = list(model.info.message_steps)
    steps[2] = 0.0
    strided = dataclasses.replace(model, info=dataclasses.replace(model.info, message_steps=steps))
    every, some = (diagnose(store, m, "m", exchange_s=60)["messages"] for m in (model, strided))
    assert [entry["round"] for entry in some] == [entry["round"] for entry in every if entry["round"] != 2]
    assert [entry["step"] for entry in some] == [entry["step"] for entry in every if entry["round"] != 2]
    assert some[1] == every[1]
    assert some[2]["rms"] > every[3]["rms"], "what round 2 would have told comes with round 3"
