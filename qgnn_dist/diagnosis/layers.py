# SPDX-License-Identifier: Apache-2.0
"""How smooth states are over the graph: Dirichlet energy and mean average distance, exactly, from one part's rows.

Legend: n local rows, H halo rows, C columns; Â = D̃^-½(A + I)D̃^-½, L̃ = I − Â, d degrees with the node itself.
Sums are taken in float64 over a part's own rows of the adjacency; those of all parts add up to the graph's.
"""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..comm.exchange import Exchange
from ..propagation.neighbourhood import Neighbourhood

__all__ = ["HaloRows", "cosine_distances", "dirichlet_sum"]

BLOCK_VALUES = 1 << 20
"""Values of one block of edge ends: keeps a block's arrays at a few MiB whatever the graph."""


class HaloRows:
    """Float rows of the halo, as their owners hold them, for measuring only.

    Args:
        exchange: between two rounds of messages; it carries one more round a call, under `direction`.
    Attributes:
        degrees: float64 (n+H,), d of local and halo rows. Making one is a round: all workers must do so together.
    """

    def __init__(self, graph: Neighbourhood, exchange: Exchange, direction: str) -> None:
        self._graph, self._exchange, self._direction = graph, exchange, direction
        # Whole numbers travel as the bits of floats: no arithmetic touches them on the way.
        sent = self.fetch(graph.degree.view(np.float32)[:, None], 0)
        self.degrees = np.ascontiguousarray(sent).view(np.int32)[:, 0].astype(np.float64) + 1.0

    def fetch(self, rows: np.ndarray, layer: int) -> np.ndarray:
        """Local rows float32 (n, C) with the halo's below them, float32 (n+H, C); all workers together."""
        n, columns = rows.shape
        everything = np.empty((n + self._graph.num_halo, columns), np.float32)
        everything[:n] = rows
        self._exchange.begin(everything.view(np.uint8), 32, columns, self._direction, layer, 0)
        self._exchange.finish()
        return everything


def dirichlet_sum(graph: Neighbourhood, degrees: np.ndarray, rows: np.ndarray) -> float:
    """This part's share of tr(XᵀL̃X), as ½·Σ ‖x_i/√d_i − x_j/√d_j‖² over directed edges j → i with i local.

    The edge form has no cancellation: smooth states keep their digits, which I − Â loses.

    Args:
        degrees: float64 (n+H,). rows: float32 or float64 (n+H, C), X.
    """
    scale = 1.0 / np.sqrt(degrees)
    total = 0.0
    for _, ends, starts in _edge_blocks(graph, rows.shape[1]):
        difference = rows[ends] * scale[ends, None] - rows[starts] * scale[starts, None]
        total += 0.5 * float((difference * difference).sum())
    return total


def cosine_distances(graph: Neighbourhood, rows: np.ndarray) -> tuple[float, int]:
    """This part's share of the mean average distance (MAD, Chen et al., AAAI 2020): its nodes' mean distances, summed.

    A node's distance to a neighbour is 1 − cos, and 1 where either row is zero. Unlike Chen et al. distances of exactly
    zero count: equal neighbours are what oversmoothing is. Nodes without neighbours are left out.

    Args:
        rows: float32 (n+H, C).
    Returns:
        Sum over local nodes with neighbours of the mean distance to them, and the number of those nodes.
    """
    norms = np.sqrt((rows.astype(np.float64) ** 2).sum(1))
    scale = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    total, count = 0.0, 0
    for begin, ends, starts in _edge_blocks(graph, rows.shape[1]):
        cosines = ((rows[ends] * scale[ends, None]) * (rows[starts] * scale[starts, None])).sum(1)
        heads = np.flatnonzero(np.diff(ends, prepend=begin - 1))
        degree = np.diff(heads, append=len(ends))
        total += float((np.add.reduceat(1.0 - cosines, heads) / degree).sum())
        count += len(heads)
    return total, count


def _edge_blocks(graph: Neighbourhood, columns: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(first row, row of every edge, its neighbour) of whole rows, in blocks of some BLOCK_VALUES values."""
    size, begin, n = max(BLOCK_VALUES // max(columns, 1), 1), 0, graph.num_local
    while begin < n:
        end = int(np.searchsorted(graph.indptr, graph.indptr[begin] + size, side="right")) - 1
        end = min(max(end, begin + 1), n)
        low, high = graph.indptr[begin], graph.indptr[end]
        if high > low:
            yield begin, np.repeat(np.arange(begin, end), np.diff(graph.indptr[begin:end + 1])), graph.indices[low:high]
        begin = end
