# SPDX-License-Identifier: Apache-2.0
"""`qgnn plan`: whether a graph fits on given hosts, and what an epoch and a prediction take there."""
from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import RunConfig, load_config
from ..data.graph import SPLITS, Graph, SparseFeatures
from ..errors import InputError
from ..memory import byte_size
from ..model.packed import ModelInfo
from ..propagation.elastic import refuse_parts
from ..propagation.smp import Propagation
from ..storage.place import uri_of
from ..store.reader import Store
from .alternatives import sampled, sign
from .cut import Cut, cut_of_graph, cut_of_numbers, cut_of_store, cut_of_store_again
from .memory import BASE_BYTES, RAY_BASE_BYTES, Need, multipliers_act, prediction_need, training_need, worst_steps
from .rates import Rates, cache_file, load_rates, save_rates
from .seconds import ELASTIC_SLOWER, LINK_USE, ROUND_S, SERVER_S, Hosts, epoch_seconds, predict_seconds
from .shapes import GraphSize
from .traffic import traffic

__all__ = ["PLAN_VERSION", "check_hosts", "choose_rates", "cut_of", "make_plan"]

PLAN_VERSION = 1
USABLE = 0.9
"""Share of a host's memory that workers may take; the rest is the system's."""
HOST_BYTES = 700 << 20
"""Ray's own processes on a host, and the driver."""
PAIRS = ((32, 32), (8, 8), (4, 4), (2, 32), (2, 4), (1, 2))
"""Widths of messages and gradients that a plan compares."""
MOST_HOSTS = 1024
DEFAULT_RATES = Path(__file__).with_name("rates.json")


@dataclass(frozen=True)
class _Case:
    """A plan for one number of hosts and one pair of widths."""

    training: Need
    prediction: Need
    host_bytes: int
    epoch_s: float
    predict_s: float
    fits: bool


def make_plan(cut: Cut, hosts: Hosts, config: RunConfig, rates: Rates, rates_from: str, *,
              parts: int | None = None, name: str = "") -> dict[str, Any]:
    """The plan as plain values.

    Args:
        parts: of a store, which stay on any number of hosts; None: as many as workers.
        rates_from: where the rates come from, for people.
    Returns: `fits`, `memory`, `bytes` and `seconds` by widths, `suffice`, `alternatives`, `advice`, `assumptions`;
        `failed` where it does not fit, so that the command ends with 1.
    """
    number = parts or hosts.count * hosts.workers
    if config.propagation.kind == "elastic":
        refuse_parts(number)
        parts = 1
    if parts is not None:
        hosts = dataclasses.replace(hosts, workers=math.ceil(parts / hosts.count))
    if number > cut.size.nodes:
        raise InputError(f"{number} workers for {cut.size.nodes} nodes; take fewer hosts")
    now = _case(cut, number, hosts, config, rates)
    seconds = epoch_seconds(cut, number, config, rates, hosts)
    suffice = _suffice(cut, hosts, config, rates, parts)
    rows = [_row(cut, number, hosts, _at(config, *pair), rates) for pair in _pairs(config)]
    result = {
        "schema": PLAN_VERSION, "graph": {"name": name, **dataclasses.asdict(cut.size)},
        "hosts": {**dataclasses.asdict(hosts), "threads": hosts.threads}, "workers": number,
        "settings": {"hidden": config.model.hidden, "propagation": config.propagation.kind,
                     "layers": config.propagation.layers, "rounds": config.propagation.rounds,
                     "coding": config.messages.coding, "bits": config.quant.stages()},
        "cut": {"fraction": cut.fraction(number), "halo_rows": cut.sends(number), "how": cut.how,
                "largest_part": dataclasses.asdict(max(cut.parts(number), key=lambda p: p.rows + p.halo))},
        "rates": {"from": rates_from, "machine": rates.machine, "threads": rates.threads, "versions": rates.versions},
        "fits": now.fits, "failed": not now.fits,
        "memory": {"training": _need(now.training), "prediction": _need(now.prediction),
                   "host_bytes": now.host_bytes, "usable_bytes": int(USABLE * hosts.ram_bytes)},
        "seconds": {**dataclasses.asdict(seconds), "epoch": now.epoch_s, "predict": now.predict_s},
        "widths": rows, "suffice": suffice,
        "alternatives": [_own_float(cut, number, hosts, config, rates), sign(cut, number, config, hosts),
                         sampled(cut, number, config, hosts)],
        "assumptions": _assumptions(cut, hosts, rates, rates_from, config),
    }
    return {**result, "advice": [] if now.fits else _advice(cut, number, hosts, config, rates, now, suffice, parts)}


def cut_of(source: str | None, numbers: Mapping[str, int | None], workers: int, *, train_nodes: int | None = None,
           cut: float | None = None, root: Path | None = None,
           say: Callable[[str], None] = lambda _: None) -> tuple[Cut, str, int | None]:
    """The cut of a store, of a source or of bare numbers; a name; and the parts of a store that stays, else None.

    Args:
        numbers: --nodes, --edges, --features and --classes. workers: that a graph is cut for which has no store, or
            one of fewer parts, which would be made again.
        train_nodes, cut: beside bare numbers. root: where OGB data sets lie.
    Raises: InputError: numbers are missing, odd, or beside a source.
    """
    given = {name: value for name, value in {**numbers, "--train-nodes": train_nodes, "--cut": cut}.items()
             if value is not None}
    if source is None:
        missing = [name for name in numbers if numbers[name] is None]
        if missing:
            raise InputError(f"{', '.join(missing)}: missing; give a store or a graph, or all of {', '.join(numbers)}")
        wrong = [f"{name} {value}" for name, value in given.items() if name != "--cut" and not 0 < value < 2**62]
        if wrong:
            raise InputError(f"{', '.join(wrong)}: expected numbers above 0")
        nodes, edges, features, classes = (int(numbers[name] or 0) for name in numbers)
        if train_nodes is not None and train_nodes > nodes:
            raise InputError(f"--train-nodes {train_nodes}: more than the {nodes} nodes")
        train = train_nodes or math.ceil(nodes / 10)
        size = GraphSize(nodes=nodes, edges=edges, features=features, classes=classes, train=train,
                         valid=min(train, nodes - train), stored=float(features))
        return cut_of_numbers(size, cut, workers), "", None
    if given:
        raise InputError(f"{', '.join(given)}: only without a store or a graph, whose own numbers are taken")
    if uri_of(source) is not None or (Path(source) / "manifest.json").exists():
        store = Store.open(source)
        if store.num_parts < workers:
            say(f"cutting it for {workers} workers")
            return cut_of_store_again(store, workers), store.name, None
        return cut_of_store(store), store.name, store.num_parts
    from ..data.load import load_graph

    say("reading the graph")
    graph = load_graph(source, root=root, progress=say)
    say(f"cutting it for {workers} workers")
    return cut_of_graph(graph, _size_of(graph), workers), graph.name, None


def _size_of(graph: Graph) -> GraphSize:
    """Of a graph that is not partitioned yet; edges are counted with the cut."""
    split, features, stored = graph.split, graph.features, float(graph.num_features)
    train, valid = (graph.num_nodes // 10 if split is None else int((split == SPLITS[name]).sum())
                    for name in ("train", "valid"))
    if isinstance(features, SparseFeatures):
        stored = len(features.values) / max(graph.num_nodes, 1)
    return GraphSize(nodes=graph.num_nodes, edges=0, features=graph.num_features, classes=max(graph.num_classes, 1),
                     train=train, valid=valid, stored=stored, sparse=isinstance(features, SparseFeatures))


def choose_rates(file: str | Path | None, calibrate: bool, say: Callable[[str], None] = lambda _: None
                 ) -> tuple[Rates, str]:
    """Rates and where they come from: a file, a new probe, the user's cache, or what ships with the program.

    Raises: InputError: the file is missing or damaged.
    """
    if calibrate:
        from .probe import probe

        load, cores = os.getloadavg()[0], os.cpu_count() or 1
        rates, target = probe(cores, say), Path(file) if file is not None else cache_file()
        save_rates(rates, target)
        busy = f", while {cores} cores had {load:.1f} programs to run: do it again when they rest" * (load > cores / 2)
        return rates, f"calibrated just now, kept in {target}{busy}"
    if file is not None:
        return load_rates(Path(file)), f"calibration {file}"
    if cache_file().exists():
        return load_rates(cache_file()), f"calibrated before ({cache_file()})"
    return load_rates(DEFAULT_RATES), "not calibrated: rates that ship with the program; --calibrate measures this host"


def _case(cut: Cut, number: int, hosts: Hosts, config: RunConfig, rates: Rates) -> _Case:
    parts, size, base = cut.parts(number), cut.size, BASE_BYTES if number == 1 else RAY_BASE_BYTES
    training = max((training_need(part, size, config, base=base) for part in parts), key=lambda n: n.resident)
    info = _model(size, config)
    prediction = max((prediction_need(part, size, info, base=base) for part in parts), key=lambda n: n.resident)
    host = HOST_BYTES + hosts.workers * max(training.resident, prediction.resident)
    return _Case(training, prediction, host,
                 epoch_seconds(cut, number, config, rates, hosts).total,
                 predict_seconds(cut, number, config, rates, hosts).total,
                 host <= USABLE * hosts.ram_bytes)


def _model(size: GraphSize, config: RunConfig) -> ModelInfo:
    """The model that training would pack, as far as memory asks."""
    p, bits = config.propagation, {k: v for k, v in config.quant.stages().items() if k != "gradients"}
    return ModelInfo(
        num_features=size.features, hidden=config.model.hidden, num_classes=size.classes, bits=bits,
        method=config.quant.method, coding=config.messages.coding, feature_norm="none", feature_signed=True,
        kind=p.kind, layers=p.layers, mu=p.mu, eta=p.eta, rounds=p.rounds,
        multipliers=[-0.1] * p.layers if multipliers_act(config) else [], message_steps=worst_steps(config),
        weight_steps=[1.0, 1.0], hidden_step=1.0, residual_step=1.0, level=-1, feature_level=-1, class_names=None,
        graph="", fingerprint="", elastic=Propagation.of(config).elastic)


def _at(config: RunConfig, messages: int, gradients: int) -> RunConfig:
    """The same settings at other widths on the wire; float messages mean a float model, as its twin is trained."""
    quant = config.quant
    if messages == 32:
        return dataclasses.replace(config, quant=dataclasses.replace(load_config(overrides=["quant.bits=32"]).quant,
                                                                     gradients=gradients))
    return dataclasses.replace(config, quant=dataclasses.replace(quant, messages=messages, gradients=gradients))


def _pairs(config: RunConfig) -> list[tuple[int, int]]:
    own = int(config.quant.messages or 32), int(config.quant.gradients or 32)
    return sorted({*PAIRS, own}, key=lambda pair: (-pair[0], -pair[1]))


def _row(cut: Cut, number: int, hosts: Hosts, config: RunConfig, rates: Rates) -> dict[str, Any]:
    sent, case = traffic(cut, number, config), _case(cut, number, hosts, config, rates)
    bits = config.quant.stages()
    return {"messages": bits["messages"], "gradients": bits["gradients"], **dataclasses.asdict(sent),
            "epoch_bytes": sent.epoch, "epoch_s": case.epoch_s, "predict_s": case.predict_s,
            "worker_bytes": case.training.resident, "fits": case.fits}


def _suffice(cut: Cut, hosts: Hosts, config: RunConfig, rates: Rates, parts: int | None) -> dict[str, Any]:
    """The fewest hosts that it fits on, and those of the shortest epoch; at most MOST_HOSTS."""
    counts = sorted({*range(1, 33), *(2**k for k in range(11)), *(3 * 2**k for k in range(9)), hosts.count})
    rows: list[dict[str, Any]] = []
    for count in counts:
        number = parts or count * hosts.workers
        if count > (parts or min(MOST_HOSTS, cut.size.nodes)):
            break
        there = dataclasses.replace(hosts, count=count, workers=math.ceil(number / count))
        case = _case(cut, number, there, config, rates)
        rows.append({"hosts": count, "workers": number, "host_bytes": case.host_bytes, "epoch_s": case.epoch_s,
                     "predict_s": case.predict_s, "fits": case.fits})
    fitting = [row for row in rows if row["fits"]]
    fastest = min(fitting, key=lambda row: row["epoch_s"], default=None)
    return {"least_hosts": fitting[0]["hosts"] if fitting else None,
            "fastest_hosts": fastest["hosts"] if fastest else None, "rows": rows}


def _own_float(cut: Cut, number: int, hosts: Hosts, config: RunConfig, rates: Rates) -> dict[str, Any]:
    row = _row(cut, number, hosts, _at(config, 32, 32), rates)
    return {"name": "the same, float messages", "worker_bytes": row["worker_bytes"], "once_bytes": 0, "once_s": 0.0,
            "epoch_bytes": row["epoch_bytes"], "epoch_s": row["epoch_s"], "says": "quant.bits=32: the float twin"}


def _need(need: Need) -> dict[str, Any]:
    return {"items": need.items, "phase": need.phase, "anonymous": need.anonymous, "mapped": need.mapped,
            "at_rest": need.at_rest, "resident": need.resident, "largest": need.largest}


def _advice(cut: Cut, number: int, hosts: Hosts, config: RunConfig, rates: Rates, now: _Case, suffice: dict[str, Any],
            parts: int | None) -> list[str]:
    """What is too large, and what would make it fit: each change alone, tried on the same formulas."""
    need = max(now.training, now.prediction, key=lambda n: n.resident)
    items = {**need.items, "graph (mapped)": need.mapped}
    largest = max(items, key=lambda name: items[name])
    lines = [f"Does not fit: a host needs {byte_size(now.host_bytes)}, {byte_size(USABLE * hosts.ram_bytes)} of its "
             f"{byte_size(hosts.ram_bytes)} may be taken; the largest item is {largest} with "
             f"{byte_size(items[largest])} a worker"]

    def tried(what: str, case: _Case) -> None:
        says = "then it fits" if case.fits else "not enough alone"
        if case.host_bytes < now.host_bytes:
            lines.append(f"{what}: {byte_size(case.host_bytes)} a host, {says}")

    if suffice["least_hosts"] is not None:
        lines.append(f"{suffice['least_hosts']} hosts of this kind suffice")
    elif config.propagation.kind == "elastic":
        lines.append("propagation.kind=elastic takes one host: more memory there, or fewer layers, or smp or appnp, "
                     "which take many")
    elif parts is not None:
        lines.append(f"more parts: the store's {parts} do not fit on any number of hosts; `qgnn partition --parts`")
    if hosts.workers > 1:
        fewer = dataclasses.replace(hosts, workers=1)
        tried("one worker a host", _case(cut, number if parts else hosts.count, fewer, config, rates))
    bits = config.quant.stages()
    if bits["features"] == 32:
        tried("quant.features=8", _case(cut, number, hosts, dataclasses.replace(
            config, quant=dataclasses.replace(config.quant, features=8)), rates))
    if bits["messages"] > 2:
        tried("quant.messages=2", _case(cut, number, hosts, _at(config, 2, bits["gradients"]), rates))
    if config.propagation.rounds == "two":
        tried("propagation.rounds=merged", _case(cut, number, hosts, dataclasses.replace(
            config, propagation=dataclasses.replace(config.propagation, rounds="merged")), rates))
    if config.model.hidden > 64:
        tried("model.hidden=64", _case(cut, number, hosts, dataclasses.replace(
            config, model=dataclasses.replace(config.model, hidden=64)), rates))
    if now.host_bytes - hosts.workers * need.mapped <= USABLE * hosts.ram_bytes:
        lines.append("it would run, but slowly: the mapped graph would be read from disk in every round")
    return lines


def _assumptions(cut: Cut, hosts: Hosts, rates: Rates, rates_from: str, config: RunConfig) -> list[str]:
    elastic = ", ".join(f"{factor:g} ({what})" for what, factor in ELASTIC_SLOWER.items())
    return [
        f"cut: {cut.how}",
        f"rates: {rates_from}; {rates.machine}, {rates.threads} threads, more speed it up with "
        f"{100 * min(rates.serial.values()):.0f} to {100 * max(rates.serial.values()):.0f} % of the work left serial; "
        f"neighbours lie "
        f"{'as the order of the rows puts them' if cut.within.any() else 'anywhere in memory'}",
        f"link: {hosts.link_gbps:g} Gbit/s full duplex a host, {100 * LINK_USE:.0f} % of it used, {1000 * ROUND_S:g} "
        f"ms a round, {1000 * SERVER_S:g} ms to the multiplier server, hidden behind interior rows as far as they last",
        f"memory: {100 * USABLE:.0f} % of a host's, {byte_size(HOST_BYTES)} of it for Ray; the store's graph stays "
        "mapped in memory, features are read once and kept as 16-bit codes (float32 at 32 bits)",
        "seconds of a backward with gradients under 32 bits are those of float ones, but for the wire",
        "an epoch evaluates all nodes; predictions are without start, reading from a cold disk, and writing",
    ] + [
        f"elastic layers take as long as appnp's times {elastic}, on one thread, as on synthetic:arxiv; their memory "
        "is that of a projection that moves every edge",
    ] * (config.propagation.kind == "elastic")


def check_hosts(count: int, ram_gb: float, cores: int, link_gbps: float, workers: int) -> Hosts:
    """Hosts from what a user gave; InputError names what is odd."""
    for option, value in (("--hosts", count), ("--host-ram-gb", ram_gb), ("--host-cores", cores),
                          ("--link-gbps", link_gbps), ("--workers-per-host", workers)):
        if not 0 < value < 1e9:
            raise InputError(f"{option} {value:g}: expected a number above 0")
    if workers > cores:
        raise InputError(f"--workers-per-host {workers}: more than the {cores} cores of a host")
    return Hosts(count=count, ram_bytes=ram_gb * 2**30, cores=cores, link_gbps=link_gbps, workers=workers)
