# SPDX-License-Identifier: Apache-2.0
"""`qgnn bench exchange`: training epochs over links of a given rate, at every width of messages and of gradients."""
from __future__ import annotations

import itertools
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from ..comm.trace import COMPUTE, PACK, WIRE, Span
from ..comm.wire import HEADER_BYTES
from ..config import RunConfig, load_config
from ..errors import ConfigError, InputError
from ..quant.levels import NUM_LEVELS
from ..quant.packed import row_bytes
from ..store.reader import Store
from ..training.metrics import figures
from .beside import SETTINGS
from .exchange_table import finish
from .folder import table_folder
from .netns import NetnsCluster, bits_per_second, cannot, congestion_control
from .ranks import Hosts, Loopback, Ranks, Training

__all__ = ["CELLS", "exchange", "formula", "on_the_wire", "parse_cell"]

Cell = tuple[int, int]
"""Bits of the messages forward, and of the gradients."""
CELLS: tuple[Cell, ...] = tuple(itertools.product((32, 8, 4, 2, 1), (32, 8, 4, 2)))
FLOAT: Cell = (32, 32)
UNSHAPED = "none"
KINDS = ("forward", "backward", "evaluation", "control")


def exchange(source: str, *, out: str | Path, workers: Sequence[int] = (4,), rates: Sequence[str] = ("1gbit",),
             methods: Sequence[str] = ("random",), cells: Sequence[Cell] | None = None, repeats: int = 5,
             time_s: float = 0.0, evaluate: bool = False, hidden: int = 256, layers: int = 10, threads: int = 1,
             pictures: bool = True, overwrite: bool = False, on_step: Callable[[str], None] | None = None
             ) -> dict[str, Any]:
    """Train with every cell on the same links in turns: an epoch of each, again and again.

    Each worker is a process in a network namespace, with one link of the given rate in each direction to a switch; what
    they run is the TrainWorker of `qgnn train`, merged rounds of smp.

    Args:
        source: what `partition` takes, the bare name of a synthetic shape, or a store, whose parts and method hold
            then. workers, methods: of the stores to make. rates: of a link, as `tc` writes it, or `none`.
        cells: default all of CELLS; float both ways is always there. repeats: timed epochs of each, after one that
            warms up. time_s: also train every cell anew for so many seconds, with an evaluation an epoch, and tell the
            test accuracy at the best validation epoch. evaluate: also time epochs with an evaluation.
        threads: of each worker; the cores are shared by all.
    Returns: {machine, commit, versions, rows}, see docs/exchange.md; a row that could not be measured has `why`.
    Raises: InputError: the output exists, an unknown rate, method or shape.
    """
    say = on_step or (lambda _: None)
    target = table_folder(out, "exchange", overwrite=overwrite, pictures=pictures)
    for rate in rates:
        if rate != UNSHAPED:
            bits_per_second(rate)
    chosen = list(dict.fromkeys([FLOAT, *(CELLS if cells is None else cells)]))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="qgnn-bench-") as scratch:
        for store in stores_of(source, Path(scratch), workers, methods, say):
            rows += _store_rows(store, rates, chosen, repeats=repeats, time_s=time_s, evaluate=evaluate, hidden=hidden,
                                layers=layers, threads=threads, say=say)
    return finish(target, rows, pictures=pictures)


def parse_cell(word: str) -> Cell:
    """`2/4`: messages of 2 bits, gradients of 4; 32 is float.

    Raises: InputError: another form or width.
    """
    forward, slash, backward = word.partition("/")
    if slash and forward in ("1", "2", "4", "8", "32") and backward in ("2", "4", "8", "32"):
        return int(forward), int(backward)
    raise InputError(f"--cell {word}: expected FORWARD/GRADIENTS in bits, as 2/4; 1, 2, 4, 8 or 32 (float) forward, 2, "
                     "4, 8 or 32 of gradients")


def stores_of(source: str, scratch: Path, workers: Sequence[int], methods: Sequence[str],
              say: Callable[[str], None]) -> list[Store]:
    """The store of a source that is one, else a store for each number of workers and method."""
    from ..data.load import load_graph
    from ..data.synthetic import SHAPES
    from ..partitioning.api import partition_graph

    if (Path(source) / "manifest.json").exists():
        return [Store.open(source)]
    say(f"reading {source}")
    graph = load_graph(f"synthetic:{source}" if source in SHAPES else source, progress=say)
    stores = []
    for parts in workers:
        for method in methods if parts > 1 else ["random"]:
            say(f"cutting into {parts} by {method}")
            place = scratch / f"{method}-{parts}"
            partition_graph(graph, parts=parts, out=place, method=method)
            stores.append(Store.open(place))
    return stores


def settings_of(cell: Cell, hidden: int, layers: int) -> RunConfig:
    """The run's settings.

    Raises: ConfigError: a width that this version does not know.
    """
    forward, backward = cell
    words = [*SETTINGS, f"quant.bits={forward}", f"model.hidden={hidden}", f"propagation.layers={layers}",
             "timeouts.exchange_s=600", "timeouts.server_s=600"]
    return load_config(overrides=[*words, f"quant.gradients={backward}"])


def formula(store: Store, rank: int, config: RunConfig, weights: int, *, evaluate: bool) -> dict[str, int]:
    """Bytes that a rank sends in an epoch, by kind (law 5): rows times packed bytes, a byte more where a row has a
    scale of its own, and a header a peer and round; all-reduces of `weights` float32, and of an evaluation's
    exponents.
    """
    rows = [len(plan.send_rows) for plan in store.part(rank).peers]
    quant, layers, columns = config.quant, config.propagation.layers, store.num_classes

    def rounds(row: int) -> int:
        return layers * (sum(rows) * row + HEADER_BYTES * sum(count > 0 for count in rows))

    def reduced(count: int, size: int) -> int:
        bounds = [count * r // store.num_parts for r in range(store.num_parts + 1)]
        sizes = np.diff(bounds)
        sent = [int(n) for r, n in enumerate(sizes) if r != rank] + [int(sizes[rank])] * (store.num_parts - 1)
        return sum(size * n + HEADER_BYTES for n in sent if n)

    messages, gradients = int(quant.messages or 32), int(quant.gradients or 32)
    forward = rounds(row_bytes(columns, messages))
    return {"forward": forward, "backward": rounds(row_bytes(columns, gradients) + (gradients < 32)),
            "evaluation": forward if evaluate else 0,
            "control": reduced(weights, 4) + (reduced(NUM_LEVELS, 8) if evaluate else 0)}


def _store_rows(store: Store, rates: Sequence[str], cells: Sequence[Cell], *, repeats: int, time_s: float,
                evaluate: bool, hidden: int, layers: int, threads: int, say: Callable[[str], None]
                ) -> list[dict[str, Any]]:
    """All rates and cells on one store. Shaped links that cannot be made leave rows with the reason."""
    rows: list[dict[str, Any]] = []
    reason, bare = cannot(shaped=True), cannot()
    head = {"shape": store.name, "method": store.manifest["partitioner"]["method"], "workers": store.num_parts,
            "nodes": store.num_nodes, "edges": store.num_edges, "cut_fraction": store.manifest["cut_fraction"],
            "halo_rows": store.manifest["halo_rows"], "hidden": hidden, "layers": layers, "threads": threads}
    measured = [rate for rate in rates if rate == UNSHAPED or not reason]
    configs, absent = _configs(cells, hidden, layers)
    for rate in rates:
        whys = absent if rate in measured else dict.fromkeys(cells, f"skipped: {reason}")
        rows += [{**head, "rate": rate, **_widths(cell), "evaluation": False, "why": why}
                 for cell, why in whys.items()]
    if not measured:
        return rows
    hosts: Hosts = Loopback() if bare else NetnsCluster(store.num_parts)
    with (hosts if isinstance(hosts, NetnsCluster) else nullcontext(hosts)), \
            Ranks(hosts, store.num_parts, threads=threads, timeout_s=600.0) as ranks:
        for rate in measured:
            if isinstance(hosts, NetnsCluster):
                hosts.shape(None if rate == UNSHAPED else rate)
            here = {**head, "rate": rate, "hosts": "processes" if bare else "network namespaces",
                    "congestion_control": congestion_control()}
            found = _measure(ranks, hosts, store, configs, rate, repeats, evaluate,
                             lambda text, rate=rate: say(f"{head['method']}, {store.num_parts} workers, "  # type: ignore
                                                         f"{rate}: {text}"))
            if time_s > 0:
                for cell, config in configs.items():
                    say(f"{rate}, {_name(cell)}: training for {time_s:g} s")
                    found[cell, False] |= _train_for(ranks, store, config, time_s)
            rows += [{**here, **_widths(cell), "evaluation": evaluated, **row}
                     for (cell, evaluated), row in found.items()]
    order = {(rate, cell): i for i, (rate, cell) in enumerate(itertools.product(rates, cells))}
    return sorted(rows, key=lambda row: (order[row["rate"], (row["forward"], row["gradients"])], row["evaluation"]))


def _configs(cells: Sequence[Cell], hidden: int, layers: int) -> tuple[dict[Cell, RunConfig], dict[Cell, str]]:
    """Settings of the cells that this version can train, and why the others are left out."""
    configs, absent = {}, {}
    for cell in cells:
        try:
            configs[cell] = settings_of(cell, hidden, layers)
        except ConfigError as error:
            absent[cell] = f"not available: {error.message}"
    return configs, absent


def _widths(cell: Cell) -> dict[str, int]:
    return {"forward": cell[0], "gradients": cell[1]}


def _name(cell: Cell) -> str:
    return f"{cell[0]}/{cell[1]} bits"


def _measure(ranks: Ranks, hosts: Hosts, store: Store, configs: Mapping[Cell, RunConfig], rate: str, repeats: int,
             evaluate: bool, say: Callable[[str], None]) -> dict[tuple[Cell, bool], dict[str, Any]]:
    """Times of all cells in turns, then one epoch of each under the trace and the interfaces' counters."""
    trainings: dict[Cell, Training] = {}
    for cell, config in configs.items():
        say(f"setting up {_name(cell)}")
        trainings[cell] = ranks.training(store, config)
        # Ends each worker's watch over its memory: a process holds many workers here, whose watches would add up.
        trainings[cell].call("close", timeout_s=60.0)
    try:
        modes = [False, True] if evaluate else [False]
        times: dict[tuple[Cell, bool], list[float]] = {key: [] for key in itertools.product(configs, modes)}
        last: dict[tuple[Cell, bool], list[dict[str, Any]]] = {}
        for turn in range(repeats + 1):
            for cell, mode in times:
                say(f"turn {turn} of {repeats}, {_name(cell)}")
                seconds, results = trainings[cell].epoch(evaluate=mode)
                last[cell, mode] = [*last.get((cell, mode), []), *results] if turn else []
                if turn:
                    times[cell, mode].append(seconds)
        rows = {}
        for (cell, mode), own in times.items():
            base = times[FLOAT, mode]
            rows[cell, mode] = {
                "epoch_s": {"median": statistics.median(own), "p10": float(np.quantile(own, 0.1)),
                            "p90": float(np.quantile(own, 0.9))},
                "repeats": repeats, "speedup": statistics.median(a / b for a, b in zip(base, own)),
                **_shares(last[cell, mode], store.num_parts)}
        for cell, training in trainings.items():
            weights = sum(g.size for g in training.call_one(0, "gradients", timeout_s=60.0).values())
            for mode in modes:
                rows[cell, mode] |= _traced(training, hosts, store, configs[cell], rate, weights, mode)
        return rows
    finally:
        for training in trainings.values():
            training.close()


def _shares(results: Sequence[dict[str, Any]], size: int) -> dict[str, Any]:
    """From the results of all timed epochs and ranks: seconds a rank waits in an epoch, by what for, and CPU seconds of
    all ranks together; medians over epochs and means over ranks."""
    waits = {what: statistics.fmean(r["wait_s"][what] for r in results) for what in results[0]["wait_s"]}
    by_epoch = [results[i:i + size] for i in range(0, len(results), size)]
    cpu = statistics.median(sum(r["cpu_s"] for r in epoch) for epoch in by_epoch)
    return {"wait_s": waits, "cpu_s": cpu, "cpu_floor_s": cpu / (os.cpu_count() or 1)}


def _traced(training: Training, hosts: Hosts, store: Store, config: RunConfig, rate: str, weights: int,
            evaluate: bool) -> dict[str, Any]:
    """One epoch under the trace: bytes against the formula and the interfaces, and how full the links were."""
    counted = isinstance(hosts, NetnsCluster)
    before = [hosts.sent_bytes(i) for i in range(training.size)] if isinstance(hosts, NetnsCluster) else []
    training.call("trace", True, timeout_s=60.0)
    _, results = training.epoch(evaluate=evaluate)
    spans = training.call("trace", False, timeout_s=60.0)
    after = [hosts.sent_bytes(i) for i in range(training.size)] if isinstance(hosts, NetnsCluster) else []
    sent = [r["wire_bytes"] for r in results]
    wanted = [formula(store, rank, config, weights, evaluate=evaluate) for rank in range(training.size)]
    row: dict[str, Any] = {
        "bytes": {kind: [one.get(kind, 0) for one in sent] for kind in KINDS},
        "formula": {kind: [one[kind] for one in wanted] for kind in KINDS},
        "bytes_equal": all(one.get(kind, 0) == want[kind] for one, want in zip(sent, wanted) for kind in KINDS)}
    if counted:
        row["interface_bytes"] = [b - a for a, b in zip(before, after)]
        row["interface_ratio"] = sum(row["interface_bytes"]) / max(sum(sum(one.values()) for one in sent), 1)
    busiest = []
    for rank, one in enumerate(sent):
        part = store.part(rank)
        rows = sum(len(plan.send_rows) for plan in part.peers)
        busiest.append(sum(one[kind] for kind in KINDS if kind != "control") * max(1.0, part.num_halo / max(rows, 1)))
    return {**row, **on_the_wire(spans, busiest, rate)}


def on_the_wire(spans: Sequence[Sequence[Span]], busiest: Sequence[float], rate: str) -> dict[str, Any]:
    """Where the rounds of an epoch spend their time, means over ranks, from all ranks' spans on one machine's clock.

    Args: busiest: bytes of messages, sent or received, of each rank's fuller direction. rate: of a link, or UNSHAPED.
    Returns: `wire_s`, from a rank's begin until it has sent and received all; `compute_s`, `pack_s`; `tail_s`, from
        when the last rank has begun a round until the last one has all, which is exchange and nothing else; and of a
        shaped link `full_link_s`, what the busiest link's bytes take at its rate, and `link_use`, that over `tail_s`:
        above 1 where a part of the exchange passed while slower ranks still computed.
    """
    row: dict[str, Any] = {f"{kind}_s": statistics.fmean(sum(one.seconds for one in own if one.kind == kind)
                                                         for own in spans) for kind in (WIRE, COMPUTE, PACK)}
    rounds: dict[str, list[Span]] = {}
    for one in itertools.chain.from_iterable(spans):
        if one.kind == WIRE:
            rounds.setdefault(one.what, []).append(one)
    row["tail_s"] = sum(max(one.end for one in own) - max(one.start for one in own) for own in rounds.values())
    if rate != UNSHAPED:
        row["full_link_s"] = 8 * max(busiest) / bits_per_second(rate)
        row["link_use"] = row["full_link_s"] / row["tail_s"] if row["tail_s"] > 0 else None
    return row


def _train_for(ranks: Ranks, store: Store, config: RunConfig, time_s: float) -> dict[str, Any]:
    """Train anew with an evaluation an epoch, as `qgnn train` does, until the time is over."""
    best, accuracy, epochs, spent = -1.0, None, 0, 0.0
    with closing(ranks.training(store, config)) as training:
        while True:
            seconds, results = training.epoch(evaluate=True)
            spent += seconds
            if spent > time_s:
                break
            epochs += 1
            found, _ = figures([r["evaluation"] for r in results], "accuracy")
            if found["valid"] > best:
                best, accuracy = found["valid"], found["test"]
    return {"time_s": time_s, "test_accuracy": accuracy, "epochs_in_time": epochs}
