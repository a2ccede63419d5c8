# SPDX-License-Identifier: Apache-2.0
"""OGB node-classification folders, read block by block from the files that OGB distributes.

`ogbn-arxiv` lies in ROOT/ogbn_arxiv (or ROOT/ogbn_arxiv_pyg, as OGB's own loaders call it):

    raw/edge.csv.gz  raw/node-feat.csv.gz  raw/node-label.csv.gz  raw/num-node-list.csv.gz  raw/num-edge-list.csv.gz
    raw/data.npz     raw/node-label.npz                          instead of those, for papers100M
    split/<type>/{train,valid,test}.csv.gz  or  split/<type>/split_dict.pt

OGB's loader keeps everything in memory, and its pickled caches do not open under torch >= 2.6; neither is used. The
`ogb` package's table gives class counts, split types and addresses; a folder in OGB's format that the table does not
know (written by its DatasetSaver) is read all the same.
"""
from __future__ import annotations

import csv
import difflib
import gzip
import importlib.util
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from qgnn_dist.data import checks
from qgnn_dist.data.arrays import MOST_DEFLATED, NpzArchive
from qgnn_dist.data.download import fetch
from qgnn_dist.data.graph import SPLITS, Graph
from qgnn_dist.errors import InputError
from qgnn_dist.files.read import check_regular, reason, shown

__all__ = ["Entry", "known_graphs", "load_ogb"]

DOWNLOAD_GB = {"ogbn-arxiv": 0.08, "ogbn-products": 1.38, "ogbn-papers100M": 56.17}
"""GiB to download as OGB's own tool shows them, for messages where there is no network."""
CSV_BLOCK_BYTES = 8 << 20
LONGEST_LINE, MOST_COLUMNS = CSV_BLOCK_BYTES, 1 << 20
"""Of a csv file: characters, and values."""


@dataclass(frozen=True)
class Entry:
    """What the `ogb` package's table says about one graph. `folder` is the folder inside the downloaded zip file."""

    classes: int
    tasks: int
    split: str
    url: str
    folder: str
    hetero: bool
    edge_features: bool


def known_graphs() -> dict[str, Entry]:
    """OGB's table of node-classification graphs, read without importing the package; empty where it is missing."""
    spec = importlib.util.find_spec("ogb")
    if spec is None or not spec.submodule_search_locations:
        return {}
    table = Path(spec.submodule_search_locations[0]) / "nodeproppred" / "master.csv"
    if not table.is_file():
        return {}
    with table.open(newline="") as file:
        rows = list(csv.reader(file))
    known = {}
    for at, name in enumerate(rows[0]):
        if at:
            value = {row[0]: row[at] for row in rows[1:]}
            known[name] = Entry(
                classes=int(value["num classes"]),
                tasks=int(value["num tasks"]),
                split=value["split"],
                url=value["url"],
                folder=value["download_name"],
                hetero=value["is hetero"] == "True",
                edge_features=value["has_edge_attr"] == "True",
            )
    return known


def load_ogb(
    name: str, *, root: str | Path | None = None, yes: bool = False, progress: Callable[[str], None] | None = None
) -> Graph:
    """The OGB graph `name`, from ROOT (default `dataset`); downloaded only with `yes`. Never asks.

    Raises:
        InputError: unknown name, a graph out of scope, no data on disk, or something in the files is wrong.
        QgnnError: the download failed.
    """
    root = Path(root) if root is not None else Path("dataset")
    entry = known_graphs().get(name)
    if entry is not None and (entry.hetero or entry.tasks > 1 or entry.edge_features):
        reason = "several node types" if entry.hetero else "several labels a node and edge features"
        raise InputError(f"{name} has {reason}, which are not supported: single-label graphs of one node type are")
    folder = _folder(name, root)
    if folder is None:
        folder = _download(name, entry, root, yes, progress)
    raw = folder / "raw"
    if not raw.is_dir():
        raise InputError("there is no folder raw; remove this one and get the graph again", file=str(folder))
    known = entry.classes if entry is not None else None
    if os.path.lexists(raw / "data.npz"):
        graph = _load_binary(name, raw, known, progress)
    else:
        graph = _load_csv(name, raw, known, progress)
    graph.split = _split(folder, entry, graph.num_nodes)
    return checks.check_graph(graph, str(folder))


def _folder(name: str, root: Path) -> Path | None:
    base = name.replace("-", "_")
    return next((path for path in (root / f"{base}_pyg", root / base) if path.is_dir()), None)


def _download(
    name: str, entry: Entry | None, root: Path, yes: bool, progress: Callable[[str], None] | None
) -> Path:
    target = root / name.replace("-", "_")
    if entry is None:
        known = list(known_graphs()) or list(DOWNLOAD_GB)
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise InputError(f"OGB has no graph {name}{hint}, and there is no folder {target}")
    if not yes:
        size = f"{DOWNLOAD_GB[name]:.2f} GiB" if name in DOWNLOAD_GB else "of unknown size"
        raise InputError(
            f"{name} is not on disk: expected the folder {target}; --yes downloads it ({size}) from {entry.url}, "
            "or unpack that file there, or --root names another folder"
        )
    fetch(entry.url, entry.folder, target, progress)
    return target


def _load_csv(name: str, raw: Path, known_classes: int | None, progress: Callable[[str], None] | None) -> Graph:
    if os.path.lexists(raw / "edge-feat.csv.gz"):
        raise InputError("edge features are not supported", file=str(raw / "edge-feat.csv.gz"))
    count_file, edge_file = raw / "num-node-list.csv.gz", raw / "edge.csv.gz"
    num_nodes = checks.check_num_nodes(_one_count(count_file, "nodes"), "num-node-list", str(count_file))
    if not edge_file.is_file():
        raise InputError("there is no such file", file=str(edge_file))
    if _columns(edge_file) not in (0, 2):
        raise InputError(f"has {_columns(edge_file)} columns, expected 2 (source, target)", file=str(edge_file))
    edges_file = raw / "num-edge-list.csv.gz"
    num_edges = _one_count(edges_file, "edges") if os.path.lexists(edges_file) else None
    labels, num_classes = None, 0
    label_file, feature_file = raw / "node-label.csv.gz", raw / "node-feat.csv.gz"
    if os.path.lexists(label_file):  # whatever it is: what is there is never passed over
        y = _csv_array(label_file, pa.float64(), num_nodes)
        labels, num_classes = checks.labels_from(y, num_nodes, "node-label", str(label_file), known_classes)
    elif not os.path.lexists(feature_file):
        most = _most_rows(edge_file, 2)
        checks.check_evidence(num_nodes, 0, most if num_edges is None else min(num_edges, most), "num-node-list",
                              str(count_file))
    features = None
    if os.path.lexists(feature_file):
        if progress:
            progress(f"{name}: reading features of {num_nodes:,} nodes")
        features = _csv_features(feature_file, num_nodes)
    return Graph(
        name=name,
        num_nodes=num_nodes,
        edges=lambda: _csv_edges(edge_file, num_nodes, num_edges),
        features=features,
        labels=labels,
        num_classes=num_classes,
        edge_rows=num_edges,
    )


def _columns(path: Path) -> int:
    """Values in the first line, 0 in an empty file."""
    try:
        check_regular(path)
        with gzip.open(path, "rt") as file:
            line = file.readline(LONGEST_LINE)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"is no gzip-compressed csv file ({reason(error)})", file=str(path)) from error
    columns = line.count(",") + 1 if line else 0
    if len(line) >= LONGEST_LINE or columns > MOST_COLUMNS:
        raise InputError(f"has a first line of {columns} columns and {len(line)} characters or more, expected at most "
                         f"{MOST_COLUMNS} and {LONGEST_LINE}", file=str(path))
    return columns


def _most_rows(path: Path, columns: int) -> int:
    """More rows of so many columns cannot be in a file: a value takes a digit and a comma."""
    return check_regular(path) * MOST_DEFLATED // (2 * columns)


def _csv_blocks(path: Path, kind: pa.DataType) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, (k, columns) array) after another; every value of the file is read as `kind`."""
    names = [f"column {at}" for at in range(_columns(path))]
    if not names:
        return
    row = 0
    try:
        with pa.input_stream(str(path), compression="gzip") as stream:
            reader = pa_csv.open_csv(
                stream,
                read_options=pa_csv.ReadOptions(column_names=names, block_size=CSV_BLOCK_BYTES),
                convert_options=pa_csv.ConvertOptions(column_types=dict.fromkeys(names, kind), null_values=[]),
            )
            for batch in reader:
                block = np.empty((batch.num_rows, len(names)), kind.to_pandas_dtype())
                for at in range(len(names)):
                    block[:, at] = batch.column(at).to_numpy()
                yield row, block
                row += len(block)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"is damaged after row {row} ({reason(error)}); get the file again", file=str(path)) from error


def _csv_array(path: Path, kind: pa.DataType, most: int) -> np.ndarray:
    """All rows, of which no more than `most` are expected: reading stops after a block that has more."""
    blocks, rows = [np.empty((0, max(_columns(path), 1)), kind.to_pandas_dtype())], 0
    for first, block in _csv_blocks(path, kind):
        blocks.append(block)
        rows = first + len(block)
        if rows > most:
            break
    return np.concatenate(blocks)


def _one_count(path: Path, what: str) -> int:
    if not path.is_file():
        raise InputError("there is no such file", file=str(path))
    values = _csv_array(path, pa.int64(), 1).reshape(-1)
    if len(values) != 1:
        raise InputError(f"counts the {what} of {len(values)} graphs, expected one graph", file=str(path))
    return int(values[0])


def _csv_features(path: Path, num_nodes: int) -> np.ndarray:
    if num_nodes > _most_rows(path, max(_columns(path), 1)):
        raise InputError(f"node-feat cannot have the {num_nodes} rows that num-node-list says: it has "
                         f"{check_regular(path)} bytes", file=str(path))
    sink = checks.FeatureSink((num_nodes, _columns(path)), np.dtype(np.float32), "node-feat", str(path))
    rows = 0
    for row, block in _csv_blocks(path, pa.float32()):
        rows = row + len(block)
        if rows > num_nodes:
            break
        sink.put(row, block)
    if rows != num_nodes:
        got = f"{rows}" if rows < num_nodes else f"more than {num_nodes}"
        raise InputError(f"node-feat has {got} rows, expected {num_nodes} (num-node-list)", file=str(path))
    return sink.done()


def _csv_edges(path: Path, num_nodes: int, num_edges: int | None) -> Iterator[np.ndarray]:
    rows = 0
    for row, block in _csv_blocks(path, pa.int64()):
        pair = np.ascontiguousarray(block.T)
        yield checks.check_edges(pair, num_nodes, "edge", str(path), offset=row, unit="row")
        rows = row + len(block)
    if num_edges is not None and rows != num_edges:
        raise InputError(f"has {rows} rows, expected {num_edges} (num-edge-list); get the file again", file=str(path))


def _load_binary(name: str, raw: Path, known_classes: int | None, progress: Callable[[str], None] | None) -> Graph:
    path = raw / "data.npz"
    file = str(path)
    with NpzArchive(path) as archive:
        for array in ("edge_index", "num_nodes_list"):
            if array not in archive:
                raise InputError(f"array {array} is missing; the file holds {shown(', '.join(archive.headers))}",
                                 file=file)
        if "edge_feat" in archive:
            raise InputError("array edge_feat: edge features are not supported", file=file)
        counts = archive.headers["num_nodes_list"]
        if counts.shape != (1,) or counts.dtype.kind not in "iu":
            raise InputError(f"num_nodes_list is {counts.dtype} {counts.shape}, expected one integer", file=file)
        num_nodes = checks.check_num_nodes(int(archive.read("num_nodes_list")[0]), "num_nodes_list", file)
        header = archive.headers["edge_index"]
        checks.check_edge_shape(header.shape, header.dtype, "edge_index", file)
        label_path, bare = raw / "node-label.npz", "node_feat" not in archive
        if bare and not os.path.lexists(label_path):
            checks.check_evidence(num_nodes, 0, header.shape[1], "num_nodes_list", file)
        features = None
        if not bare:
            if progress:
                progress(f"{name}: reading features of {num_nodes:,} nodes")
            features = _binary_features(archive, num_nodes, file)
    labels, num_classes = None, 0
    if os.path.lexists(label_path):
        with NpzArchive(label_path) as archive:
            if "node_label" not in archive:
                raise InputError("array node_label is missing", file=str(label_path))
            y = archive.read("node_label")
        labels, num_classes = checks.labels_from(y, num_nodes, "node_label", str(label_path), known_classes)
    return Graph(
        name=name,
        num_nodes=num_nodes,
        edges=lambda: _binary_edges(path, num_nodes),
        features=features,
        labels=labels,
        num_classes=num_classes,
        edge_rows=header.shape[1],
    )


def _binary_features(archive: NpzArchive, num_nodes: int, file: str) -> np.ndarray:
    header = archive.headers["node_feat"]
    if len(header.shape) != 2 or header.shape[0] != num_nodes:
        raise InputError(f"node_feat has shape {header.shape}, expected ({num_nodes}, number of features)", file=file)
    if header.fortran:
        return checks.dense_features(archive.read("node_feat"), num_nodes, "node_feat", file)
    sink = checks.FeatureSink((num_nodes, header.shape[1]), header.dtype, "node_feat", file)
    for start, block in archive.rows("node_feat"):
        sink.put(start, block)
    return sink.done()


def _binary_edges(path: Path, num_nodes: int) -> Iterator[np.ndarray]:
    with NpzArchive(path) as archive:
        header = archive.headers["edge_index"]
        pieces = iter([archive.read("edge_index")]) if header.fortran else archive.columns("edge_index")
        offset = 0
        for piece in pieces:
            chunk = checks.check_edges(piece, num_nodes, "edge_index", str(path), offset=offset)
            yield np.ascontiguousarray(chunk, np.int64)
            offset += piece.shape[1]


def _split(folder: Path, entry: Entry | None, num_nodes: int) -> np.ndarray | None:
    base = folder / "split"
    kinds = sorted(path.name for path in base.iterdir() if path.is_dir()) if base.is_dir() else []
    if entry is not None and kinds and entry.split not in kinds:
        raise InputError(f"there is no split {entry.split}; there is {', '.join(kinds)}", file=str(base))
    if not kinds:
        return None
    if entry is None and len(kinds) > 1:
        raise InputError(f"holds several splits ({', '.join(kinds)}), expected one", file=str(base))
    path = base / (entry.split if entry is not None else kinds[0])
    pickled = path / "split_dict.pt"
    if os.path.lexists(pickled):
        return checks.split_from_indices(_split_dict(pickled), num_nodes, file=str(pickled))
    indices = {}
    for name in SPLITS:
        file = path / f"{name}.csv.gz"
        if not file.is_file():
            raise InputError("there is no such file", file=str(file))
        if _columns(file) > 1:
            raise InputError(f"has {_columns(file)} columns, expected 1", file=str(file))
        indices[name] = _csv_array(file, pa.int64(), num_nodes).reshape(-1)
        if len(indices[name]) > num_nodes:
            raise InputError(f"has more rows than there are nodes ({num_nodes})", file=str(file))
    return checks.split_from_indices(indices, num_nodes, {name: f"{name}.csv.gz" for name in SPLITS}, str(path))


def _split_dict(path: Path) -> dict[str, np.ndarray]:
    """The index arrays of a split_dict.pt; only tensors and plain NumPy arrays of numbers are let through."""
    import torch

    multiarray = importlib.import_module("numpy._core.multiarray" if hasattr(np, "_core") else "numpy.core.multiarray")
    allowed: list[Any] = [
        (multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
        (multiarray._reconstruct, "numpy._core.multiarray._reconstruct"),
        np.ndarray,
        np.dtype,
        type(np.dtype(np.int64)),
        type(np.dtype(np.int32)),
    ]
    try:
        check_regular(path)
        with torch.serialization.safe_globals(allowed):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises all kinds on what it did not write, AssertionError and MemoryError too
        raise InputError(
            "does not open as plain index arrays (nothing else is unpickled); give train, valid, test.csv.gz instead",
            file=str(path),
        ) from error
    if not isinstance(loaded, dict):
        raise InputError(f"holds a {type(loaded).__name__}, expected a dictionary of index arrays", file=str(path))
    found = {}
    for key, value in loaded.items():
        if isinstance(value, torch.Tensor) and value.layout == torch.strided and value.dtype != torch.bfloat16:
            value = value.detach().numpy()
        if not isinstance(value, np.ndarray):
            raise InputError(f"{shown(key)} is a {type(value).__name__}, expected an index array", file=str(path))
        found[shown(key)] = value
    return found
