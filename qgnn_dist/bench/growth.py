# SPDX-License-Identifier: Apache-2.0
"""`qgnn bench growth`: memory, bytes and time of training as the graph grows, and as the workers do."""
from __future__ import annotations

import math
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import RunConfig, load_config
from ..data.synthetic import SHAPES, generate, parse_shape
from ..partitioning.api import partition_graph
from ..store.reader import Store
from .beside import SETTINGS
from .folder import table_folder
from .netns import bits_per_second
from .ranks import Loopback, Ranks
from .written import Tables, figure_of, write_bench

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw", "fits", "fitted_slope", "growth", "tables"]

EDGES, WORKERS = (1_000_000, 10_000_000, 100_000_000), (1, 2, 4, 8)
_FITTED = {"memory": "anon_bytes", "bytes": "wire_bytes", "seconds": "epoch_s"}
_BY = {"edges": "edges", "workers": "workers"}


def growth(*, out: str | Path, edges: Sequence[int] = EDGES, workers: Sequence[int] = WORKERS,
           fixed_edges: int | None = None, edge_workers: int = 2, degree: float = 50.0, method: str = "stream",
           settings: Sequence[str] = (), link: str = "1gbit", epochs: int = 3, threads: int = 1, pictures: bool = True,
           overwrite: bool = False, on_step: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Train block models of products' features, classes and degree: several sizes at `edge_workers` workers, then one
    size at several numbers of workers, each worker a process of its own on this machine.

    Args:
        edges: sizes, undirected. workers: numbers of workers at `fixed_edges`, default the first of `edges`.
        degree: mean, of directed edges. method: who owns a node. settings: `section.key=value` words.
        link: of a worker in the model of time, as `tc` writes it. epochs: timed, after one that warms up.
    Returns: {machine, commit, versions, rows, fits}. A row has `series` (edges or workers), `anon_bytes` (of each
        worker, its peak above the idle process), `wire_bytes` (of each worker, an epoch), `epoch_s` and
        `epoch_how`: measured where every thread has a core, else modelled: the largest worker's CPU seconds, and its
        bytes at the link's rate, one after the other. `fits`: series → figure → slope of log on log.
    Raises: InputError: the output exists, or a size of no use.
    """
    say = on_step or (lambda _: None)
    target = table_folder(out, "growth", overwrite=overwrite, pictures=pictures)
    rate = bits_per_second(link)
    config = load_config(overrides=[*SETTINGS, "timeouts.exchange_s=600", "timeouts.server_s=600", *settings])
    cases = [("edges", count, edge_workers) for count in edges]
    cases += [("workers", fixed_edges or edges[0], count) for count in workers]
    rows: list[dict[str, Any]] = []
    for series, count, size in cases:
        same = next((row for row in rows if (row["asked_edges"], row["workers"]) == (count, size)), None)
        if same is not None:
            rows.append({**same, "series": series})
            continue
        with tempfile.TemporaryDirectory(prefix="qgnn-bench-") as scratch:
            row = _row(Path(scratch), count, size, degree, method, config, rate, epochs, threads, say)
        rows.append({"series": series, "asked_edges": count, **row})
    found = fits(rows)
    return write_bench("growth", target, rows, "Growth", _INTRO, tables(rows, found),
                       draw(rows, found) if pictures else None, fits=found, link=link)


_INTRO = (
    "Block models with the features, classes and mean degree of products. Memory: peak of anonymous memory of the"
    " largest worker, above the same process with its libraries loaded and nothing read; measured. MB: what the "
    "busiest worker sends in an epoch; measured. Seconds of an epoch: measured where every thread has a core of "
    "its own; else modelled, as the largest worker's CPU seconds and its bytes at the link's rate, one after the "
    "other (`shared`: what it took here, cores shared). Slopes: of the logarithm on the logarithm.")


def _row(scratch: Path, edges: int, size: int, degree: float, method: str, config: RunConfig, rate: float, epochs: int,
         threads: int, say: Callable[[str], None]) -> dict[str, Any]:
    nodes = max(round(2 * edges / degree), 100)
    products = SHAPES["products"]
    name = f"{edges:,} edges, {size} worker{'s' if size > 1 else ''}"
    say(f"{name}: partitioning")
    shape = parse_shape(f"sbm?nodes={nodes}&edges={edges}&features={products.features}&classes={products.classes}")
    made = partition_graph(generate(shape), parts=size, out=scratch / "store", method=method if size > 1 else "auto")
    store = Store.open(scratch / "store")
    say(f"{name}: training")
    with Ranks(Loopback(), size, threads=threads, timeout_s=600.0) as ranks:
        training = ranks.training(store, config)
        training.epoch()
        runs = [training.epoch() for _ in range(epochs)]
        peaks = training.call("memory", timeout_s=60.0)
        idle = ranks.idle_bytes
    sent = [sum(result["wire_bytes"].values()) for result in runs[-1][1]]
    shared = statistics.median(seconds for seconds, _ in runs)
    cpu = statistics.median(max(r["cpu_s"] for r in results) for _, results in runs)
    modelled = cpu / threads + 8 * max(sent) / rate
    fits_here = size * threads <= (os.cpu_count() or 1)
    return {"shape": store.name, "nodes": store.num_nodes, "edges": store.num_edges, "workers": size,
            "threads": threads, "method": store.manifest["partitioner"]["method"],
            "cut_fraction": store.manifest["cut_fraction"], "halo_rows": store.manifest["halo_rows"],
            "partition_s": sum(made["seconds"].values()), "partition_anon_bytes": made["peak"]["peak_anon_bytes"],
            "anon_bytes": [peak["peak_anon_bytes"] - mine for peak, mine in zip(peaks, idle)],
            "wire_bytes": sent, "cpu_s": cpu, "shared_s": shared, "modelled_s": modelled,
            "epoch_s": shared if fits_here else modelled, "epoch_how": "measured" if fits_here else "modelled"}


def _largest(value: Any) -> float:
    return float(max(value)) if isinstance(value, list) else float(value)


def fits(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Series → memory, bytes, seconds → slope; what is 0 somewhere (bytes of one worker) is fitted without it."""
    found: dict[str, dict[str, float]] = {}
    for series, by in _BY.items():
        own = [row for row in rows if row["series"] == series]
        for name, key in _FITTED.items():
            slope = fitted_slope([row[by] for row in own], [_largest(row[key]) for row in own])
            if slope is not None:
                found.setdefault(series, {})[name] = slope
    return found


def fitted_slope(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Least squares of log y on log x over the points above 0; None with fewer than two different x.

    >>> fitted_slope([1, 10, 100], [3, 30, 300])
    1.0
    """
    points = [(math.log(a), math.log(b)) for a, b in zip(x, y) if a > 0 and b > 0]
    if len({a for a, _ in points}) < 2:
        return None
    return round(float(np.polyfit([a for a, _ in points], [b for _, b in points], 1)[0]), 6)


def tables(rows: Sequence[dict[str, Any]], found: dict[str, dict[str, float]]) -> Tables:
    """A table for each series, and one of the slopes."""
    columns = ["edges", "nodes", "workers", "cut, %", "partition, s", "its memory, MiB", "a worker's memory, MiB",
               "MB an epoch", "s an epoch", "how", "shared, s"]
    result: Tables = []
    for series, title in (("edges", "By the graph's size"), ("workers", "By the number of workers")):
        own = [row for row in rows if row["series"] == series]
        if own:
            result.append((title, columns, [[
                f"{row['edges']:,}", f"{row['nodes']:,}", str(row["workers"]), f"{100 * row['cut_fraction']:.1f}",
                f"{row['partition_s']:.1f}", f"{row['partition_anon_bytes'] / 2**20:.0f}",
                f"{max(row['anon_bytes']) / 2**20:.1f}", f"{max(row['wire_bytes']) / 1e6:.1f}",
                f"{row['epoch_s']:.3f}", row["epoch_how"], f"{row['shared_s']:.3f}"] for row in own]))
    if found:
        result.append(("Fitted slopes", ["by", *_FITTED], [
            [series, *(f"{own[name]:.2f}" if name in own else "–" for name in _FITTED)]
            for series, own in found.items()]))
    return result


def draw(rows: Sequence[dict[str, Any]], found: dict[str, dict[str, float]]) -> Figure:
    """Memory, bytes and seconds of the largest worker, on logarithmic axes; hollow points are modelled."""
    shown = [series for series in _BY if any(row["series"] == series for row in rows)]
    figure, panels = figure_of(3 * len(shown), width=3.2)
    labels = {"memory": ("a worker's memory, MiB", 2**20), "bytes": ("MB a worker sends an epoch", 1e6),
              "seconds": ("s an epoch", 1.0)}
    for number, series in enumerate(shown):
        own = sorted((row for row in rows if row["series"] == series), key=lambda row: row[_BY[series]])
        for axes, (name, key) in zip(panels[3 * number:], _FITTED.items()):
            label, unit = labels[name]
            points = [(row[_BY[series]], _largest(row[key]) / unit, row["epoch_how"]) for row in own]
            points = [point for point in points if point[1] > 0]
            axes.plot([x for x, _, _ in points], [y for _, y, _ in points], color="#0072B2", linewidth=0.9)
            for x, y, how in points:
                hollow = name == "seconds" and how == "modelled"
                axes.plot(x, y, "o", color="#0072B2", markersize=5, markerfacecolor="white" if hollow else "#0072B2")
            axes.set_xscale("log", base=10 if series == "edges" else 2)
            axes.set_yscale("log")
            slope = found.get(series, {}).get(name)
            axes.set_title(label + ("" if slope is None else f", slope {slope:.2f}"), fontsize=8, loc="left")
            axes.set_xlabel(f"{series}" + (f", {own[0]['workers']} workers" if series == "edges" else
                                           f", {own[0]['edges']:,} edges"), fontsize=8)
    return figure
