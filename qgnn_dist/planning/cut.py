# SPDX-License-Identifier: Apache-2.0
"""How large parts will be, and how many rows they will read from one another, for any number of them.

A store's own parts are counted. For other numbers of parts, and for graphs that are not partitioned yet, each end of an
edge is taken to lie in a given other part with probability share/P, where `share` is 1 for parts drawn by chance and
less for a better cut: a node of degree d is then read by a given other part with probability 1 − (1 − share/P)^d. Real
cuts are uneven, which lowers the number of rows that are read, so the figure is an upper one.
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from ..data.graph import Graph
from ..errors import InputError
from ..partitioning import stream
from ..partitioning.balance import Balance
from ..partitioning.clean import CleanGraph, clean
from ..store.reader import Store
from .shapes import GraphSize, PartSize, parts_of

__all__ = ["Cut", "cut_of_graph", "cut_of_numbers", "cut_of_store", "cut_of_store_again"]

BALANCE = 1.05
"""Rows and edges of the largest part against the mean: the capacity of `stream`."""
WINDOWS, SAMPLE_ROWS = 32, 1 << 16
"""Distances of neighbours are counted by powers of two, for so many rows of each part."""
_AGAIN = "; the store has fewer parts than there are workers, and would be made again by `qgnn partition --parts "
SAMPLE_EDGES = 10_000_000
"""Undirected edges up to which a source is cut as a whole; beyond, the subgraph of drawn nodes that has as many."""


@dataclass(frozen=True)
class Cut:
    """Predicted parts.

    Attributes:
        share: cut fraction over that of a random cut, 1 − 1/P. how: where it comes from, for people.
        degrees, counts: how many nodes have a degree. halo_factor: rows that are read, against the formula's.
        known: number of parts → their sizes, where these were counted. within: shares of neighbours that lie at most
        2^k rows away.
    """

    size: GraphSize
    share: float
    how: str
    degrees: np.ndarray
    counts: np.ndarray
    halo_factor: float = 1.0
    known: Mapping[int, list[PartSize]] = field(default_factory=dict)
    within: np.ndarray = field(default_factory=lambda: np.zeros(WINDOWS))

    def near(self, rows: float) -> float:
        """Share of the neighbours that lie at most so many rows away in their part; 0 where nothing is known."""
        return float(np.interp(math.log2(max(rows, 1.0)), np.arange(WINDOWS), self.within))

    def fraction(self, parts: int) -> float:
        """Share of the edges whose ends lie in two parts."""
        return self.share * (1 - 1 / parts)

    def parts(self, parts: int) -> list[PartSize]:
        """All parts where they were counted; else one that stands for all, the largest."""
        if parts in self.known:
            return self.known[parts]
        size, balance = self.size, BALANCE if parts > 1 else 1.0
        rows = min(math.ceil(size.nodes / parts * balance), size.nodes)
        halo = int(self.halo_factor * _read(self.degrees, self.counts, self.share, parts) / parts * balance)
        untouched = float((self.counts * (1 - self.fraction(parts)) ** self.degrees).sum() / max(size.nodes, 1))
        return [PartSize(
            rows=rows, boundary=round(rows * (1 - untouched)), halo=min(halo, size.nodes - rows), sends=halo,
            peers=parts - 1, edges=math.ceil(2 * size.edges / parts * balance), labelled=rows,
            valid=math.ceil(size.valid / parts * balance))]

    def sends(self, parts: int) -> int:
        """Rows that all parts together send in a round."""
        if parts in self.known:
            return sum(part.sends for part in self.known[parts])
        return int(self.halo_factor * _read(self.degrees, self.counts, self.share, parts))

    def frames(self, parts: int) -> int:
        """Messages of a round."""
        if parts in self.known:
            return sum(part.peers for part in self.known[parts])
        return parts * (parts - 1)


def cut_of_store(store: Store) -> Cut:
    """Counted for the store's own number of parts."""
    parts, own = store.num_parts, parts_of(store)
    opened = [store.part(p) for p in range(parts)]
    degrees, counts = _histogram(np.concatenate([np.asarray(part.degree) for part in opened]))
    distances = np.concatenate([_distances(part.indptr, part.indices, part.num_local) for part in opened])
    within = np.array([float((distances <= 2**k).mean()) if len(distances) else 0.0 for k in range(WINDOWS)])
    how = f"counted in the store's {parts} part{'s' * (parts > 1)}"
    if parts == 1:
        return Cut(GraphSize.of(store), 1.0, f"{how}; a random cut for other numbers", degrees, counts, known={1: own},
                   within=within)
    share = store.manifest["cut_fraction"] / (1 - 1 / parts)
    expected = _read(degrees, counts, share, parts)
    factor = sum(part.sends for part in own) / expected if expected else 1.0
    return Cut(GraphSize.of(store), share, how, degrees, counts, factor, {parts: own}, within)


def cut_of_store_again(store: Store, parts: int) -> Cut:
    """Of a store that would be made again, of more parts: by its own cut, or that of the graph in its only part."""
    if store.num_parts > 1:
        how = f"as the store's {store.num_parts} parts are cut, into {parts}"
        return dataclasses.replace(cut_of_store(store), how=f"{how}{_AGAIN}{parts}`")
    part = store.part(0)

    def edges() -> Iterator[np.ndarray]:
        for begin in range(0, part.num_local, SAMPLE_ROWS):
            end = min(begin + SAMPLE_ROWS, part.num_local)
            heads = np.repeat(np.arange(begin, end), np.diff(part.indptr[begin:end + 1]))
            tails = np.asarray(part.indices[part.indptr[begin]:part.indptr[end]], np.int64)
            yield np.stack([heads, tails])[:, heads < tails]

    graph = Graph(name=store.name, num_nodes=store.num_nodes, edges=edges, split=part.split)
    cut = cut_of_graph(graph, GraphSize.of(store), parts)
    return dataclasses.replace(cut, how=f"{cut.how}{_AGAIN}{parts}`")


def _distances(indptr: np.ndarray, indices: np.ndarray, rows: int) -> np.ndarray:
    """How far neighbours lie from some rows, a run of rows at a time; halo rows lie farther than any."""
    found = []
    for begin in np.linspace(0, max(rows - SAMPLE_ROWS // 16, 0), 16, dtype=np.int64):
        end = min(int(begin) + SAMPLE_ROWS // 16, rows)
        own = np.repeat(np.arange(begin, end), np.diff(indptr[begin:end + 1]))
        other = np.asarray(indices[indptr[begin]:indptr[end]], np.int64)
        found.append(np.where(other < rows, np.abs(other - own), 2**31))
    return np.concatenate(found)


def cut_of_numbers(size: GraphSize, cut: float | None = None, parts: int = 1) -> Cut:
    """All nodes at the mean degree, which reads most rows; parts drawn by chance unless `cut` is given.

    Args: cut: share of the edges that `parts` parts cut, in 0…1.
    """
    degrees, counts = np.array([2 * size.edges / max(size.nodes, 1)]), np.array([size.nodes])
    if cut is None:
        how = "a random cut, 1 − 1/P of the edges: the worst; --cut tells a better one"
        return Cut(size, 1.0, how, degrees, counts)
    if not 0 <= cut <= 1:
        raise InputError(f"--cut {cut:g}: expected 0 to 1, the share of the edges that lie between parts")
    share = cut / (1 - 1 / parts) if parts > 1 else 1.0
    return Cut(size, min(share, 1.0), f"--cut {cut:g} at {parts} parts", degrees, counts)


def cut_of_graph(graph: Graph, size: GraphSize, parts: int, seed: int = 0) -> Cut:
    """From one pass of the streaming partitioner, over all of the graph or over a subgraph of drawn nodes.

    A subgraph has fewer edges to a node, and any partitioner cuts few of few edges. So its cut is compared with that of
    the same subgraph whose edges are drawn by chance: what is better is taken to be the graph's own structure. That
    errs towards more: of `synthetic:mid` and `synthetic:arxiv` 1.6 times the rows that the whole graph's cut sends.
    """
    degree, given = np.zeros(size.nodes, np.int64), 0
    for chunk in graph.edges():
        degree += np.bincount(chunk.ravel(), minlength=size.nodes)
        given += chunk.shape[1]
    kept = min(1.0, math.sqrt(SAMPLE_EDGES / max(given, 1)))
    drawn = graph if kept == 1 else _subgraph(graph, kept, seed)
    cleaned = clean(drawn)
    if kept == 1:
        size = dataclasses.replace(size, edges=cleaned.num_edges)
        degrees, counts = _histogram(np.diff(cleaned.indptr))
    else:  # both directions or one, repeated or not: in the subgraph as in all of it
        undirected = cleaned.num_edges / max(sum(chunk.shape[1] for chunk in drawn.edges()), 1)
        size = dataclasses.replace(size, edges=int(given * undirected))
        degrees, counts = _histogram(np.rint(degree * undirected))
    if parts == 1:
        return Cut(size, 1.0, "one part; a random cut for other numbers", degrees, counts)
    owners, fraction = _stream(cleaned, parts, seed, Balance.of(drawn))
    if kept < 1:
        _, chance = _stream(clean(_rewired(cleaned, seed)), parts, seed, Balance.of(drawn))
        share = min(fraction / chance, 1.0) if chance else 1.0
        return Cut(size, share, f"`stream` on the subgraph of {drawn.num_nodes:,} drawn nodes, {parts} parts, against "
                   "edges drawn by chance", degrees, counts)
    share = min(fraction / (1 - 1 / parts), 1.0)
    known = _counted(cleaned.indptr, cleaned.indices, owners, parts, size)
    expected = _read(degrees, counts, share, parts)
    factor = sum(part.sends for part in known) / expected if expected else 1.0
    return Cut(size, share, f"`stream` on all of the graph, {parts} parts", degrees, counts, factor, {parts: known})


def _stream(cleaned: CleanGraph, parts: int, seed: int, balance: Balance) -> tuple[np.ndarray, float]:
    """Owners, and the share of the edges that lie between two of them."""
    owners, _ = stream.assign(cleaned.indptr, cleaned.indices, parts, seed, balance)
    remote = np.repeat(owners, np.diff(cleaned.indptr)) != owners[cleaned.indices]
    return owners, float(remote.mean()) if len(remote) else 0.0


def _rewired(cleaned: CleanGraph, seed: int) -> Graph:
    """A graph whose nodes have about the same degrees, and nothing else in common."""
    heads = np.repeat(np.arange(cleaned.num_nodes), np.diff(cleaned.indptr))
    ends = np.random.default_rng(seed).permutation(heads)
    half = len(ends) // 2
    return Graph(name="rewired", num_nodes=cleaned.num_nodes,
                 edges=lambda: iter([np.stack([ends[:half], ends[half:2 * half]])]))


def _read(degrees: np.ndarray, counts: np.ndarray, share: float, parts: int) -> float:
    """Expected number of (row, other part that reads it)."""
    return float((parts - 1) * (counts * -np.expm1(degrees * math.log1p(-share / parts))).sum()) if parts > 1 else 0.0


def _histogram(degree: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    degrees, counts = np.unique(degree, return_counts=True)
    return degrees.astype(np.float64), counts


def _subgraph(graph: Graph, kept: float, seed: int) -> Graph:
    """Of drawn nodes, renumbered in their order, so that sources with locality keep it."""
    chosen = np.random.default_rng(seed).random(graph.num_nodes) < kept
    number = np.cumsum(chosen) - 1

    def edges() -> Iterator[np.ndarray]:
        for chunk in graph.edges():
            yield number[chunk[:, chosen[chunk].all(0)]]

    return Graph(name=f"{graph.name}, drawn", num_nodes=int(chosen.sum()), edges=edges)


def _counted(indptr: np.ndarray, indices: np.ndarray, owners: np.ndarray, parts: int,
             size: GraphSize) -> list[PartSize]:
    """Sizes of the parts that `owners` makes."""
    rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    to, of = owners[rows], owners[indices]
    remote = to != of
    pairs = np.unique(indices[remote].astype(np.int64) * parts + to[remote])
    reader, owner = pairs % parts, owners[pairs // parts]
    meet = np.unique(owner.astype(np.int64) * parts + reader)
    boundary = np.zeros(len(owners), bool)
    boundary[rows[remote]] = True
    count = {name: np.bincount(x, minlength=parts) for name, x in {
        "rows": owners, "boundary": owners[boundary], "halo": reader, "sends": owner, "peers": meet // parts,
        "edges": to}.items()}
    valid = size.valid / max(size.nodes, 1)
    return [PartSize(**{name: int(x[p]) for name, x in count.items()}, labelled=int(count["rows"][p]),
                     valid=math.ceil(valid * count["rows"][p])) for p in range(parts)]
