# SPDX-License-Identifier: Apache-2.0
"""Generated graphs: exact counts, homophily, degree tail, and how much features and edges tell about classes.

    python tests/unit/test_data_synthetic.py arxiv          prints the figures quoted in data/synthetic.py
"""
from __future__ import annotations

import resource
import sys
import time

import numpy as np
import pytest
import scipy.sparse as sp

from qgnn_dist.data import load_graph
from qgnn_dist.data.graph import TEST, TRAIN, VALID, Graph
from qgnn_dist.data.synthetic import SHAPES, BlockModel, parse_shape
from qgnn_dist.errors import InputError

DEMO = "synthetic:sbm?nodes=20000&edges=120000&features=64&classes=10&seed=0"


def linear_accuracy(x: np.ndarray, graph: Graph) -> float:
    """Test accuracy of the linear classifier that is best for Gaussian classes of equal covariance, closed form."""
    assert graph.labels is not None
    assert graph.split is not None
    train, test = np.flatnonzero(graph.split == TRAIN), np.flatnonzero(graph.split == TEST)
    labels, features = graph.labels[train], x[train].astype(np.float64)
    counts = np.bincount(labels, minlength=graph.num_classes)
    means = np.zeros((graph.num_classes, x.shape[1]))
    np.add.at(means, labels, features)
    means /= counts[:, None]
    features -= means[labels]
    covariance = features.T @ features / len(train)
    covariance += 1e-3 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    weights = np.linalg.solve(covariance, means.T)
    bias = np.log(counts / counts.sum()) - 0.5 * (means.T * weights).sum(axis=0)
    return float((np.argmax(x[test] @ weights + bias, axis=1) == graph.labels[test]).mean())


def adjacency(graph: Graph) -> sp.csr_matrix:
    matrix = sp.csr_matrix((graph.num_nodes, graph.num_nodes), dtype=np.float32)
    pieces = [edges.astype(np.int32) for edges in graph.edges()]
    source, target = np.concatenate(pieces, axis=1)
    del pieces
    ones = np.ones(len(source), np.float32)
    matrix = sp.coo_matrix((ones, (source, target)), matrix.shape).tocsr()
    return matrix + matrix.T


def propagated(neighbours: sp.csr_matrix, x: np.ndarray, steps: int = 10, alpha: float = 0.1) -> np.ndarray:
    """APPNP's propagation of the features."""
    degree = np.asarray(neighbours.sum(axis=1)).ravel()
    scale = (1 / np.sqrt(degree + 1)).astype(np.float32)[:, None]
    h = x
    for _ in range(steps):
        scaled = scale * h
        h = (1 - alpha) * scale * (neighbours @ scaled + scaled) + alpha * x
    return h


def measure(source: str) -> dict[str, float]:
    start = time.perf_counter()
    graph = load_graph(source)
    loaded = time.perf_counter()
    count = same = 0
    assert graph.labels is not None
    for edges in graph.edges():
        count += edges.shape[1]
        same += int((graph.labels[edges[0]] == graph.labels[edges[1]]).sum())
    passed = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    neighbours = adjacency(graph)
    degree = np.asarray(neighbours.sum(axis=1)).ravel()
    assert isinstance(graph.features, np.ndarray)
    return {
        "edges": count,
        "homophily": same / count,
        "mean degree": float(degree.mean()),
        "median degree": float(np.median(degree)),
        "max degree": float(degree.max()),
        "isolated": float((degree == 0).mean()),
        "largest class": float(np.bincount(graph.labels).max() / graph.num_nodes),
        "features alone": linear_accuracy(graph.features, graph),
        "propagated": linear_accuracy(propagated(neighbours, graph.features), graph),
        "seconds load": loaded - start,
        "seconds edges": passed - loaded,
        "GiB": peak,
    }


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        figures = measure(DEMO if argument == "demo" else f"synthetic:{argument}")
        print(argument, {key: round(value, 3) for key, value in figures.items()}, flush=True)
