# SPDX-License-Identifier: Apache-2.0
"""The one graph that all systems of a bench run on: a store of one part, and where asked for an .npz of the same."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..cluster import api
from ..data.graph import SPLITS, TEST, Graph
from ..data.npz import edge_passes
from ..data.synthetic import SHAPES
from ..errors import InputError
from ..store.reader import FEATURE_BLOCK_ROWS, Part, Store

__all__ = ["dense_features", "drawn_store", "has_test", "open_source", "write_npz"]


def open_source(source: str, scratch: Path, keep: Path | None, say: Callable[[str], None]) -> Store:
    """The store of a source, written into `scratch` where the source is no store.

    Args:
        source: what `partition` takes, the bare name of a synthetic shape (arxiv, mid, products), or a store.
        keep: folder that gets `graph.npz` beside it; None for none.
    Raises: InputError: several parts, sparse features, no labels or no splits.
    """
    place = Path(source)
    if not (place / "manifest.json").exists():
        source = f"synthetic:{source}" if source in SHAPES else source
        say(f"writing a store of {source}")
        place = scratch / "store"
        api.partition(source, parts=1, out=place)
    store = Store.open(place)
    if store.num_parts != 1:
        raise InputError(f"the store has {store.num_parts} parts; expected one, which all systems can read",
                         file=str(place))
    if store.feature_kind != "dense":
        raise InputError(f"{store.feature_kind or 'no'} features; expected dense ones", file=str(place))
    if not (store.has_labels and store.has_split):
        raise InputError("labels or splits are missing; models are trained first", file=str(place))
    if keep is not None:
        say(f"writing {keep / 'graph.npz'}")
        keep.mkdir(parents=True, exist_ok=True)
        write_npz(store, keep / "graph.npz")
    return store


def has_test(store: Store) -> bool:
    """Whether a test node has a label: systems are compared by those alone."""
    for part in (store.part(number) for number in range(store.num_parts)):
        if part.split is not None and part.labels is not None and ((part.split == TEST) & (part.labels >= 0)).any():
            return True
    return False


def dense_features(part: Part, rows: np.ndarray | None = None) -> np.ndarray:
    """Features float32 in memory, of all rows or of some (int64, ascending), read block by block."""
    count = part.num_local
    out = np.empty((count if rows is None else len(rows), part.num_features), np.float32)
    for begin in range(0, count, FEATURE_BLOCK_ROWS):
        end = min(begin + FEATURE_BLOCK_ROWS, count)
        if rows is None:
            out[begin:end] = part.features_dense(begin, end)
        else:
            low, high = np.searchsorted(rows, [begin, end])
            out[low:high] = part.features_dense(begin, end)[rows[low:high] - begin]
    return out


def write_npz(store: Store, file: Path) -> None:
    """A store of one part as .npz, nodes in the order of the source; `qgnn partition` reads it."""
    part = store.part(0)  # its rows ascend by source index
    assert part.labels is not None
    assert part.split is not None
    rows = np.repeat(np.arange(part.num_local, dtype=np.int32), np.diff(part.indptr))
    once = rows < part.indices
    arrays: dict[str, Any] = {f"{name}_idx": np.flatnonzero(part.split == number) for name, number in SPLITS.items()}
    if store.class_names is not None:
        arrays["class_names"] = np.array(store.class_names)
    np.savez(file, edge_index=np.stack([rows[once], part.indices[once]]), x=dense_features(part), y=part.labels,
             num_nodes=np.int64(store.num_nodes), **arrays)


def drawn_store(store: Store, limit: int, out: Path) -> Store:
    """A store of the subgraph that `limit` drawn nodes induce; the store itself where it has no more.

    A packed model is a function of features and graph, so models to be timed on a large graph may be trained on this.
    """
    if store.num_nodes <= limit:
        return store
    part = store.part(0)
    assert part.labels is not None
    assert part.split is not None
    rows = np.sort(np.random.default_rng(0).choice(store.num_nodes, limit, replace=False))
    number = np.full(store.num_nodes, -1, np.int64)
    number[rows] = np.arange(limit)
    starts, counts = part.indptr[rows], part.degree[rows].astype(np.int64)
    offsets = np.cumsum(counts) - counts
    tails = number[part.indices[np.repeat(starts - offsets, counts) + np.arange(counts.sum())]]
    heads = np.repeat(np.arange(limit), counts)
    once = (tails >= 0) & (heads < tails)
    graph = Graph(name=f"{store.name}-drawn", num_nodes=limit, edges=edge_passes(np.stack([heads[once], tails[once]])),
                  features=dense_features(part, rows), labels=np.array(part.labels[rows]),
                  num_classes=store.num_classes, split=np.array(part.split[rows]), class_names=store.class_names)
    api.partition(graph, parts=1, out=out)
    return Store.open(out)
