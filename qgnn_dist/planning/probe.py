# SPDX-License-Identifier: Apache-2.0
"""Measure this machine's kernels, some 25 seconds: what `qgnn plan --calibrate` runs.

Neighbours are drawn by chance, so that every one is fetched from where the states lie: graphs whose rows follow their
neighbours are faster. Each figure is the least of a few runs. The kernels of training and prediction run as they are.
"""
from __future__ import annotations

import functools
import math
import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np
import torch

from .. import __version__, kernels
from ..comm.exchange import Exchange
from ..comm.pool import LocalPool, WorkerContext
from ..config import load_config
from ..model.features import FeatureBlock
from ..model.perceptron import DropoutKey, FeatureMatrix, Perceptron
from ..model.row_blocks import RowBlocks
from ..propagation.fused import FusedLayers
from ..propagation.fused_float import FusedFloatLayers
from ..propagation.neighbourhood import Neighbourhood
from ..propagation.smp import FrozenMultipliers, Multipliers, Propagation
from ..quant.packed import row_bytes
from ..store.reader import PeerPlan
from .rates import FAR_BYTES, KINDS, NEAR_BYTES, PERCEPTRON_KINDS, LayerRate, PerceptronRate, Rates

__all__ = ["machine_name", "probe"]

COLUMNS, ROWS, DEGREES, DEPTHS = (16, 64), (1 << 14, 1 << 17), (2, 16), (2, 5)
RAGGED = 47
TURNS, LEAST_RUNS, BUDGET_S = 2, 2, 0.03
"""Everything is timed in turns, seconds apart, in so many runs or for so long, and the fastest counts: a virtual
machine's cores are slower by a third for seconds at a time, and a first run finds its memory new."""
WIDTHS = (1, 2, 4, 8, 32)
SCALED_LAYERS = (("training", 2), ("frozen", 2), ("gradient", 32))
"""Kinds of layers, each at the width that stands for all in what is not measured at every one."""
SCALED_DEPTH, SCALED_TURNS = 10, 2
"""Layers of a forward that is compared between threads, as the first two, on memory that is new, gain less than the
others; and how often one thread and all of them take their turns."""
NETWORKS = ((32, 64, 16), (256, 64, 16), (128, 256, 40))
"""Features, hidden, classes of the perceptrons that are timed."""
NETWORK_ROWS, MANY_ROWS = 1 << 13, 1 << 16
"""Of a perceptron: enough for a rate, and so many that waking threads is no matter."""
EXCHANGE_BYTES = (1 << 12, 1 << 23)


class _Clock:
    """Seconds of the fastest run of everything so far."""

    def __init__(self) -> None:
        self._least: dict[tuple[Any, ...], float] = {}

    def time(self, what: tuple[Any, ...], run: Callable[[], Any], prepare: Callable[[], Any] = lambda: None) -> float:
        """Of `what`, after at least LEAST_RUNS more, and more until BUDGET_S are over."""
        times: list[float] = []
        while len(times) < LEAST_RUNS or sum(times) < BUDGET_S:
            prepare()
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return self.note(what, min(times))

    def note(self, what: tuple[Any, ...], seconds: float) -> float:
        """Seconds that somebody else has taken; returns the least so far."""
        self._least[what] = min(self._least.get(what, math.inf), seconds)
        return self._least[what]


def probe(threads: int, say: Callable[[str], None] = lambda _: None) -> Rates:
    """Rates of this machine with so many threads busy."""
    before, before_torch = kernels.threads(), torch.get_num_threads()
    torch.set_num_threads(1)  # as in TrainWorker.setup
    clock = _Clock()
    try:
        for turn in range(TURNS):
            say(f"turn {turn + 1} of {TURNS}")
            rates = _turn(clock, threads, say)
    finally:
        kernels.set_threads(before)
        torch.set_num_threads(before_torch)
    return rates


def _turn(clock: _Clock, threads: int, say: Callable[[str], None]) -> Rates:
    """Time everything once more; the rates by what was fastest so far."""
    kernels.set_threads(threads)
    layers = [rate for columns in COLUMNS for rows in ROWS for rate in _layers(clock, columns, rows, say)]
    say(f"layers of {RAGGED} columns")
    ragged = {kind: _ragged(clock, kind, bits) for kind, bits in SCALED_LAYERS}
    say("the perceptron")
    read_ns, score_ns = _passes(clock)
    far_ns, perceptron = _far(clock), _perceptrons(clock)
    say("an exchange over loopback")
    exchange_ns, round_s = _exchange(clock)
    say("one thread")
    versions = {"qgnn-dist": __version__, "kernels": kernels.isa(), "numpy": metadata.version("numpy")}
    return Rates(
        machine=machine_name(), threads=threads, serial=_serial(clock, threads), versions=versions,
        layers=tuple(layers), ragged=ragged, perceptron=perceptron, far_ns=far_ns, read_ns=read_ns, score_ns=score_ns,
        exchange_ns=exchange_ns, round_s=round_s)


def machine_name() -> str:
    """The processor's model and number of cores."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {os.cpu_count()} cores"


class _LiveMultipliers:
    """Always 0, which it is at the defaults, and at once: layers are measured, not a server."""

    live = any = True

    def value(self, layer: int) -> float:
        return 0.0

    def post(self, layer: int, dot: float) -> None:
        pass


def _graph(rows: int, degree: int) -> Neighbourhood:
    rng = np.random.default_rng(0)
    return Neighbourhood(np.arange(rows + 1, dtype=np.int64) * degree,
                         rng.integers(0, rows, rows * degree, dtype=np.int32),
                         np.full(rows, (degree + 1) ** -0.5, np.float32), 0, 0)


def _layers(clock: _Clock, columns: int, rows: int, say: Callable[[str], None]) -> list[LayerRate]:
    """All kinds and widths at one size: a row's share by two depths, an edge's by two degrees."""
    say(f"layers of {columns} columns and {rows} rows")
    few, many = (_graph(rows, degree) for degree in DEGREES)
    exchange = Exchange([], rows, 0, None, 0, 60.0)
    h0 = np.random.default_rng(1).standard_normal((rows, columns), np.float32)
    state, found = h0.copy(), []
    for kind, bits in [*((kind, bits) for bits in WIDTHS for kind in ("training", "frozen")), ("gradient", 32)]:
        run, fresh = _forward(kind, bits, exchange, state), functools.partial(np.copyto, state, h0)
        two, four = (clock.time((kind, bits, columns, rows, depth), functools.partial(run, few, depth), fresh)
                     for depth in DEPTHS)
        row = max(four - two, 0.0) / (DEPTHS[1] - DEPTHS[0])  # a round of a row and its few edges
        if kind != "frozen":  # whose sums over edges are those of training
            whole = clock.time((kind, bits, columns, rows, "many"), functools.partial(run, many, DEPTHS[0]), fresh)
            edge = max(whole - two, 0.0) / DEPTHS[0] / (rows * (DEGREES[1] - DEGREES[0]))
        start = max(two - DEPTHS[0] * row, 0.0)
        found.append(LayerRate(kind, bits, columns, rows, 1e9 * start / rows,
                               1e9 * max(row / rows - edge * DEGREES[0], 0.0), 1e9 * edge))
    return found


def _ragged(clock: _Clock, kind: str, bits: int) -> float:
    """How much longer a round of rows takes whose columns fill no whole vectors: RAGGED against one more."""
    rows, graph = ROWS[1] // 2, _graph(ROWS[1] // 2, DEGREES[0])
    exchange, times = Exchange([], rows, 0, None, 0, 60.0), []
    for columns in (RAGGED, RAGGED + 1):
        h0 = np.random.default_rng(1).standard_normal((rows, columns), np.float32)
        run, fresh = _forward(kind, bits, exchange, h0), functools.partial(np.copyto, h0, h0.copy())
        times.append(clock.time((kind, bits, columns), functools.partial(run, graph, DEPTHS[1]), fresh))
    return max(times[0] / times[1], 1.0)


def _forward(kind: str, bits: int, exchange: Exchange, state: np.ndarray) -> Callable[[Neighbourhood, int], np.ndarray]:
    live: Multipliers = _LiveMultipliers() if kind == "training" else FrozenMultipliers([])
    direction = {"training": "forward", "frozen": "evaluation", "gradient": "backward"}[kind]

    def run(graph: Neighbourhood, depth: int) -> np.ndarray:
        spec = Propagation("smp", depth, 9.0, 0.1, "merged")
        if bits == 32:
            return FusedFloatLayers(spec, graph, exchange, direction).run(state, state, live)
        steps = [2.0 ** -(k // 3) for k in range(depth)]
        layers = FusedLayers(spec, graph, exchange, direction, bits=bits, steps=steps, innovation=True, residual_bits=8,
                             residual_step=2.0**-5, multipliers=live, record=kind == "training")
        return layers.run(state)

    return run


def _far(clock: _Clock) -> float:
    """ns more that a neighbour's cache line takes from FAR_BYTES than from what the layers above lie in."""
    rows, degree = 1 << 14, DEGREES[1]
    indptr, out = np.arange(rows + 1, dtype=np.int64) * degree, np.empty((rows, 64), np.int32)
    times = []
    for size in (NEAR_BYTES, FAR_BYTES):
        payload = np.full((size // 16, 16), 0x55, np.uint8)
        indices = np.random.default_rng(0).integers(0, len(payload), rows * degree, dtype=np.int32)
        times.append(clock.time(("sums", size), functools.partial(kernels.aggregate_codes, indptr, indices, payload, 2,
                                                                  0, rows, out)))
    return 1e9 * max(times[1] - times[0], 0.0) / (rows * degree)


def _serial(clock: _Clock, threads: int) -> dict[str, float]:
    """Of every kind of layers and of the perceptron: the share of the work that no second thread takes over."""
    columns, rows = COLUMNS[0], ROWS[1]
    graph, exchange = _graph(rows, DEGREES[0]), Exchange([], rows, 0, None, 0, 60.0)
    times = dict[tuple[str, int], float]()
    h0 = np.random.default_rng(1).standard_normal((rows, columns), np.float32)
    state = h0.copy()
    networks = {**_training(*NETWORKS[-1], MANY_ROWS), **_packed(*NETWORKS[-1], MANY_ROWS)}
    for count in (1, threads) * SCALED_TURNS:
        kernels.set_threads(count)
        for kind, bits in SCALED_LAYERS:
            run, fresh = _forward(kind, bits, exchange, state), functools.partial(np.copyto, state, h0)
            deep = functools.partial(run, graph, SCALED_DEPTH)
            times[kind, count] = clock.time((kind, "threads", count), deep, fresh)
        for kind in PERCEPTRON_KINDS:
            times[kind, count] = clock.time((kind, "threads", count), networks[kind, 2])
    for count in {1, threads}:
        times["backward", count] = max(times["backward", count] - times["forward", count], 1e-9)
    return {kind: min(max((threads * times[kind, threads] / times[kind, 1] - 1) / max(threads - 1, 1), 0.0), 1.0)
            for kind in (*KINDS, *PERCEPTRON_KINDS)}


def _perceptrons(clock: _Clock) -> tuple[PerceptronRate, ...]:
    """Every kind and width by three shapes."""
    shapes, times = [], dict[tuple[str, int], list[float]]()
    for network in NETWORKS:
        features, hidden, classes = network
        shapes.append((features + hidden, features * hidden + hidden * classes))
        for key, run in {**_training(*network), **_packed(*network)}.items():
            times.setdefault(key, []).append(1e9 * clock.time((*key, network), run) / NETWORK_ROWS)
    for bits in WIDTHS[1:]:
        times["backward", bits] = [max(b - f, 0.0) for f, b in zip(times["forward", bits], times["backward", bits])]
    rates = []
    for (kind, bits), nanoseconds in times.items():
        # Of least relative errors; where one share comes out negative, the other takes all.
        scaled = np.array(shapes, float) / np.array(nanoseconds)[:, None]
        (value, weight), *_ = np.linalg.lstsq(scaled, np.ones(len(shapes)), rcond=None)
        if min(value, weight) < 0:
            alone = scaled.sum(0) / (scaled * scaled).sum(0)
            value, weight = (alone[0], 0.0) if weight < 0 else (0.0, alone[1])
        rates.append(PerceptronRate(kind, bits, float(value), float(weight)))
    return tuple(rates)


def _training(features: int, hidden: int, classes: int, rows: int = NETWORK_ROWS
              ) -> dict[tuple[str, int], Callable[[], Any]]:
    """RowBlocks at every width with dropout of one half. "backward" is both passes: the forward is taken off later."""
    rng = np.random.default_rng(0)
    key = DropoutKey(0, 1, np.arange(rows), 0.5)
    grad = np.full((rows, classes), 1e-3, np.float32)

    def both(blocks: RowBlocks) -> None:
        blocks.forward(key, 0.2)
        blocks.backward(grad)

    runs: dict[tuple[str, int], Callable[[], Any]] = {}
    for bits in WIDTHS[1:]:
        config = load_config(overrides=[f"model.hidden={hidden}", "model.dropout=0.5", f"quant.bits={bits}"])
        values = rng.standard_normal((rows, features), np.float32) if bits == 32 else \
            rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, features)).astype(np.int16)
        matrix = FeatureMatrix(FeatureBlock(values, np.ones(rows, np.float32), features))
        blocks = RowBlocks(Perceptron(config, features, classes), matrix)
        runs["forward", bits] = functools.partial(blocks.forward, key, 0.2)
        runs["backward", bits] = functools.partial(both, blocks)
    return runs


def _packed(features: int, hidden: int, classes: int, rows: int = NETWORK_ROWS
            ) -> dict[tuple[str, int], Callable[[], Any]]:
    """The packed model's perceptron at every width."""
    rng, out = np.random.default_rng(0), np.empty((rows, classes), np.float32)
    scale = np.ones(rows, np.float32)
    runs: dict[tuple[str, int], Callable[[], Any]] = {}
    for bits in WIDTHS[1:-1]:
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
        codes = rng.integers(low, high, (rows, features)).astype(np.int16)
        first, second = (rng.integers(low, high, shape).astype(np.int8)
                         for shape in ((features, hidden), (hidden, classes)))
        runs["packed", bits] = functools.partial(
            kernels.perceptron_dense, codes, scale, first, np.float32(0.1), np.zeros(hidden, np.float32),
            np.float32(1.0), bits, second, np.float32(0.1), np.zeros(classes, np.float32), None, out)
    x = rng.standard_normal((rows, features), np.float32)
    weights = [rng.standard_normal(shape, np.float32) for shape in ((features, hidden), (hidden, classes))]
    middle = np.empty((rows, hidden), np.float32)

    def in_float() -> None:
        kernels.matmul_float_dense(x, weights[0], middle)
        kernels.matmul_float_dense(np.maximum(middle, 0), weights[1], out)

    runs["packed", 32] = in_float
    return runs


def _passes(clock: _Clock) -> tuple[float, float]:
    """ns of a feature value that is read and coded, and of a score in what surrounds the layers."""
    x = np.random.default_rng(0).standard_normal((1 << 16, 64), np.float32)
    codes, scale = np.empty(x.shape, np.int16), np.empty(len(x), np.float32)
    classes, confidence, rows = np.empty(len(x), np.int32), np.empty(len(x), np.float32), np.empty((len(x), 3))

    def score() -> None:
        kernels.softmax(x, classes, confidence, None)
        kernels.row_moments(x, rows)
        np.zeros_like(x)[:] = 0

    read = clock.time(("read",), lambda: kernels.feature_codes_dense(x, 0, 2, True, codes, scale))
    return 1e9 * read / x.size, 1e9 * clock.time(("score",), score) / x.size


class _End:
    """One of two ranks that send each other rows."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context

    def exchange(self, rows: int, repeats: int) -> float:
        """Seconds of a round, the least of some; both ends run as many."""
        other = PeerPlan(1 - self._context.rank, np.arange(rows, dtype=np.int32), 0, rows)
        exchange = Exchange([other], rows, rows, self._context.group, self._context.run_id, 60.0)
        buffer = np.zeros((2 * rows, row_bytes(64, 8)), np.uint8)

        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            exchange.begin(buffer, 8, 64, "forward", 0, 0)
            exchange.finish()
            times.append(time.perf_counter() - start)
        return min(times)


def _exchange(clock: _Clock) -> tuple[float, float]:
    """ns of a byte and seconds of a round, of two ranks in this process."""
    pool = LocalPool(_End, {}, 2, threads=kernels.threads())
    try:
        small, large = (clock.note(("exchange", size), max(pool.call("exchange", size // 64, repeats, timeout_s=60)))
                        for size, repeats in zip(EXCHANGE_BYTES, (20, 3)))
    finally:
        pool.close()
    byte_s = max(large - small, 0.0) / (EXCHANGE_BYTES[1] - EXCHANGE_BYTES[0])
    return 1e9 * byte_s, max(small - EXCHANGE_BYTES[0] * byte_s, 0.0)
