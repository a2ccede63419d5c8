# SPDX-License-Identifier: Apache-2.0
"""A worker that computes three times as long as the others is named, now and then."""
from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from qgnn_dist.comm.pool import LocalPool
from qgnn_dist.propagation.multiplier import InProcessServer, MultiplierRule, MultiplierServer
from qgnn_dist.training.loop import run_training
from qgnn_dist.training.run_folder import RunFolder
from qgnn_dist.training.slow import EVERY, SlowWorkers, WorkerShare
from qgnn_dist.training.worker import TrainWorker
from tests.helpers import make_store, settings, small_graph

PLACES = [WorkerShare("a", 100, 1000), WorkerShare("b", 110, 900), WorkerShare("c", 90, 1100)]


def test_named_after_three_epochs_and_then_now_and_then() -> None:
    slow = SlowWorkers(PLACES)
    assert [slow.look(epoch, [0.1, 0.31, 0.1]) for epoch in (1, 2)] == [[], []]
    text, = slow.look(3, [0.1, 0.4, 0.11])
    assert text.startswith("rank 1 on host b is slow: it computes 0.31 s an epoch (epoch 3), the median of the others "
                           "is 0.1 s; it has 110 rows and 900 edges, they 95 and 1,050; look at what else runs")
    assert not any(slow.look(epoch, [0.1, 0.31, 0.1]) for epoch in range(4, 3 + EVERY))
    assert len(slow.look(3 + EVERY, [0.1, 0.31, 0.1])) == 1


@pytest.mark.parametrize("epochs", [
    [[0.1, 0.9, 0.1], [0.1, 0.9, 0.1], [0.1, 0.29, 0.1], [0.1, 0.9, 0.1]],  # once it kept up
    [[0.001, 0.009, 0.001]] * 4,                                         # of milliseconds nobody is slow
    [[0.1, 0.2, 0.2]] * 4,
])
def test_not_named(epochs: list[list[float]]) -> None:
    slow = SlowWorkers(PLACES)
    assert not any(slow.look(epoch, seconds) for epoch, seconds in enumerate(epochs, 1))


def test_one_worker_is_never_slow_and_a_large_part_is_said_to_be_one() -> None:
    assert not any(SlowWorkers(PLACES[:1]).look(epoch, [5.0]) for epoch in range(9))
    slow = SlowWorkers([WorkerShare("a", 100, 1000), WorkerShare("b", 100, 4000)])
    assert not slow.look(1, [0.1, 0.5]) + slow.look(2, [0.1, 0.5])
    assert slow.look(3, [0.1, 0.5])[0].endswith("partition the graph again")


class _Slowed(TrainWorker):
    """Rank 1 of the workers is on a host that something else keeps busy."""

    def _step(self, epoch: int) -> Any:
        if self._context.rank == 1:
            time.sleep(0.3)
        return super()._step(epoch)


def test_a_slowed_worker_is_named_in_log_metrics_and_summary(tmp_path: Path,
                                                             caplog: pytest.LogCaptureFixture) -> None:
    store = make_store(small_graph(signed=True), tmp_path / "s", 3)
    config = settings("train.epochs=5")
    server = InProcessServer(MultiplierServer(3, MultiplierRule.of(config, store.num_edges), 60.0))
    pool = LocalPool(_Slowed, {"store": str(store.path), "config": config}, 3, server=server)
    try:
        with caplog.at_level(logging.WARNING):
            summary = run_training(pool, server.call, store, config, RunFolder(tmp_path / "run"))
    finally:
        pool.close()
        server.close()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [len(line.get("slow_workers", [])) for line in lines] == [0, 0, 1, 0, 0]
    text, = lines[2]["slow_workers"]
    assert text.startswith("rank 1 on host ")
    assert f"it has {store.part(1).num_local} rows and {len(store.part(1).indices):,} edges" in text
    assert [record.message for record in caplog.records] == [text]
    assert summary["warnings"] == [text]
    for line in lines:  # the others waited for it, and did not compute longer for that
        assert line["compute_s"][1] >= 0.3
        assert max(line["compute_s"][0], line["compute_s"][2]) < 0.2
