# SPDX-License-Identifier: Apache-2.0
"""Tomorrow's graph cut like today's: nodes are known again by their ids, and stay where they were."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..data.graph import Graph
from ..errors import InputError
from ..store.reader import Store

__all__ = ["check_like", "known_columns", "known_owners", "known_scales"]


def check_like(path: str | Path, parts: int, method: str) -> Store:
    """The store whose owners are kept.

    Raises:
        StoreError: none there, or damaged. InputError: another number of parts, or a method that would cut anew.
    """
    if method not in ("auto", "stream"):
        raise InputError(f"--like places new nodes by stream, not by {method}; leave --method out")
    store = Store.open(path)
    if store.num_parts != parts:
        raise InputError(f"--like {path} has {store.num_parts} parts, --parts is {parts}: expected the same number")
    return store


def known_owners(store: Store, graph: Graph) -> tuple[np.ndarray, dict[str, int]]:
    """Owners int32 (N,) of the graph's nodes, −1 for those that the store has not, and how many nodes were `kept`, are
    `new` and were `removed`.

    Raises:
        InputError: ids of another kind, words here and numbers there.
    """
    ids = pa.array(np.arange(graph.num_nodes)) if graph.node_ids is None else pa.concat_arrays([graph.node_ids])
    ids, owners, kept = _comparable(ids), np.full(graph.num_nodes, -1, np.int32), 0
    for index in range(store.num_parts):  # one part's look-up at a time
        theirs = _comparable(store.part(index).node_ids)
        if theirs.type != ids.type:
            raise InputError(f"--like {store.path} has node ids of type {theirs.type}, {graph.name} of {ids.type}: "
                             "expected the same kind, or no node would be known again")
        here = np.asarray(pc.is_in(ids, value_set=theirs))
        owners[here] = index
        kept += int(np.count_nonzero(here))
    return owners, {"kept": kept, "new": graph.num_nodes - kept, "removed": store.num_nodes - kept}


def known_scales(store: Store, hops: int) -> list[float] | None:
    """The scales of a store's mixed features, so that a model trained on them finds the same in a later store.

    Raises:
        InputError: the store has another number of hops.
    """
    if store.hops != hops:
        raise InputError(f"--like {store.path} has features of {store.hops} hops, --hops is {hops}: expected the same")
    return [float(scale) for scale in store.manifest["hops"]["scales"]]


def known_columns(store: Store, num_features: int, standardise: bool) -> dict[str, list[float]] | None:
    """Means and deviations of a store's columns, so that a model trained on them finds the same in a later store.

    Raises:
        InputError: one of both is standardised alone; another number of features.
    """
    if store.standardised != standardise:
        there, here = ("standardised", "leaves it out") if store.standardised else ("not standardised", "has it")
        raise InputError(f"--like {store.path} has features that are {there}, --standardise: this command {here}; "
                         "expected the same")
    found: dict[str, list[float]] | None = store.manifest.get("standardised")
    if found is not None and len(found["means"]) != num_features:
        raise InputError(f"--like {store.path} has means of {len(found['means'])} features, the graph has "
                         f"{num_features}: expected the same")
    return found


def _comparable(ids: pa.Array) -> pa.Array:
    """Whole numbers of any width as int64, words as large_string; anything else as it is."""
    if pa.types.is_dictionary(ids.type):
        ids = ids.dictionary_decode()
    if pa.types.is_integer(ids.type) and not (pa.types.is_uint64(ids.type) and _past_int64(ids)):
        return ids.cast(pa.int64())
    return ids.cast(pa.large_string()) if pa.types.is_string(ids.type) else ids


def _past_int64(ids: pa.Array) -> bool:
    largest = pc.max(ids).as_py()
    return largest is not None and largest >= 2**63
