# SPDX-License-Identifier: Apache-2.0
"""Graphs from one .npz file.

Arrays: `edge_index` int (2, E), both directions or one; features `x` float16/32/64 (N, F), or the CSR pieces
`x_data x_indices x_indptr x_shape`; `y` int (N,), -1 unlabelled; `train_idx valid_idx test_idx`; `class_names`
(text, one a class); `num_nodes`. Only `edge_index` is needed. Without `num_nodes` the features, then the labels, then
the largest index in the edges say how many nodes there are.
"""
from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from qgnn_dist.data import checks
from qgnn_dist.data.arrays import CHUNK_EDGES, NpzArchive
from qgnn_dist.data.graph import SPLITS, Graph, SparseFeatures
from qgnn_dist.errors import InputError
from qgnn_dist.files.read import shown

__all__ = ["edge_passes", "load_npz"]

_CSR = ("x_data", "x_indices", "x_indptr", "x_shape")
_KNOWN = ("edge_index", "num_nodes", "x", *_CSR, "y", "train_idx", "valid_idx", "test_idx", "class_names")
_WEIGHTS = ("edge_weight", "edge_weights", "edge_attr", "edge_feat", "weight", "weights")


def edge_passes(edge_index: np.ndarray) -> Callable[[], Iterator[np.ndarray]]:
    """`Graph.edges` for edges that are in memory, or a memory map, and checked."""

    def edges() -> Iterator[np.ndarray]:
        for start in range(0, edge_index.shape[1], CHUNK_EDGES):
            yield np.ascontiguousarray(edge_index[:, start : start + CHUNK_EDGES], np.int64)

    return edges


def load_npz(path: str | Path, progress: Callable[[str], None] | None = None) -> Graph:
    """The graph in a .npz file, every array in it checked; nothing is unpickled.

    Raises:
        InputError: missing or damaged file or array, wrong dtype, shape, index, label or split.
    """
    path = Path(path)
    file = str(path)
    with NpzArchive(path) as archive:
        _check_names(archive, file, progress)
        header = archive.headers["edge_index"]
        checks.check_edge_shape(header.shape, header.dtype, "edge_index", file)
        edge_index = archive.read("edge_index")
        num_nodes = _num_nodes(archive, edge_index, file)
        rows = (archive.headers[name].shape[:1] for name in ("x", "y", "x_indptr") if name in archive)
        checks.check_evidence(num_nodes, max((shape[0] for shape in rows if shape), default=0), edge_index.shape[1],
                              "num_nodes" if "num_nodes" in archive else "edge_index", file)
        for start in range(0, edge_index.shape[1], CHUNK_EDGES):
            chunk = edge_index[:, start : start + CHUNK_EDGES]
            checks.check_edges(chunk, num_nodes, "edge_index", file, offset=start)
        labels, num_classes = None, 0
        if "y" in archive:
            labels, num_classes = checks.labels_from(archive.read("y"), num_nodes, "y", file)
        split = None
        given = {name: archive.read(f"{name}_idx") for name in SPLITS if f"{name}_idx" in archive}
        if given:
            split = checks.split_from_indices(given, num_nodes, {name: f"{name}_idx" for name in SPLITS}, file)
        graph = Graph(
            name=path.name.removesuffix(".npz"),
            num_nodes=num_nodes,
            edges=edge_passes(edge_index),
            features=_features(archive, num_nodes, file),
            labels=labels,
            num_classes=num_classes,
            split=split,
            class_names=_class_names(archive, file) if labels is not None else None,
            edge_rows=edge_index.shape[1],
        )
    return checks.check_graph(graph, file)


def _check_names(archive: NpzArchive, file: str, progress: Callable[[str], None] | None) -> None:
    for name in archive.headers:
        if name in _WEIGHTS:
            raise InputError(
                f"array {name}: edge weights and edge features are not supported; drop it to use the plain graph",
                file=file,
            )
    if "edge_index" not in archive:
        held = shown(", ".join(archive.headers) or "nothing", 200)
        raise InputError(f"array edge_index is missing; the file holds {held}", file=file)
    ignored = [name for name in archive.headers if name not in _KNOWN]
    for name in ignored:
        close = difflib.get_close_matches(name, [known for known in _KNOWN if known not in archive], n=1, cutoff=0.75)
        if close:
            raise InputError(f"unknown array {shown(name)} (did you mean {close[0]}?)", file=file)
    if ignored and progress:
        progress(f"{file}: arrays that are not used: {shown(', '.join(ignored), 200)}")
    present = [name for name in _CSR if name in archive]
    if present and len(present) < len(_CSR):
        missing = ", ".join(name for name in _CSR if name not in archive)
        raise InputError(f"array {missing} is missing: sparse features need {', '.join(_CSR)}", file=file)
    if present and "x" in archive:
        raise InputError("holds features twice, as x and as x_data …; keep one", file=file)


def _integers(archive: NpzArchive, name: str, shape: tuple[int, ...], file: str) -> list[int]:
    header = archive.headers[name]
    if header.shape not in (shape, (1, *shape)) or header.dtype.kind not in "iu":
        raise InputError(f"{name} is {header.dtype} {header.shape}, expected integers {shape}", file=file)
    return [int(value) for value in archive.read(name).reshape(-1)]


def _num_nodes(archive: NpzArchive, edge_index: np.ndarray, file: str) -> int:
    if "num_nodes" in archive:
        return checks.check_num_nodes(_integers(archive, "num_nodes", (), file)[0], "num_nodes", file)
    if "x_shape" in archive:
        return checks.check_num_nodes(_integers(archive, "x_shape", (2,), file)[0], "x_shape", file)
    for name in ("x", "y"):
        if name in archive and archive.headers[name].shape:
            return checks.check_num_nodes(archive.headers[name].shape[0], name, file)
    return checks.check_num_nodes(int(edge_index.max()) + 1 if edge_index.size else 0, "edge_index", file)


def _features(archive: NpzArchive, num_nodes: int, file: str) -> np.ndarray | SparseFeatures | None:
    if "x" in archive:
        return checks.dense_features(archive.read("x"), num_nodes, "x", file)
    if "x_data" not in archive:
        return None
    rows, columns = _integers(archive, "x_shape", (2,), file)
    if rows != num_nodes:
        raise InputError(f"x_shape says {rows} rows, expected {num_nodes} (num_nodes)", file=file)
    indptr, indices, data = (archive.read(name) for name in ("x_indptr", "x_indices", "x_data"))
    return checks.sparse_features(indptr, indices, data, (rows, columns), "x", file)


def _class_names(archive: NpzArchive, file: str) -> list[str] | None:
    if "class_names" not in archive:
        return None
    names = archive.read("class_names")
    if names.dtype.kind != "U" or names.ndim != 1:
        raise InputError(f"class_names is {names.dtype} {names.shape}, expected text (classes,)", file=file)
    return [str(name) for name in names]
