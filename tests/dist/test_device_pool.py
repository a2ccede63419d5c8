# SPDX-License-Identifier: Apache-2.0
"""`cluster.device` on Ray: who gets a GPU, and the one sentence where there is none. Ray believes in two GPUs here."""
from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray import cloudpickle

from qgnn_dist.cluster import api
from qgnn_dist.cluster.pool import RayPool
from qgnn_dist.comm.pool import WorkerContext
from qgnn_dist.config import ClusterConfig, TimeoutsConfig
from qgnn_dist.errors import InputError
from tests.helpers import make_store, small_graph

cloudpickle.register_pickle_by_value(sys.modules[__name__])
TIMES = TimeoutsConfig(start_s=60.0, rendezvous_s=30.0, exchange_s=20.0, server_s=10.0)


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False,
             logging_level="ERROR", object_store_memory=100_000_000)
    yield
    ray.shutdown()


class Probe:
    def __init__(self, context: WorkerContext) -> None:
        self.context = context

    def where(self) -> tuple[str | None, list[int]]:
        import ray

        return self.context.device, [int(i) for i in ray.get_gpu_ids()]


def _places(size: int, device: str) -> list[Any]:
    cluster = ClusterConfig(cpus_per_worker=0.5, device=device)
    with RayPool(Probe, {}, size, cluster=cluster, timeouts=TIMES) as pool:
        return pool.call("where", timeout_s=30)


def test_each_worker_gets_a_gpu_of_its_own() -> None:
    found = _places(2, "cuda")
    assert [name for name, _ in found] == ["cuda", "cuda"]
    assert sorted(ids for _, ids in found) == [[0], [1]]


def test_too_few_gpus_are_refused_at_once_and_auto_does_without() -> None:
    with pytest.raises(InputError) as caught:
        _places(3, "cuda")
    text = str(caught.value)
    assert "cluster.device=cuda: 3 workers need a GPU each, and Ray knows 2" in text
    assert "4 CPU, 2 GPU" in text
    assert "\n" not in text
    assert _places(3, "auto") == [(None, [])] * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="this host has a GPU")
def test_auto_does_without_gpus_that_torch_cannot_use() -> None:
    assert [name for name, _ in _places(2, "auto")] == [None, None]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this host has a GPU")
def test_every_workers_host_refuses_where_torch_sees_none(tmp_path: Path) -> None:
    store = make_store(small_graph(), tmp_path / "s", 2)
    words = ["cluster.device=cuda", "cluster.cpus_per_worker=0.5", "train.epochs=1"]
    with pytest.raises(InputError) as caught:
        api.train(store.path, out=tmp_path / "run", overrides=words)
    text = str(caught.value)
    assert "ranks 0, 1: cluster.device=cuda: torch " in text
    assert text.startswith("host ")
    assert "\n" not in text
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="quant.method=qlr trains on the CPU only"):
        api.train(store.path, out=tmp_path / "run", overrides=[*words, "quant.method=qlr"])
