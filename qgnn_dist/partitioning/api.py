# SPDX-License-Identifier: Apache-2.0
"""From a graph to a store: clean, decide who owns a node, build every part, put the folder in place."""
from __future__ import annotations

import difflib
import importlib.util
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data.graph import Graph, SparseFeatures
from ..errors import EXISTS, InputError
from ..files.write import check_room, disk_errors
from ..memory import MemoryWatch, available_bytes
from ..quant.packed import row_bytes
from ..store.describe import summarise
from ..store.manifest import CODED_VERSION, FORMAT_VERSION, MANIFEST, ORDERED_VERSION, SOURCE_ORDER
from ..store.reader import Store
from ..store.writer import new_store
from . import metis, mtkahypar, random, stream
from .balance import Balance
from .build import build_part, disk_bytes, edges_at_once, remove_spool, spool
from .clean import CleanGraph, check_arrays, clean, fingerprint
from .features import CodedFeatures, check_feature_bits
from .hops import MixedFeatures, check_hops, hop_bytes
from .like import check_like, known_columns, known_owners, known_scales
from .order import ORDERS, choose_order
from .standardise import check_columns, standardised

__all__ = ["METHODS", "partition_graph"]

Assign = Callable[[np.ndarray, np.ndarray, int, int, Balance], tuple[np.ndarray, dict[str, Any]]]
METHODS: dict[str, Assign] = {"metis": metis.assign, "mtkahypar": mtkahypar.assign, "stream": stream.assign,
                              "random": random.assign}
"""Method → owners int32 (N,) and what the manifest tells of them, from indptr, indices, parts, seed and balance."""
METIS_EDGES = 10_000_000
"""Directed edges up to which `auto` takes METIS, which is then done in ten seconds; at 25 M it took 21 s and `stream`
1.7, for a cut 1.10 times as large (docs/cuts.md)."""
METIS_BYTES_PER_EDGE = 150
"""Measured: 116, at 25 M directed edges."""

DEFAULT_SHARE = 0.5
"""Of the memory that the machine has available, what partitioning takes if nothing is said."""
LEAST_KEYS = 1 << 18
"""Keys of edges (8 bytes each) in memory while sorting, however little memory is allowed."""

Builders = Callable[[Callable[[str, int], dict[str, Any]], str, list[int]], list[dict[str, Any]]]


def partition_graph(graph: Graph, *, parts: int, out: str | Path, method: str = "auto", order: str = "auto",
                    seed: int = 0, memory_gb: float | None = None, balance: float | None = None,
                    edge_balance: float | None = None, like: str | Path | None = None,
                    standardise: bool = False, hops: int = 0, features_bits: int | None = None,
                    overwrite: bool = False, run_builders: Builders | None = None, builders: int = 1,
                    progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Write a store of `parts` parts.

    Args:
        method: `auto`, `metis`, `mtkahypar`, `stream`, `random`: who owns a node. order: `auto`, `source`, `degree`,
            `rcm`, `community`, `random`: how rows lie inside a part (order.choose_order says how `auto` chooses). Equal
            graph, method, order, parts and seed give equal part files, if each `auto` chooses the same.
        memory_gb: bound of the anonymous memory that edges may take, and what `auto` may count on; None for half of
            what the machine has available. A method or order that was asked for by name takes what it takes.
        balance, edge_balance: most nodes of a part over the mean, and most edges and training nodes; of `stream`, by
            default as in Balance. like: a store of as many parts, of an earlier state of the graph: nodes that it has
            keep their part, new ones are placed by `stream`.
        standardise: dense columns get mean 0 and deviation 1 (standardise.py), those of `like` where it is given.
        hops: so many hops of neighbours' features stand beside a node's own (hops.py). features_bits: 8, 4 or 2 keep
            dense features as codes (quant.columns); None keeps them as they are.
        run_builders: runs `build_part` for all parts, e.g. on Ray actors; None builds them one after the other here.
        builders: how many of them `run_builders` runs side by side at most; they share the memory.
    Returns: the manifest without its file list.
    Raises: InputError, and OutputError: the disk. Nothing is left behind then, and an older store stays as it was.
    """
    target = _check_request(graph, parts, out, method, order, seed, overwrite)
    limits = _balance(method, graph, balance, edge_balance)
    model = None if like is None else check_like(like, parts, method)
    if memory_gb is None:
        memory_gb = round(DEFAULT_SHARE * available_bytes() / 1e9, 2)
    elif not memory_gb > 0:
        raise InputError(f"--memory {memory_gb:g}: expected more than 0 GB")
    check_arrays(graph)
    mixing = _check_features(graph, model, standardise, hops, features_bits)
    memory, stages = int(memory_gb * 1e9), _Stages(progress)
    try:
        with disk_errors(target.parent, 0, str(out), "the store"), new_store(target) as building:
            scratch, keys = building.folder, max(memory // 16, LEAST_KEYS)
            needed = _first_room(graph, parts, keys) + mixing
            check_room(scratch, needed, str(out), "the store")
            known = needed if graph.edge_rows is not None else 0
            with (disk_errors(scratch, known, str(out), "the store"),
                  stages.stage("read", "reading and sorting the edges")):
                cleaned = clean(graph, scratch, keys)
            chosen, reason = _choose(method, cleaned, parts, memory_gb, bool(balance or edge_balance))
            if model is not None:
                chosen, reason = "stream", f"as {model.name} was cut in {like}"
            with stages.stage("cut", f"partitioning into {parts} by {chosen}"):
                owners, found = _owners(graph, cleaned, parts, chosen, seed, limits, model)
            with stages.stage("order", "ordering the nodes" + (f" by {order}" if order != "auto" else "")):
                nodes, sorted_by, why = choose_order(order, cleaned.indptr, cleaned.indices, seed)
            needed = disk_bytes(graph, len(cleaned.indices), parts) + mixing
            check_room(scratch, needed, str(out), "the store")
            with disk_errors(scratch, needed, str(out), "the store"):
                with (stages.stage("features", "scales, neighbours and codes of features")
                      if standardise or hops or features_bits is not None else nullcontext()):
                    at_rest, stored = _at_rest(graph, cleaned, standardise, hops, features_bits, scratch, model)
                with stages.stage("build", "building the parts"):
                    run = run_builders or (lambda build, folder, wanted: [build(folder, part) for part in wanted])
                    spool(at_rest, cleaned, owners, parts, nodes, scratch,
                          edges_at_once(memory, builders), {"out": str(out), "needed_bytes": needed})
                    entries = run(build_part, str(scratch), list(range(parts)))
                    built = max(entry.pop("peak_anon_bytes") for entry in entries)
                    manifest = _manifest(graph, cleaned, entries)
                    manifest["num_features"] *= hops + 1
                    del cleaned, at_rest  # network file systems keep a file that is still mapped
                    remove_spool(scratch)
                manifest |= {
                    "format_version": _version(features_bits, sorted_by),
                    "partitioner": {"method": chosen, "requested": method, "reason": reason, "seed": seed, **found},
                    "order": {"method": sorted_by, "requested": order, "reason": why},
                    **stored,
                    "seconds": stages.seconds,
                    "peak": {**stages.watch.peaks(), "memory_gb": memory_gb, "anon_bytes_by_stage": stages.anon_bytes,
                             "builder_anon_bytes": built}}
                building.commit(manifest)
    finally:
        stages.watch.close()
    return summarise(manifest)


def _version(features_bits: int | None, order: str) -> int:
    """The oldest format that a store with such features and rows can have."""
    if features_bits is not None:
        return CODED_VERSION
    return FORMAT_VERSION if order == SOURCE_ORDER else ORDERED_VERSION


class _Stages:
    """What each stage takes, by name: `seconds`, and the most `anon_bytes` of this process; `watch` is to be closed."""

    def __init__(self, progress: Callable[[str], None] | None) -> None:
        self.seconds, self.anon_bytes = dict[str, float](), dict[str, int]()
        self.watch, self._progress = MemoryWatch(), progress

    @contextmanager
    def stage(self, name: str, text: str) -> Iterator[None]:
        """Around the stage; `text` is for people."""
        if self._progress is not None:
            self._progress(text)
        start = time.perf_counter()
        self.watch.lap()
        yield
        self.seconds[name], self.anon_bytes[name] = round(time.perf_counter() - start, 3), self.watch.lap()


def _owners(graph: Graph, cleaned: CleanGraph, parts: int, method: str, seed: int, limits: Balance,
            model: Store | None) -> tuple[np.ndarray, dict[str, Any]]:
    """Owners int32 (N,), and what the manifest tells of them. Args: model: of `like`."""
    if parts == 1:
        return np.zeros(cleaned.num_nodes, np.int32), {}
    if model is not None:
        return _extend(graph, cleaned, parts, model, limits)
    return METHODS[method](cleaned.indptr, cleaned.indices, parts, seed, limits)


def _first_room(graph: Graph, parts: int, keys: int) -> int:
    """Bytes of disk that building takes, as far as is known before edges are read: at least those if none repeats."""
    rows = graph.edge_rows or 0
    runs = 16 * rows if 2 * rows > keys else 0
    return max(runs + 4 * rows, 4 * rows + disk_bytes(graph, rows, parts))


def _check_request(graph: Graph, parts: int, out: str | Path, method: str, order: str, seed: int,
                   overwrite: bool) -> Path:
    """The store's folder, links followed; refuses what can be told before anything is read."""
    target = Path(os.path.realpath(out))
    if target.exists() and not overwrite:
        raise InputError(EXISTS, file=str(out))
    if target.exists() and not (target / MANIFEST).exists():
        raise InputError("output exists and is not a store; choose another --out", file=str(out))
    _check_word("--method", method, METHODS)
    _check_word("--order", order, ORDERS)
    if not 1 <= parts <= graph.num_nodes:
        raise InputError(f"--parts {parts}: expected 1 to {graph.num_nodes}, the number of nodes")
    if not 0 <= seed < 2**31:
        raise InputError(f"--seed {seed}: expected 0 to {2**31 - 1}")
    return target


def _check_word(option: str, word: str, known: Iterable[str]) -> None:
    words = ["auto", *known]
    if word not in words:
        near = difflib.get_close_matches(word, words, 1)
        raise InputError(f"{option} {word}: expected {', '.join(words)}"
                         + (f"; did you mean {near[0]}?" if near else ""))


def _check_features(graph: Graph, model: Store | None, standardise: bool, hops: int, features_bits: int | None) -> int:
    """Refuse what cannot be made of a graph's features; returns the bytes of disk that making it takes."""
    scaling = check_columns(graph, standardise)
    check_hops(graph, hops)
    if model is not None:
        known_columns(model, graph.num_features, standardise)
        if hops:
            known_scales(model, hops)
    check_feature_bits(graph, features_bits)
    return scaling + hop_bytes(graph, hops)


def _at_rest(graph: Graph, cleaned: CleanGraph, standardise: bool, hops: int, features_bits: int | None,
             scratch: Path, model: Store | None) -> tuple[Graph, dict[str, Any]]:
    """The graph with the features that its parts are to hold, their grids in `scratch`, and what the manifest tells."""
    stored: dict[str, Any] = {}
    known = None if model is None else known_columns(model, graph.num_features, standardise)
    if standardise:
        graph, stored["standardised"] = standardised(graph, scratch, known)
    if hops:
        mixed = MixedFeatures(graph, cleaned, hops, scratch, None if model is None else known_scales(model, hops))
        graph = replace(graph, features=mixed)  # type: ignore[arg-type]
        stored["hops"] = {"count": hops, "scales": mixed.scales}
    if features_bits is not None:
        coded = CodedFeatures(graph, features_bits)
        np.save(scratch / "x_grids.npy", [coded.grids.low, coded.grids.high])
        graph = replace(graph, features=coded)  # type: ignore[arg-type]
        stored["feature_bits"] = features_bits
    return graph, stored


def _balance(method: str, graph: Graph, nodes: float | None, edges: float | None) -> Balance:
    """What was asked for, where the method keeps it."""
    given = {"--balance": nodes, "--edge-balance": edges}
    for option, value in given.items():
        if value is not None and method not in ("auto", "stream"):
            raise InputError(f"{option} {value:g} is kept by --method stream alone, not by {method}; leave one of them "
                             "out")
    asked = {name: value for name, value in (("nodes", nodes), ("edges", edges)) if value is not None}
    return Balance.of(graph, **asked)


def _extend(graph: Graph, cleaned: CleanGraph, parts: int, model: Store,
            limits: Balance) -> tuple[np.ndarray, dict[str, Any]]:
    """Owners of the nodes that a store knows, and of new ones; and what the manifest tells."""
    known, counts = known_owners(model, graph)
    owners, found = stream.extend(cleaned.indptr, cleaned.indices, parts, known, limits)
    return owners, {**found, "like": {"fingerprint": model.fingerprint, **counts}}


def _choose(method: str, cleaned: CleanGraph, parts: int, memory_gb: float, asked: bool) -> tuple[str, str]:
    """The method and why; `asked`: for a balance that METIS does not keep."""
    if method != "auto":
        return method, "asked for"
    if parts == 1:
        return "random", "one part holds everything"
    if asked:
        return "stream", "METIS keeps no balance of edges and training nodes"
    directed = len(cleaned.indices)
    if importlib.util.find_spec("pymetis") is None:
        return "stream", "pymetis is not installed"
    if directed > METIS_EDGES:
        return "stream", f"{directed} directed edges are more than METIS does in ten seconds ({METIS_EDGES})"
    needed = directed * METIS_BYTES_PER_EDGE / 1e9
    if needed > memory_gb:
        return "stream", f"METIS would need about {needed:.1f} GB, --memory is {memory_gb:g}"
    return "metis", f"{directed} directed edges: METIS has the better cut and takes seconds"


def _manifest(graph: Graph, cleaned: CleanGraph, entries: list[dict[str, Any]]) -> dict[str, Any]:
    sizes = np.array([e["rows"] for e in entries])
    edges = np.array([e["directed_edges"] for e in entries])
    sends = sum(e["sends"] for e in entries)
    columns = max(graph.num_classes, 1)
    kind = None
    if graph.features is not None:
        kind = "sparse" if isinstance(graph.features, SparseFeatures) else "dense"
    return {
        "name": graph.name.encode("utf-8", "replace").decode(),  # files may have names that are no Unicode
        "fingerprint": fingerprint(cleaned, graph),
        "num_nodes": cleaned.num_nodes,
        "num_edges": cleaned.num_edges,
        "num_features": graph.num_features,
        "feature_kind": kind,
        "num_classes": graph.num_classes,
        "class_names": graph.class_names,
        "has_labels": graph.labels is not None,
        "has_split": graph.split is not None,
        "cleaned": cleaned.counts,
        "cut_fraction": sum(e["cut"] for e in entries) / max(len(cleaned.indices), 1),
        "balance": {"rows": float(sizes.max() / sizes.mean()), "edges": float(edges.max() / max(edges.mean(), 1e-9))},
        "halo_rows": int(sum(e["halo"] for e in entries)),
        "bytes_per_round": {str(b): sends * row_bytes(columns, b) for b in (2, 4, 32)},
        "parts": entries,
    }
