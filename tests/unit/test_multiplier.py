# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio
import random
import threading
import time

import numpy as np
import pytest

from qgnn_dist.config import load_config
from qgnn_dist.errors import DeadlineError
from qgnn_dist.propagation.multiplier import InProcessServer, MultiplierRule, MultiplierServer

RULE = MultiplierRule.of(load_config(overrides=["propagation.eta_lambda=1.5", "propagation.alpha=0.1"]), 100)


def test_normalised_rule_moves_to_its_clamp_and_back_to_zero() -> None:
    assert RULE.lambda_min == pytest.approx(-2.0)
    multiplier, slack, residual, clamped = RULE.advance(0.0, 0.0, 0.5, 1.0)
    assert (multiplier, residual, clamped) == (pytest.approx(-0.6), pytest.approx(-0.4), False)
    multiplier, slack, residual, clamped = RULE.advance(multiplier, slack, 2.0, 1.0)
    assert (multiplier, clamped) == (-2.0, True)
    multiplier, *_ = RULE.advance(-0.1, 0.0, 0.0, 1.0)
    assert multiplier == 0.0
    assert RULE.advance(0.0, 0.0, -3.0, 1.0)[2] == pytest.approx(0.1)
    assert RULE.advance(0.0, 0.0, 1.0, 0.0)[0] == 0.0
    assert RULE.advance(0.0, 0.0, float("nan"), 1.0)[0] == 0.0


@pytest.mark.parametrize("mu", [1.0, 9.0])
def test_merged_rounds_contract_every_mode_within_twice_the_clamp(mu: float) -> None:
    """The companion matrix of a mode ω of L̃: spectral radius under 1 for −(2−η)/(2+η) < −2ηλ < 1 and η < 2/(1+2μ)."""
    def radius(omega: float, eta: float, m: float) -> float:
        memory = m * (1 - omega)
        now = 1 - (1 - m) * eta * (1 + mu * omega) + memory
        return float(np.abs(np.linalg.eigvals(np.array([[now, -memory], [1.0, 0.0]]))).max())

    limit = 2 / (1 + 2 * mu)
    for omega in np.linspace(0, 2, 41):
        for eta in (0.1 * limit, 0.5 * limit, 0.99 * limit):
            for m in (-0.99 * (2 - eta) / (2 + eta), 0.0, 0.4, 0.8, 0.99):
                assert radius(omega, eta, m) < 1, (omega, eta, m)
    assert radius(2.0, 1.01 * limit, 0.4) > 1
    assert radius(0.0, 0.5 * limit, 1.01) > 1
    assert radius(0.0, 0.5 * limit, -1.01 * (2 - 0.5 * limit) / (2 + 0.5 * limit)) > 1
    rule = MultiplierRule.of(load_config(overrides=["propagation.eta=0.05"]), 1)
    assert -2 * rule.eta * rule.lambda_min == pytest.approx(0.4)


def test_published_rule_is_the_papers() -> None:
    rule = MultiplierRule.of(load_config(overrides=["propagation.constraint=published"]), 1000)
    assert rule.start() == (1e-3, 1e-3)
    multiplier, slack, residual, clamped = rule.advance(1e-3, 1e-3, 50.0, 7.0)
    assert residual == pytest.approx(0.2 * 1000 - 1e-6 - 50)
    assert multiplier == pytest.approx(1e-3 + 1e-5 * residual)
    assert slack == pytest.approx(1e-3 + 2e-5 * 1e-3 * 1e-3)
    assert not clamped


def _trajectory(size: int, delay_s: float) -> list[float]:
    server = MultiplierServer(size, RULE)

    async def worker(rank: int) -> list[float]:
        draw = random.Random(rank)
        values = []
        for layer in range(5):
            await asyncio.sleep(delay_s * draw.random())
            dot, energy = (2 * k / (size * (size + 1)) for k in (rank + 1, size - rank))  # uneven, each one in all
            values.append(await server.post_layer(1, layer, rank, 0.6 * dot, energy))
        return values

    async def run() -> list[list[float]]:
        return await asyncio.gather(*(worker(rank) for rank in range(size)))

    answers = asyncio.run(run())
    assert all(a == answers[0] for a in answers)
    return answers[0]


def test_every_rank_gets_one_parts_trajectory_whoever_comes_first() -> None:
    alone = _trajectory(1, 0.0)
    assert alone[0] < 0
    assert alone[-1] == RULE.lambda_min
    assert _trajectory(4, 0.01) == pytest.approx(alone, rel=1e-12)


def test_silent_rank_is_named_within_the_deadline() -> None:
    server = InProcessServer(MultiplierServer(3, RULE, deadline_s=0.2))
    try:
        replies = [server.client(rank).post_layer(4, 2, 0.1, 1.0) for rank in (0, 2)]
        start = time.perf_counter()
        for reply in replies:
            with pytest.raises(DeadlineError, match=r"rank\(s\) 1 did not post layer 4 2 .*timeouts.server_s"):
                reply.result(0.2)  # as long as the server waits itself, which began later
        assert time.perf_counter() - start < 2
    finally:
        server.close()


def test_a_server_of_one_worker_needs_no_thread() -> None:
    server = InProcessServer(MultiplierServer(1, RULE, deadline_s=0.2))
    assert "qgnn-multiplier-server" not in {thread.name for thread in threading.enumerate()}
    try:
        rule = MultiplierServer(1, RULE)
        for layer in (0, 1):
            there = server.client(0).post_layer(1, layer, 40.0, 2.0).result(1.0)
            assert there == asyncio.run(rule.post_layer(1, layer, 0, 40.0, 2.0))
        assert there != RULE.start()[0], "nothing moved"
        failing = server.client(0).post_ranges(1, {"news/0": [1.0]})  # a fault of the question comes with its answer
        with pytest.raises((IndexError, ValueError)):
            failing.result(1.0)
    finally:
        server.close()


def test_ranges_are_shared_and_survive_a_checkpoint() -> None:
    server = MultiplierServer(2, RULE)

    async def both(epoch: int, first: float, second: float) -> dict:
        answers = await asyncio.gather(server.post_ranges(epoch, 0, {"news/0": [first, first, first, 1]}),
                                       server.post_ranges(epoch, 1, {"news/0": [second, second, second, 1]}))
        assert answers[0] == answers[1]
        return answers[0]

    asyncio.run(both(0, 4.0, 4.0))
    answer = asyncio.run(both(1, 16.0, 16.0))
    assert answer["ranges"]["news/0"][0] == pytest.approx(0.9 * 2 + 0.1 * 4)
    other = MultiplierServer(2, RULE)
    other.load_state(server.state())
    assert other.state() == server.state()
    assert other.ranges == server.ranges
