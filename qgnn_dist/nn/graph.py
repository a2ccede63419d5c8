# SPDX-License-Identifier: Apache-2.0
"""What a module makes of the graph that it is given, kept while the same graph comes again."""
from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

from torch import Tensor

from ..data import checks
from ..data.graph import Graph
from ..data.npz import edge_passes
from ..data.pyg import edges_of
from ..errors import InputError
from ..model.memory import neighbourhood_of
from ..propagation.neighbourhood import Neighbourhood

__all__ = ["Remembered", "read_adjacency"]

Value = TypeVar("Value")


class Remembered(Generic[Value]):
    """What was made of one object, for as long as that object lives and is not changed in place.

    Copies and pickles of it start empty. A change that torch cannot see (through `.numpy()` or `.data`) is not noticed.
    """

    def __init__(self) -> None:
        self._source: weakref.ref[Any] | None = None
        self._version: int | None = None
        self._value: Value | None = None

    def of(self, source: Any, make: Callable[[], Value]) -> Value:
        """What `make` gave for this very object, now or before."""
        version = _version(source)
        if self._source is None or self._source() is not source or version is None or version != self._version:
            self._value = make()
            self._source, self._version = weakref.ref(source), version
        return cast(Value, self._value)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Remembered, ()


def _version(source: Any) -> int | None:
    """How often an object was changed in place; None where that cannot be told."""
    if isinstance(source, Tensor):
        return None if source.is_inference() else int(source._version)
    return 0


def read_adjacency(adjacency: Any, num_nodes: int) -> Neighbourhood:
    """The rows of an adjacency (see SMPConv.forward), cleaned: symmetric, no self loops, no duplicates.

    Raises: InputError: another form, size or index, or weights that are not all 1.
    """
    where = "adjacency"
    edges = edges_of(adjacency, where)
    if not isinstance(adjacency, Tensor) or adjacency.shape[0] != 2 or adjacency.is_sparse or adjacency.is_sparse_csr:
        size = int(adjacency.size(0)) if hasattr(adjacency, "size") and callable(adjacency.size) else num_nodes
        if size != num_nodes:
            raise InputError(f"{where} is of {size} nodes, x has {num_nodes} rows")
    checks.check_edges(edges, num_nodes, where)
    return neighbourhood_of(Graph("the graph", num_nodes, edge_passes(edges)))
