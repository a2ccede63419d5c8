# SPDX-License-Identifier: Apache-2.0
"""Graphs near the one that a model was trained on: what frozen ranges have to stand."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ..data.graph import Graph, SparseFeatures

__all__ = ["SHIFTS", "without_edges", "write_shifted"]

EDGES_LEFT_OUT = 0.1


def scaled(graph: Graph, factor: float) -> Graph:
    """The same graph, every feature times `factor`."""
    features = graph.features
    if isinstance(features, SparseFeatures):
        features = dataclasses.replace(features, values=features.values * np.float32(factor))
    elif features is not None:
        features = np.asarray(features, np.float32) * np.float32(factor)
    return dataclasses.replace(graph, features=features)


def without_edges(graph: Graph, share: float = EDGES_LEFT_OUT) -> Graph:
    """The same graph less about `share` of its undirected edges; which ones depends on their ends' indices alone."""
    def edges() -> Iterator[np.ndarray]:
        for chunk in graph.edges():
            yield chunk[:, _hashed(chunk, graph.num_nodes) >= share]

    return dataclasses.replace(graph, edges=edges)


def _hashed(chunk: np.ndarray, num_nodes: int) -> np.ndarray:
    """A number in [0, 1) for each edge, the same in both directions: splitmix64's finish (Steele et al., 2014)."""
    x = chunk.min(0).astype(np.uint64) * np.uint64(num_nodes) + chunk.max(0).astype(np.uint64)
    x += np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    uniform: np.ndarray = (x ^ (x >> np.uint64(31))).astype(np.float64) / 2.0**64
    return uniform


SHIFTS: dict[str, Callable[[Graph], Graph]] = {
    "features x 0.5": lambda graph: scaled(graph, 0.5), "features x 2": lambda graph: scaled(graph, 2.0),
    "10 % of edges removed": without_edges}
"""What a table calls a shift → the graph after it."""


def write_shifted(source: str, folder: Path, root: str | Path | None) -> None:
    """Write a store of one part for each of SHIFTS, `folder`/0, 1, …"""
    from ..data.load import load_graph
    from ..partitioning.api import partition_graph

    graph = load_graph(source, root=root)
    for number, change in enumerate(SHIFTS.values()):
        partition_graph(change(graph), parts=1, out=folder / str(number), overwrite=True)
