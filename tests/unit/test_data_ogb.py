# SPDX-License-Identifier: Apache-2.0
"""OGB folders as OGB lays them out, text and binary; what is refused; the download without a network."""
from __future__ import annotations

import gzip
import io
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qgnn_dist.data import Graph, load_graph
from qgnn_dist.data.ogb import known_graphs
from qgnn_dist.errors import InputError, QgnnError

NODES = 50


def content(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    order = rng.permutation(NODES)
    return {
        "edge": rng.integers(0, NODES, (200, 2)),
        "node-feat": rng.standard_normal((NODES, 8)).astype(np.float32),
        "node-label": rng.integers(0, 7, (NODES, 1)),
        "num-node-list": np.array([[NODES]]),
        "num-edge-list": np.array([[200]]),
        "train": order[:20][:, None],
        "valid": order[20:30][:, None],
        "test": order[30:][:, None],
    }


def write_csv(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        for row in array:
            file.write(",".join(repr(value) for value in row.tolist()) + "\n")


def lay_out(folder: Path, split: str = "time", **changes: Any) -> dict[str, Any]:
    """A folder as OGB's zip files unpack; a change to None leaves a file out."""
    arrays = content() | {key.replace("_", "-"): value for key, value in changes.items()}
    for name, array in arrays.items():
        if array is not None:
            place = f"split/{split}" if name in ("train", "valid", "test") else "raw"
            write_csv(folder / place / f"{name}.csv.gz", array)
    (folder / "RELEASE_v1.txt").write_text("# Release note\n")
    return arrays


def edges_of(graph: Graph) -> np.ndarray:
    return np.concatenate(list(graph.edges()), axis=1)


def check_same(graph: Graph, arrays: dict[str, Any]) -> None:
    assert graph.num_nodes == NODES
    assert np.array_equal(edges_of(graph), arrays["edge"].T)
    assert edges_of(graph).dtype == np.int64
    assert isinstance(graph.features, np.ndarray)
    assert graph.features.dtype == np.float32
    assert np.array_equal(graph.features, arrays["node-feat"])
    assert graph.labels is not None
    assert graph.labels.dtype == np.int32
    assert np.array_equal(graph.labels, arrays["node-label"][:, 0])
    assert graph.split is not None
    for number, name in enumerate(("train", "valid", "test"), start=1):
        assert set(np.flatnonzero(graph.split == number)) == set(arrays[name][:, 0].tolist())


def refused(root: Path, *parts: str, name: str = "ogbn-arxiv") -> str:
    with pytest.raises(InputError) as caught:
        list(load_graph(name, root=root).edges())
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


@pytest.mark.parametrize("folder", ["ogbn_arxiv", "ogbn_arxiv_pyg"])
def test_text_layout(tmp_path: Path, folder: str) -> None:
    arrays = lay_out(tmp_path / folder)
    graph = load_graph("ogbn-arxiv", root=tmp_path)
    check_same(graph, arrays)
    assert (graph.name, graph.num_classes) == ("ogbn-arxiv", 40)


def test_default_root_is_ogbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arrays = lay_out(tmp_path / "dataset" / "ogbn_products", split="sales_ranking")
    graph = load_graph("ogbn-products")
    check_same(graph, arrays)
    assert graph.num_classes == 47


def test_small_blocks_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qgnn_dist.data.ogb.CSV_BLOCK_BYTES", 300)
    arrays = lay_out(tmp_path / "ogbn_arxiv")
    graph = load_graph("ogbn-arxiv", root=tmp_path)
    assert len(list(graph.edges())) > 3
    check_same(graph, arrays)


@pytest.mark.parametrize("kind", ["arrays", "tensors"])
def test_split_dict(tmp_path: Path, kind: str) -> None:
    arrays = lay_out(tmp_path / "ogbn_arxiv", train=None, valid=None, test=None)
    split = {name: content()[name][:, 0] for name in ("train", "valid", "test")}
    saved = split if kind == "arrays" else {name: torch.from_numpy(index) for name, index in split.items()}
    path = tmp_path / "ogbn_arxiv" / "split" / "time" / "split_dict.pt"
    path.parent.mkdir(parents=True)
    torch.save(saved, path)
    check_same(load_graph("ogbn-arxiv", root=tmp_path), arrays | content())


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harm-was-done"),))


def test_split_dict_with_anything_else_is_not_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lay_out(tmp_path / "ogbn_arxiv")
    torch.save({"train": Harmful()}, tmp_path / "ogbn_arxiv" / "split" / "time" / "split_dict.pt")
    refused(tmp_path, "split_dict.pt", "nothing else is unpickled", "train, valid, test.csv.gz")
    assert not Path("harm-was-done").exists()


def test_binary_layout_with_nan_labels_and_half_features(tmp_path: Path) -> None:
    """papers100M: everything in two npz files, labels as floats with NaN where there is none."""
    arrays = content()
    raw = tmp_path / "ogbn_papers100M" / "raw"
    lay_out(raw.parent, **{name.replace("-", "_"): None for name in arrays if "-" in name or name == "edge"})
    raw.mkdir()
    labels = arrays["node-label"].astype(np.float32)
    bare = int(arrays["test"][0, 0])
    labels[bare] = np.nan
    np.savez_compressed(
        raw / "data.npz",
        edge_index=arrays["edge"].T.astype(np.int64, order="C"),
        node_feat=arrays["node-feat"].astype(np.float16),
        num_nodes_list=np.array([NODES]),
        num_edges_list=np.array([200]),
        node_year=np.zeros((NODES, 1), int),
    )
    np.savez_compressed(raw / "node-label.npz", node_label=labels)
    graph = load_graph("ogbn-papers100M", root=tmp_path)
    assert graph.num_classes == 172
    assert isinstance(graph.features, np.ndarray)
    assert graph.features.dtype == np.float16
    assert np.array_equal(graph.features, arrays["node-feat"].astype(np.float16))
    assert np.array_equal(edges_of(graph), arrays["edge"].T)
    assert graph.labels is not None
    assert graph.labels[bare] == -1
    assert np.array_equal(np.delete(graph.labels, bare), np.delete(arrays["node-label"][:, 0], bare))


@pytest.mark.parametrize("fortran", [False, True])
def test_binary_edges_come_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fortran: bool) -> None:
    monkeypatch.setattr("qgnn_dist.data.arrays.CHUNK_EDGES", 64)
    raw = tmp_path / "ogbn_toy" / "raw"
    raw.mkdir(parents=True)
    edges = np.array(content()["edge"].T, order="F" if fortran else "C")
    np.savez(raw / "data.npz", edge_index=edges, num_nodes_list=[NODES], num_edges_list=[200])
    graph = load_graph("ogbn-toy", root=tmp_path)
    assert [chunk.shape[1] for chunk in graph.edges()] == ([200] if fortran else [64, 64, 64, 8])
    assert np.array_equal(edges_of(graph), edges)
    assert (graph.features, graph.labels, graph.split) == (None, None, None)


def test_folder_of_ogbs_own_saver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that OGB's DatasetSaver writes, under a name that OGB's table does not know."""
    saver_module = pytest.importorskip("ogb.io.save_dataset")
    monkeypatch.chdir(tmp_path)
    arrays = content()
    saver = saver_module.DatasetSaver("ogbn-toy", is_hetero=False, version=1)
    graph = {"edge_index": arrays["edge"].T, "node_feat": arrays["node-feat"], "num_nodes": NODES}
    saver.save_graph_list([graph])
    saver.save_target_labels(arrays["node-label"])
    saver.save_split({name: arrays[name][:, 0] for name in ("train", "valid", "test")}, split_name="random")
    Path("submission_ogbn_toy/toy").rename("ogbn_toy")
    loaded = load_graph("ogbn-toy", root=tmp_path)
    check_same(loaded, arrays)
    assert loaded.num_classes == 7


def test_table_of_ogb_is_read_without_importing_it() -> None:
    known = known_graphs()
    assert known["ogbn-arxiv"].classes == 40
    assert known["ogbn-papers100M"].folder == "papers100M-bin"
    assert known["ogbn-products"].split == "sales_ranking"


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"edge": None}, ["edge.csv.gz", "no such file"]),
        ({"num_node_list": None}, ["num-node-list.csv.gz", "no such file"]),
        ({"num_node_list": np.array([[20], [30]])}, ["2 graphs"]),
        ({"num_node_list": np.array([[49]])}, ["(50, 1)", "(49,)"]),
        ({"edge": np.array([[0, 1, 1]])}, ["3 columns, expected 2"]),
        ({"edge": np.array([[0, 1], [2, 50]]), "num_edge_list": None}, ["node 50", "row 1", "0 to 49"]),
        ({"edge": np.array([[0, 1], [-1, 5]]), "num_edge_list": None}, ["node -1", "row 1"]),
        ({"edge": np.array([[0, 1]])}, ["1 rows, expected 200 (num-edge-list)"]),
        ({"edge": np.array([[0.5, 1]])}, ["edge.csv.gz", "damaged"]),
        ({"edge_feat": np.ones((200, 1))}, ["edge features are not supported"]),
        ({"node_feat": np.zeros((49, 2))}, ["node-feat has 49 rows, expected 50"]),
        ({"node_feat": np.zeros((51, 2))}, ["node-feat has more than 50 rows"]),
        ({"node_feat": np.full((50, 2), np.nan)}, ["node-feat holds 100 values", "rows: 0, 1, 2, 3, 4"]),
        ({"node_label": np.zeros((50, 3), int)}, ["3 labels a node"]),
        ({"node_label": np.full((50, 1), 40)}, ["node-label is 40 in row 0", "40 classes"]),
        ({"node_label": np.full((50, 1), -3)}, ["node-label is -3"]),
        ({"train": np.array([[50]])}, ["train.csv.gz[0] is node 50"]),
        ({"train": content()["test"]}, ["test.csv.gz overlaps train.csv.gz in 20 nodes"]),
        ({"train": None}, ["train.csv.gz", "no such file"]),
        ({"valid": np.empty((0, 1), int)}, ["valid.csv.gz is empty"]),
    ],
)
def test_wrong_folders_get_one_line(tmp_path: Path, changes: dict[str, Any], parts: list[str]) -> None:
    lay_out(tmp_path / "ogbn_arxiv", **changes)
    refused(tmp_path, *parts)


def test_cut_file(tmp_path: Path) -> None:
    lay_out(tmp_path / "ogbn_arxiv")
    path = tmp_path / "ogbn_arxiv" / "raw" / "node-feat.csv.gz"
    path.write_bytes(path.read_bytes()[:-200])
    refused(tmp_path, "node-feat.csv.gz", "damaged")


def test_wrong_split_folder(tmp_path: Path) -> None:
    lay_out(tmp_path / "ogbn_arxiv", split="random")
    refused(tmp_path, "no split time", "random")


def test_names_without_data(tmp_path: Path) -> None:
    folder = str(tmp_path / "ogbn_products")
    refused(tmp_path, "not on disk", "1.38 GiB", "--yes", folder, name="ogbn-products")
    refused(tmp_path, "56.17 GiB", name="ogbn-papers100M")
    refused(tmp_path, "no graph ogbn-arxif", "did you mean ogbn-arxiv?", name="ogbn-arxif")
    refused(tmp_path, "several node types", name="ogbn-mag")
    refused(tmp_path, "several labels", name="ogbn-proteins")
    assert list(tmp_path.iterdir()) == []


class Response(io.BytesIO):
    def __init__(self, data: bytes, size: int | None = None) -> None:
        super().__init__(data)
        self.headers = {"Content-Length": str(len(data) if size is None else size)}


@pytest.fixture
def archive(tmp_path: Path) -> bytes:
    lay_out(tmp_path / "server" / "arxiv")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for path in sorted((tmp_path / "server").rglob("*")):
            file.write(path, path.relative_to(tmp_path / "server"))
    return buffer.getvalue()


def test_download_with_yes(tmp_path: Path, archive: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def opener(url: str, timeout: float) -> Response:
        assert timeout > 0
        asked.append(url)
        return Response(archive)

    monkeypatch.setattr(urllib.request, "urlopen", opener)
    lines: list[str] = []
    root = tmp_path / "root"
    check_same(load_graph("ogbn-arxiv", root=root, yes=True, progress=lines.append), content())
    assert "GiB" in lines[0]
    assert [path.name for path in root.iterdir()] == ["ogbn_arxiv"]
    load_graph("ogbn-arxiv", root=root, yes=True)
    assert asked == [known_graphs()["ogbn-arxiv"].url]


@pytest.mark.parametrize("fault", ["offline", "cut", "page", "folder", "room"])
def test_failed_downloads_leave_nothing(
    tmp_path: Path, archive: bytes, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def opener(url: str, timeout: float) -> Response:
        if fault == "offline":
            raise urllib.error.URLError("no route to host")
        if fault == "folder":
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w") as file:
                file.writestr("else/readme", "x")
            return Response(buffer.getvalue())
        answers = {
            "cut": Response(archive[:-50], len(archive)),
            "page": Response(b"<html>"),
            "room": Response(archive, 1 << 60),
        }
        return answers[fault]

    monkeypatch.setattr(urllib.request, "urlopen", opener)
    root = tmp_path / "root"
    words = {"offline": "no route", "cut": "ended after", "page": "no zip", "folder": "no folder", "room": "free"}
    with pytest.raises(QgnnError, match=words[fault]) as caught:
        load_graph("ogbn-arxiv", root=root, yes=True)
    assert caught.value.exit_code == 1
    assert list(root.iterdir()) == []
