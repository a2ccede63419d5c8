# SPDX-License-Identifier: Apache-2.0
"""The parts of a store from what the driver has spooled to a scratch folder; each in any process that sees the folder.

All that there is an entry of for every edge lies in files and passes through memory block by block; what there is one
of for every node may be in memory.

Legend: N nodes, n rows of the part, H halo slots.
"""
from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..data.graph import NO_SPLIT, SPLITS, Graph, SparseFeatures, row_entries
from ..errors import StoreError
from ..files.write import disk_errors
from ..memory import MemoryWatch
from ..store.columns import checksum, open_batches, write_batches, write_columns
from ..store.manifest import part_folder
from ..store.reader import FEATURE_BLOCK_ROWS
from .clean import INDICES, CleanGraph
from .features import refuse_not_finite
from .scratch import append, map_array, save_array, write_values

__all__ = ["build_part", "disk_bytes", "edges_at_once", "remove_spool", "spool"]

LEAST_EDGES, MOST_EDGES = 1 << 16, 1 << 20
"""Directed edges of a block: fewer would cost time, more gain none."""
BYTES_PER_EDGE = 50
"""Of memory that a block takes. Measured: 21 to 41."""
BYTES_PER_NODE = 80
"""Of disk that the arrays of nodes take, twice: for the builders and in the store; without features."""


def edges_at_once(memory_bytes: int, builders: int) -> int:
    """Directed edges of a block such that builders that run side by side take a quarter of the memory together."""
    return min(max(memory_bytes // (4 * builders * BYTES_PER_EDGE), LEAST_EDGES), MOST_EDGES)


def disk_bytes(graph: Graph, directed_edges: int, parts: int) -> int:
    """What `spool` and the builders write, about, at the most that lies there at one time."""
    features = 0
    if isinstance(graph.features, SparseFeatures):
        features = 8 * len(graph.features.values)
    elif graph.features is not None:
        features = graph.num_nodes * graph.num_features * graph.features.dtype.itemsize
    return 2 * features + 4 * directed_edges * (3 if parts > 1 else 2) + BYTES_PER_NODE * graph.num_nodes


def spool(graph: Graph, cleaned: CleanGraph, owners: np.ndarray, parts: int, nodes: np.ndarray, scratch: Path,
          block_edges: int, about: dict[str, Any] | None = None) -> None:
    """Write what the builders need, as plain arrays that they memory-map; `cleaned` has been made in `scratch`.

    Local order is decided here: a part's rows with remote neighbours come first, then its interior rows, each as they
    follow one another in `nodes`, which holds every node once.

    Args:
        block_edges: edges that pass through memory together, here and in the builders; a row with more is a block.
        about: what an error of a builder is to tell: `out`, `needed_bytes`.
    """
    n = cleaned.num_nodes
    interior = _shuffle(cleaned, owners, parts, scratch, block_edges)
    order = nodes[np.lexsort((interior[nodes], owners[nodes]))]
    starts = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=parts))]).astype(np.int64)
    place = np.empty(n, np.int32)
    place[order] = np.arange(n, dtype=np.int32)
    arrays: dict[str, np.ndarray] = {
        "indptr": cleaned.indptr, "order": order, "place": place, "starts": starts,
        "boundary": np.bincount(owners[~interior], minlength=parts)}
    if graph.labels is not None:
        arrays["labels"] = graph.labels
    if graph.split is not None:
        arrays["split"] = graph.split
    if isinstance(graph.features, SparseFeatures):
        arrays |= {f"x_{k}": np.asarray(getattr(graph.features, k)) for k in ("indptr", "indices", "values")}
    for name, array in arrays.items():
        save_array(scratch / f"{name}.npy", array)
    if graph.features is not None and not isinstance(graph.features, SparseFeatures):
        write_values(scratch / "x.npy", tuple(graph.features.shape), graph.features.dtype, _finite_blocks(graph))
    if graph.node_ids is not None:
        write_columns(scratch / "node_ids.arrow", {"node_id": pa.concat_arrays([graph.node_ids])})
    (scratch / "about.json").write_text(json.dumps(
        {"out": str(scratch), "needed_bytes": 0, **(about or {}),
         "parts": parts, "features": graph.num_features, "block_edges": block_edges}))


def remove_spool(scratch: Path) -> None:
    """Delete what `spool` and `clean` wrote; the parts stay."""
    for leftover in [*scratch.glob("*.npy"), *scratch.glob("*.bin"), *scratch.glob("*.arrow"), scratch / "about.json"]:
        leftover.unlink()


def build_part(scratch: str, part: int) -> dict[str, Any]:
    """Write `scratch/part-NNNNN/`; returns its entry of the manifest, and `peak_anon_bytes` of this process meanwhile.

    Memory: a block of edges or of features (65,536 rows), 5 bytes a node of the graph, 60 a row of the part, and 8 for
    every (row, peer) of which one sends to the other.

    Raises:
        StoreError: this host does not see the folder. OutputError: the disk.
    """
    source, folder = Path(scratch), Path(scratch) / part_folder(part)
    if not (source / "about.json").exists():
        raise StoreError("this host does not see the new store's folder; put --out where all hosts see it",
                         file=scratch)
    about = json.loads((source / "about.json").read_text())
    watch = MemoryWatch()
    try:
        with disk_errors(source, about["needed_bytes"], about["out"], "the store"):
            folder.mkdir()
            return _build(source, folder, part, about) | {"peak_anon_bytes": watch.peaks()["peak_anon_bytes"]}
    finally:
        watch.close()


def _build(source: Path, folder: Path, part: int, about: dict[str, Any]) -> dict[str, Any]:
    starts = _load(source, "starts")
    nodes = np.asarray(_load(source, "order")[starts[part]:starts[part + 1]], np.int64)
    indptr, halo, plan, cut = _write_edges(source, folder, part, nodes, about)
    columns: dict[str, Any] = {"source_index": nodes, "node_id": _node_ids(source, nodes),
                               "degree": np.diff(indptr).astype(np.int32)}
    counts = {}
    if (source / "labels.npy").exists():
        columns["label"] = np.asarray(_load(source, "labels")[nodes], np.int32)
    if (source / "split.npy").exists():
        columns["split"] = np.asarray(_load(source, "split")[nodes], np.int8)
        counts = {name: int((columns["split"] == number).sum()) for name, number in SPLITS.items()}
        counts["unsplit"] = int((columns["split"] == NO_SPLIT).sum())
    write_columns(folder / "nodes.arrow", columns)
    write_columns(folder / "rows.arrow", {"indptr": indptr})
    write_columns(folder / "halo.arrow", {"source_index": halo})
    write_columns(folder / "peers.arrow", {k: v for k, v in plan.items() if k != "send_rows"})
    write_columns(folder / "send.arrow", {"row": plan["send_rows"]})
    _write_features(source, folder, part, nodes, about)
    files = {f.name: {"bytes": f.stat().st_size, "blake2b": checksum(f)} for f in sorted(folder.iterdir())}
    return {"rows": len(nodes), "boundary": int(_load(source, "boundary")[part]), "halo": len(halo),
            "sends": len(plan["send_rows"]), "peers": len(plan["peer"]), "directed_edges": int(indptr[-1]),
            "cut": cut, **counts, "files": files}


def _load(source: Path, name: str) -> np.ndarray:
    mapped: np.ndarray = np.load(source / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    return mapped


def _row_blocks(indptr: np.ndarray, entries: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of rows that follow one another, up to `entries` of them, with up to `entries` entries together; a
    row with more is a block of its own."""
    begin, rows = 0, len(indptr) - 1
    while begin < rows:
        end = int(np.searchsorted(indptr, indptr[begin] + entries, side="right")) - 1
        end = min(max(end, begin + 1), begin + entries, rows)
        yield begin, end
        begin = end


def _shuffle(cleaned: CleanGraph, owners: np.ndarray, parts: int, scratch: Path, block_edges: int) -> np.ndarray:
    """Append the neighbours of every row to its owner's file; returns which rows have none elsewhere, bool (N,).

    The single part of a graph reads what cleaning has written.
    """
    interior = np.ones(cleaned.num_nodes, bool)
    if parts == 1:
        return interior
    for begin, end in _row_blocks(cleaned.indptr, block_edges):
        bounds, own = cleaned.indptr[begin:end + 1], owners[begin:end]
        columns, counts = cleaned.indices[bounds[0]:bounds[-1]], np.diff(bounds)
        rows = np.repeat(np.arange(end - begin), counts)
        interior[begin + rows[own[rows] != owners[columns]]] = False
        by_owner = np.argsort(own, kind="stable")
        columns = columns[row_entries(bounds[:-1][by_owner] - bounds[0], counts[by_owner])]
        ends = np.cumsum(np.bincount(own, weights=counts, minlength=parts).astype(np.int64))
        for part, piece in enumerate(np.split(columns, ends[:-1])):
            if len(piece):
                append(scratch / f"edges-{part}.bin", piece)
    return interior


def _finite_blocks(graph: Graph) -> Iterator[np.ndarray]:
    features = graph.features
    assert features is not None
    assert not isinstance(features, SparseFeatures)
    for start in range(0, graph.num_nodes, FEATURE_BLOCK_ROWS):
        block = features[start:start + FEATURE_BLOCK_ROWS]
        refuse_not_finite(graph.name, block, start)
        yield block


def _write_edges(source: Path, folder: Path, part: int, nodes: np.ndarray, about: dict[str, Any]
                 ) -> tuple[np.ndarray, np.ndarray, dict[str, Any], int]:
    """The part's neighbours in local numbering as a file; returns its row pointer, its halo's source indices, its
    exchange plan and how many of its edges are cut.

    Halo slots are ordered by (owner, the owner's row). The graph is undirected, so the rows that a peer reads of us are
    exactly those of ours that have a neighbour there: both sides derive the same order without talking.
    """
    starts, place = np.array(_load(source, "starts")), _load(source, "place")
    parts, first, rows, block_edges = about["parts"], int(starts[part]), len(nodes), about["block_edges"]
    given, edges = _rows_on_disk(source, part, parts, nodes)
    indptr = np.zeros(rows + 1, np.int64)
    np.cumsum(given[1], out=indptr[1:])
    read, sends, cut = np.zeros(len(place), bool), [np.empty(0, np.int64)], 0
    file = source / f"local-{part}.bin"
    for begin, end in _row_blocks(indptr, block_edges):
        begins, counts = given[:, begin:end]
        local = place[edges[row_entries(begins, counts)]] - np.int32(first)
        away = (local < 0) | (local >= rows)
        if away.any():
            there = local[away] + np.int32(first)
            read[there] = True
            owner = np.searchsorted(starts, there, side="right") - 1
            sends.append(np.unique(owner * rows + np.repeat(np.arange(begin, end), counts)[away]))
            local[away] = ~there
            cut += len(there)
        append(file, local)
    places = np.flatnonzero(read)
    if len(places):
        # Every remote neighbour is now there as ~place; its slot is known only after the last one was seen.
        _replace_negative(file, np.cumsum(read, dtype=np.int32) + np.int32(rows - 1), block_edges)
    write_columns(folder / "neighbours.arrow", {"index": map_array(file, np.int32)})
    for done in (file, source / f"edges-{part}.bin"):
        done.unlink(missing_ok=True)
    received = np.bincount(np.searchsorted(starts, places, side="right") - 1, minlength=parts)
    pairs = np.sort(np.concatenate(sends))
    sent = np.bincount(pairs // max(rows, 1), minlength=parts)
    peers = np.flatnonzero(received + sent)
    plan = {"peer": peers.astype(np.int32), "send_begin": (np.cumsum(sent) - sent)[peers], "send_count": sent[peers],
            "recv_begin": (np.cumsum(received) - received)[peers], "recv_count": received[peers],
            "send_rows": (pairs % max(rows, 1)).astype(np.int32)}
    return indptr, np.asarray(_load(source, "order")[places], np.int64), plan, cut


def _rows_on_disk(source: Path, part: int, parts: int, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each row's neighbours begin and how many there are, int64 (2, n), and the file that they begin in.

    A part's file holds its rows by rising source index.
    """
    indptr = _load(source, "indptr")
    begins = np.asarray(indptr[nodes], np.int64)
    counts = np.asarray(indptr[nodes + 1], np.int64) - begins
    if parts == 1:
        return np.stack([begins, counts]), map_array(source / INDICES, np.int32)
    by_source = np.argsort(nodes)
    begins[by_source] = np.cumsum(counts[by_source]) - counts[by_source]
    return np.stack([begins, counts]), map_array(source / f"edges-{part}.bin", np.int32)


def _replace_negative(file: Path, slots: np.ndarray, block_edges: int) -> None:
    """Put slots[place] where the int32 values of a file are ~place, in place."""
    with open(file, "r+b") as opened:
        while block := opened.read(4 * block_edges):
            values = np.frombuffer(block, np.int32).copy()
            negative = values < 0
            values[negative] = slots[~values[negative]]
            opened.seek(-len(block), os.SEEK_CUR)
            opened.write(values.data)


def _node_ids(source: Path, nodes: np.ndarray) -> pa.Array:
    file = source / "node_ids.arrow"
    if not file.exists():
        return pa.array(nodes)
    return open_batches(file).get_batch(0).column("node_id").take(pa.array(nodes))


def _write_features(source: Path, folder: Path, part: int, nodes: np.ndarray, about: dict[str, Any]) -> None:
    num_features = about["features"]
    if (source / "x.npy").exists():
        if (source / "x_grids.npy").exists():  # then x holds codes
            low, high = _load(source, "x_grids")
            write_columns(folder / "feature_grids.arrow", {"low": low, "high": high})
        x = _load(source, "x")
        schema = pa.schema([("x", pa.list_(pa.from_numpy_dtype(x.dtype), num_features))])

        def batches() -> Iterator[pa.RecordBatch]:
            for start in range(0, len(nodes), FEATURE_BLOCK_ROWS):
                rows = np.ascontiguousarray(x[nodes[start:start + FEATURE_BLOCK_ROWS]])
                column = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), num_features)
                yield pa.record_batch([column], schema=schema)

        write_batches(folder / "features.arrow", schema, batches())
    elif (source / "x_indptr.npy").exists():
        given = SparseFeatures(_load(source, "x_indptr"), _load(source, "x_indices"), _load(source, "x_values"),
                               (len(nodes), num_features))
        indptr = np.zeros(len(nodes) + 1, np.int64)
        np.cumsum(given.indptr[nodes + 1] - given.indptr[nodes], out=indptr[1:])
        files = {name: source / f"{name}-{part}.bin" for name in ("index", "value")}
        for begin, end in _row_blocks(indptr, about["block_edges"]):
            block = given.rows(nodes[begin:end])
            append(files["index"], np.asarray(block.indices, np.int32))
            append(files["value"], np.asarray(block.values, np.float32))
        write_columns(folder / "feature_rows.arrow", {"indptr": indptr})
        write_columns(folder / "features.arrow", {"index": map_array(files["index"], np.int32),
                                                  "value": map_array(files["value"], np.float32)})
        for done in files.values():
            done.unlink(missing_ok=True)
