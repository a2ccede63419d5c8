# SPDX-License-Identifier: Apache-2.0
"""`qgnn bench baselines`: test accuracy against seconds of training, of what else one machine could do.

Beside our full-graph training, two ways that need no messages between hosts: SIGN (Rossi et al., 2020), which mixes
neighbours into the features once and trains a perceptron, and GraphSAGE (Hamilton et al., NeurIPS 2017) on sampled
neighbourhoods, as PyG has them. Legend: n nodes, F features, C classes.
"""
from __future__ import annotations

import importlib.util
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout, relu

from .. import kernels
from ..config import load_config
from ..errors import InputError
from ..store.reader import Store
from ..training.metrics import figures
from .beside import SETTINGS
from .folder import table_folder
from .sign import Sign, mixed_features
from .source import has_test, open_source
from .stock import product_of
from .task import Task
from .training import OwnTraining
from .written import Tables, figure_of, write_bench

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SYSTEMS", "baselines", "draw", "summary", "tables"]

Point = tuple[float, float, float]
"""Seconds of training so far, and accuracies of validation and test."""
SYSTEMS = ("qgnn-int2", "qgnn-fp32", "sign", "sage-sampled")
HOPS, SIGN_BATCH = 4, 8192
FAN_OUT, SAGE_BATCH = (15, 10), 1024
SHARES = (0.95, 0.99)
"""Of the best accuracy that any system reaches: how long each takes to be there."""


def baselines(source: str, *, out: str | Path, systems: Sequence[str] | None = None, seconds: float = 120.0,
              threads: int = 0, hidden: int = 256, layers: int = 10, pictures: bool = True, overwrite: bool = False,
              on_step: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Train each system for so many seconds on one machine, one after the other.

    Args:
        source: as of `qgnn bench train`. systems: of SYSTEMS, default all. seconds: of training, SIGN's mixing
            included; evaluations come on top and are not counted. hidden: of all. layers: K of ours.
    Returns: {machine, commit, versions, rows}; a row has `curve` (seconds, validation and test accuracy), the test
        accuracy at the best validation figure, `seconds_to` shares of the best system's, or `why` there is none.
    Raises: InputError: the output exists, an unknown system, or a source that does not serve.
    """
    say = on_step or (lambda _: None)
    chosen = list(systems or SYSTEMS)
    unknown = [name for name in chosen if name not in SYSTEMS]
    if unknown:
        raise InputError(f"--system {unknown[0]}: expected {', '.join(SYSTEMS)}")
    target = table_folder(out, "baselines", overwrite=overwrite, pictures=pictures)
    count = threads or os.cpu_count() or 1
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="qgnn-bench-") as scratch:
        store = open_source(source, Path(scratch), None, say)
        if not has_test(store):
            raise InputError("no test node has a label, and systems are compared by those; call some valid nodes test",
                             file=str(store.path))
        for name in chosen:
            say(f"{name}: training for {seconds:g} s")
            torch.set_num_threads(count)
            kernels.set_threads(count)
            torch.manual_seed(0)
            head = {"system": name, "shape": store.name, "nodes": store.num_nodes, "edges": store.num_edges,
                    "threads": count, "hidden": hidden}
            why = _absent(name)
            rows.append({**head, "why": why} if why else
                        {**head, "curve": _curve(_epochs(name, store, count, hidden, layers), seconds, name, say)})
    summary(rows)
    measured = any("curve" in row for row in rows)
    return write_bench("baselines", target, rows, "Time to accuracy on one machine", _INTRO, tables(rows),
                       draw(rows) if pictures and measured else None, seconds=seconds)


_INTRO = (f"qgnn: full-graph training, features to classes, as `qgnn train` with one part. sign: {HOPS} hops of Â "
          f"mixed into the features once, then a perceptron in batches of {SIGN_BATCH} training nodes. sage-sampled: "
          f"PyG's SAGEConv, two layers, {FAN_OUT[0]} and {FAN_OUT[1]} sampled neighbours, batches of {SAGE_BATCH}. "
          "Seconds of training, with SIGN's mixing and without evaluations; test accuracy at the best validation "
          "figure.")


def _absent(name: str) -> str:
    """Why a system cannot run here."""
    if name == "sage-sampled" and not any(importlib.util.find_spec(m) for m in ("pyg_lib", "torch_sparse")):
        return "not measured: PyG's sampler needs pyg-lib or torch-sparse"
    return ""


def _curve(epochs: Iterator[Point], limit: float, name: str, say: Callable[[str], None]) -> list[Point]:
    found: list[Point] = []
    for point in epochs:
        found.append(point)
        say(f"{name}: {point[0]:.0f} of {limit:g} s, {100 * point[2]:.1f} %")
        if point[0] >= limit:
            break
    return found


def _epochs(name: str, store: Store, threads: int, hidden: int, layers: int) -> Iterator[Point]:
    if name.startswith("qgnn-"):
        return _own(store, threads, 2 if name == "qgnn-int2" else 32, hidden, layers)
    return (_sign if name == "sign" else _sage)(Task(store, "none"), hidden)


def _own(store: Store, threads: int, bits: int, hidden: int, layers: int) -> Iterator[Point]:
    config = load_config(overrides=[*SETTINGS, f"quant.bits={bits}", f"model.hidden={hidden}",
                                    f"propagation.layers={layers}"])
    training, spent = OwnTraining(store, config, threads), 0.0
    try:
        while True:
            start = time.perf_counter()
            result = training.evaluated_epoch()
            spent += time.perf_counter() - start - result["evaluation_s"]
            accuracy, _ = figures([result["evaluation"]], "accuracy")
            yield spent, accuracy["valid"], accuracy["test"]
    finally:
        training.close()


def _accuracy(task: Task, scores: Tensor, name: str) -> float:
    """Of scores (n, C) on a split."""
    rows = torch.from_numpy(task.rows[name])
    return float((scores[rows].argmax(1) == task.y[rows]).float().mean())


def _sign(task: Task, hidden: int) -> Iterator[Point]:
    start = time.perf_counter()
    mixed, train = mixed_features(task, HOPS), torch.from_numpy(task.rows["train"])
    model = Sign(task.x.shape[1], hidden, task.classes, HOPS, 0.5, batch_norm=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    spent = time.perf_counter() - start
    while True:
        start = time.perf_counter()
        model.train()
        for rows in torch.split(train[torch.randperm(len(train))], SIGN_BATCH):
            optimizer.zero_grad()
            torch.autograd.backward(cross_entropy(model([one[rows] for one in mixed]), task.y[rows]))
            optimizer.step()
        spent += time.perf_counter() - start
        scores = model.all_rows(mixed)
        yield spent, _accuracy(task, scores, "valid"), _accuracy(task, scores, "test")


class _Sage(nn.Module):
    """Two layers of PyG's SAGEConv."""

    def __init__(self, features: int, hidden: int, classes: int) -> None:
        from torch_geometric.nn import SAGEConv

        super().__init__()
        self.first, self.second = SAGEConv(features, hidden), SAGEConv(hidden, classes)

    def forward(self, x: Tensor, edges: Any) -> Tensor:
        h = dropout(relu(self.first(x, edges)), 0.5, self.training)
        scores: Tensor = self.second(h, edges)
        return scores

    def all_rows(self, x: Tensor, mean: Callable[[Tensor], Tensor]) -> Tensor:
        """Scores of every node from all its neighbours; `mean` is that of a row's neighbours."""
        h = relu(self.first.lin_l(mean(x)) + self.first.lin_r(x))
        scores: Tensor = self.second.lin_l(mean(h)) + self.second.lin_r(h)
        return scores


def _sage(task: Task, hidden: int) -> Iterator[Point]:
    from torch_geometric.data import Data
    from torch_geometric.loader import NeighborLoader

    graph, n = task.graph, len(task.x)
    counts = np.diff(graph.indptr)
    edges = torch.from_numpy(np.stack([graph.indices.astype(np.int64), np.repeat(np.arange(n), counts)]))
    mean = product_of("torch-csr", (graph.indptr, graph.indices.astype(np.int64),
                                    np.repeat(1 / np.maximum(counts, 1), counts).astype(np.float32)))
    start = time.perf_counter()
    with warnings.catch_warnings():  # of torch-sparse, which will not always serve
        warnings.simplefilter("ignore", UserWarning)
        loader = NeighborLoader(Data(x=task.x, y=task.y, edge_index=edges), num_neighbors=list(FAN_OUT),
                                batch_size=SAGE_BATCH, input_nodes=torch.from_numpy(task.rows["train"]), shuffle=True)
    model = _Sage(task.x.shape[1], hidden, task.classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    spent = time.perf_counter() - start
    while True:
        start = time.perf_counter()
        model.train()
        for batch in loader:
            optimizer.zero_grad()
            scores = model(batch.x, batch.edge_index)[:batch.batch_size]
            torch.autograd.backward(cross_entropy(scores, batch.y[:batch.batch_size]))
            optimizer.step()
        spent += time.perf_counter() - start
        model.eval()
        with torch.no_grad():
            scores = model.all_rows(task.x, mean)
        yield spent, _accuracy(task, scores, "valid"), _accuracy(task, scores, "test")


def summary(rows: Sequence[dict[str, Any]]) -> None:
    """Put into each row its test accuracy and how soon it was at shares of the best one's."""
    measured = [row for row in rows if row.get("curve")]
    for row in measured:
        valid, test = max(((point[1], point[2]) for point in row["curve"]), key=lambda pair: pair[0])
        row |= {"valid": valid, "test": test, "epochs": len(row["curve"]), "train_s": row["curve"][-1][0]}
    best = max((row["test"] for row in measured), default=0.0)
    for row in measured:
        row["seconds_to"] = {str(share): next((point[0] for point in row["curve"] if point[2] >= share * best), None)
                             for share in SHARES}


def tables(rows: Sequence[dict[str, Any]]) -> Tables:
    """One table."""
    columns = ["system", "test, %", "epochs", "s of training",
               *(f"s to {100 * share:g} % of the best" for share in SHARES)]
    lines = []
    for row in rows:
        if "test" not in row:
            lines.append([row["system"], row.get("why", "–"), *["–"] * (len(columns) - 2)])
            continue
        reached = [row["seconds_to"][str(share)] for share in SHARES]
        lines.append([row["system"], f"{100 * row['test']:.2f}", str(row["epochs"]), f"{row['train_s']:.1f}",
                      *("never" if s is None else f"{s:.1f}" for s in reached)])
    return [(f"{rows[0]['shape']}, {rows[0]['threads']} threads", columns, lines)]


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """Test accuracy against seconds of training."""
    figure, (axes,) = figure_of(1, width=5.6)
    for row, colour in zip((row for row in rows if row.get("curve")), ("#D55E00", "#b8b8b8", "#0072B2", "#009E73")):
        axes.plot([point[0] for point in row["curve"]], [100 * point[2] for point in row["curve"]], label=row["system"],
                  color=colour, linewidth=1.2)
    axes.set_xscale("log")
    axes.set_xlabel("seconds of training", fontsize=8)
    axes.set_ylabel("test accuracy, %", fontsize=8)
    axes.set_title(f"{rows[0]['shape']}, {rows[0]['threads']} threads", fontsize=8, loc="left")
    axes.legend(frameon=False, fontsize=8)
    return figure
