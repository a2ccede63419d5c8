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


def test_demo_graph_learns_from_edges() -> None:
    """The demo's graph: propagation lands in 65-85 %, features alone at least 10 points lower; quickly made."""
    figures = measure(DEMO)
    print(figures)
    assert figures["edges"] == 120_000
    assert abs(figures["homophily"] - 0.65) < 0.001
    assert figures["max degree"] > 30 * figures["mean degree"]
    assert figures["median degree"] < 0.75 * figures["mean degree"]
    assert 0.65 <= figures["propagated"] <= 0.85
    assert figures["propagated"] - figures["features alone"] >= 0.10
    assert figures["features alone"] > 0.3
    assert figures["seconds load"] + figures["seconds edges"] < 5


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("query", ["nodes=3000&classes=5&edges=18000", "nodes=6000&classes=20&features=32"])
def test_small_graphs_keep_the_gap(query: str, seed: int) -> None:
    figures = measure(f"synthetic:sbm?{query}&seed={seed}")
    assert abs(figures["homophily"] - 0.65) < 0.03
    assert 0.65 <= figures["propagated"] <= 0.85
    assert figures["propagated"] - figures["features alone"] >= 0.10


def all_edges(graph: Graph) -> np.ndarray:
    return np.concatenate(list(graph.edges()), axis=1)


def test_edges_are_distinct_and_exactly_as_many_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qgnn_dist.data.synthetic.CHUNK_EDGES", 1000)
    graph = load_graph("synthetic:sbm?nodes=2500&edges=30000&classes=6&seed=4&homophily=0.8")
    chunks = list(graph.edges())
    assert len(chunks) > 10
    assert all(chunk.dtype == np.int64 and chunk.shape[0] == 2 for chunk in chunks)
    edges = np.concatenate(chunks, axis=1)
    assert edges.shape == (2, 30_000)
    assert edges.min() >= 0
    assert edges.max() < 2500
    assert (edges[0] != edges[1]).all()
    assert len(np.unique(edges.min(axis=0) * 2500 + edges.max(axis=0))) == 30_000
    assert graph.labels is not None
    assert (graph.labels[edges[0]] == graph.labels[edges[1]]).sum() == 24_000
    # Both directions occur, so the graph is no pre-sorted triangle.
    assert 0.4 < (edges[0] < edges[1]).mean() < 0.6


def test_dense_graph_fills_up_without_weights() -> None:
    """Hubs run out of neighbours: the last pairs are drawn evenly, and the count still holds."""
    graph = load_graph("synthetic:sbm?nodes=120&edges=1400&classes=3&features=8")
    edges = all_edges(graph)
    assert len(np.unique(edges.min(axis=0) * 120 + edges.max(axis=0))) == 1400


def test_seed_decides_everything() -> None:
    source = "synthetic:sbm?nodes=2000&edges=8000&features=12&classes=4"
    one, same, other = load_graph(f"{source}&seed=5"), load_graph(f"{source}&seed=5"), load_graph(f"{source}&seed=6")
    assert np.array_equal(all_edges(one), all_edges(one))
    for name in ("features", "labels", "split"):
        assert np.array_equal(getattr(one, name), getattr(same, name))
        assert not np.array_equal(getattr(one, name), getattr(other, name))
    assert np.array_equal(all_edges(one), all_edges(same))
    assert not np.array_equal(all_edges(one), all_edges(other))


def test_features_do_not_depend_on_where_they_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    source = "synthetic:sbm?nodes=2000&features=12&classes=4"
    kept = load_graph(source).features
    monkeypatch.setattr("qgnn_dist.data.arrays.IN_MEMORY_BYTES", 1000)
    mapped = load_graph(source).features
    assert isinstance(mapped, np.memmap)
    assert np.array_equal(kept, mapped)
    assert mapped.dtype == np.float32
    assert abs(float((mapped**2).mean()) - 1) < 0.2
    assert 0.3 < (mapped < 0).mean() < 0.7


def test_blocks_and_split() -> None:
    shape = parse_shape("sbm?nodes=4000&classes=8")
    model = BlockModel(shape)
    assert all(len(np.unique(model.block[model.labels == c])) >= 20 for c in range(8))
    split = load_graph("synthetic:sbm?nodes=4000&classes=8").split
    assert split is not None
    assert [int((split == number).sum()) for number in (TRAIN, VALID, TEST)] == [2000, 800, 1200]


def test_named_shapes_have_the_real_counts() -> None:
    arxiv, products = SHAPES["arxiv"], SHAPES["products"]
    assert (arxiv.nodes, arxiv.edges, arxiv.features, arxiv.classes) == (169_343, 1_166_243, 128, 40)
    assert (products.nodes, products.edges, products.features, products.classes) == (2_449_029, 61_859_140, 100, 47)
    assert (arxiv.homophily, products.homophily) == (0.65, 0.81)


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("synthetic:arxif", ["arxif", "did you mean 'arxiv'?"]),
        ("synthetic:sbm?node=100", ["node", "did you mean 'nodes'?"]),
        ("synthetic:arxiv?nodes=5", ["nodes", "arxiv knows seed"]),
        ("synthetic:sbm?nodes=many", ["nodes=many", "whole number"]),
        ("synthetic:sbm?homophily=1.5", ["homophily=1.5", "less than 1"]),
        ("synthetic:sbm?classes=1", ["classes=1", "at least 2"]),
        ("synthetic:sbm?nodes=100&classes=10", ["nodes=100", "classes=10", "200"]),
        ("synthetic:sbm?nodes=1000&edges=400000", ["edges=400000", "1000 nodes", "fewer edges"]),
    ],
)
def test_wrong_sources_get_one_line(source: str, parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        load_graph(source)
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        figures = measure(DEMO if argument == "demo" else f"synthetic:{argument}")
        print(argument, {key: round(value, 3) for key, value in figures.items()}, flush=True)
