# SPDX-License-Identifier: Apache-2.0
"""`qgnn bench partition`: cuts of one graph beside each other: what they cut, hold and take."""
from __future__ import annotations

import importlib
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.graph import TRAIN
from ..errors import InputError, QgnnError
from ..partitioning.api import METHODS
from ..partitioning.balance import Balance, loads_of
from .folder import table_folder
from .footprint import measure_apart

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw", "markdown", "partition", "table"]

BLOCK_NODES = 1 << 16
"""Nodes whose edges are looked at together when a cut is counted."""
_LIBRARIES = {"metis": "pymetis", "mtkahypar": "mtkahypar"}
"""What others' methods import, which is loaded before anything is timed."""
COLUMNS = {"cut": "cut", "largest cut": "cut_max", "seconds": "seconds_median", "against METIS": "speedup",
           "of processor": "cpu_s_median", "against METIS'": "cpu_speedup",
           "peak, MiB": "peak_bytes", "graph, MiB": "input_bytes", "nodes": "balance_nodes", "edges": "balance_edges",
           "training": "balance_train"}
"""Heading of a table → key of a row."""


def partition(source: str, *, out: str | Path, methods: Sequence[str] | None = None, parts: int = 8, seeds: int = 5,
              balance: float | None = None, edge_balance: float | None = None, pictures: bool = True,
              overwrite: bool = False, on_step: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Cut one graph by every method and seed, each in a process of its own, methods in turns.

    Args:
        source: a graph source; its edges and training nodes are used. methods: default all that are installed.
        balance, edge_balance: of `stream`, as `qgnn partition` has them.
    Returns: {machine, commit, versions, rows}, a row a method: `cut` (share of the edges, mean over seeds), `cut_max`,
        `seconds_median`, `seconds_min`, `cpu_s_median` (of the processor: what others on it take counts less),
        `peak_bytes` (the most, above an idle process, the graph's `input_bytes` included), `balance_nodes`,
        `balance_edges`, `balance_train` (the largest part over the mean, the worst seed), against METIS where it ran
        `cut_ratio`, `speedup`, `cpu_speedup` (medians over seeds) and `memory_ratio`; or `why` not.
    Raises: InputError: the output exists, an unknown method, or no matplotlib for pictures.
    """
    from ..files.write import write_atomically
    from .machine import envelope

    say = on_step or (lambda _: None)
    chosen = list(dict.fromkeys(methods or _installed()))
    unknown = [name for name in chosen if name not in METHODS]
    if unknown:
        raise InputError(f"--method {unknown[0]}: expected {', '.join(METHODS)}")
    target = table_folder(out, "partition", overwrite=overwrite, pictures=pictures)
    asked: dict[str, Any] = {name: value for name, value in (("nodes", balance), ("edges", edge_balance))
                             if value is not None}
    Balance(**asked)
    with tempfile.TemporaryDirectory(prefix="qgnn-bench-") as scratch:
        head = _spool(source, Path(scratch), parts, say)
        runs = _turns(scratch, chosen, parts, seeds, asked, say)
    rows = [{**head, "system": name if name in _LIBRARIES else f"qgnn-{name}", "method": name, **_row(runs[name])}
            for name in chosen]
    _compare(rows, runs)
    result = {"schema": 1, "bench": "partition", **envelope(rows)}
    target.mkdir(parents=True, exist_ok=True)
    write_atomically(target / "table.json", (json.dumps(result, indent=2) + "\n").encode())
    write_atomically(target / "table.md", markdown(result).encode())
    files = [target / "table.md", target / "table.json"]
    if pictures:
        from .pictures import save_figure

        files += save_figure(draw(rows), target / "cuts")
    return {**result, "files": [str(file) for file in files]}


def _installed() -> list[str]:
    return [name for name in METHODS if name not in _LIBRARIES or importlib.util.find_spec(_LIBRARIES[name])]


def _spool(source: str, scratch: Path, parts: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Write the graph as arrays; returns how every row begins."""
    from ..data.load import load_graph
    from ..partitioning.clean import clean

    graph = load_graph(source, progress=say)
    if not 2 <= parts <= graph.num_nodes:
        raise InputError(f"--parts {parts}: expected 2 to {graph.num_nodes}, the number of nodes")
    cleaned = clean(graph)
    np.save(scratch / "indptr.npy", cleaned.indptr)
    np.save(scratch / "indices.npy", cleaned.indices)
    if graph.split is not None:
        np.save(scratch / "train.npy", (graph.split == TRAIN).astype(np.uint8))
    return {"shape": graph.name, "nodes": cleaned.num_nodes, "edges": cleaned.num_edges, "parts": parts, "threads": 1}


def _turns(scratch: str, methods: Sequence[str], parts: int, seeds: int, asked: Mapping[str, float],
           say: Callable[[str], None]) -> dict[str, list[dict[str, Any]]]:
    """What each method found, a run a seed; one that failed has `why` and is not tried again."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
    for seed in range(seeds):
        for name in methods:
            if any("why" in run for run in runs[name]):
                continue
            say(f"{name}, seed {seed}")
            try:
                runs[name].append(measure_apart(_prepare, scratch, name, parts, seed, dict(asked),
                                                modules=["qgnn_dist.partitioning.api"]))
            except QgnnError as error:
                runs[name].append({"why": str(error)})
    return runs


def _prepare(scratch: str, method: str, parts: int, seed: int, asked: Mapping[str, float]) -> Callable[[], Any]:
    """Load the graph and the method's library; what it returns is timed inside."""
    if method in _LIBRARIES:
        importlib.import_module(_LIBRARIES[method])
    indptr, indices = (np.load(Path(scratch) / f"{name}.npy") for name in ("indptr", "indices"))
    file = Path(scratch) / "train.npy"
    train = np.load(file) if file.exists() else None
    balance = Balance(train=train, **asked)

    def run() -> dict[str, Any]:
        start, worked = time.perf_counter(), time.process_time()
        owners, _ = METHODS[method](indptr, indices, parts, seed, balance)
        seconds, worked = time.perf_counter() - start, time.process_time() - worked
        loads = loads_of(owners, indptr, train, parts)
        worst = loads.max(0) / np.maximum(loads.mean(0), 1e-9)
        return {"seconds": seconds, "cpu_s": worked, "cut": _cut(indptr, indices, owners), "balance": worst.tolist()}

    return run


def _cut(indptr: np.ndarray, indices: np.ndarray, owners: np.ndarray) -> float:
    """Share of the edges between parts."""
    apart = 0
    for begin in range(0, len(owners), BLOCK_NODES):
        bounds = indptr[begin:begin + BLOCK_NODES + 1]
        rows = np.repeat(owners[begin:begin + BLOCK_NODES], np.diff(bounds))
        apart += int(np.count_nonzero(rows != owners[indices[bounds[0]:bounds[-1]]]))
    return apart / max(len(indices), 1)


def _row(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    failed = [run["why"] for run in runs if "why" in run]
    if failed:
        return {"why": failed[0], "repeats": 0}
    cuts, seconds = ([run[key] for run in runs] for key in ("cut", "seconds"))
    worst = {f"balance_{name}": max(run["balance"][kind] for run in runs)
             for kind, name in enumerate(("nodes", "edges", "train"))}
    return {"repeats": len(runs), "cut": statistics.fmean(cuts), "cut_max": max(cuts), "cuts": cuts,
            "seconds_median": statistics.median(seconds), "seconds_min": min(seconds),
            "cpu_s_median": statistics.median(run["cpu_s"] for run in runs),
            **{key: max(run[key] for run in runs) for key in ("peak_bytes", "input_bytes")}, **worst}


def _compare(rows: Sequence[dict[str, Any]], runs: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """Each measured row against METIS' in the same turns."""
    theirs = next((row for row in rows if row["method"] == "metis" and "cut" in row), None)
    for row in rows:
        if theirs is None or "cut" not in row:
            continue
        turns = list(zip(runs["metis"], runs[row["method"]]))
        row |= {"cut_ratio": row["cut"] / max(theirs["cut"], 1e-12),
                **{name: statistics.median(a[key] / max(b[key], 1e-9) for a, b in turns)
                   for name, key in (("speedup", "seconds"), ("cpu_speedup", "cpu_s"))},
                "memory_ratio": row["peak_bytes"] / max(theirs["peak_bytes"], 1)}


def table(result: dict[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """Title, headings and lines; columns that no row has are left out."""
    rows = result["rows"]
    first = rows[0]
    there = {name: key for name, key in COLUMNS.items() if any(row.get(key) for row in rows)}
    title = f"{first['shape']}, {first['nodes']} nodes, {first['edges']} edges, {first['parts']} parts"
    return title, ["method", *there], [[row["method"], *_texts(row, there.values())] for row in rows]


def _texts(row: dict[str, Any], keys: Sequence[str] | Any) -> Iterator[str]:
    for key in keys:
        value = row.get(key)
        if value is None:
            yield row["why"] if key == "cut" and "why" in row else "–"
        elif key.endswith("_bytes"):
            yield f"{value / 2**20:.0f}"
        elif key == "cut" and "cut_ratio" in row and row["method"] != "metis":
            yield f"{value:.4f} ({row['cut_ratio']:.2f}×)"
        elif key in ("cut", "cut_max"):
            yield f"{value:.4f}"
        else:
            yield f"{value:.1f}×" if key.endswith("speedup") else f"{value:.2f}"


def markdown(result: dict[str, Any]) -> str:
    """table.md."""
    machine, (title, columns, lines) = result["machine"], table(result)
    seeds = max(row["repeats"] for row in result["rows"])
    rule = [":---", *["---:"] * (len(columns) - 1)]
    return "\n".join([
        f"# {title}", "",
        f"Cut: share of the edges between parts, mean and largest over {seeds} seeds (× METIS'). Seconds: median, by "
        "the clock and of the processor; against METIS: median over turns. Peak: resident, in a process of its own, "
        "above an idle one, the graph in it included. Nodes, edges, training nodes: the largest part over the mean, "
        "the worst seed.", "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']:g} GiB; commit "
        f"{result['commit'] or 'unknown'}; "
        f"{', '.join(f'{name} {version}' for name, version in result['versions'].items())}.", "",
        *(f"| {' | '.join(words)} |" for words in (columns, rule, *lines))]) + "\n"


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """Cut, seconds, memory and the largest part's edges, a panel each, a bar a method."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = {"cut": ("cut, share of the edges", 1.0), "seconds_median": ("seconds", 1.0),
              "peak_bytes": ("peak memory, MiB", 2.0**-20), "balance_edges": ("edges of the largest part / mean", 1.0)}
    measured = [row for row in rows if "cut" in row]
    figure = Figure(figsize=(11, 0.5 * len(measured) + 1.4), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06))
    for axes, (key, (label, unit)) in zip(figure.subplots(1, len(panels), sharey=True), panels.items()):
        values = [row[key] * unit for row in measured]
        bars = axes.barh([row["method"] for row in measured], values, height=0.6,
                         color=["#b8b8b8" if row["method"] == "metis" else "#0072B2" for row in measured])
        axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, fontsize=8)
        axes.set_title(label, fontsize=10, loc="left")
        axes.margins(x=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    figure.supxlabel(f"{rows[0]['shape']}, {rows[0]['parts']} parts; grey: METIS", fontsize=8, color="#555555")
    return figure
