# SPDX-License-Identifier: Apache-2.0
"""A grid's graphs as stores: as they are, shifted, or blind, each written again when its source changes."""
from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import StoreError
from .folder import read_note

if TYPE_CHECKING:
    from ..data.graph import Graph
    from ..store.reader import Store

__all__ = ["dataset_store", "without_test_labels", "write_shifted_stores"]


def dataset_store(store: Path, source: str, root: str | Path | None, on_step: Callable[[str], None] | None = None, *,
                  hops: int = 0, parts: int = 1, blind: bool = False) -> str:
    """What tells a dataset's store from another's, which is written first where there is none of the source as it is.

    Args: root: folder of OGB data sets. hops: of its features. parts: of the store. blind: without the test nodes'
        labels, see `without_test_labels`.
    """
    from ..cluster import api
    from ..data.load import load_graph
    from ..files.write import write_atomically
    from ..store.reader import Store

    note = store.with_name(f"{store.name}.json")
    state = {"source": _identity(source), **({"hops": hops} if hops else {}),
             **({"parts": parts} if parts > 1 else {}), **({"blind": True} if blind else {})}
    if read_note(note) == state:
        try:
            return _told(Store.open(store))
        except StoreError:
            pass  # damaged, or of an older version
    note.unlink(missing_ok=True)
    store.parent.mkdir(parents=True, exist_ok=True)
    if on_step is not None:
        on_step(f"partitioning {store.name}")
    given = without_test_labels(load_graph(source, root=root)) if blind else source
    api.partition(given, parts=parts, out=store, root=root, hops=hops, overwrite=store.exists())
    write_atomically(note, (json.dumps(state) + "\n").encode())
    return _told(Store.open(store))


def _told(store: Store) -> str:
    hops = f" with {store.hops} hops" if store.hops else ""
    return store.fingerprint + hops + (f" in {store.num_parts} parts" if store.num_parts > 1 else "")


def write_shifted_stores(stores: Path, source: str, root: str | Path | None,
                         on_step: Callable[[str], None] | None) -> None:
    """The shifted graphs' stores, written where there are none of the source as it is now."""
    from ..files.write import write_atomically
    from .shifts import SHIFTS, write_shifted

    note, state = stores / "source.json", {"source": _identity(source), "shifts": list(SHIFTS)}
    if read_note(note) == state:
        return
    if on_step is not None:
        on_step(f"shifting {stores.name}")
    note.unlink(missing_ok=True)
    stores.mkdir(parents=True, exist_ok=True)
    write_shifted(source, stores, root)
    write_atomically(note, (json.dumps(state) + "\n").encode())


def _identity(source: str) -> str:
    """Changes when the source does: a file's hash; the names, sizes and times of Parquet files; else the text."""
    if source.endswith(".npz"):
        digest = hashlib.sha256()
        with open(source, "rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
        return f"npz {digest.hexdigest()}"
    if source.startswith("parquet:"):
        base = Path(source.partition(":")[2])
        files = [(str(f.relative_to(base)), f.stat().st_size, f.stat().st_mtime_ns)
                 for f in sorted(base.rglob("*")) if f.is_file()]
        return f"parquet {hashlib.sha256(json.dumps(files).encode()).hexdigest()}"
    return source


def without_test_labels(graph: Graph) -> Graph:
    """The same graph, every labelled test node called class 0: what is chosen on it has seen no test label.

    Training, validation and its figures are the same; test figures tell nothing.
    """
    import numpy as np

    from ..data.graph import TEST

    if graph.labels is None or graph.split is None:
        return graph  # refused by whoever trains on it
    hidden = (np.asarray(graph.split) == TEST) & (np.asarray(graph.labels) >= 0)
    return dataclasses.replace(graph, labels=np.where(hidden, 0, graph.labels).astype(np.asarray(graph.labels).dtype))
