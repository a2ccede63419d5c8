# SPDX-License-Identifier: Apache-2.0
"""`qgnn bench inference`: features to classes, ours at every width beside the stock float path, in one run."""
from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .. import kernels
from ..comm.exchange import Exchange
from ..errors import InputError
from ..model.forward import PackedForward, model_reader
from ..model.packed import PackedModel
from ..propagation.neighbourhood import Neighbourhood
from ..quant.packed import row_bytes
from ..store.reader import Part, Store

__all__ = ["KINDS", "WIDTHS", "inference"]

KINDS = {"appnp": ("propagation.kind=appnp",), "smp-merged": ("propagation.kind=smp", "propagation.rounds=merged"),
         "smp-two": ("propagation.kind=smp", "propagation.rounds=two")}
"""What is propagated; `smp` with a threshold that keeps the multiplier at work."""
WIDTHS = {"fp32": ("quant.bits=32",), "int8": ("quant.bits=8",), "int4": ("quant.bits=4",), "int2": ("quant.bits=2",),
          "int2-m1": ("quant.bits=2", "quant.messages=1")}
_COMMON = ("train.epochs=2", "train.checkpoint_every=1000000", "propagation.alpha=0.01", "model.feature_norm=none")


def inference(source: str, *, out: str | Path, kinds: list[str] | None = None, repeats: int = 10, threads: int = 0,
              hidden: int = 256, layers: int = 10, overwrite: bool = False,
              on_step: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Time all systems on one graph, one after the other in turns, features in memory, until the classes are there.

    Args:
        source: a graph source with dense features, e.g. `synthetic:arxiv`, or a store of one part.
        kinds: of KINDS, default all. threads: of every system; 0: all cores.
    Returns: {machine, commit, versions, rows}; a row has ms_median, ms_p10, ms_p90, `stock` (the fastest stock system
        of its kind), `speedup` over it, for merged rounds `speedup_over_two` (stock at the published two rounds), bytes
        of the model and of the messages a node, and `agreement`, the share of classes that are the first stock
        system's (of float rows; the others are models of their own).
    Raises: InputError: the output exists, a kind is unknown, or the graph's features are sparse.
    """
    from ..cluster import api
    from ..training.checkpoint import write_atomically
    from .machine import envelope
    from .stock import STOCK, StockForward

    say = on_step or (lambda _: None)
    chosen = list(KINDS) if kinds is None else kinds
    unknown = [kind for kind in chosen if kind not in KINDS]
    if unknown:
        raise InputError(f"--kind {unknown[0]}: expected {', '.join(KINDS)}")
    target = Path(out)
    if (target / "table.json").exists() and not overwrite:
        raise InputError("output exists; add --overwrite to replace it", file=str(target))
    count = threads or os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="qgnn-bench-") as scratch:
        place = Path(source)
        if not (place / "manifest.json").exists():
            say(f"writing a store of {source}")
            place = Path(scratch) / "store"
            api.partition(source, parts=1, out=place)
        store = Store.open(place)
        if store.num_parts != 1:
            raise InputError(f"the store has {store.num_parts} parts; inference is timed on one", file=str(place))
        part = store.part(0)
        if part.feature_kind != "dense":
            raise InputError("sparse features are not timed yet; expected dense ones", file=str(place))
        rows: list[dict[str, Any]] = []
        for kind in chosen:
            models = {}
            for width, words in WIDTHS.items():
                say(f"{kind}: a model of {width}")
                run = Path(scratch) / f"{kind}-{width}"
                api.train(place, out=run, overrides=[*_COMMON, *KINDS[kind], *words, f"model.hidden={hidden}",
                                                     f"propagation.layers={layers}", f"cluster.threads={count}"])
                api.export(run, out=run / "model")
                models[width] = PackedModel.load(run / "model")
            rows += _time_kind(kind, store, part, models, [s for s in STOCK if StockForward.is_there(s)], repeats,
                               count, say)
    _compare(rows)
    result = {"schema": 1, "bench": "inference", **envelope(rows)}
    target.mkdir(parents=True, exist_ok=True)
    write_atomically(target / "table.json", (json.dumps(result, indent=2) + "\n").encode())
    return {**result, "files": [str(target / "table.json")]}


class _InMemory:
    """A part's features, read once: what reading blocks asks a part for."""

    feature_kind = "dense"

    def __init__(self, part: Part) -> None:
        self.x = np.array(part.features_dense(0, part.num_local), order="C")

    def features_dense(self, begin: int, end: int) -> np.ndarray:
        return self.x[begin:end]


def _time_kind(kind: str, store: Store, part: Part, models: dict[str, PackedModel], stock: list[str], repeats: int,
               threads: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    import torch

    from .stock import StockForward

    torch.set_num_threads(threads)
    kernels.set_threads(threads)
    graph, memory = Neighbourhood.of(part), _InMemory(part)
    systems: dict[str, Callable[[], np.ndarray]] = {}
    for name in stock:
        forward = StockForward(name, graph, models["fp32"], memory.x)
        systems[name] = lambda forward=forward: forward.run()[0]  # type: ignore[misc]
    for width, model in models.items():
        systems[f"qgnn-{width}"] = lambda model=model: _own(model, graph, part, memory)  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in systems}
    classes = {}
    for turn in range(repeats + 1):  # the first one warms up
        say(f"{kind}: turn {turn} of {repeats}")
        for name, run in systems.items():
            start = time.perf_counter()
            classes[name] = run()
            if turn:
                times[name].append(1000 * (time.perf_counter() - start))
    float_classes = classes[stock[0]]
    return [_row(kind, name, store, times[name], threads, models.get(name.removeprefix("qgnn-")),
                 float((classes[name] == float_classes).mean())) for name in systems]


def _own(model: PackedModel, graph: Neighbourhood, part: Part, memory: _InMemory) -> np.ndarray:
    exchange = Exchange(part.peers, part.num_local, part.num_halo, None, 0, 60.0)
    reader = model_reader(memory, model)  # type: ignore[arg-type]
    scores = PackedForward(graph, exchange, None, "evaluation").run(model, reader)
    classes, confidence = np.empty(len(scores), np.int32), np.empty(len(scores), np.float32)
    kernels.softmax(scores, classes, confidence, None)
    return classes


def _row(kind: str, system: str, store: Store, times: list[float], threads: int, model: PackedModel | None,
         agreement: float) -> dict[str, Any]:
    ours = system.startswith("qgnn-")
    p10, p90 = (float(np.quantile(times, q)) for q in (0.1, 0.9))
    row = {"system": system, "shape": store.name, "kind": kind, "rounds": kind.rpartition("-")[2] if "-" in kind else
           "merged", "coding": "innovation" if ours else None, "bits": model.info.bits["messages"] if model else 32,
           "threads": threads, "scope": "features-to-classes", "ms_median": statistics.median(times), "ms_p10": p10,
           "ms_p90": p90, "repeats": len(times), "nodes": store.num_nodes, "edges": store.num_edges,
           "agreement": agreement if system == "qgnn-fp32" or not ours else None}
    if model is not None:
        row |= {"model_bytes": len(model.to_bytes()), "message_bytes_per_node": sum(
            step > 0 for step in model.info.message_steps) * row_bytes(store.num_classes, model.info.bits["messages"])}
    return row


def _compare(rows: list[dict[str, Any]]) -> None:
    """Each row against the fastest stock system of its kind, and against that of the published two rounds."""
    best = {kind: min((r for r in rows if r["kind"] == kind and not r["system"].startswith("qgnn-")),
                      key=lambda r: r["ms_median"]) for kind in dict.fromkeys(r["kind"] for r in rows)}
    for row in rows:
        stock = best[row["kind"]]
        row |= {"stock": stock["system"], "speedup": stock["ms_median"] / row["ms_median"]}
        if row["kind"] == "smp-merged" and "smp-two" in best:
            row["speedup_over_two"] = best["smp-two"]["ms_median"] / row["ms_median"]
