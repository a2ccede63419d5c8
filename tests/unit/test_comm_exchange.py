# SPDX-License-Identifier: Apache-2.0
"""Rounds of messages between ranks in threads, over real gloo: every halo row is exact, every byte counted."""
from __future__ import annotations

import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pytest

from qgnn_dist.comm.exchange import Exchange
from qgnn_dist.comm.formation import Formation
from qgnn_dist.comm.group import Group
from qgnn_dist.comm.pool import LocalPool, WorkerContext
from qgnn_dist.comm.wire import HEADER_BYTES, frame_row_bytes
from qgnn_dist.errors import StoreError
from qgnn_dist.quant.packed import row_bytes

BITS = (1, 2, 4, 8, 32)


@dataclass
class Plan:
    peer: int
    send_rows: np.ndarray
    recv_begin: int
    recv_count: int


@dataclass
class Layout:
    """One rank's plans, and which (owner, row) each of its halo slots shows."""

    peers: list[Plan]
    num_local: int
    halo: list[tuple[int, int]]


def random_layouts(size: int, seed: int, one_way: bool = False) -> list[Layout]:
    """Random rows between random pairs; rank 0 has no rows of its own in every third seed."""
    rng = np.random.default_rng(seed)
    local = [int(n) for n in rng.integers(1, 60, size)]
    if seed % 3 == 2:
        local[0] = 0
    wanted = {(to, owner): np.sort(rng.choice(local[owner], rng.integers(0, local[owner] + 1), replace=False))
              for to in range(size) for owner in range(size) if to != owner}
    if one_way:
        wanted[0, 1] = wanted[0, 1][:0]
    layouts = []
    for rank in range(size):
        peers, halo = [], []
        for peer in range(size):
            if peer != rank and (len(wanted[rank, peer]) or len(wanted[peer, rank])):
                peers.append(Plan(peer, wanted[peer, rank].astype(np.int32), len(halo), len(wanted[rank, peer])))
                halo += [(peer, int(row)) for row in wanted[rank, peer]]
        layouts.append(Layout(peers, local[rank], halo))
    return layouts


def state(rank: int, rows: int, width: int, round_: int) -> np.ndarray:
    """Local rows' bytes of a rank in a round, which any rank can compute."""
    return np.random.default_rng([rank, width, round_]).integers(0, 256, (rows, width), dtype=np.uint8)


class HaloWorker:
    """Runs rounds and compares every halo row with its owner's."""

    def __init__(self, context: WorkerContext, layouts: list[Layout]) -> None:
        self.context, self.layouts, own = context, layouts, layouts[context.rank]
        self.exchange = Exchange(own.peers, own.num_local, len(own.halo), context.group, context.run_id, 10.0)

    def rounds(self, bits: int, columns: int, count: int, direction: str) -> tuple[dict[str, int], int]:
        own, rank, width = self.layouts[self.context.rank], self.context.rank, frame_row_bytes(columns, bits, direction)
        buffer = np.zeros((own.num_local + len(own.halo), width), np.uint8)
        for r in range(count):
            buffer[:own.num_local] = state(rank, own.num_local, width, r)
            self.exchange.begin(buffer, bits, columns, direction, layer=r, round=r)
            self.exchange.finish()
            states = [state(p, layout.num_local, width, r) for p, layout in enumerate(self.layouts)]
            expected = np.array([states[p][row] for p, row in own.halo], np.uint8).reshape(len(own.halo), width)
            np.testing.assert_array_equal(buffer[own.num_local:], expected)
            np.testing.assert_array_equal(buffer[:own.num_local], states[rank])
        assert self.context.group is not None
        return asdict(self.context.group.counters), self.exchange.expected_bytes(bits, columns, direction)

    def announced(self, bits: int, count: int) -> None:
        """Rounds by two buffers in turns, each announced while the one before is begun."""
        own, rank, width = self.layouts[self.context.rank], self.context.rank, frame_row_bytes(7, bits, "forward")
        now, then = (np.zeros((own.num_local + len(own.halo), width), np.uint8) for _ in range(2))
        for r in range(count):
            now[:own.num_local] = state(rank, own.num_local, width, r)
            if rank == r % 3:
                time.sleep(0.02)  # peers' rows of the next round may be there before this one's
            following = (then, r + 1, r + 1) if r + 1 < count else None
            self.exchange.begin(now, bits, 7, "forward", r, r, following=following)
            self.exchange.finish()
            states = [state(p, layout.num_local, width, r) for p, layout in enumerate(self.layouts)]
            expected = np.array([states[p][row] for p, row in own.halo], np.uint8).reshape(len(own.halo), width)
            np.testing.assert_array_equal(now[own.num_local:], expected)
            now, then = then, now

    def reduce(self, size: int, dtype: str) -> tuple[np.ndarray, dict[str, int]]:
        array = np.random.default_rng(self.context.rank).normal(size=size) * 100
        array = array.astype(dtype)
        assert self.context.group is not None
        self.context.group.all_reduce_sum(array)
        self.context.group.barrier()
        return array, asdict(self.context.group.counters)


def pool_of(size: int, layouts: list[Layout]) -> LocalPool:
    return LocalPool(HaloWorker, {"layouts": layouts}, size, timeout_s=10.0)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_halo_rows_are_exact_and_bytes_follow_the_formula(size: int) -> None:
    for seed in range(3):
        layouts = random_layouts(size, seed)
        pool = pool_of(size, layouts)
        try:
            before = [0] * size
            for bits in BITS:
                results = pool.call("rounds", bits, 7, 3, "forward", timeout_s=30)
                for rank, (counters, formula) in enumerate(results):
                    rows = [len(p.send_rows) for p in layouts[rank].peers]
                    by_hand = sum(n * -(-7 * bits // 8) + 64 for n in rows if n)
                    assert formula == by_hand
                    assert counters["forward"] - before[rank] == 3 * by_hand
                    assert counters["backward"] == counters["evaluation"] == counters["control"] == 0
                    before[rank] = counters["forward"]
        finally:
            pool.close()


@pytest.mark.parametrize("size", [2, 4])
def test_rows_of_rounds_announced_ahead_arrive_where_they_belong(size: int) -> None:
    layouts = random_layouts(size, 1)
    pool = pool_of(size, layouts)
    try:
        for bits in BITS:
            pool.call("announced", bits, 6, timeout_s=30)
        results = pool.call("rounds", 2, 7, 2, "forward", timeout_s=30)  # nothing was left behind
    finally:
        pool.close()
    for rank, (counters, _) in enumerate(results):
        rows = [len(p.send_rows) for p in layouts[rank].peers]
        by_hand = {bits: sum(n * -(-7 * bits // 8) + HEADER_BYTES for n in rows if n) for bits in BITS}
        assert counters["forward"] == 6 * sum(by_hand.values()) + 2 * by_hand[2]


@pytest.mark.parametrize("change", ["buffer", "bits", "columns", "direction", "layer", "round"])
def test_another_round_than_the_announced_one_is_refused(change: str) -> None:
    exchange, now, then = Exchange([], 2, 0, None, 1, 1.0), np.zeros((2, 1), np.uint8), np.zeros((2, 1), np.uint8)
    exchange.begin(now, 4, 2, "forward", 0, 0, following=(then, 1, 1))
    exchange.finish()
    with pytest.raises(ValueError, match="release: a round is begun or announced"):
        exchange.release()
    right = {"buffer": then, "bits": 4, "columns": 2, "direction": "forward", "layer": 1, "round": 1}
    wrong = {"buffer": now, "bits": 8, "columns": 1, "direction": "evaluation", "layer": 2, "round": 3}
    also = {"bits": {"columns": 1}}.get(change, {})
    with pytest.raises(ValueError, match="the round before announced"):
        exchange.begin(**{**right, change: wrong[change], **also})  # type: ignore[arg-type]


def test_a_row_of_coded_gradients_has_a_scale_byte() -> None:
    layouts = random_layouts(2, 1)
    pool = pool_of(2, layouts)
    try:
        sent = 0
        for bits, width in ((2, 3), (4, 5), (8, 8), (32, 28)):
            results = pool.call("rounds", bits, 7, 2, "backward", timeout_s=30)
            by_hand = width * len(layouts[0].peers[0].send_rows) + 64
            assert results[0][1] == by_hand
            sent += 2 * by_hand
            assert results[0][0]["backward"] == sent
            assert results[0][0]["forward"] == 0
    finally:
        pool.close()


def test_a_direction_without_rows_sends_nothing() -> None:
    layouts = random_layouts(2, 4, one_way=True)
    assert [p.recv_count for p in layouts[0].peers] == [0]
    pool = pool_of(2, layouts)
    try:
        results = pool.call("rounds", 2, 40, 2, "evaluation", timeout_s=30)
    finally:
        pool.close()
    assert results[1][0]["evaluation"] == 0
    assert results[0][0]["evaluation"] == 2 * (10 * len(layouts[0].peers[0].send_rows) + HEADER_BYTES)


@pytest.mark.parametrize(("plan", "words"), [
    (Plan(1, np.array([0, 60], np.int32), 0, 2), "send rows run from 0 to 60, the part has 60 rows"),
    (Plan(1, np.array([-1], np.int32), 0, 2), "send rows run from -1"),
    (Plan(1, np.array([1], np.int64), 0, 2), "send rows are int64"),
    (Plan(1, np.array([1], np.int32), 3, 2), "slots 3 to 5, the part has 4 halo slots"),
    (Plan(0, np.array([1], np.int32), 0, 2), "peer 0 of rank 0"),
    (Plan(2, np.array([1], np.int32), 0, 2), "peer 2 of rank 0"),
])
def test_a_plan_that_does_not_fit_the_part_is_refused(plan: Plan, words: str) -> None:
    group = Group(0, 2, 1.0, Formation.new(), None, None)
    with pytest.raises(StoreError, match=words):
        Exchange([plan], 60, 4, group, 1, 1.0)


def test_headers_are_under_one_percent_from_10000_rows_a_peer() -> None:
    plan = Plan(1, np.arange(10_000, dtype=np.int32), 0, 10_000)
    exchange = Exchange([plan], 10_000, 10_000, Group(0, 2, 1.0, Formation.new(), None, None), 1, 1.0)
    for bits in BITS:
        assert exchange.expected_bytes(bits, 7) == 10_000 * row_bytes(7, bits) + HEADER_BYTES
        assert 0.01 * exchange.expected_bytes(bits, 7) > HEADER_BYTES


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 5, 1000])
def test_all_reduce_sums_in_rank_order_and_counts_its_bytes(size: int, length: int) -> None:
    layouts = [Layout([], 1, []) for _ in range(size)]
    for dtype in ("float32", "float64", "int64"):
        pool = pool_of(size, layouts)
        try:
            results = pool.call("reduce", length, dtype, timeout_s=30)
        finally:
            pool.close()
        parts = [(np.random.default_rng(r).normal(size=length) * 100).astype(dtype) for r in range(size)]
        expected = np.zeros(length, np.int64 if dtype == "int64" else np.float64)
        for part in parts:
            expected += part
        for rank, (array, counters) in enumerate(results):
            np.testing.assert_array_equal(array, expected.astype(dtype))
            bounds = [length * r // size for r in range(size + 1)]
            pieces = [bounds[r + 1] - bounds[r] for r in range(size)]
            item = np.dtype(dtype).itemsize
            scatter = sum(pieces[r] * item + 64 for r in range(size) if r != rank and pieces[r])
            gather = (size - 1) * (pieces[rank] * item + 64) if pieces[rank] else 0
            barrier = 2 * (size - 1) * (8 + 64)
            assert counters["control"] == scatter + gather + barrier


def test_all_reduce_refuses_other_dtypes() -> None:
    pool = pool_of(2, [Layout([], 1, []), Layout([], 1, [])])
    try:
        with pytest.raises(TypeError, match="float16"):
            pool.call("reduce", 4, "float16", timeout_s=10)
    finally:
        pool.close()


def test_one_part_has_no_group_and_nothing_to_do() -> None:
    exchange = Exchange([], 5, 0, None, 1, 1.0)
    buffer = np.arange(5, dtype=np.uint8).reshape(5, 1)
    exchange.begin(buffer, 8, 1, "forward", 0, 0)
    exchange.finish()
    assert exchange.exchange_rounds == 1
    assert exchange.expected_bytes(8, 1) == 0
    with pytest.raises(ValueError, match="no group"):
        Exchange([Plan(1, np.zeros(1, np.int32), 0, 1)], 5, 1, None, 1, 1.0)


@pytest.mark.parametrize(("shape", "dtype", "bits", "direction", "words"), [
    ((5, 2), "uint8", 8, "forward", r"\(5, 2\).*expected uint8 \(5, 1\)"),
    ((4, 1), "uint8", 8, "forward", r"\(4, 1\)"),
    ((5, 1), "int8", 8, "forward", "int8"),
    ((5, 1), "uint8", 8, "control", "direction"),
    ((5, 1), "uint8", 8, "backward", r"\(5, 1\).*expected uint8 \(5, 2\)"),
])
def test_begin_refuses_a_wrong_buffer(shape: tuple[int, int], dtype: str, bits: int, direction: str,
                                      words: str) -> None:
    exchange = Exchange([], 5, 0, None, 1, 1.0)
    with pytest.raises(ValueError, match=words):
        exchange.begin(np.zeros(shape, dtype), bits, 1, direction, 0, 0)


def test_begin_and_finish_alternate() -> None:
    exchange = Exchange([], 1, 0, None, 1, 1.0)
    with pytest.raises(ValueError, match="no round"):
        exchange.finish()
    exchange.begin(np.zeros((1, 1), np.uint8), 8, 1, "forward", 0, 0)
    with pytest.raises(ValueError, match="not been finished"):
        exchange.begin(np.zeros((1, 1), np.uint8), 8, 1, "forward", 0, 0)


def test_a_single_worker_runs_in_the_callers_thread() -> None:
    class Where:
        def __init__(self, context: WorkerContext) -> None:
            assert context.group is None

        def thread(self) -> Any:
            return threading.current_thread()

    pool = LocalPool(Where, {}, 1)
    assert pool.call("thread", timeout_s=1) == [threading.current_thread()]
    assert pool.call_one(0, "thread", timeout_s=1) is threading.current_thread()
    pool.close()
