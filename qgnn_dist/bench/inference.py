# SPDX-License-Identifier: Apache-2.0
"""`qgnn bench inference`: features to classes, ours at every width beside the stock float path, in one run."""
from __future__ import annotations

import os
import tempfile
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import kernels
from ..cluster import api
from ..comm.exchange import Exchange
from ..data.graph import SPLITS
from ..errors import QgnnError
from ..model.forward import PackedForward, model_reader
from ..model.packed import ModelInfo, PackedModel
from ..propagation.neighbourhood import Neighbourhood
from ..quant.packed import row_bytes
from ..store.reader import Part, Store
from .beside import KINDS, SETTINGS, check_bench, compare, finish, head
from .footprint import Sizes, available_bytes, failure, measure_apart, misfits, modules_of, need
from .source import dense_features, drawn_store, open_source
from .stock import COMPILED, STOCK, Operator, StockForward, is_there, operator, product_of
from .turns import spread, stream_copy, take_turns

__all__ = ["TRAIN_NODES", "WIDTHS", "OwnForward", "inference", "layer_bytes"]

WIDTHS = {"fp32": "quant.bits=32", "int8": "quant.bits=8", "int4": "quant.bits=4", "int2": "quant.bits=2",
          "int1": "quant.bits=1"}
"""Name → setting; at 1 bit the messages have one, and the rest the least that they can have (2 bits)."""
TRAIN_NODES = 200_000
"""Of larger graphs, the nodes whose subgraph the models are trained on."""
_LARGE, _FEW = 2_000_000, 3
"""From so many nodes on, so few repeats."""


def inference(source: str, *, out: str | Path, kinds: list[str] | None = None, repeats: int | None = None,
              threads: int = 0, hidden: int = 256, layers: int = 10, epochs: int = 20, memory: bool = True,
              pictures: bool = True, keep: str | Path | None = None, overwrite: bool = False,
              on_step: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Time all systems on one graph, one after the other in turns, features in memory, until the classes are there.

    Args:
        source: of a graph with dense features, the name of a shape (arxiv, mid, products), or a store of one part.
        kinds: of KINDS, default all. repeats: default 10, from two million nodes on 3. threads: of every system; 0:
            all cores. epochs: of training before.
        memory: measure every system in a process of its own too. keep: folder that gets the graph as npz.
    Returns: {machine, commit, versions, stream_copy_bytes_per_s, rows}. A row that was measured has ms_median, ms_p10,
        ms_p90; `stock` (the fastest stock system of its kind), `speedup` over it, for merged rounds `speedup_over_two`
        (stock at the published two rounds); `agreement`, the share of nodes in the class that our float model finds,
        and `accuracy` on the test nodes; `estimate_bytes`, `input_bytes`, `peak_bytes` (footprint.measure). Ours has
        `model_bytes`, `tensor_bytes` (without the header), `model_ratio` (its float twin's to those),
        `message_bytes_per_node`, `bandwidth_bytes_per_s` (layer_bytes), and where memory was measured `state_bytes`
        (all arrays of a forward, inputs aside) and `predict_bytes` (the peak of `qgnn predict`). A row that was not
        measured has ms_median null and `why`.
    Raises: InputError: the output exists, a kind is unknown, or the graph does not serve.
    """
    say = on_step or (lambda _: None)
    target, chosen = check_bench("inference", out, kinds, pictures=pictures, overwrite=overwrite)
    count = threads or os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="qgnn-bench-") as scratch:
        store = open_source(source, Path(scratch), None if keep is None else Path(keep), say)
        times = repeats or (_FEW if store.num_nodes >= _LARGE else 10)
        small = drawn_store(store, TRAIN_NODES, Path(scratch) / "drawn")
        models: dict[str, dict[str, Path]] = {}
        for kind in chosen:
            models[kind] = {}
            for width, word in WIDTHS.items():
                say(f"{kind}: a model of {width}")
                run = Path(scratch) / f"{kind}-{width}"
                api.train(small.path, out=run, overrides=[
                    *SETTINGS, *KINDS[kind], word, f"train.epochs={epochs}", "train.checkpoint_every=1000000",
                    f"model.hidden={hidden}", f"propagation.layers={layers}", f"cluster.threads={count}"])
                models[kind][width] = run / "model"
                api.export(run, out=models[kind][width])
        bench = _Bench(store, models, count, hidden, Path(scratch), say)
        measured = bench.memories() if memory else {}
        rows = bench.rows(times, measured)
        stream = stream_copy()
    compare(rows)
    return finish("inference", target, rows, pictures=pictures, stream_copy_bytes_per_s=stream)


class _InMemory:
    """A part's features, read once: what reading blocks asks a part for."""

    feature_kind = "dense"

    def __init__(self, x: np.ndarray) -> None:
        self.x = x

    def features_dense(self, begin: int, end: int) -> np.ndarray:
        return self.x[begin:end]


class OwnForward:
    """A packed model's forward to classes. features: float32 (n, F)."""

    def __init__(self, model: PackedModel, part: Part, graph: Neighbourhood, features: np.ndarray) -> None:
        self._model, self._graph = model, graph
        self._read = model_reader(_InMemory(features), model)  # type: ignore[arg-type]
        self._exchange = Exchange(part.peers, part.num_local, part.num_halo, None, 0, 60.0)
        self.seconds: list[float] = []

    def run(self) -> np.ndarray:
        """Classes (n,); `seconds` gets what the propagation took."""
        forward = PackedForward(self._graph, self._exchange, None, "evaluation")
        scores = forward.run(self._model, self._read)
        self.seconds.append(forward.seconds["propagate"])
        classes, confidence = np.empty(len(scores), np.int32), np.empty(len(scores), np.float32)
        kernels.softmax(scores, classes, confidence, None)
        return classes


def layer_bytes(info: ModelInfo, nodes: int, edges: int) -> int:
    """The bytes that all layers of a propagation must move, however they are computed; caches may serve some of them.

    A round reads for each of the `edges` directed edges an index (4 bytes) and a row of ⌈C·b/8⌉ bytes, and writes and
    sends on such a row a node; a layer reads the state and the H⁰ term and writes the state, 3·4C bytes a node; where
    messages are innovations, a round also reads and writes what is believed and the sums of codes, 4·4C.
    """
    columns, row = 4 * info.num_classes, row_bytes(info.num_classes, info.bits["messages"])
    coded = info.bits["messages"] < 32 and info.coding == "innovation"
    a_round = edges * (4 + row) + nodes * row + (4 * nodes * columns if coded else 0)
    return _rounds(info) * a_round + info.layers * 3 * nodes * columns


class _Bench:
    """The systems on one graph. models: kind → width → file."""

    def __init__(self, store: Store, models: Mapping[str, Mapping[str, Path]], threads: int, hidden: int, scratch: Path,
                 say: Callable[[str], None]) -> None:
        self._store, self._models, self._threads, self._scratch, self._say = store, models, threads, scratch, say
        sizes = Sizes(nodes=store.num_nodes, edges=2 * store.num_edges, features=store.num_features, hidden=hidden,
                      classes=store.num_classes)
        self._stock = [system for system in STOCK if is_there(system)]
        # Ours first: what is left out where not all fit together is stock, the largest last.
        names = [*(f"qgnn-{width}" for width in WIDTHS), *self._stock[:1], COMPILED, *self._stock[1:]]
        self._needs = {name: need(name, sizes, training=False) for name in names}

    def memories(self) -> dict[tuple[str, str], dict[str, Any]]:
        """(kind, system) → what it took, in a process of its own; nothing where it would not fit, or died."""
        found = {}
        for kind, models in self._models.items():
            for name, mine in self._needs.items():
                if misfits({name: mine}, available_bytes()):
                    continue
                self._say(f"{kind}: memory of {name}")
                width = name.removeprefix("qgnn-")
                place, modules = str(self._store.path), modules_of(name)
                try:
                    figures: dict[str, Any]
                    if width in models:
                        model = str(models[width])
                        figures = measure_apart(_prepare_own, place, model, self._threads, modules=modules)
                        out = str(self._scratch / f"predictions-{kind}-{width}")
                        predicted = measure_apart(_prepare_predict, place, model, self._threads, out, modules=modules)
                        figures["predict_bytes"] = predicted["peak_bytes"]
                    else:
                        figures = measure_apart(_prepare_stock, name, place, str(models["fp32"]), self._threads,
                                                modules=modules)
                except QgnnError as error:
                    figures = {"memory_why": error.message}
                found[kind, name] = figures
        return found

    def rows(self, repeats: int, measured: Mapping[tuple[str, str], dict[str, Any]]) -> list[dict[str, Any]]:
        """Time all kinds, one after the other."""
        torch.set_num_threads(self._threads)
        kernels.set_threads(self._threads)
        left_out = misfits(self._needs, available_bytes())
        part = self._store.part(0)
        graph, features = Neighbourhood.of(part), dense_features(part)
        matrix: Operator | None = None
        products = {}
        for name in self._stock:
            if name not in left_out:
                matrix = matrix or operator(graph)
                products[name] = product_of(name, matrix)
        del matrix
        rows = []
        for kind, files in self._models.items():
            models = {width: PackedModel.load(file) for width, file in files.items()}
            own = {f"qgnn-{width}": OwnForward(model, part, graph, features) for width, model in models.items()
                   if f"qgnn-{width}" not in left_out}
            stock = {name: StockForward(product, models["fp32"], features) for name, product in products.items()}
            if COMPILED not in left_out and "torch-csr" in products:
                stock[COMPILED] = StockForward(products["torch-csr"], models["fp32"], features, compiled=True)
            reasons, first_s = dict(left_out), {}
            for name in list(stock):
                self._say(f"{kind}: first run of {name}")
                try:
                    first_s[name] = stock[name].first()
                except Exception as error:  # a compiler that is not there, or memory: this row's fault alone
                    reasons[name] = failure(error)
                    del stock[name]
            runs: dict[str, Callable[[], np.ndarray]] = {name: forward.classes for name, forward in stock.items()}
            runs |= {name: forward.run for name, forward in own.items()}
            times, classes = take_turns(runs, repeats, lambda text, kind=kind: self._say(  # type: ignore[misc]
                f"{kind}: {text}"))
            for name in [*self._stock, COMPILED, *(f"qgnn-{width}" for width in WIDTHS)]:
                row = self._row(kind, name, models.get(name.removeprefix("qgnn-")), models["fp32"], times.get(name))
                row |= measured.get((kind, name), {})
                if name in times:
                    row |= self._quality(part, classes[name], classes.get("qgnn-fp32"))
                    row |= {"compile_s": first_s[name]} if name == COMPILED else {}
                else:
                    row["why"] = reasons[name]
                if name in own and name in times:
                    seconds = float(np.median(own[name].seconds[-repeats:]))
                    moved = layer_bytes(models[name.removeprefix("qgnn-")].info, part.num_local, len(part.indices))
                    row["bandwidth_bytes_per_s"] = moved / seconds
                rows.append(row)
        return rows

    def _row(self, kind: str, system: str, model: PackedModel | None, twin: PackedModel,
             times: list[float] | None) -> dict[str, Any]:
        store = self._store
        row = {**head(store, kind, system, self._threads), "bits": model.info.bits["messages"] if model else 32,
               "scope": "features-to-classes", "estimate_bytes": self._needs[system].total,
               **(spread(times) if times else {"ms_median": None})}
        if model is not None:
            tensors = _tensor_bytes(model)
            row |= {"model_bytes": len(model.to_bytes()), "tensor_bytes": tensors,
                    "model_ratio": _tensor_bytes(twin) / tensors, "message_bytes_per_node": sum(
                        step > 0 for step in model.info.message_steps) * row_bytes(
                            store.num_classes, model.info.bits["messages"]) if model.info.message_steps else
                    4 * store.num_classes * _rounds(model.info)}
        return row

    def _quality(self, part: Part, classes: np.ndarray, float_classes: np.ndarray | None) -> dict[str, Any]:
        assert part.labels is not None
        assert part.split is not None
        test = (part.split == SPLITS["test"]) & (part.labels >= 0)
        return {"agreement": None if float_classes is None else float((classes == float_classes).mean()),
                "accuracy": float((classes[test] == part.labels[test]).mean()) if test.any() else None}


def _rounds(info: ModelInfo) -> int:
    return info.propagation.num_rounds


def _tensor_bytes(model: PackedModel) -> int:
    """Of the model's file without its header: 8 bytes that tell the header's length, and the header."""
    data = model.to_bytes()
    return len(data) - 8 - int.from_bytes(data[:8], "little")


def _prepare_stock(system: str, store: str, model: str, threads: int) -> Callable[[], Any]:
    torch.set_num_threads(threads)
    part = Store.open(store).part(0)
    product = product_of("torch-csr" if system == COMPILED else system, operator(Neighbourhood.of(part)))
    forward = StockForward(product, PackedModel.load(model), dense_features(part), compiled=system == COMPILED)
    if system == COMPILED:
        forward.first()  # what compiling takes is not what running takes
    return forward.run


def _prepare_own(store: str, model: str, threads: int) -> Callable[[], dict[str, int]]:
    torch.set_num_threads(threads)
    kernels.set_threads(threads)
    part = Store.open(store).part(0)
    forward = OwnForward(PackedModel.load(model), part, Neighbourhood.of(part), dense_features(part))

    def run() -> dict[str, int]:
        forward.run()
        tracemalloc.start()
        forward.run()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return {"state_bytes": peak}

    return run


def _prepare_predict(store: str, model: str, threads: int, out: str) -> Callable[[], None]:
    def run() -> None:
        api.predict(store, model=model, out=out, config={"cluster": {"threads": threads}})

    return run
