# SPDX-License-Identifier: Apache-2.0
"""What a plan knows of a graph and of its parts: counts, nothing else."""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..model.features import keeps_dense
from ..store.reader import Store

__all__ = ["GraphSize", "PartSize", "parts_of", "row_work", "weight_count"]


@dataclass(frozen=True, kw_only=True)
class GraphSize:
    """Counts of a graph.

    Attributes:
        edges: undirected. stored: values that are kept of a feature row, `features` where they are dense.
        sparse: whether rows are in CSR form. train, valid: nodes of these splits.
    """

    nodes: int
    edges: int
    features: int
    classes: int
    train: int
    valid: int
    stored: float
    sparse: bool = False

    def codes_are_dense(self, bits: int) -> bool:
        """Whether features of so many bits are worked on without row pointers."""
        return not self.sparse or keeps_dense(self.stored, self.features, bits)

    @classmethod
    def of(cls, store: Store) -> GraphSize:
        """Of a store."""
        entries = store.manifest["parts"]
        train, valid = (sum(e.get(name, 0) for e in entries) for name in ("train", "valid"))
        return cls(nodes=store.num_nodes, edges=store.num_edges, features=store.num_features,
                   classes=store.num_classes, train=train, valid=valid, stored=store.stored_values,
                   sparse=store.feature_kind == "sparse")


@dataclass(frozen=True, kw_only=True)
class PartSize:
    """Counts of one part.

    Attributes:
        rows, boundary: local rows, and those with remote neighbours. halo: remote rows that it reads.
        sends: rows that it sends in a round. peers: parts that it sends to. edges: directed, ending in its rows.
        labelled, valid: rows of the three splits together, and of the validation split.
    """

    rows: int
    boundary: int
    halo: int
    sends: int
    peers: int
    edges: int
    labelled: int
    valid: int

    @property
    def interior_share(self) -> float:
        """Share of the rows that have no remote neighbour: what is worked on while the wire is busy."""
        return 1 - self.boundary / self.rows if self.rows else 1.0


def parts_of(store: Store) -> list[PartSize]:
    """The parts of a store, as its manifest counts them."""
    return [_part(entry) for entry in store.manifest["parts"]]


def _part(entry: dict[str, Any]) -> PartSize:
    counts = {name: int(entry.get(name, 0)) for name in ("train", "valid", "test")}
    known = {f.name: int(entry.get(f.name, 0)) for f in dataclasses.fields(PartSize)}
    return PartSize(**(known | {"edges": entry["directed_edges"], "labelled": sum(counts.values()),
                                "valid": counts["valid"]}))


def weight_count(size: GraphSize, hidden: int) -> int:
    """Numbers in the two weight matrices and biases."""
    return size.features * hidden + hidden + hidden * size.classes + size.classes


def row_work(size: GraphSize, hidden: int, bits: int) -> tuple[float, float]:
    """Input and hidden values of a row in the perceptron, and weights that meet it. Args: bits: of the features."""
    values = size.features if size.codes_are_dense(bits) else size.stored
    return values + hidden, values * hidden + hidden * size.classes
