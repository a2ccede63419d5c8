# SPDX-License-Identifier: Apache-2.0
"""Refuse a run that its hosts cannot hold, with the numbers, before a worker allocates anything."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..comm.pool import WorkerPool
from ..config import RunConfig
from ..errors import InputError
from ..memory import available_bytes, byte_size
from ..model.packed import ModelInfo
from ..store.reader import Store
from .memory import Need, prediction_need, training_need
from .shapes import GraphSize, PartSize, parts_of

__all__ = ["check_prediction", "check_training", "room"]


def room(host: str) -> dict[str, Any]:
    """What a worker says of its host: its name, and the bytes that its process may still take."""
    return {"host": host, "available": available_bytes()}


def check_training(pool: WorkerPool, store: Store, config: RunConfig) -> None:
    """Ask every worker (`room`) what its host has left, and compare.

    Raises: InputError: names the host, its items, and what to change.
    """
    size = GraphSize.of(store)
    _check(pool, parts_of(store), lambda part: training_need(part, size, config), config.timeouts.start_s, "training")


def check_prediction(pool: WorkerPool, store: Store, info: ModelInfo, *, scores: bool, timeout_s: float) -> None:
    """`check_training` of a prediction."""
    size = GraphSize.of(store)
    _check(pool, parts_of(store), lambda part: prediction_need(part, size, info, scores=scores), timeout_s,
           "prediction")


def _check(pool: WorkerPool, parts: Sequence[PartSize], need: Callable[[PartSize], Need], timeout_s: float,
           what: str) -> None:
    """Anonymous bytes of all workers of a host against the least that one of them sees there.

    The mapped store is left out: the system drops its pages rather than end a process.
    """
    rooms = pool.call("room", timeout_s=timeout_s)
    for host in dict.fromkeys(r["host"] for r in rooms):
        ranks = [rank for rank, r in enumerate(rooms) if r["host"] == host]
        needs = [need(parts[rank]) for rank in ranks]
        wanted, left = sum(n.anonymous for n in needs), min(rooms[rank]["available"] for rank in ranks)
        if wanted <= left:
            continue
        items: dict[str, int] = {}
        for one in needs:
            for name, count in one.items.items():
                items[name] = items.get(name, 0) + count
        listed = ", ".join(f"{name} {byte_size(count)}" for name, count in
                           sorted(items.items(), key=lambda item: -item[1]))
        workers = f"{len(ranks)} workers" if len(ranks) > 1 else "1 worker"
        raise InputError(
            f"{what} does not fit: {workers} here need about {byte_size(wanted)} ({listed}; at their peak, "
            f"{needs[0].phase}), {byte_size(left)} are available; use more parts on more hosts (`qgnn plan STORE` says "
            "how many), or cluster.memory_check=off to try all the same", host=host)
