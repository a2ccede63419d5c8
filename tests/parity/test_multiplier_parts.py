# SPDX-License-Identifier: Apache-2.0
"""The multiplier's trajectory does not depend on the parts, nor on when the server answers."""
from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from qgnn_dist.propagation.multiplier import InProcessServer, MultiplierRule, MultiplierServer
from tests.helpers import make_store, settings, small_graph, train_pool


class LateServer(MultiplierServer):
    """Answers whenever it likes."""

    async def post_layer(self, epoch: int, layer: int, rank: int, dot: float, energy: float) -> float:
        await asyncio.sleep(0.02 * random.random())
        answer = await super().post_layer(epoch, layer, rank, dot, energy)
        await asyncio.sleep(0.02 * random.random())
        return answer


@pytest.mark.parametrize("rounds", ["merged", "two"])
@pytest.mark.parametrize("bits", [2, 32])
def test_trajectory_from_zero_to_the_clamp(tmp_path: Path, rounds: str, bits: int) -> None:
    graph = small_graph()
    config = settings(f"quant.bits={bits}", f"propagation.rounds={rounds}", "propagation.layers=8",
                      "propagation.alpha=0.001", "propagation.eta_lambda=10", "model.feature_norm=l2")
    rule = MultiplierRule.of(config, 1)
    want: list[list[float]] = []
    for parts in (1, 2, 4):
        store = make_store(graph, tmp_path / str(parts), parts)
        server = InProcessServer((MultiplierServer if parts == 1 else LateServer)(parts, rule))
        try:
            with train_pool(store, config, server) as pool:
                got = [pool.call("train_epoch", epoch, False, timeout_s=60)[0] for epoch in (1, 2, 3)]
        finally:
            server.close()
        trajectories = [r["multipliers"] for r in got]
        if parts == 1:
            want = trajectories
            assert all(t[0] == 0.0 for t in want)
            assert any(rule.lambda_min in t for t in want)
            assert any(rule.lambda_min < value < 0 for t in want for value in t)
            assert sum(r["clamps"] for r in got) > 0
        for mine, one in zip(trajectories, want):
            assert len(mine) == 8
            assert mine == pytest.approx(one, rel=1e-4, abs=1e-6)
