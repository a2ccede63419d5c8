# SPDX-License-Identifier: Apache-2.0
"""Training by torch operations against our own kernels: whole numbers exactly, floats within law 1's tolerance.

The same tests run with torch on the CPU everywhere, and on a GPU where there is one; without, those skip and say so.
"""
from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qgnn_dist import kernels
from qgnn_dist.comm.device import CollectiveExchange, HostCopyExchange
from qgnn_dist.comm.exchange import Exchange
from qgnn_dist.comm.wire import HEADER_BYTES
from qgnn_dist.config import RunConfig
from qgnn_dist.device import codes, gradients, random
from qgnn_dist.device.layers import CodedRounds, FloatRounds, run_layers
from qgnn_dist.propagation.fused import FusedLayers
from qgnn_dist.propagation.fused_float import FusedFloatLayers
from qgnn_dist.propagation.messages import STAGE_GRADIENTS, GradientCoding, GradientMessenger
from qgnn_dist.propagation.neighbourhood import Neighbourhood
from qgnn_dist.propagation.smp import FrozenMultipliers, Propagation
from qgnn_dist.store.reader import Store
from tests.helpers import by_source, make_store, settings, small_graph, train_pool, worst_excess

DEVICES = [pytest.param("cpu", id="torch-on-cpu"),
           pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this host"))]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1])
def test_random_numbers_are_the_kernels(device: torch.device, seed: int) -> None:
    rows = np.concatenate([np.arange(50), [2**31, 2**40 - 1]]).astype(np.int64)
    want = np.empty((52, 13), np.uint32)
    kernels.keyed_bits(seed, 2**32 - 1, 4, 65535, 255, rows, 13, want)
    at = torch.from_numpy(rows).to(device)
    got = random.keyed_bits(seed, 2**32 - 1, 4, 65535, 255, at[:, None], torch.arange(4, device=device)[None])
    np.testing.assert_array_equal(got.reshape(52, 16)[:, :13].cpu().numpy(), want)
    for share in (0.1, 0.5, 0.95):
        mask = np.empty((52, 13), np.float32)
        kernels.dropout_dense(seed, 3, 1, 0, rows, 13, share, mask)
        kept = random.kept(seed, 3, 1, at, 13, share)
        assert 0 < kept.float().mean() < 1
        np.testing.assert_array_equal(kept.cpu().numpy(), mask > 0)
        i, j = torch.from_numpy(np.array([3, 3, 51, 20])).to(device), torch.tensor([12, 0, 5, 7], device=device)
        assert random.kept_at(seed, 3, 1, at[i], j, share).tolist() == kept[i, j].tolist()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 33])
def test_packing_is_the_kernels(device: torch.device, bits: int, columns: int) -> None:
    given = np.random.default_rng(0).integers(0, 2**bits, (11, columns)).astype(np.uint8)
    want = np.empty((11, -(-columns * bits // 8)), np.uint8)
    kernels.pack(given, bits, want)
    payload = torch.full(want.shape, 255, dtype=torch.uint8, device=device)
    codes.pack(torch.from_numpy(given).to(device), bits, payload)
    np.testing.assert_array_equal(payload.cpu().numpy(), want)
    for kind in (torch.float32, torch.float64, torch.int32):
        out = torch.empty(11, columns, dtype=kind, device=device)
        codes.unpack(payload, bits, out)
        np.testing.assert_array_equal(out.cpu().numpy(), given)


def test_odd_values_get_the_kernels_codes(device: torch.device) -> None:
    x = np.array([[np.nan, np.inf, -np.inf, 0.0, -0.0, 1e30, -1e-30, 0.99999994]], np.float32)
    one = np.ones(1, np.float32)
    for bits in (1, 2, 8):
        payload, want = np.empty((1, bits), np.uint8), np.empty((1, 8), np.uint8)
        kernels.code_news(x, one, None, 0.5, bits, 0, 1, payload, None)
        kernels.unpack(payload, bits, want)
        got = codes.level(torch.from_numpy(x).to(device), torch.full((1,), 0.5, device=device), bits)
        np.testing.assert_array_equal((got + 2 ** (bits - 1)).cpu().numpy(), want)


def _one_part(path: Path) -> tuple[Neighbourhood, Exchange]:
    part = make_store(small_graph(nodes=400), path, 1).part(0)
    return Neighbourhood.of(part), Exchange([], part.num_local, 0, None, 0, 5.0)


def _rounds_exchange(graph: Neighbourhood, device: torch.device) -> HostCopyExchange:
    return HostCopyExchange([], graph.num_local, graph.num_boundary, 0, None, 0, 5.0, device)


def test_sums_past_float32s_whole_numbers_are_exact(device: torch.device) -> None:
    """A hub of 70,000 neighbours at 8 bits: doubled sums pass 2^24, where float32 rounds."""
    n = 70_001
    indptr = np.concatenate([[0], [n - 1], n - 1 + np.arange(1, n)]).astype(np.int64)
    indices = np.concatenate([np.arange(1, n), np.zeros(n - 1)]).astype(np.int32)
    degree = np.diff(indptr).astype(np.int32)
    graph = Neighbourhood(indptr, indices, (1 / np.sqrt(degree + 1.0)).astype(np.float32), 0, 0)
    on = codes.DeviceGraph.of(graph, device)
    assert on.count_type(2) == torch.float32
    assert on.count_type(8) == torch.float64
    h = np.random.default_rng(0).normal(size=(n, 3)).astype(np.float32)
    h[1:] *= 40
    sums = CodedRounds(on, _rounds_exchange(graph, device), 3, "forward", bits=8, steps=[0.015625], innovation=True,
                       record=False).gather(torch.from_numpy(h).to(device), 0)
    payload, whole = np.empty((n, 3), np.uint8), np.empty((n, 3), np.int32)
    want, believed = np.zeros((n, 3), np.float32), np.zeros((n, 3), np.float32)
    kernels.code_news(h, graph.inv_sqrt_degree, believed, 0.015625, 8, 0, n, payload, None)
    kernels.aggregate_codes(indptr, indices, payload, 8, 0, n, whole)
    assert (2 * whole[0].astype(np.int64) > 2**24).any()
    kernels.add_news(whole, degree, 0.015625, 8, True, 0, n, want)
    np.testing.assert_array_equal(sums.cpu().numpy(), want)


@pytest.mark.parametrize("rounds", ["merged", "two"])
@pytest.mark.parametrize(("bits", "innovation"), [(2, True), (1, True), (8, True), (4, False)])
def test_coded_layers_have_the_kernels_bits(device: torch.device, tmp_path: Path, rounds: str, bits: int,
                                            innovation: bool) -> None:
    graph, exchange = _one_part(tmp_path / "s")
    spec = Propagation("smp", 5, 9.0, 0.1, rounds)
    steps = [2.0 ** (1 - k // 2) for k in range(spec.num_rounds)]
    if rounds == "merged" and innovation:
        steps[3] = 0.0
    multipliers = FrozenMultipliers([-1.0, -0.5, -0.25, -0.125, -0.7])
    h0 = np.random.default_rng(0).normal(size=(400, 6)).astype(np.float32)
    fused = FusedLayers(spec, graph, exchange, "forward", bits=bits, steps=steps, innovation=innovation,
                        residual_bits=8, residual_step=0.03125, multipliers=multipliers, record=True)
    want = fused.run(h0.copy())
    on, state = codes.DeviceGraph.of(graph, device), torch.from_numpy(h0).to(device)
    coded = CodedRounds(on, _rounds_exchange(graph, device), 6, "forward", bits=bits, steps=steps,
                        innovation=innovation, record=True)
    got = run_layers(spec, on, state, codes.midrise(state, 0.03125, 8), coded, multipliers)
    np.testing.assert_array_equal(got.cpu().numpy(), want)
    assert set(coded.moments) == set(fused.moments)
    for name, figures in fused.moments.items():
        assert coded.moments[name] == pytest.approx(figures, rel=1e-12)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [1, 5, 16, 47])
def test_coded_gradients_have_the_kernels_bytes(device: torch.device, bits: int, columns: int) -> None:
    """Rows of every size, of zeros, of one value, and of numbers that are none or too large."""
    rng, n = np.random.default_rng(bits * columns), 400
    h = rng.normal(size=(n, columns)).astype(np.float32) * np.exp2(rng.integers(-100, 30, (n, 1))).astype(np.float32)
    h[3], h[5, :1], h[6, -1:], h[7, :1], h[9] = 0, np.nan, np.inf, 1e30, 2.0 ** rng.integers(-3, 3)
    h[10], h[11] = -np.abs(h[10]), 2.0**-140
    ones, rows = np.full(n, 0.7, np.float32), rng.permutation(2**33 + np.arange(n)).astype(np.int64)
    key = (7, 3, STAGE_GRADIENTS, 9, 1)
    want = np.zeros((n, -(-columns * bits // 8) + 1), np.uint8)
    kernels.code_gradients(h, ones, bits, *key, rows, 0, n, want)
    payload = torch.zeros(want.shape, dtype=torch.uint8, device=device)
    y = torch.from_numpy(ones).to(device)[:, None] * torch.from_numpy(h).to(device)
    gradients.code_gradients(y, bits, key, torch.from_numpy(rows).to(device), payload)
    np.testing.assert_array_equal(payload.cpu().numpy(), want)
    values, got = np.empty((n, columns), np.float32), torch.empty(n, columns, device=device)
    kernels.aggregate_scaled(np.arange(n + 1), np.arange(n, dtype=np.int32), want, bits, 0, n, values)
    gradients.gradient_values(payload, bits, got)
    np.testing.assert_array_equal(got.cpu().numpy(), values)
    assert np.isnan(values[5:8]).all()
    assert (values[3] == 0).all()


@pytest.mark.parametrize("rounds", ["merged", "two"])
def test_rounds_of_coded_gradients(device: torch.device, tmp_path: Path, rounds: str) -> None:
    """The same numbers are drawn in every round; a sum's last bits may still lift single values to the next level."""
    graph, exchange = _one_part(tmp_path / "s")
    spec = Propagation("smp", 5, 9.0, 0.1, rounds)
    multipliers = FrozenMultipliers([-1.0, -0.5, -0.25, -0.125, -0.7])
    coding = GradientCoding(4, 5, 2, np.arange(400))
    grad = np.random.default_rng(0).normal(size=(400, 6)).astype(np.float32)
    want = spec.run(graph, grad, grad, GradientMessenger(graph, exchange, 6, coding), multipliers)
    on, state = codes.DeviceGraph.of(graph, device), torch.from_numpy(grad).to(device)
    coded = gradients.GradientRounds(on, _rounds_exchange(graph, device), 6, coding)
    got = run_layers(spec, on, state, state, coded, multipliers).cpu().numpy()
    far = np.abs(got - want) > 1e-4 * np.abs(want) + 1e-6 * np.abs(want).max()
    print(f"torch on {device}, {rounds} rounds of 4-bit gradients: {far.mean():.1e} of the values differ")
    assert far.mean() <= 0.01


@pytest.mark.parametrize("kind", ["smp", "appnp", "none"])
@pytest.mark.parametrize("rounds", ["merged", "two"])
def test_float_layers(device: torch.device, tmp_path: Path, kind: str, rounds: str) -> None:
    graph, exchange = _one_part(tmp_path / "s")
    spec = Propagation(kind, 5, 9.0, 0.1, rounds)
    h0 = np.random.default_rng(0).normal(size=(400, 6)).astype(np.float32)
    on, state = codes.DeviceGraph.of(graph, device), torch.from_numpy(h0).to(device)
    for values, record in (([-1.0, -0.5, -0.25, -0.125, -0.7], False), ([], True)):
        fused = FusedFloatLayers(spec, graph, exchange, "forward", record=record)
        want = fused.run(h0.copy(), h0, FrozenMultipliers(values))
        floats = FloatRounds(on, _rounds_exchange(graph, device), 6, "forward", record=record)
        got = run_layers(spec, on, state, state, floats, FrozenMultipliers(values), all_rounds=record)
        assert worst_excess(got.cpu().numpy(), want) <= 1
        assert set(floats.moments) == set(fused.moments)
        for name, figures in fused.moments.items():
            assert floats.moments[name] == pytest.approx(figures, rel=1e-4)


def _epochs(store: Store, config: RunConfig, device: str | None, count: int) -> dict[str, Any]:
    with train_pool(store, config, device=device) as pool:
        reports, gradients = [], []
        for epoch in range(1, count + 1):
            reports.append(pool.call("train_epoch", epoch, epoch == count, timeout_s=60))
            gradients.append(pool.call_one(0, "gradients", timeout_s=60))
        scores = by_source(pool.call("training_scores", timeout_s=60))
        calibrated = pool.workers[0]._ranges
        confusion = sum(r["evaluation"]["confusion"]["test"] for r in reports[-1])
    return {"loss": np.array([sum(r["loss"] for r in ranks) for ranks in reports]), "gradients": gradients,
            "scores": scores, "ranges": calibrated, "accuracy": np.trace(confusion) / confusion.sum(),
            "wire": [sum(r["wire_bytes"].get(kind, 0) for ranks in reports for r in ranks)
                     for kind in ("forward", "backward")],
            "multipliers": [ranks[0]["multipliers"] for ranks in reports]}


@pytest.mark.parametrize("words", [
    ("quant.bits=32",), ("quant.bits=32", "propagation.rounds=two"), ("quant.bits=2",),
    ("quant.bits=2", "propagation.rounds=two"), ("quant.messages=1",), ("quant.bits=8", "propagation.kind=appnp"),
    ("quant.bits=4", "messages.coding=direct"), ("quant.method=lsq",), ("quant.method=minmax",),
    ("quant.weights=32", "quant.hidden=4"), ("propagation.kind=none",), ("messages.stride=3", "propagation.layers=9"),
    ("quant.gradients=4",), ("quant.gradients=2", "propagation.rounds=two"),
])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
def test_an_epoch_is_the_hosts(device: torch.device, tmp_path: Path, words: tuple[str, ...], sparse: bool,
                               parts: int) -> None:
    """The same loss, gradients, bytes, multipliers and ranges; two epochs, so that the second has learned steps."""
    store = make_store(small_graph(sparse=sparse, signed=True), tmp_path / "s", parts, "metis")
    config = settings(*words, "propagation.alpha=0.001", "model.feature_norm=none")
    want, got = (_epochs(store, config, where, 2) for where in (None, device.type))
    np.testing.assert_allclose(got["loss"], want["loss"], rtol=1e-5)
    assert got["wire"] == want["wire"]
    worst = 0.0
    for mine, theirs in zip(got["gradients"][:1], want["gradients"][:1]):
        assert set(mine) == set(theirs)
        for name, value in theirs.items():
            worst = max(worst, worst_excess(mine[name], value))
    print(f"torch on {device}, {words} sparse={sparse} parts={parts}: worst gradient over tolerance {worst:.3f}")
    assert worst <= 1
    np.testing.assert_allclose(got["multipliers"][0], want["multipliers"][0], rtol=1e-5, atol=1e-9)
    assert set(got["ranges"]) == set(want["ranges"])
    for name, figures in want["ranges"].items():
        np.testing.assert_allclose(dataclasses.astuple(got["ranges"][name]), dataclasses.astuple(figures), rtol=1e-3,
                                   atol=1e-6)


@pytest.mark.parametrize("words", [("quant.bits=2", "quant.gradients=4"), ("quant.bits=32",)])
def test_all_to_alls_carry_what_host_copies_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                               words: tuple[str, ...]) -> None:
    """The exchange that NCCL serves on GPUs, here over gloo: the same numbers, and the same bytes but for headers."""
    store = make_store(small_graph(signed=True), tmp_path / "s", 3, "random")
    config = settings(*words, "model.feature_norm=none")
    want = _epochs(store, config, "cpu", 2)
    opened = []

    def collective(peers: Any, num_local: int, *rest: Any) -> CollectiveExchange:
        _, _, group, _, _, device = rest
        opened.append(group.rank)
        return CollectiveExchange(peers, num_local, group, group._backend, device)

    monkeypatch.setattr("qgnn_dist.device.training.open_device_exchange", collective)
    got = _epochs(store, config, "cpu", 2)
    assert sorted(opened) == [0, 1, 2]
    np.testing.assert_array_equal(got["loss"], want["loss"])
    for mine, theirs in zip(got["gradients"], want["gradients"]):
        for name, value in theirs.items():
            np.testing.assert_array_equal(mine[name], value)
    frames = [2 * 4 * HEADER_BYTES * sum(len(store.part(i).peers) for i in range(3))] * 2
    assert [a - b for a, b in zip(want["wire"], got["wire"])] == frames


def test_first_epochs_codes_are_the_hosts(device: torch.device, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte that is sent forward in the first epoch, ranks 0 and 1, float and coded perceptron alike."""
    store = make_store(small_graph(nodes=1000), tmp_path / "s", 2, "metis")
    begin = Exchange.begin

    def sent(where: str | None) -> dict[tuple[int, int], bytes]:
        seen: dict[tuple[int, int], bytes] = {}

        def record(self: Exchange, buffer: np.ndarray, bits: int, columns: int, direction: str, layer: int,
                   round: int) -> None:
            if direction == "forward" and bits == 2 and self._group is not None:
                seen[self._group.rank, round] = buffer[:self._num_local].tobytes()
            begin(self, buffer, bits, columns, direction, layer, round)

        monkeypatch.setattr(Exchange, "begin", record)
        with train_pool(store, settings("quant.bits=2", "model.feature_norm=l2"), device=where) as pool:
            pool.call("train_epoch", 1, False, timeout_s=60)
            boundary = [w._part.num_boundary for w in pool.workers]
        monkeypatch.setattr(Exchange, "begin", begin)
        width = len(seen[0, 0]) // (boundary[0] if where else store.part(0).num_local)
        return {place: rows[:boundary[place[0]] * width] for place, rows in seen.items()}

    want, got = sent(None), sent(device.type)
    assert len(want) == 2 * 4
    assert got == want


def test_fifty_epochs_follow_the_host(device: torch.device, tmp_path: Path) -> None:
    """As law 10 has it of several parts: mean |Δloss| at most 1 %, and the same accuracy within a few nodes."""
    store = make_store(small_graph(nodes=1500), tmp_path / "s", 2, "metis")
    config = settings("quant.bits=2", "model.feature_norm=l2", "train.lr=0.01")
    want, got = (_epochs(store, config, where, 50) for where in (None, device.type))
    drift = float((np.abs(got["loss"] - want["loss"]) / want["loss"]).mean())
    print(f"torch on {device}: mean |Δloss| {drift:.2e}, test {got['accuracy']:.3f} / {want['accuracy']:.3f}")
    assert want["loss"][-1] < 0.7 * want["loss"][0]
    assert drift <= 0.01
    assert abs(got["accuracy"] - want["accuracy"]) <= 0.03
