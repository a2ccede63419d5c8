# SPDX-License-Identifier: Apache-2.0
"""Generated graphs: a degree-corrected stochastic block model with the shapes of known benchmarks.

Nodes sit in blocks (at least 20 a class). Each node has an expected degree with a power-law tail and its own share of
edges that stay inside its class; where that share is small, no propagation finds the class, which is what keeps the
accuracy of propagation below 85 % however good the features are. Edges are drawn in three layers: inside a block,
between blocks of a class, between classes. An edge belongs to the chunk of its first block, so duplicates can be
dropped inside a chunk and replaced: the graph has exactly the asked number of distinct undirected edges, without self
loops, and exactly the asked share of them inside a class. Every chunk has its own seeded generator, so a pass needs
memory for one chunk, and every pass gives the same edges.

Features are dense, signed float32 of mean square 1: class mean + half as strong block mean + noise, all in a
subspace of max(8, classes) dimensions, and weak noise in all dimensions.

Measured (accuracy in %; linear classifier on features as they are / after 10 steps of APPNP, alpha 0.1; 30 % test):

MEASURED
"""
from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import NormalDist
from urllib.parse import parse_qsl

import numpy as np

from qgnn_dist.data.arrays import new_rows
from qgnn_dist.data.graph import TEST, TRAIN, VALID, Graph
from qgnn_dist.errors import InputError

__all__ = ["SHAPES", "BlockModel", "Shape", "generate", "parse_shape"]

MIN_BLOCKS_PER_CLASS = 20
NODES_PER_BLOCK = 1000  # larger classes get more blocks
IN_BLOCK_SHARE = 0.6  # of the edges inside a class
CHUNK_EDGES = 1 << 19
CHUNK_ROWS = 1 << 15
TAIL_EXPONENT = 1.5  # of the degrees' survival function
DEGREE_SHIFT = 0.2  # smallest expected degree, in units of the power law's scale
MAX_DEGREE_RATIO = 400.0  # largest expected degree / mean
MAX_DENSITY = 0.7  # of all possible pairs, that a layer may fill: beyond it, drawing and dropping duplicates is slow
WEIGHTED_ROUNDS = 50  # of replacing duplicates, before unweighted drawing finishes the job
SIGNAL_SHIFT = 1.1  # length of a class mean, in units of the noise; see `_signal`
BLOCK_SIGNAL = 0.5
REST_NOISE = 0.3


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What to generate: counts, the share of edges inside a class, shares of training and validation nodes, seed.

    `mixing` is the concentration of the beta distribution of the nodes' own shares: near 0 they are 0 or 1.
    """

    name: str
    nodes: int
    edges: int
    features: int
    classes: int
    homophily: float = 0.65
    mixing: float = 0.5
    train: float = 0.5
    valid: float = 0.2
    seed: int = 0


SHAPES = {
    "arxiv": Shape(
        name="arxiv", nodes=169_343, edges=1_166_243, features=128, classes=40,
        train=90_941 / 169_343, valid=29_799 / 169_343,
    ),
    "products": Shape(
        name="products", nodes=2_449_029, edges=61_859_140, features=100, classes=47, homophily=0.81, mixing=0.05,
        train=196_615 / 2_449_029, valid=39_323 / 2_449_029,
    ),
    "mid": Shape(name="mid", nodes=1_000_000, edges=12_500_000, features=64, classes=32),
    "sbm": Shape(name="sbm", nodes=10_000, edges=60_000, features=64, classes=10),
}  # fmt: skip
"""Node, edge, feature and class counts and splits of ogbn-arxiv and ogbn-products; edges are undirected, each once."""

_KEYS = {
    "sbm": ("nodes", "edges", "features", "classes", "seed", "homophily"),
    "arxiv": ("seed",), "products": ("seed",), "mid": ("seed",),
}  # fmt: skip
_LEAST = {"nodes": 1, "edges": 1, "features": 1, "classes": 2, "seed": 0}


def parse_shape(text: str) -> Shape:
    """The shape that `arxiv`, `sbm?nodes=2000&edges=9000`, … (what follows `synthetic:`) asks for.

    Raises:
        InputError: unknown name or key (with the near one), a value that is no number or does not fit.
    """
    source = f"synthetic:{text}"
    name, _, query = text.partition("?")
    if name not in SHAPES:
        raise InputError(f"{source}: there is no shape {name!r}{_near(name, SHAPES)}; expected {', '.join(SHAPES)}")
    values: dict[str, int | float] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key not in _KEYS[name]:
            hint = _near(key, _KEYS[name])
            raise InputError(f"{source}: unknown key {key!r}{hint}; {name} knows {', '.join(_KEYS[name])}")
        values[key] = _number(source, key, value)
    shape = replace(SHAPES[name], **values)  # type: ignore[arg-type]
    if "nodes" in values and "edges" not in values:
        shape = replace(shape, edges=6 * shape.nodes)
    if shape.nodes < MIN_BLOCKS_PER_CLASS * shape.classes:
        least = MIN_BLOCKS_PER_CLASS * shape.classes
        raise InputError(
            f"{source}: nodes={shape.nodes} is too few for classes={shape.classes}: expected at least "
            f"{MIN_BLOCKS_PER_CLASS} a class, {least}"
        )
    return shape


def _near(word: str, known: object) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)  # type: ignore[call-overload]
    return f" (did you mean {close[0]!r}?)" if close else ""


def _number(source: str, key: str, value: str) -> int | float:
    try:
        number = float(value) if key == "homophily" else int(value)
    except ValueError:
        kind = "a number" if key == "homophily" else "a whole number"
        raise InputError(f"{source}: {key}={value} is not {kind}") from None
    if key == "homophily":
        if not 0 < number < 1:
            raise InputError(f"{source}: homophily={value} is out of range: expected more than 0 and less than 1")
    elif number < _LEAST[key]:
        raise InputError(f"{source}: {key}={value} is out of range: expected at least {_LEAST[key]}")
    return number


def generate(shape: Shape, progress: Callable[[str], None] | None = None) -> Graph:
    """The graph of a shape; edges are made anew in each pass, features once (on disk where they are large).

    Raises:
        InputError: more edges than a sparse graph of that many nodes can hold.
    """
    default = SHAPES[shape.name] if shape.name in SHAPES else SHAPES["sbm"]
    changed = [f"{key}={getattr(shape, key)}" for key in _KEYS["sbm"] if getattr(shape, key) != getattr(default, key)]
    name = f"synthetic:{shape.name}" + ("?" + "&".join(changed) if changed else "")
    if progress:
        progress(f"{name}: {shape.nodes:,} nodes, {shape.edges:,} edges")
    model = BlockModel(shape)
    return Graph(
        name=name,
        num_nodes=shape.nodes,
        edges=model.edges,
        features=model.features(),
        labels=model.labels,
        num_classes=shape.classes,
        split=_split(shape),
        edge_rows=shape.edges,
    )


def _split(shape: Shape) -> np.ndarray:
    order = np.random.default_rng([shape.seed, 4]).permutation(shape.nodes)
    train = max(1, round(shape.train * shape.nodes))
    valid = max(1, round(shape.valid * shape.nodes))
    split = np.full(shape.nodes, TEST, np.int8)
    split[order[:train]] = TRAIN
    split[order[train : train + valid]] = VALID
    return split


@dataclass(frozen=True)
class _Layer:
    """One kind of edge. `cumulative` (N+1,): running sum of the nodes' weights; `counts` (blocks,): edges by block."""

    cumulative: np.ndarray
    counts: np.ndarray
    partner_start: np.ndarray
    partner_stop: np.ndarray


class BlockModel:
    """The random graph itself. Inside, nodes are counted by place: sorted by class, then block.

    Attributes:
        block: int32 (N,), each node's block.
        labels: int32 (N,), each node's class.
        starts: int64 (blocks+1,), the first place of each block.
        typical: float32 (N,), each node's share of edges inside its class, which also scales its features' signal.
        node_at: the node at each place, a random permutation: node numbers tell nothing about blocks.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        rng = np.random.default_rng([shape.seed, 0])
        self.blocks_per_class = max(MIN_BLOCKS_PER_CLASS, round(shape.nodes / shape.classes / NODES_PER_BLOCK))
        num_blocks = shape.classes * self.blocks_per_class
        ends = np.cumsum(
            np.repeat(rng.gamma(30.0, size=shape.classes), self.blocks_per_class) * rng.gamma(4.0, size=num_blocks)
        )
        spare = np.floor(ends / ends[-1] * (shape.nodes - num_blocks)).astype(np.int64)
        self.starts = np.concatenate([[0], spare]) + np.arange(num_blocks + 1)
        self.node_at = rng.permutation(shape.nodes).astype(np.int32 if shape.nodes < 2**31 else np.int64)
        self.block = np.empty(shape.nodes, np.int32)
        self.block[self.node_at] = np.repeat(np.arange(num_blocks, dtype=np.int32), np.diff(self.starts))
        self.labels = self.block // np.int32(self.blocks_per_class)
        self._layers = self._make_layers(*self._weights(rng))

    def _weights(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Expected degree of each place inside its block, elsewhere in its class, and outside."""
        shape = self.shape
        degree = (1.0 - rng.random(shape.nodes)) ** (-1.0 / TAIL_EXPONENT) - (1.0 - DEGREE_SHIFT)
        np.minimum(degree, min(np.sqrt(shape.nodes), MAX_DEGREE_RATIO) * degree.mean(), out=degree)
        degree *= 2 * shape.edges / degree.sum()
        share = rng.beta(shape.mixing * shape.homophily, shape.mixing * (1 - shape.homophily), size=shape.nodes)
        np.clip(share, 0.02, 0.98, out=share)
        self.typical = np.empty(shape.nodes, np.float32)
        self.typical[self.node_at] = share
        inside = degree * share
        block_size = np.diff(self.starts)
        class_size = np.diff(self.starts[:: self.blocks_per_class])
        # A hub cannot have more neighbours in its block than there are: the rest of its degree goes further out.
        near = np.minimum(inside * IN_BLOCK_SHARE, 0.2 * np.repeat(block_size, block_size))
        far = np.minimum(inside - near, 0.2 * np.repeat(class_size, class_size))
        return near, far, degree - inside

    def _make_layers(self, near: np.ndarray, far: np.ndarray, across: np.ndarray) -> list[_Layer]:
        shape = self.shape
        start, stop = self.starts[:-1], self.starts[1:]
        class_stop = np.repeat(self.starts[:: self.blocks_per_class][1:], self.blocks_per_class)
        end = np.full(len(start), shape.nodes)
        size = (stop - start).astype(float)
        inside = round(shape.homophily * shape.edges)
        in_block = round(inside * float(near.sum() / (near.sum() + far.sum())))

        layers: list[_Layer] = []
        for weights, low, high, pairs in (
            (near, start, stop, size * (size - 1) / 2),
            (far, stop, class_stop, size * (class_stop - stop)),
            (across, class_stop, end, size * (end - class_stop)),
        ):
            placed = sum(int(layer.counts.sum()) for layer in layers)
            total = (in_block, inside - placed, shape.edges - inside)[len(layers)]
            sums = np.concatenate([[0.0], np.cumsum(weights)])
            own, others = sums[stop] - sums[start], sums[high] - sums[low]
            counts = _apportion(own if low is start else own * others, total, np.floor(MAX_DENSITY * pairs))
            # What blocks cannot hold goes between them; the other two layers have nowhere left to go.
            if low is not start and counts.sum() < total:
                raise InputError(
                    f"synthetic:{shape.name}: edges={shape.edges} do not fit {shape.nodes} nodes in {shape.classes} "
                    f"classes at homophily {shape.homophily}: ask for fewer edges or more nodes"
                )
            layers.append(_Layer(sums, counts, low, high))
        return layers

    def edges(self) -> Iterator[np.ndarray]:
        """One pass over all edges, int64 (2, k) chunks, each edge once, in an arbitrary direction."""
        total = np.cumsum(np.sum([layer.counts for layer in self._layers], axis=0))
        first = 0
        while first < len(total):
            done = total[first - 1] if first else 0
            last = max(first + 1, int(np.searchsorted(total, done + CHUNK_EDGES, side="right")))
            yield self._chunk(first, last)
            first = last

    def _chunk(self, first: int, last: int) -> np.ndarray:
        """All edges whose first place lies in the blocks first..last."""
        rng = np.random.default_rng([self.shape.seed, 1, first])
        keys = np.concatenate([self._draw_layer(rng, layer, first, last) for layer in self._layers])
        low, high = np.divmod(keys, self.shape.nodes)
        flip = rng.random(len(keys), np.float32) < 0.5
        ends: np.ndarray = self.node_at[np.stack([np.where(flip, high, low), np.where(flip, low, high)])]
        return ends.astype(np.int64)

    def _draw_layer(self, rng: np.random.Generator, layer: _Layer, first: int, last: int) -> np.ndarray:
        """Distinct pairs (lower place · N + higher place), sorted, exactly the layer's count for each block."""
        nodes = self.shape.nodes
        start, stop = self.starts[first:last], self.starts[first + 1 : last + 1]
        low, high = layer.partner_start[first:last], layer.partner_stop[first:last]
        keys = np.empty(0, np.int64)
        missing = layer.counts[first:last].copy()
        rounds = 0
        while missing.any():
            ask = np.where(missing > 0, missing + missing // 16 + 2, 0)
            sums = layer.cumulative if rounds < WEIGHTED_ROUNDS else None
            one = _draw(rng, sums, np.repeat(start, ask), np.repeat(stop, ask))
            two = _draw(rng, sums, np.repeat(low, ask), np.repeat(high, ask))
            pairs = (np.minimum(one, two) * nodes + np.maximum(one, two))[one != two]
            new = np.unique(pairs)
            new = new[~_contains(keys, new)]
            # Of too many keep a random choice: the lowest would favour low places.
            block = np.searchsorted(stop, new // nodes, side="right")
            order = np.lexsort((rng.random(len(new)), block))
            new, block = new[order], block[order]
            rank = np.arange(len(new)) - np.searchsorted(block, np.arange(last - first))[block]
            keep = rank < missing[block]
            missing -= np.bincount(block[keep], minlength=last - first)
            keys = np.sort(np.concatenate([keys, new[keep]]))
            rounds += 1
        return keys

    def features(self) -> np.ndarray:
        """float32 (N, F), made chunk by chunk; a temporary memory map where it is large."""
        shape = self.shape
        rng = np.random.default_rng([shape.seed, 2])
        dims = min(shape.features, max(8, shape.classes))
        of_class = _directions(rng, shape.classes, dims)
        of_block = rng.standard_normal((len(self.starts) - 1, dims))
        of_block /= np.linalg.norm(of_block, axis=1, keepdims=True)
        signal = _signal(shape.classes)
        means = signal * (np.repeat(of_class, self.blocks_per_class, axis=0) + BLOCK_SIGNAL * of_block)
        power = (dims + signal**2 * (1 + BLOCK_SIGNAL**2)) / shape.features + REST_NOISE**2
        mixing = (_directions(rng, dims, shape.features) / np.sqrt(power)).astype(np.float32)
        means = means.astype(np.float32)
        x = new_rows((shape.nodes, shape.features), np.float32)
        for chunk, begin in enumerate(range(0, shape.nodes, CHUNK_ROWS)):
            end = min(begin + CHUNK_ROWS, shape.nodes)
            draw = np.random.default_rng([shape.seed, 3, chunk])
            latent = draw.standard_normal((end - begin, dims), dtype=np.float32)
            latent += means[self.block[begin:end]] * self.typical[begin:end, None]
            rows = draw.standard_normal((end - begin, shape.features), dtype=np.float32)
            rows *= np.float32(REST_NOISE / np.sqrt(power))
            rows += latent @ mixing
            x[begin:end] = rows
        return x


def _signal(classes: int) -> float:
    """Length of a class mean over the noise's standard deviation.

    A perceptron compares C scores of unit noise, the right one raised by the signal. The median of the largest of
    C-1 normal numbers makes it right for half of the typical nodes, whatever C is; the shift adds what atypical ones
    take away.
    """
    return NormalDist().inv_cdf(0.5 ** (1 / (classes - 1))) + SIGNAL_SHIFT


def _directions(rng: np.random.Generator, count: int, dims: int) -> np.ndarray:
    """Random unit vectors (count, dims), orthogonal where there is room for it."""
    vectors = rng.standard_normal((count, dims))
    if count <= dims:
        vectors = np.linalg.qr(vectors.T)[0].T
    unit: np.ndarray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


def _draw(rng: np.random.Generator, sums: np.ndarray | None, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """A place in [low, high) each, with the probabilities that the running sums give, or equal ones."""
    r = rng.random(len(low))
    if sums is None:
        even: np.ndarray = low + np.floor(r * (high - low)).astype(np.int64)
        return even
    at = np.searchsorted(sums, sums[low] + r * (sums[high] - sums[low]), side="right") - 1
    drawn: np.ndarray = np.clip(at, low, high - 1)
    return drawn


def _contains(sorted_keys: np.ndarray, keys: np.ndarray) -> np.ndarray:
    if not len(sorted_keys):
        return np.zeros(len(keys), bool)
    at = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    there: np.ndarray = sorted_keys[at] == keys
    return there


def _apportion(weights: np.ndarray, total: int, limits: np.ndarray) -> np.ndarray:
    """Whole numbers in proportion to the weights, none over its limit; they add up to total where limits allow it."""
    shares, open_weights = np.zeros(len(weights)), weights.astype(float)
    while shares.sum() < total - 1e-6 and open_weights.sum() > 0:
        shares = np.minimum(shares + open_weights * ((total - shares.sum()) / open_weights.sum()), limits)
        full = (shares >= limits) & (open_weights > 0)
        if not full.any():
            break
        open_weights[full] = 0.0
    # Rounding the running sum keeps the total; the small shift only undoes rounding errors of the sum itself.
    return np.diff(np.floor(np.concatenate([[0.0], np.cumsum(shares)]) + 1e-6)).astype(np.int64)
