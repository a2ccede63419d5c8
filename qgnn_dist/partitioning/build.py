# SPDX-License-Identifier: Apache-2.0
"""One part of a store from what the driver has spooled to a scratch folder; runs in any process that sees the folder.

Legend: n rows of the part, H halo slots.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..data.graph import NO_SPLIT, SPLITS, Graph, SparseFeatures
from ..errors import InputError, StoreError
from ..store.columns import checksum, open_batches, write_batches, write_columns
from ..store.manifest import part_folder
from ..store.reader import FEATURE_BLOCK_ROWS
from .clean import CleanGraph

__all__ = ["build_part", "remove_spool", "spool"]

SCAN_ROWS = 65536
"""Rows whose edges are looked at together."""


def spool(graph: Graph, cleaned: CleanGraph, owners: np.ndarray, parts: int, nodes: np.ndarray, scratch: Path) -> None:
    """Write what the builders need as plain arrays that they memory-map.

    Local order is decided here: a part's rows with remote neighbours come first, then its interior rows, each as they
    follow one another in `nodes`, which holds every node once.
    """
    n = cleaned.num_nodes
    interior = np.ones(n, bool)
    for start in range(0, n, SCAN_ROWS):
        bounds = cleaned.indptr[start:start + SCAN_ROWS + 1]
        rows = np.repeat(np.arange(start, start + len(bounds) - 1), np.diff(bounds))
        interior[rows[owners[rows] != owners[cleaned.indices[bounds[0]:bounds[-1]]]]] = False
    order = nodes[np.lexsort((interior[nodes], owners[nodes]))]
    sizes = np.bincount(owners, minlength=parts)
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    local = np.empty(n, np.int32)
    local[order] = (np.arange(n) - np.repeat(starts[:-1], sizes)).astype(np.int32)
    arrays: dict[str, np.ndarray] = {
        "indptr": cleaned.indptr, "indices": cleaned.indices, "owners": owners, "order": order, "starts": starts,
        "local": local, "boundary": np.bincount(owners[~interior], minlength=parts)}
    if graph.labels is not None:
        arrays["labels"] = graph.labels
    if graph.split is not None:
        arrays["split"] = graph.split
    if isinstance(graph.features, SparseFeatures):
        arrays |= {f"x_{k}": np.asarray(getattr(graph.features, k)) for k in ("indptr", "indices", "values")}
    for name, array in arrays.items():
        np.save(scratch / f"{name}.npy", array)
    if graph.features is not None and not isinstance(graph.features, SparseFeatures):
        _spool_dense(graph, scratch / "x.npy")
    if graph.node_ids is not None:
        write_columns(scratch / "node_ids.arrow", {"node_id": pa.concat_arrays([graph.node_ids])})
    (scratch / "about.json").write_text(json.dumps({"parts": parts, "features": graph.num_features}))


def remove_spool(scratch: Path) -> None:
    """Delete what `spool` wrote; the parts stay."""
    for leftover in [*scratch.glob("*.npy"), *scratch.glob("*.arrow"), scratch / "about.json"]:
        leftover.unlink()


def build_part(scratch: str, part: int) -> dict[str, Any]:
    """Write `scratch/part-NNNNN/` and return its entry of the manifest."""
    source, folder = Path(scratch), Path(scratch) / part_folder(part)
    if not (source / "about.json").exists():
        raise StoreError("this host does not see the new store's folder; put --out where all hosts see it",
                         file=scratch)
    folder.mkdir()
    about = json.loads((source / "about.json").read_text())
    starts = _load(source, "starts")
    nodes = np.asarray(_load(source, "order")[starts[part]:starts[part + 1]], np.int64)
    edges, plan = _edges(source, part, nodes, about["parts"])
    degree = np.diff(edges["indptr"]).astype(np.int32)
    columns: dict[str, Any] = {"source_index": nodes, "node_id": _node_ids(source, nodes), "degree": degree}
    counts = {}
    if (source / "labels.npy").exists():
        columns["label"] = np.asarray(_load(source, "labels")[nodes], np.int32)
    if (source / "split.npy").exists():
        columns["split"] = np.asarray(_load(source, "split")[nodes], np.int8)
        counts = {name: int((columns["split"] == number).sum()) for name, number in SPLITS.items()}
        counts["unsplit"] = int((columns["split"] == NO_SPLIT).sum())
    write_columns(folder / "nodes.arrow", columns)
    write_columns(folder / "rows.arrow", {"indptr": edges["indptr"]})
    write_columns(folder / "neighbours.arrow", {"index": edges["indices"]})
    write_columns(folder / "halo.arrow", {"source_index": edges["halo"]})
    write_columns(folder / "peers.arrow", {k: v for k, v in plan.items() if k != "send_rows"})
    write_columns(folder / "send.arrow", {"row": plan["send_rows"]})
    _write_features(source, folder, nodes, about["features"])
    files = {f.name: {"bytes": f.stat().st_size, "blake2b": checksum(f)} for f in sorted(folder.iterdir())}
    return {"rows": len(nodes), "boundary": int(_load(source, "boundary")[part]), "halo": len(edges["halo"]),
            "sends": len(plan["send_rows"]), "peers": len(plan["peer"]), "directed_edges": len(edges["indices"]),
            "cut": int((edges["indices"] >= len(nodes)).sum()),
            **counts, "files": files}


def _load(source: Path, name: str) -> np.ndarray:
    return np.load(source / f"{name}.npy", mmap_mode="r", allow_pickle=False)


def _spool_dense(graph: Graph, path: Path) -> None:
    features = graph.features
    assert features is not None
    assert not isinstance(features, SparseFeatures)
    out = np.lib.format.open_memmap(path, mode="w+", dtype=features.dtype, shape=tuple(features.shape))
    for start in range(0, graph.num_nodes, FEATURE_BLOCK_ROWS):
        block = features[start:start + FEATURE_BLOCK_ROWS]
        finite = np.isfinite(block)
        if not finite.all():
            row = start + int(np.flatnonzero(~finite.all(1))[0])
            raise InputError(f"{graph.name}: features hold NaN or infinity (first row: {row}); fill or drop them")
        out[start:start + FEATURE_BLOCK_ROWS] = block
    out.flush()


def _edges(source: Path, part: int, nodes: np.ndarray, parts: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The part's rows in local numbering, and its exchange plan.

    Halo slots are ordered by (owner, the owner's row). The graph is undirected, so the rows that a peer reads of us are
    exactly those of ours that have a neighbour there: both sides derive the same order without talking.
    """
    all_indptr, owners, local, starts, order = (
        _load(source, name) for name in ("indptr", "owners", "local", "starts", "order"))
    begins = np.asarray(all_indptr[nodes], np.int64)
    counts = np.asarray(all_indptr[nodes + 1], np.int64) - begins
    indptr = np.zeros(len(nodes) + 1, np.int64)
    np.cumsum(counts, out=indptr[1:])
    take = np.repeat(begins - indptr[:-1], counts) + np.arange(indptr[-1])
    columns = np.asarray(_load(source, "indices")[take], np.int64)
    owner = np.asarray(owners[columns], np.int64)
    remote = owner != part
    total = len(all_indptr) - 1
    indices = np.asarray(local[columns], np.int32)
    remote_places = starts[owner[remote]] + indices[remote]
    places = np.unique(remote_places)
    halo = np.asarray(order[places], np.int64)
    indices[remote] = (len(nodes) + np.searchsorted(places, remote_places)).astype(np.int32)
    rows = np.repeat(np.arange(len(nodes)), counts)[remote]
    sends = np.unique(owner[remote] * total + rows)
    received = np.bincount(owners[halo], minlength=parts)
    sent = np.bincount(sends // total, minlength=parts)
    peers = np.flatnonzero(received + sent)
    plan = {"peer": peers.astype(np.int32), "send_begin": (np.cumsum(sent) - sent)[peers], "send_count": sent[peers],
            "recv_begin": (np.cumsum(received) - received)[peers], "recv_count": received[peers],
            "send_rows": (sends % total).astype(np.int32)}
    return {"indptr": indptr, "indices": indices, "halo": halo}, plan


def _node_ids(source: Path, nodes: np.ndarray) -> pa.Array:
    file = source / "node_ids.arrow"
    if not file.exists():
        return pa.array(nodes)
    return open_batches(file).get_batch(0).column("node_id").take(pa.array(nodes))


def _write_features(source: Path, folder: Path, nodes: np.ndarray, num_features: int) -> None:
    if (source / "x.npy").exists():
        if (source / "x_grids.npy").exists():  # then x holds codes
            low, high = _load(source, "x_grids")
            write_columns(folder / "feature_grids.arrow", {"low": low, "high": high})
        x = _load(source, "x")
        schema = pa.schema([("x", pa.list_(pa.from_numpy_dtype(x.dtype), num_features))])

        def batches() -> Any:
            for start in range(0, len(nodes), FEATURE_BLOCK_ROWS):
                rows = np.ascontiguousarray(x[nodes[start:start + FEATURE_BLOCK_ROWS]])
                column = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), num_features)
                yield pa.record_batch([column], schema=schema)

        write_batches(folder / "features.arrow", schema, batches())
    elif (source / "x_indptr.npy").exists():
        stored = SparseFeatures(_load(source, "x_indptr"), _load(source, "x_indices"), _load(source, "x_values"),
                                (len(nodes), num_features)).rows(nodes)
        write_columns(folder / "feature_rows.arrow", {"indptr": stored.indptr})
        write_columns(folder / "features.arrow", {"index": np.asarray(stored.indices, np.int32),
                                                  "value": np.asarray(stored.values, np.float32)})
