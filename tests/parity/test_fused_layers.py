# SPDX-License-Identifier: Apache-2.0
"""A round and its layer in one pass give the bits of the kernels that do one thing each, at every level."""
from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qgnn_dist import kernels
from qgnn_dist.comm.exchange import Exchange
from qgnn_dist.config import load_config
from qgnn_dist.diagnosis.report import diagnose
from qgnn_dist.planning.memory import worst_steps
from qgnn_dist.propagation.fused import FusedLayers, fixed_point
from qgnn_dist.propagation.messages import CodedMessenger
from qgnn_dist.propagation.neighbourhood import Neighbourhood
from qgnn_dist.propagation.smp import FrozenMultipliers, Propagation
from qgnn_dist.quant.packed import row_bytes
from tests.helpers import make_store, small_graph, untrained_model
from tests.parity.test_kernels_levels import _everywhere, _graph
from tests.parity.test_predict_bits import bits_of, predictions

STEP, NEXT, UNIT, RESIDUAL_STEP = 0.25, 0.125, 2.0**-4, 0.5
STORAGES = {"float": np.float32, "fixed": np.uint16, "far": np.uint16, "fixed, a byte": np.uint8,
            "far, a byte": np.uint8}
"""Where R is, and the numbers of Ŷ; what fits a byte are codes of 1 and 2 bits."""
CASES = ["plain", "constrained", "first", "corrected", "in place", "direct", "unsent", "odd step"]


class _Case:
    """Arguments of one round over a small graph, with state that fixed point holds too."""

    def __init__(self, columns: int, bits: int, case: str) -> None:
        rng = np.random.default_rng(columns)
        self.indptr, self.indices, buffer = _graph(rng, 120)
        n = self.n = len(self.indptr) - 1
        self.columns, self.bits, self.case = columns, bits, case
        self.degree = np.diff(self.indptr).astype(np.int32)
        self.d = (1 / np.sqrt(self.degree + 1)).astype(np.float32)
        self.payload = rng.integers(0, 256, (buffer, row_bytes(columns, bits))).astype(np.uint8)
        self.h, self.before = (rng.normal(size=(n, columns)).astype(np.float32) for _ in range(2))
        self.stride = -(-columns // 8) * 8
        self.weights = (0.05, 0.9, 0.1)
        self.step = 0.0 if case == "unsent" else STEP
        self.following = 0.0 if case == "unsent" else 0.1 if case == "odd step" else NEXT
        # What codes so far have added up to, with room for those to come: whole numbers of UNIT, 0 is in the middle.
        code = 2**bits - 1
        self.middle, share = 7.5, (code * STEP / 2 / UNIT if self.step else 0.0)
        self.middle_now = (self.middle if case != "direct" or not self.step else 0.0) + share
        self.r = rng.integers(0, 400, (n, self.stride)).astype(np.uint16)
        self.known = rng.integers(0, 200 if bits < 8 else 256, (n, self.stride)).astype(np.uint16)
        self.levels = rng.integers(-128, 128, (n, self.stride)).astype(np.int8)
        full = 400 + self.degree.astype(np.int64) * round(code * STEP / UNIT) > 2**16 - 1
        self.far_rows = {name: np.flatnonzero(rows).astype(np.int32) for name, rows in {
            "fixed": full, "far": full | (np.arange(n) % 3 == 0)}.items()}
        self.far = rng.normal(size=(n, columns)).astype(np.float32)
        self.innovation, self.gradient = case != "direct", case != "corrected"
        self.coefficient = -0.3 if case in ("constrained", "first", "corrected") else 0.0
        self.looks_back = case in ("constrained", "corrected")
        self.begin, self.end = 3, n - 2

    def floats(self, whole: np.ndarray, zero: Any) -> np.ndarray:
        """Values of fixed point; `zero`: what stands for 0."""
        return ((whole[:, :self.columns] - np.asarray(zero)) * UNIT).astype(np.float32)

    def believed(self, whole: np.ndarray, *, after: bool) -> np.ndarray:
        """Ŷ before or after the next codes are in it."""
        code = (2**self.bits - 1) * self.following / 2 / UNIT if after else 0.0
        return self.floats(whole, self.middle_now + code)

    def sums(self, whole: np.ndarray, middle: float) -> np.ndarray:
        """R."""
        return self.floats(whole, self.degree[:, None] * middle)

    @property
    def residual(self) -> np.ndarray:
        return (self.levels[:, :self.columns].astype(np.float32) + np.float32(0.5)) * np.float32(RESIDUAL_STEP)

    def results(self) -> dict[str, np.ndarray]:
        """Arrays to be written, filled with what must be left alone."""
        n, h = self.n, self.h.copy()
        return {"h": h, "out": h if self.case == "in place" else self.before.copy(), "moments": np.zeros((n, 3)),
                "dots": np.full(n, 7.0), "next": np.full((n, self.payload.shape[1]), 77, np.uint8)}

    def run(self, storage: str) -> dict[str, np.ndarray]:
        """One pass."""
        out = self.results()
        fixed = storage != "float"
        known = self.known.astype(STORAGES[storage]) if fixed else self.believed(self.known, after=False)
        last = out["out"] if self.case in ("constrained", "corrected") else None
        head = (self.indptr, self.indices, self.payload, self.bits, self.step, self.d)
        tail = (out["h"], last, out["out"], self.gradient, self.coefficient, *self.weights,
                known if self.innovation else None, self.following, out["next"], out["moments"],
                out["dots"] if self.looks_back else None, self.begin, self.end)
        if fixed:
            rows, whole = self.far_rows[storage.split(",")[0]], self.r.copy()
            far = self.far[rows] if len(rows) else None
            kernels.fixed_layer(*head, self.levels, RESIDUAL_STEP, UNIT, self.middle, whole,
                                rows if len(rows) else None, far, *tail)
            np.testing.assert_array_equal(whole[rows], self.r[rows])
            wrote = np.zeros(self.n, bool)
            wrote[self.begin:self.end] = True
            known = np.where(wrote[:, None] & (self.following != 0), self.believed(known, after=True),
                             self.believed(known, after=False))
            out["r"] = np.where(wrote[:, None], self.sums(whole, self.middle_now), self.sums(whole, self.middle))
            if far is not None:
                out["r"][rows] = far
        else:
            out["r"] = self.sums(self.r, self.middle)
            kernels.layer(*head, self.residual, out["r"], *tail)
        return {**out, "known": known if self.innovation else self.believed(self.known, after=False)}

    def in_turn(self, r: np.ndarray) -> dict[str, np.ndarray]:
        """The kernels that do one thing each."""
        out, begin, end = self.results(), self.begin, self.end
        n, h, known = self.n, self.h, self.believed(self.known, after=False)
        sums, p, held, half = (np.zeros((n, self.columns), t) for t in (np.int32, *[np.float32] * 3))
        kernels.propagated(r, self.before, self.d, begin, end, held)
        if self.step:
            kernels.aggregate_codes(self.indptr, self.indices, self.payload, self.bits, begin, end, sums)
            kernels.add_news(sums, self.degree, self.step, self.bits, self.innovation, begin, end, r)
        kernels.propagated(r, h, self.d, begin, end, p)
        kernels.half_step(h, p, self.residual, *self.weights, half)
        held = p if self.case == "first" else held
        dots = np.zeros(n)
        if self.case == "corrected":
            kernels.apply_multiplier(self.before, h, held, p, self.coefficient, half, dots)
        elif self.coefficient:
            kernels.apply_multiplier(self.before, h, held, p, 0.0, np.empty_like(h), dots)
            kernels.apply_multiplier(h, half, held, p, self.coefficient, half, None)
        if self.following:
            kernels.code_news(half, self.d, known if self.innovation else None, self.following, self.bits, begin, end,
                              out["next"], out["moments"])
        rows = slice(begin, end)
        out["out"][rows] = half[rows]
        if self.looks_back:
            out["dots"][rows] = dots[rows]
        return {**out, "r": r, "known": known}


@pytest.mark.parametrize("columns", [1, 2, 7, 16, 33, 40, 64, 130, 512])
@pytest.mark.parametrize(("storage", "case", "bits"), [
    (storage, case, bits) for storage in STORAGES for case in CASES for bits in (1, 2, 4, 8)
    if (storage == "float" or case != "odd step")  # fixed point has steps that are powers of two
    and (bits <= 2 or not storage.endswith("byte"))])
def test_one_pass_is_the_kernels_in_turn(storage: str, bits: int, columns: int, case: str) -> None:
    this = _Case(columns, bits, case)
    got = _everywhere(lambda: this.run(storage))
    r = this.sums(this.r, this.middle)
    if storage != "float":
        rows = this.far_rows[storage.split(",")[0]]
        r[rows] = this.far[rows]
    start, want = r.copy(), this.in_turn(r)
    rows, outside = slice(this.begin, this.end), [*range(this.begin), *range(this.end, this.n)]
    np.testing.assert_array_equal(got["r"][rows], want["r"][rows])
    np.testing.assert_array_equal(got["r"][outside], start[outside])
    for name in ("out", "next", "known", "moments", "dots"):
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    assert (got["out"][rows] != this.h[rows]).any()


@pytest.mark.parametrize("columns", [1, 7, 16, 40, 130])
@pytest.mark.parametrize(("known_type", "bits"), [
    (kind, bits) for kind in (np.uint8, np.uint16, None) for bits in (1, 2, 4, 8) if kind is not np.uint8 or bits < 8])
def test_a_start_is_the_kernels_in_turn(bits: int, columns: int, known_type: type | None) -> None:
    innovation, middle = known_type is not None, (2**bits - 1) * STEP / 2 / UNIT
    rng = np.random.default_rng(columns)
    n, stride = 50, -(-columns // 8) * 8
    h, d = rng.normal(size=(n, columns)).astype(np.float32), rng.random(n).astype(np.float32)
    h[3, 0] = np.nan

    def whole() -> dict[str, np.ndarray]:
        out = {"residual": np.full((n, stride), 7, np.int8), "known": np.full((n, stride), 9, known_type or np.uint16),
               "next": np.full((n, row_bytes(columns, bits)), 77, np.uint8), "moments": np.zeros((n, 3))}
        kernels.fixed_start(h, d, RESIDUAL_STEP / 8, 4, UNIT, STEP, bits, 2, n - 1, out["residual"],
                            out["known"] if innovation else None, out["next"], out["moments"])
        return {name: value[:, :columns] if value.shape[1] == stride else value for name, value in out.items()}

    got = _everywhere(whole)
    rows = slice(2, n - 1)
    known, payload, moments = np.zeros_like(h), np.full_like(got["next"], 77), np.zeros((n, 3))
    kernels.code_news(h, d, known if innovation else None, STEP, bits, 2, n - 1, payload, moments)
    residual = np.empty_like(h)
    kernels.midrise(h, RESIDUAL_STEP / 8, 4, residual)
    np.testing.assert_array_equal(got["next"], payload)
    np.testing.assert_array_equal(got["moments"], moments)
    np.testing.assert_array_equal((got["residual"][rows].astype(np.float32) + 0.5) * RESIDUAL_STEP / 8, residual[rows])
    if innovation:
        np.testing.assert_array_equal((got["known"][rows] - middle) * UNIT, known[rows])
    assert (got["residual"][:2] == 7).all()
    assert (got["residual"][n - 1:] == 7).all()


def test_too_wide_a_row_is_refused() -> None:
    columns = kernels.LAYER_COLUMNS + 1
    wide, payload = np.zeros((1, columns), np.float32), np.zeros((1, row_bytes(columns, 2)), np.uint8)
    assert not FusedLayers.can_run(Propagation("appnp", 1, 9.0, 0.1, "merged"), columns)
    if kernels.isa() != "reference":
        with pytest.raises(ValueError, match="layer: h has 4097 columns, expected at most 4096"):
            kernels.layer(np.zeros(2, np.int64), np.zeros(0, np.int32), payload, 2, 1.0, np.ones(1, np.float32), wide,
                          wide.copy(), wide, None, wide.copy(), True, 0.0, 0.0, 0.9, 0.1, None, 0.0, payload.copy(),
                          None, None, 0, 1)


@pytest.mark.parametrize(("step", "unit"), [(0.3, 0.125), (0.0625, 0.125), (0.25, 0.1), (2.0**12, 2.0**-3)])
def test_fixed_point_has_steps_that_are_powers_of_two(step: float, unit: float) -> None:
    if kernels.isa() != "reference":
        with pytest.raises(ValueError, match=f"fixed_start: step is {step:f}, expected a power of two from 1 to 16384"):
            kernels.fixed_start(np.zeros((1, 4), np.float32), np.ones(1, np.float32), 0.5, 8, unit, step, 2, 0, 1,
                                np.zeros((1, 8), np.int8), None, np.zeros((1, 1), np.uint8), None)


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_a_row_of_millions_of_neighbours(bits: int) -> None:
    """Past 4,000,000 neighbours twice the sum of 8-bit codes leaves 32 bits."""
    degree = 4_300_000
    indptr, indices = np.array([0, degree]), np.zeros(degree, np.int32)
    payload = np.full((1, 1), 255, np.uint8)
    h, r = np.zeros((1, 8 // bits), np.float32), np.zeros((1, 8 // bits), np.float32)
    for level in ("scalar", "avx2") if kernels.isa() == "avx2" else ("scalar",):
        with kernels.using_isa(level):
            kernels.layer(indptr, indices, payload, bits, 1.0, np.ones(1, np.float32), h.copy(), r, h, None, h, True,
                          0.0, 0.0, 1.0, 0.0, None, 0.0, np.zeros((1, 1), np.uint8), None, None, 0, 1)
        assert (r == np.float32(0.5 * (2**bits - 1) * degree)).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("threads", [1, 3])
def test_long_rows_are_shared_out(bits: int, threads: int) -> None:
    """Rows past 2^17 neighbours are added up in pieces by all threads, one among short ones and one at the end."""
    rng = np.random.default_rng(bits)
    degree = np.array([3, 2**17 + 1, 0, 5, 2**17, 300_000], np.int32)
    indptr = np.concatenate([[0], np.cumsum(degree)]).astype(np.int64)
    indices, columns = rng.integers(0, 40, indptr[-1]).astype(np.int32), 11
    payload = rng.integers(0, 256, (40, row_bytes(columns, bits))).astype(np.uint8)
    codes, n = np.empty((40, columns), np.uint8), len(degree)
    kernels.unpack(payload, bits, codes)
    want = np.array([np.bincount(indices[a:b], minlength=40) @ codes.astype(np.int64)
                     for a, b in itertools.pairwise(indptr)]).reshape(n, columns)
    h, d = np.zeros((n, columns), np.float32), np.ones(n, np.float32)

    def whole() -> dict[str, np.ndarray]:
        sums, r = np.empty((n, columns), np.int32), np.zeros((n, columns), np.float32)
        kernels.aggregate_codes(indptr, indices, payload, bits, 0, n, sums)
        kernels.layer(indptr, indices, payload, bits, 2.0, d, h, r, h, None, h.copy(), True, 0.0, 0.0, 1.0, 0.0, None,
                      0.0, np.zeros_like(payload)[:n], None, None, 1, n)
        return {"sums": sums, "r": r}

    before = kernels.threads()
    kernels.set_threads(threads)
    try:
        got = _everywhere(whole)
    finally:
        kernels.set_threads(before)
    np.testing.assert_array_equal(got["sums"], want)
    np.testing.assert_array_equal(got["r"][1:], (2 * want - (2**bits - 1) * degree[:, None])[1:].astype(np.float32))


def test_fixed_point_holds_what_it_says() -> None:
    """The bound is reached by codes that are all highest; a doubled round no longer fits."""
    steps = [1.0] * 10 + [2.0**-4] * 3
    fixed = fixed_point(steps, 4, innovation=True)
    assert fixed is not None
    most = sum(round((2**4 - 1) * step / fixed.unit) for step in steps)
    assert most * fixed.most_neighbours <= 2**16 - 1 < most * (fixed.most_neighbours + 1)
    assert fixed_point([1.0] * 270 + [2.0**-4], 4, innovation=True) is not None
    assert fixed_point([1.0] * 274 + [2.0**-4], 4, innovation=True) is None
    assert fixed_point([1.0] * 274 + [2.0**-4], 4, innovation=False) is not None
    for steps, number in (([1.0] * 85, 1), ([1.0] * 86, 2), ([1.0] * 86 + [0.0], 2), (worst_steps(load_config()), 1)):
        narrow = fixed_point(steps, 2, innovation=True)
        assert narrow is not None
        assert narrow.believed_bytes == number
    assert fixed_point([1.0, 0.75], 2, innovation=True) is None
    assert fixed_point([], 2, innovation=True) is None


class _Live:
    """Says λ of a script, and writes down what it is told."""

    live = any = True

    def __init__(self, script: list[float]) -> None:
        self.script, self.dots = script, []  # type: tuple[list[float], list[tuple[int, float]]]

    def value(self, layer: int) -> float:
        assert [layer for layer, _ in self.dots] == list(range(layer))  # the layers before are posted
        return self.script[layer]

    def post(self, layer: int, dot: float) -> None:
        self.dots.append((layer, dot))


@pytest.mark.parametrize("words", [
    {}, {"bits": 4}, {"bits": 1, "kind": "appnp"}, {"bits": 8}, {"coding": "direct"}, {"method": "minmax"},
    {"rounds": "two"}, {"rounds": "two", "coding": "direct", "bits": 4}], ids=str)
@pytest.mark.parametrize("multipliers", [
    [], [0.0, -1.2, 0.0, -0.8], [-0.7, 0.0, -1.5, 0.0], [-0.7, -0.1, -1.5, -0.3]], ids=str)
@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("residual_bits", [4, 8, 32])
def test_layers_are_the_messengers(tmp_path: Path, words: dict[str, Any], multipliers: list[float], live: bool,
                                   residual_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    part = make_store(small_graph(), tmp_path / "s", 1).part(0)
    graph = Neighbourhood.of(part)
    info = untrained_model(make_store(small_graph(), tmp_path / "m", 1), **words).info
    steps = list(info.message_steps)
    if info.coding == "innovation":
        steps[2] = 0.0
    spec = Propagation(info.kind, info.layers, info.mu, info.eta, info.rounds)
    h0 = np.random.default_rng(0).normal(size=(graph.num_local, 5)).astype(np.float32)
    residual = h0.copy()
    if residual_bits < 32:
        kernels.midrise(h0, 0.25, residual_bits, residual)
    exchange = Exchange(part.peers, graph.num_local, part.num_halo, None, 0, 5.0)
    multipliers = [*multipliers, *[0.0] * 4][:4] if info.kind == "smp" else [0.0] * 4
    messenger = CodedMessenger(graph, exchange, 5, "evaluation", bits=info.bits["messages"], steps=steps,
                               innovation=info.coding == "innovation", record=True)
    sources = [_Live(multipliers) if live else FrozenMultipliers(multipliers) for _ in range(2)]
    want = spec.run(graph, h0, residual, messenger, sources[0])
    layers = FusedLayers(spec, graph, exchange, "evaluation", bits=info.bits["messages"], steps=steps,
                         innovation=info.coding == "innovation", residual_bits=residual_bits, residual_step=0.25,
                         multipliers=sources[1], record=True)
    used: list[str] = []
    for name in ("layer", "fixed_layer"):
        original = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, f=original, n=name: (used.append(n), f(*a)))
    got = layers.run(h0.copy())
    np.testing.assert_array_equal(got, want)
    assert layers.moments == messenger.moments
    if live:
        assert sources[1].dots == sources[0].dots  # type: ignore[union-attr]
        assert len(sources[1].dots) == spec.layers - 1  # type: ignore[union-attr]
    innovation = info.coding == "innovation"
    fixed = residual_bits < 32 and fixed_point(steps, info.bits["messages"], innovation=innovation) is not None
    assert fixed == (residual_bits < 32) or info.method != "recipe"
    assert set(used) == {"fixed_layer" if fixed else "layer"}


def test_prediction_takes_it_where_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways end in the same bits on two parts; the diagnosis looks at each step."""
    store = make_store(small_graph(), tmp_path / "s", 2)
    runs: list[Propagation] = []
    original = FusedLayers.run

    def watch(self: FusedLayers, h0: np.ndarray) -> np.ndarray:
        runs.append(self._spec)
        return original(self, h0)

    monkeypatch.setattr(FusedLayers, "run", watch)
    for rounds, kind, count in (("merged", "smp", 2), ("merged", "appnp", 2), ("two", "smp", 2)):
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
