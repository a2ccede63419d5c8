# SPDX-License-Identifier: Apache-2.0
"""From a graph to a store: clean, decide who owns a node, build every part, put the folder in place."""
from __future__ import annotations

import difflib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..data.graph import Graph, SparseFeatures
from ..errors import InputError
from ..memory import MemoryWatch
from ..quant.packed import row_bytes
from ..store.describe import summarise
from ..store.manifest import FORMAT_VERSION, MANIFEST, part_folder
from . import metis, random, stream
from .build import build_part, spool
from .clean import CleanGraph, clean, fingerprint

__all__ = ["METHODS", "partition_graph"]

METHODS: dict[str, Callable[[np.ndarray, np.ndarray, int, int], np.ndarray]] = {
    "metis": metis.assign, "stream": stream.assign, "random": random.assign}
METIS_EDGES = 10_000_000
"""Directed edges up to which `auto` takes METIS: beyond, it needs minutes and gigabytes."""
METIS_BYTES_PER_EDGE = 150
"""Measured: 25 M undirected edges took 3.7 GB, 50 M directed; doubled for safety."""

Builders = Callable[[Callable[[str, int], dict[str, Any]], str, list[int]], list[dict[str, Any]]]


def partition_graph(graph: Graph, *, parts: int, out: str | Path, method: str = "auto", seed: int = 0,
                    memory_gb: float | None = None, overwrite: bool = False, run_builders: Builders | None = None,
                    progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Write a store of `parts` parts.

    Args:
        method: `auto`, `metis`, `stream`, `random`; equal graph, method, parts and seed give equal part files.
        memory_gb: what `auto` may count on. run_builders: runs `build_part` for all parts, e.g. on Ray actors; None
            builds them one after the other here.
    Returns: the manifest without its file list.
    Raises: InputError; nothing is left behind then, and an older store stays as it was.
    """
    target = Path(os.path.abspath(out))
    if target.exists() and not overwrite:
        raise InputError("output exists; add --overwrite to replace it", file=str(out))
    if target.exists() and not (target / MANIFEST).exists():
        raise InputError("output exists and is not a store; choose another --out", file=str(out))
    if method not in ("auto", *METHODS):
        near = difflib.get_close_matches(method, ["auto", *METHODS], 1)
        raise InputError(f"--method {method}: expected auto, {', '.join(METHODS)}"
                         + (f"; did you mean {near[0]}?" if near else ""))
    if not 1 <= parts <= graph.num_nodes:
        raise InputError(f"--parts {parts}: expected 1 to {graph.num_nodes}, the number of nodes")
    say = progress or (lambda _: None)
    watch = MemoryWatch()
    temp = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        say("reading and sorting the edges")
        cleaned = clean(graph)
        chosen, reason = _choose(method, cleaned, parts, memory_gb)
        say(f"partitioning into {parts} by {chosen}")
        owners = np.zeros(cleaned.num_nodes, np.int32)
        if parts > 1:
            owners = METHODS[chosen](cleaned.indptr, cleaned.indices, parts, seed)
        temp.mkdir(parents=True)
        say("building the parts")
        spool(graph, cleaned, owners, parts, temp)
        run = run_builders or (lambda build, scratch, wanted: [build(scratch, part) for part in wanted])
        entries = run(build_part, str(temp), list(range(parts)))
        for leftover in [*temp.glob("*.npy"), *temp.glob("*.arrow"), temp / "about.json"]:
            leftover.unlink()
        partitioner = {"method": chosen, "requested": method, "reason": reason, "seed": seed}
        manifest = _manifest(graph, cleaned, owners, entries, partitioner)
        manifest["peak"] = watch.peaks()
        _write_manifest(temp, manifest)
        _put_in_place(temp, target)
    except OSError as error:
        raise InputError(f"cannot write the store: {error.strerror or error}", file=str(out)) from error
    finally:
        watch.close()
        shutil.rmtree(temp, ignore_errors=True)
    return summarise(manifest)


def _choose(method: str, cleaned: CleanGraph, parts: int, memory_gb: float | None) -> tuple[str, str]:
    """The method and why."""
    if method != "auto":
        return method, "asked for"
    if parts == 1:
        return "random", "one part holds everything"
    directed = len(cleaned.indices)
    if importlib.util.find_spec("pymetis") is None:
        return "stream", "pymetis is not installed"
    if directed > METIS_EDGES:
        return "stream", f"{directed} directed edges are more than METIS does in a minute ({METIS_EDGES})"
    needed = directed * METIS_BYTES_PER_EDGE / 1e9
    if memory_gb is not None and needed > memory_gb:
        return "stream", f"METIS would need about {needed:.1f} GB, --memory is {memory_gb:g}"
    return "metis", f"{directed} directed edges: METIS has the better cut and takes seconds"


def _manifest(graph: Graph, cleaned: CleanGraph, owners: np.ndarray, entries: list[dict[str, Any]],
              partitioner: dict[str, Any]) -> dict[str, Any]:
    rows = np.repeat(np.arange(cleaned.num_nodes, dtype=np.int32), np.diff(cleaned.indptr))
    cut = int((owners[rows] != owners[cleaned.indices]).sum())
    sizes = np.array([e["rows"] for e in entries])
    edges = np.array([e["directed_edges"] for e in entries])
    sends = sum(e["sends"] for e in entries)
    columns = max(graph.num_classes, 1)
    kind = None
    if graph.features is not None:
        kind = "sparse" if isinstance(graph.features, SparseFeatures) else "dense"
    return {
        "format_version": FORMAT_VERSION,
        "name": graph.name,
        "fingerprint": fingerprint(cleaned, graph),
        "num_nodes": cleaned.num_nodes,
        "num_edges": cleaned.num_edges,
        "num_features": graph.num_features,
        "feature_kind": kind,
        "num_classes": graph.num_classes,
        "class_names": graph.class_names,
        "has_labels": graph.labels is not None,
        "has_split": graph.split is not None,
        "partitioner": partitioner,
        "cleaned": cleaned.counts,
        "cut_fraction": cut / max(len(cleaned.indices), 1),
        "balance": {"rows": float(sizes.max() / sizes.mean()), "edges": float(edges.max() / max(edges.mean(), 1e-9))},
        "halo_rows": int(sum(e["halo"] for e in entries)),
        "bytes_per_round": {str(b): sends * row_bytes(columns, b) for b in (2, 4, 32)},
        "parts": entries,
    }


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    with open(folder / MANIFEST, "w", encoding="utf-8") as out:
        json.dump(manifest, out, indent=1)
        out.write("\n")
        out.flush()
        os.fsync(out.fileno())
    for part in range(len(manifest["parts"])):
        _sync_folder(folder / part_folder(part))
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put_in_place(temp: Path, target: Path) -> None:
    """Rename the finished folder; an older store is removed only once the new one is complete."""
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        os.rename(target, old)
    os.rename(temp, target)
    _sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)
