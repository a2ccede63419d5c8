# SPDX-License-Identifier: Apache-2.0
"""What other ways to train on the same hosts would take, in memory and bytes: modelled, never run here."""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..config import RunConfig
from .cut import Cut
from .memory import BASE_BYTES
from .seconds import LINK_USE, Hosts

__all__ = ["FANOUTS", "SIGN_HOPS", "sampled", "sign"]

SIGN_HOPS = 3
"""Hops of SIGN (Frasca et al., 2020) on large graphs, as its authors use it."""
FANOUTS, BATCH = (15, 10, 5), 1024
"""Of neighbour sampling (Hamilton et al., 2017), as in common examples of three layers."""


def sign(cut: Cut, parts: int, config: RunConfig, hosts: Hosts) -> dict[str, Any]:
    """Precompute Â^k·X for k = 0 … SIGN_HOPS, then train a perceptron on rows: hops + 1 copies of the features.

    The bytes are sent once: every hop sends the boundary rows' features as float32. An epoch then sends gradients of
    the weights alone, SIGN_HOPS + 1 times as many as ours in the first layer.
    """
    size = cut.size
    rows = math.ceil(size.nodes / parts)
    part = max(cut.parts(parts), key=lambda p: p.rows)
    copies = 4 * (SIGN_HOPS + 1) * rows * size.features
    halo = 4 * part.halo * size.features
    once = 4 * SIGN_HOPS * cut.sends(parts) * size.features
    weights = (SIGN_HOPS + 1) * size.features * config.model.hidden + config.model.hidden * size.classes
    return {
        "name": f"SIGN, {SIGN_HOPS} hops", "worker_bytes": BASE_BYTES + copies + halo + 4 * part.edges,
        "once_bytes": once, "once_s": _over_link(once / parts, hosts), "epoch_bytes": 8 * (parts - 1) * weights,
        "says": "no message in an epoch; precomputed features must fit, and a new graph means precomputing again; "
                "another model: hops are fixed and not smoothed to depth K"}


def sampled(cut: Cut, parts: int, config: RunConfig, hosts: Hosts,
            fanouts: Sequence[int] = FANOUTS) -> dict[str, Any]:
    """Mini-batches of BATCH training nodes with sampled neighbours: features of remote nodes travel in every epoch.

    Neighbours are taken to be drawn by chance from all nodes, each fetched once a batch.
    """
    size = cut.size
    degree = 2 * size.edges / max(size.nodes, 1)
    drawn, frontier = float(BATCH), float(BATCH)
    for fanout in fanouts:
        frontier *= min(fanout, degree)
        drawn += frontier
    distinct = size.nodes * -math.expm1(-drawn / max(size.nodes, 1))
    batches = math.ceil(size.train / BATCH)
    remote = max(distinct - BATCH, 0.0) * cut.fraction(parts)
    weights = size.features * config.model.hidden + config.model.hidden * size.classes
    moved = 4 * batches * remote * size.features + 8 * (parts - 1) * math.ceil(batches / parts) * weights
    rows = math.ceil(size.nodes / parts)
    held = 4 * rows * size.features + 12 * cut.size.edges // parts * 2
    batch = 4 * distinct * (size.features + 3 * config.model.hidden) * 2
    return {
        "name": "sampled mini-batches, fanouts " + "-".join(map(str, fanouts)),
        "worker_bytes": int(BASE_BYTES + held + batch), "once_bytes": 0, "once_s": 0.0, "epoch_bytes": int(moved),
        "epoch_link_s": _over_link(moved / parts, hosts), "batches": batches, "nodes_a_batch": int(distinct),
        "says": f"three layers, not K = {config.propagation.layers}; predicting all nodes takes another way, or "
                f"{size.nodes / max(size.train, 1):.0f} times an epoch's bytes"}


def _over_link(worker_bytes: float, hosts: Hosts) -> float:
    """Seconds that one worker's bytes take, all workers at once."""
    if hosts.count == 1:
        return 0.0
    return worker_bytes * hosts.workers / (hosts.link_gbps * 1e9 / 8 * LINK_USE)
