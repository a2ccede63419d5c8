# SPDX-License-Identifier: Apache-2.0
"""`qgnn bench order`: what the order of rows gives each kernel that gathers neighbours, the stock one too."""
from __future__ import annotations

import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import kernels
from ..errors import InputError
from ..partitioning.order import ORDERS, mean_log2_distance
from ..propagation.neighbourhood import Neighbourhood
from ..quant.packed import row_bytes
from ..store.reader import Store
from .folder import table_folder

__all__ = ["order"]

BITS, STEP = 2, 0.25
"""Of the layer that is timed."""


def order(source: str, *, out: str | Path, orders: Sequence[str] | None = None, columns: int = 40, repeats: int = 10,
          threads: int = 0, overwrite: bool = False, on_step: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Time the INT2 layer, the float sum and torch's CSR product on one graph in each order of its rows, in turns.

    Args:
        source: a graph source, of which the edges are used; as one part. orders: of ORDERS, default all; `source` is
            always there. columns: C of the states. threads: of every kernel; 0: all cores.
    Returns: {machine, commit, versions, rows}; a row has order, system, ms_median, ms_min, `speedup` (the median over
        turns of the time in the source's order over that in this one), `distance` (mean log2 of how far neighbours lie
        apart) and `order_s`, the seconds that ordering took.
    Raises: InputError: the output exists, or an order is unknown.
    """
    from ..cluster import api
    from ..data.load import load_graph
    from ..files.write import write_atomically
    from .machine import envelope

    say = on_step or (lambda _: None)
    unknown = [name for name in orders or () if name not in ORDERS]
    if unknown:
        raise InputError(f"--order {unknown[0]}: expected {', '.join(ORDERS)}")
    target = table_folder(out, "order", overwrite=overwrite)
    graph = load_graph(source, progress=say)
    bare = dataclasses.replace(graph, features=None, labels=None, num_classes=0, split=None, node_ids=None,
                               class_names=None)
    count = threads or os.cpu_count() or 1
    rows: list[dict[str, Any]] = []
    states = _States(graph.num_nodes, columns)
    with tempfile.TemporaryDirectory(prefix="qgnn-bench-") as scratch:
        systems: dict[str, dict[str, Callable[[], Any]]] = {}
        for name in dict.fromkeys(["source", *(orders or ORDERS)]):
            say(f"a store in the order {name}")
            made = api.partition(bare, parts=1, out=Path(scratch) / name, order=name)
            part = Store.open(Path(scratch) / name).part(0)
            systems[name] = _systems(Neighbourhood.of(part), states, count)
            rows += [{"system": system, "shape": made["name"], "order": name, "columns": columns, "threads": count,
                      "nodes": made["num_nodes"], "edges": made["num_edges"], "order_s": made["seconds"]["order"],
                      "distance": mean_log2_distance(part.indptr, part.indices, np.arange(part.num_local))}
                     for system in systems[name]]
        times = _turns(systems, repeats, say)
    for row in rows:
        own, first = times[row["order"], row["system"]], times["source", row["system"]]
        row |= {"ms_median": statistics.median(own), "ms_min": min(own), "repeats": repeats,
                "speedup": statistics.median(a / b for a, b in zip(first, own))}
    result = {"schema": 1, "bench": "order", **envelope(rows)}
    target.mkdir(parents=True, exist_ok=True)
    write_atomically(target / "table.json", (json.dumps(result, indent=2) + "\n").encode())
    return {**result, "files": [str(target / "table.json")]}


def _turns(systems: dict[str, dict[str, Callable[[], Any]]], repeats: int, say: Callable[[str], None]
           ) -> dict[tuple[str, str], list[float]]:
    """Milliseconds by (order, system). A system runs in all orders one after the other: they share the noise."""
    times: dict[tuple[str, str], list[float]] = {}
    for turn in range(repeats + 1):  # the first one warms up
        say(f"turn {turn} of {repeats}")
        for system, first in systems["source"].items():
            first()  # or the first order would find the caches full of another system's arrays
            for name, runs in systems.items():
                start = time.perf_counter()
                runs[system]()
                if turn:
                    times.setdefault((name, system), []).append(1000 * (time.perf_counter() - start))
    return times


class _States:
    """Drawn states and codes of n nodes, the same memory in every order: where it lies can matter as much."""

    def __init__(self, n: int, columns: int) -> None:
        rng = np.random.default_rng(0)
        self.x = rng.normal(size=(n, columns)).astype(np.float32)
        self.h, self.sums = self.x.copy(), np.zeros_like(self.x)
        stride = -(-columns // 8) * 8
        self.r, self.believed = np.zeros((n, stride), np.uint16), np.zeros((n, stride), np.uint8)
        self.residual = np.zeros((n, stride), np.int8)
        self.payload, self.following = (rng.integers(0, 256, (n, row_bytes(columns, BITS)), np.uint8) for _ in range(2))


def _systems(graph: Neighbourhood, states: _States, threads: int) -> dict[str, Callable[[], Any]]:
    """What is timed: the layer that prediction runs, the sum that float messages and gradients take, and torch's."""
    import torch

    from .stock import STOCK

    torch.set_num_threads(threads)
    kernels.set_threads(threads)
    n, d, s = graph.num_local, graph.inv_sqrt_degree, states
    a, b, c = 0.05, 0.9, 0.1
    weights = np.repeat(d, np.diff(graph.indptr)) * d[graph.indices]
    product = STOCK["torch-csr"][1](graph.indptr, graph.indices.astype(np.int64), weights)
    features = torch.from_numpy(s.x)
    return {
        "qgnn-int2-layer": lambda: kernels.fixed_layer(
            graph.indptr, graph.indices, s.payload, BITS, STEP, d, s.residual, STEP, STEP, 0.0, s.r, None, None, s.h,
            None, s.h, True, 0.0, a, b, c, s.believed, STEP, s.following, None, None, 0, n),
        "qgnn-float-sum": lambda: kernels.aggregate_float(graph.indptr, graph.indices, s.x, 0, n, s.sums),
        "torch-csr": lambda: product(features)}
