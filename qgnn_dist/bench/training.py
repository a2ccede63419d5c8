# SPDX-License-Identifier: Apache-2.0
"""`qgnn bench train`: an epoch of one worker, at every width beside stock full-batch training of the same model."""
from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import kernels
from ..comm.pool import LocalPool
from ..config import RunConfig, load_config
from ..data.graph import SPLITS
from ..errors import QgnnError
from ..propagation.multiplier import InProcessServer, MultiplierRule, MultiplierServer
from ..propagation.neighbourhood import Neighbourhood
from ..store.reader import Part, Store
from ..training.worker import TrainWorker
from .beside import KINDS, SETTINGS, check_bench, compare, finish, head
from .footprint import Sizes, available_bytes, measure_apart, misfits, modules_of, need
from .source import dense_features, open_source
from .stock import STOCK_TRAINING, Product, StockTraining, is_there, operator, product_of
from .turns import spread, take_turns

__all__ = ["TRAIN_WIDTHS", "OwnTraining", "stock_training", "training"]

TRAIN_WIDTHS = {"fp32": 32, "int8": 8, "int4": 4, "int2": 2}
"""Name → quant.bits."""
_DEADLINE_S = 24 * 3600.0
_EPOCHS_MEASURED = 2
"""For memory: Adam's state comes with the first."""


def training(source: str, *, out: str | Path, kinds: list[str] | None = None, repeats: int | None = None,
             threads: int = 0, hidden: int = 256, layers: int = 10, depths: Sequence[int] = (10, 64),
             memory: bool = True, pictures: bool = True, keep: str | Path | None = None, overwrite: bool = False,
             on_step: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Time epochs of all systems on one graph in turns: forward, backward and one step of Adam, no evaluation.

    Ours is one worker in this process, as `qgnn train` runs it on a store of one part. Stock is full-batch autograd in
    float: the same widths, dropout, Adam, K, rounds and rule of the multipliers.

    Args:
        depths: K of the memory rows; times are at `layers`. The others as in `bench.inference.inference`.
    Returns: {machine, commit, versions, rows}. A row has ms_median, ms_p10, ms_p90 of an epoch; `stock`, `speedup`,
        `speedup_over_two` as there; `estimate_bytes`; and where memory was measured `memory`, K → `input_bytes` and
        `peak_bytes` (footprint.measure), or `why` there are none. A row that was not timed has ms_median null and
        `why`.
    Raises: InputError: the output exists, a kind is unknown, or the graph does not serve.
    """
    say = on_step or (lambda _: None)
    target, chosen = check_bench("train", out, kinds, pictures=pictures, overwrite=overwrite)
    count = threads or os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="qgnn-bench-") as scratch:
        store = open_source(source, Path(scratch), None if keep is None else Path(keep), say)
        sizes = Sizes(nodes=store.num_nodes, edges=2 * store.num_edges, features=store.num_features, hidden=hidden,
                      classes=store.num_classes)
        names = [*(f"qgnn-{width}" for width in TRAIN_WIDTHS),
                 *(name for name, (stock, _) in STOCK_TRAINING.items() if is_there(stock))]
        needs = {name: need(name, sizes, training=True) for name in names}
        rows = []
        for kind in chosen:
            configs = {depth: _config(kind, hidden, depth) for depth in (layers, *depths)}
            memories = {name: _memories(name, store, configs, depths, count, needs[name], say) if memory else None
                        for name in names}
            left_out = misfits(needs, available_bytes())
            say(f"{kind}: setting up")
            times = _times(store, [n for n in names if n not in left_out], configs[layers], repeats or 10, count,
                           lambda text, kind=kind: say(f"{kind}: {text}"))  # type: ignore[misc]
            # Stock first, as in the table of inference.
            for name in sorted(names, key=lambda name: name in TRAIN_WIDTHS or name.startswith("qgnn-")):
                row = {**head(store, kind, name, count), "bits": TRAIN_WIDTHS.get(name.removeprefix("qgnn-"), 32),
                       "layers": layers, "scope": "training-epoch", "estimate_bytes": needs[name].total,
                       **(spread(times[name]) if name in times else {"ms_median": None, "why": left_out[name]})}
                found = memories[name]
                rows.append(row if found is None else {**row, "memory": found})
    compare(rows)
    return finish("train", target, rows, pictures=pictures)


def _config(kind: str, hidden: int, layers: int) -> RunConfig:
    return load_config(overrides=[*SETTINGS, *KINDS[kind], f"model.hidden={hidden}", f"propagation.layers={layers}"])


class OwnTraining:
    """One worker of a training run in this process, its inputs loaded and coded."""

    def __init__(self, store: Store, config: RunConfig, threads: int) -> None:
        rule = MultiplierRule.of(config, store.num_edges)
        self._server = InProcessServer(MultiplierServer(1, rule, config.timeouts.server_s))
        self._pool = LocalPool(TrainWorker, {"store": str(store.path), "config": config}, 1, server=self._server,
                               threads=threads)
        loaded, = self._pool.call("load", store.fingerprint, timeout_s=_DEADLINE_S)
        self._pool.call("setup", config.model.feature_norm, loaded["statistics"].negative > 0,
                        loaded["nodes"]["train"], timeout_s=_DEADLINE_S)
        self._epoch = 0

    def epoch(self) -> float:
        """One epoch, the first one after a calibration; returns the loss."""
        return float(self._train(evaluate=False)["loss"])

    def evaluated_epoch(self) -> dict[str, Any]:
        """One epoch and an evaluation; what TrainWorker.train_epoch returns."""
        return self._train(evaluate=True)

    def _train(self, *, evaluate: bool) -> dict[str, Any]:
        if not self._epoch:
            self._pool.call("calibrate", timeout_s=_DEADLINE_S)
        self._epoch += 1
        result: dict[str, Any] = self._pool.call("train_epoch", self._epoch, evaluate, timeout_s=_DEADLINE_S)[0]
        return result

    def weights(self) -> dict[str, np.ndarray]:
        """The network as it is now: weight1, bias1, weight2, bias2."""
        state = self._pool.call_one(0, "state", timeout_s=_DEADLINE_S)
        return {name: state[f"network.{name}"] for name in ("weight1", "bias1", "weight2", "bias2")}

    def close(self) -> None:
        """End the worker and its server."""
        self._pool.close()
        self._server.close()


def stock_training(system: str, product: Product, store: Store, part: Part, config: RunConfig,
                   features: np.ndarray) -> StockTraining:
    """Stock's training of the same network; weights from a uniform distribution, as ours begin."""
    assert part.labels is not None
    assert part.split is not None
    labels = part.labels.astype(np.int64)
    rows = np.flatnonzero((part.split == SPLITS["train"]) & (labels >= 0))
    rng, hidden = np.random.default_rng(config.seed), config.model.hidden
    weights = {name: rng.uniform(-fan_in**-0.5, fan_in**-0.5, shape).astype(np.float32) for name, shape, fan_in in (
        ("weight1", (store.num_features, hidden), store.num_features), ("bias1", (hidden,), store.num_features),
        ("weight2", (hidden, store.num_classes), hidden), ("bias2", (store.num_classes,), hidden))}
    return StockTraining(product, config, store.num_edges, features, labels, rows, weights,
                         symmetric=STOCK_TRAINING[system][1])


def _at(config: RunConfig, width: str) -> RunConfig:
    """The same settings at one of TRAIN_WIDTHS."""
    values = config.to_dict()
    values["quant"] = {"bits": TRAIN_WIDTHS[width]}
    return load_config(values=values)


def _times(store: Store, names: Sequence[str], config: RunConfig, repeats: int, threads: int,
           say: Callable[[str], None]) -> dict[str, list[float]]:
    """System → ms of its epochs."""
    own = {name: OwnTraining(store, _at(config, name.removeprefix("qgnn-")), threads) for name in names
           if name.startswith("qgnn-")}
    try:
        torch.set_num_threads(threads)
        kernels.set_threads(threads)
        part = store.part(0)
        runs: dict[str, Callable[[], float]] = {name: system.epoch for name, system in own.items()}
        stock = [name for name in names if name not in own]
        if stock:
            features, matrix = dense_features(part), operator(Neighbourhood.of(part))
            products = {base: product_of(base, matrix) for base in {STOCK_TRAINING[name][0] for name in stock}}
            del matrix
            runs |= {name: stock_training(name, products[STOCK_TRAINING[name][0]], store, part, config, features).epoch
                     for name in stock}
        return take_turns(runs, repeats, say)[0]
    finally:
        for system in own.values():
            system.close()


def _memories(name: str, store: Store, configs: Mapping[int, RunConfig], depths: Sequence[int], threads: int,
              mine: Any, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """K → what a system took, in a process of its own."""
    found: dict[str, dict[str, Any]] = {}
    for depth in depths:
        reasons = misfits({name: mine}, available_bytes())
        if reasons:
            found[str(depth)] = {"why": reasons[name]}
            continue
        say(f"memory of {name} at K = {depth}")
        prepare = _prepare_own if name.startswith("qgnn-") else _prepare_stock
        try:
            found[str(depth)] = measure_apart(prepare, name, str(store.path), configs[depth], threads,
                                              modules=modules_of(name))
        except QgnnError as error:
            found[str(depth)] = {"why": error.message}
    return found


def _prepare_own(name: str, store: str, config: RunConfig, threads: int) -> Callable[[], None]:
    system = OwnTraining(Store.open(store), _at(config, name.removeprefix("qgnn-")), threads)

    def run() -> None:
        for _ in range(_EPOCHS_MEASURED):
            system.epoch()
        system.close()

    return run


def _prepare_stock(name: str, store: str, config: RunConfig, threads: int) -> Callable[[], None]:
    torch.set_num_threads(threads)
    opened = Store.open(store)
    part = opened.part(0)
    product = product_of(STOCK_TRAINING[name][0], operator(Neighbourhood.of(part)))
    system = stock_training(name, product, opened, part, config, dense_features(part))

    def run() -> None:
        for _ in range(_EPOCHS_MEASURED):
            system.epoch()

    return run
