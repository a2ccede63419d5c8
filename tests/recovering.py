# SPDX-License-Identifier: Apache-2.0
"""What must be the same after a fault as without one."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qgnn_dist.comm.pool import LocalPool
from qgnn_dist.config import RunConfig
from qgnn_dist.propagation.multiplier import InProcessServer, MultiplierRule, MultiplierServer
from qgnn_dist.store.reader import Store
from qgnn_dist.training.loop import run_training
from qgnn_dist.training.run_folder import RunFolder
from qgnn_dist.training.worker import TrainWorker

TIMES = ("train_s", "compute_s", "evaluation_s", "epoch_s", "slow_workers")


def undisturbed(store: Store, run: Path, own: RunConfig) -> Path:
    """Train on workers in this process, without a fault."""
    server = InProcessServer(MultiplierServer(store.num_parts, MultiplierRule.of(own, store.num_edges), 60.0))
    pool = LocalPool(TrainWorker, {"store": str(store.path), "config": own}, store.num_parts, server=server)
    try:
        run_training(pool, server.call, store, own, RunFolder(run))
    finally:
        pool.close()
        server.close()
    return run


def same_end(run: Path, whole: Path) -> None:
    """Every epoch's line but its times, every tensor, the progress and the server's state, bit by bit."""
    assert records(run) == records(whole)
    found, wanted = RunFolder(run).load_checkpoint(), RunFolder(whole).load_checkpoint()
    assert found is not None
    assert wanted is not None
    assert set(found.tensors) == set(wanted.tensors)
    for name, value in wanted.tensors.items():
        np.testing.assert_array_equal(found.tensors[name], value, err_msg=name)
    assert (found.progress, found.server) == (wanted.progress, wanted.server)


def records(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without its times."""
    return [{key: value for key, value in record.items() if key not in TIMES}
            for record in RunFolder(run).read_metrics()]
