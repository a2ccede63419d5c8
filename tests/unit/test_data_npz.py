# SPDX-License-Identifier: Apache-2.0
"""Graphs from .npz files: what is read, and what is refused in one line."""
from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qgnn_dist.data import ColumnNames, Graph, SparseFeatures, load_graph
from qgnn_dist.errors import InputError


def arrays(**changes: Any) -> dict[str, Any]:
    """A correct graph of 6 nodes; a change to None leaves an array out."""
    made: dict[str, Any] = {
        "edge_index": np.array([[0, 1, 2, 3, 4, 4], [1, 2, 3, 0, 4, 0]], np.int32),
        "x": np.arange(18, dtype=np.float64).reshape(6, 3) - 5,
        "y": np.array([0, 1, 2, 1, 0, -1]),
        "train_idx": np.array([0, 1]),
        "valid_idx": np.array([2]),
        "test_idx": np.array([3, 4]),
    }
    made.update(changes)
    return {key: value for key, value in made.items() if value is not None}


def save(folder: Path, **changes: Any) -> str:
    path = folder / "graph.npz"
    np.savez(path, **arrays(**changes))
    return str(path)


def edges_of(graph: Graph) -> np.ndarray:
    return np.concatenate(list(graph.edges()), axis=1)


def refused(source: Any, *parts: str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        list(load_graph(source, **options).edges())
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


def test_whole_graph(tmp_path: Path) -> None:
    graph = load_graph(save(tmp_path))
    assert (graph.name, graph.num_nodes, graph.num_classes, graph.num_features) == ("graph", 6, 3, 3)
    assert np.array_equal(edges_of(graph), arrays()["edge_index"])
    assert edges_of(graph).dtype == np.int64
    assert isinstance(graph.features, np.ndarray)
    assert graph.features.dtype == np.float32
    assert np.array_equal(graph.features, arrays()["x"])
    assert graph.labels is not None
    assert graph.labels.dtype == np.int32
    assert graph.labels.tolist() == [0, 1, 2, 1, 0, -1]
    assert graph.split is not None
    assert graph.split.tolist() == [1, 1, 2, 3, 3, 0]


def test_compressed_and_path_object(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "c.npz", **arrays())
    assert np.array_equal(edges_of(load_graph(tmp_path / "c.npz")), arrays()["edge_index"])


def test_half_precision_stays_half(tmp_path: Path) -> None:
    graph = load_graph(save(tmp_path, x=np.ones((6, 2), np.float16)))
    assert isinstance(graph.features, np.ndarray)
    assert graph.features.dtype == np.float16


def test_edges_only(tmp_path: Path) -> None:
    np.savez(tmp_path / "web.edges.npz", edge_index=arrays()["edge_index"], num_nodes=np.int64(9))
    graph = load_graph(str(tmp_path / "web.edges.npz"))
    assert (graph.name, graph.num_nodes) == ("web.edges", 9)
    assert (graph.features, graph.labels, graph.split) == (None, None, None)
    np.savez(tmp_path / "bare.npz", edge_index=arrays()["edge_index"])
    assert load_graph(str(tmp_path / "bare.npz")).num_nodes == 5


def test_no_edges_at_all(tmp_path: Path) -> None:
    graph = load_graph(save(tmp_path, edge_index=np.empty((2, 0), np.int64)))
    assert graph.num_nodes == 6
    assert list(graph.edges()) == []


def test_all_unlabelled_is_no_label(tmp_path: Path) -> None:
    graph = load_graph(save(tmp_path, y=np.full(6, -1)))
    assert graph.labels is None
    assert graph.num_classes == 0


def test_chunks_join_to_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qgnn_dist.data.npz.CHUNK_EDGES", 4)
    graph = load_graph(save(tmp_path))
    assert [chunk.shape[1] for chunk in graph.edges()] == [4, 2]
    assert np.array_equal(edges_of(graph), arrays()["edge_index"])


def sparse(**changes: Any) -> dict[str, Any]:
    pieces = {
        "x": None,
        "x_data": np.array([1.0, 2.0, 3.0], np.float32),
        "x_indices": np.array([0, 4, 2], np.int32),
        "x_indptr": np.array([0, 1, 1, 3, 3, 3, 3], np.int64),
        "x_shape": np.array([6, 5]),
    }
    pieces.update(changes)
    return pieces


def test_sparse_features_stay_sparse(tmp_path: Path) -> None:
    x = load_graph(save(tmp_path, **sparse())).features
    assert isinstance(x, SparseFeatures)
    assert (x.shape, x.indptr.dtype, x.indices.dtype, x.values.dtype) == ((6, 5), np.int64, np.int32, np.float32)
    rows = x.rows(np.array([2, 0]))
    assert (rows.indptr.tolist(), rows.indices.tolist(), rows.values.tolist()) == ([0, 2, 3], [4, 2, 0], [2, 3, 1])


def test_a_graph_may_have_no_test_nodes(tmp_path: Path) -> None:
    for without in (None, np.array([], np.int64)):
        graph = load_graph(save(tmp_path, test_idx=without))
        assert graph.split is not None
        assert graph.split.tolist() == [1, 1, 2, 0, 0, 0]


BAD_X = np.zeros((6, 3))
BAD_X[[2, 4], 1] = np.nan, np.inf


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"edge_index": None}, ["edge_index is missing"]),
        ({"edge_index": np.zeros((2, 3))}, ["edge_index", "float64", "integer"]),
        ({"edge_index": np.zeros((3, 2), int)}, ["edge_index", "(3, 2)", "transpose"]),
        ({"edge_index": np.array([[1, 2], [2, 6]])}, ["node 6", "column 1", "0 to 5", "counted from 1"]),
        ({"edge_index": np.array([[0, 1], [1, -2]])}, ["node -2", "column 1"]),
        ({"edge_index": np.array([[0, 1], [1, 99]], np.uint8)}, ["node 99"]),
        ({"x": np.zeros((5, 3))}, ["y", "(6,)", "(5,)"]),
        ({"x": np.zeros((5, 3)), "num_nodes": np.int64(6)}, ["x", "(5, 3)", "(6, number of features)"]),
        ({"x": np.zeros((6, 3), int)}, ["x is int64", "float32"]),
        ({"x": np.zeros((6, 0))}, ["x has no columns"]),
        ({"x": np.zeros(6)}, ["x has shape (6,)"]),
        ({"x": BAD_X}, ["x holds 2 values", "NaN or infinite", "rows: 2, 4"]),
        ({"x": BAD_X.astype(np.float16)}, ["x holds 2 values", "rows: 2, 4"]),
        ({"x": np.full((6, 1), 1e60)}, ["x holds 6 values"]),
        ({"y": np.array([0, 1, 2, 1, 0, -2])}, ["y is -2 in row 5"]),
        ({"y": np.array([0, 1, 2, 1, 0, 900])}, ["y is 900 in row 5", "0 to 5"]),
        ({"y": np.zeros((6, 4), int)}, ["y has 4 labels a node"]),
        ({"y": np.array([0.5, 1, 2, 1, 0, 1])}, ["y is 0.5 in row 0"]),
        ({"y": np.zeros(4, int)}, ["y has shape (4,)", "(6,)"]),
        ({"y": np.array(["a"] * 6)}, ["y is <U1"]),
        ({"train_idx": np.array([0, 2])}, ["valid_idx overlaps train_idx in 1 node", "first: 2"]),
        ({"valid_idx": np.array([], np.int64)}, ["valid_idx is empty", "split the labelled nodes"]),
        ({"train_idx": None}, ["train_idx is missing: give train and valid"]),
        ({"test_idx": np.array([3, 6])}, ["test_idx[1] is node 6"]),
        ({"test_idx": np.array([True, False])}, ["test_idx is bool"]),
        ({"train_idx": np.array([0, 5])}, ["1 train node has no label", "first: 5"]),
        ({"num_nodes": np.int64(0)}, ["num_nodes", "0 nodes"]),
        ({"num_nodes": np.array([6.0])}, ["num_nodes is float64"]),
        ({"edge_weight": np.ones(6)}, ["edge_weight", "not supported"]),
        ({"test_index": np.array([1]), "test_idx": None}, ["unknown array test_index", "did you mean test_idx?"]),
        ({"y": np.array([0, 1, None, 1, 0, 1], object)}, ["array y", "Python objects"]),
        ({"class_names": np.array(["a", "b"])}, ["2 class names for 3 classes"]),
        (sparse(x_shape=None), ["x_shape is missing"]),
        (sparse(x=np.zeros((6, 3))), ["features twice"]),
        (sparse(x_shape=np.array([7, 5])), ["y has shape (6,), expected (7,)"]),
        (sparse(x_indices=np.array([0, 5, 2])), ["x_indices[1] is column 5", "0 to 4"]),
        (sparse(x_indices=np.array([0, 2])), ["x_data has shape (3,)"]),
        (sparse(x_indptr=np.array([0, 1, 0, 3, 3, 3, 3])), ["x_indptr falls after row 1"]),
        (sparse(x_indptr=np.array([0, 1, 1, 3])), ["x_indptr has 4 values, expected 7"]),
        (sparse(x_indptr=np.array([0, 1, 1, 3, 3, 3, 2])), ["x_indptr runs from 0 to 2"]),
        (sparse(x_data=np.array([1, np.nan, 3])), ["x_data holds 1 value that is NaN", "rows: 2"]),
    ],
)
def test_wrong_arrays_get_one_line(tmp_path: Path, changes: dict[str, Any], parts: list[str]) -> None:
    path = save(tmp_path, **changes)
    refused(path, path, *parts)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    refused(str(tmp_path / "none.npz"), "none.npz", "no such file")
    (tmp_path / "text.npz").write_text("hello")
    refused(str(tmp_path / "text.npz"), "no npz archive")
    whole = Path(save(tmp_path)).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    refused(str(tmp_path / "cut.npz"), "no npz archive")
    flipped = bytearray(whole)
    flipped[whole.index(b"edge_index.npy") + 14 + 128 + 4] ^= 0xFF
    (tmp_path / "flip.npz").write_bytes(flipped)
    refused(str(tmp_path / "flip.npz"), "edge_index is damaged")


def test_a_header_that_promises_too_much_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<i8", "fortran_order": False, "shape": (2, 1 << 50)})
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as file:
        file.writestr("edge_index.npy", buffer.getvalue() + bytes(64))
    refused(str(tmp_path / "huge.npz"), "edge_index is damaged", "expected 18014398509482112 for shape")


def test_ignored_arrays_are_said(tmp_path: Path) -> None:
    lines: list[str] = []
    load_graph(save(tmp_path, year=np.arange(6)), progress=lines.append)
    assert len(lines) == 1
    assert "year" in lines[0]


def test_class_names(tmp_path: Path) -> None:
    assert load_graph(save(tmp_path, class_names=np.array(["a", "b", "c"]))).class_names == ["a", "b", "c"]


def test_sources_that_do_not_exist() -> None:
    refused("syntetic:arxiv", "no graph source", "did you mean synthetic:arxiv?", "FILE.npz")
    refused("ogbn_arxiv", "did you mean ogbn-arxiv?")
    refused("graph.csv", "no graph source")
    refused("synthetic:arxiv", "column names are for parquet", columns=ColumnNames(src="from"))


def test_real_graphs_load(data_dir: Path) -> None:
    cora = load_graph(str(data_dir / "cora.npz"))
    assert (cora.num_nodes, cora.num_features, cora.num_classes) == (2708, 1433, 7)
    assert isinstance(cora.features, SparseFeatures)
    assert edges_of(cora).shape == (2, 10_556)
    assert cora.split is not None
    assert [int((cora.split == number).sum()) for number in (1, 2, 3)] == [140, 500, 1000]
    web = load_graph(str(data_dir / "web_cnr2000.edges.npz"))
    assert (web.num_nodes, web.features) == (325_557, None)
