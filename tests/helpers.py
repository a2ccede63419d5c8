# SPDX-License-Identifier: Apache-2.0
"""Small graphs, stores and runs that several test folders share."""
from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qgnn_dist import kernels
from qgnn_dist.comm.pool import LocalPool
from qgnn_dist.config import RunConfig, load_config
from qgnn_dist.data.graph import TEST, TRAIN, VALID, Graph, SparseFeatures
from qgnn_dist.errors import InputError
from qgnn_dist.model.packed import ModelInfo, PackedModel
from qgnn_dist.partitioning.api import partition_graph
from qgnn_dist.propagation.elastic import Elastic
from qgnn_dist.propagation.multiplier import InProcessServer, MultiplierRule, MultiplierServer
from qgnn_dist.propagation.smp import Propagation
from qgnn_dist.quant.grids import AFFINE_METHODS, affine_grid, as_lists, stage_names
from qgnn_dist.store.manifest import CHECKSUM, MANIFEST, manifest_checksum
from qgnn_dist.store.reader import Store
from qgnn_dist.training.loop import _identity, prepare_run
from qgnn_dist.training.worker import TrainWorker


def small_graph(nodes: int = 300, classes: int = 5, features: int = 24, *, sparse: bool = False, degree: float = 6.0,
                seed: int = 0, signed: bool = False) -> Graph:
    """A homophilous graph with isolated nodes, unlabelled nodes and all three splits."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, nodes).astype(np.int32)
    edges = rng.integers(0, nodes, (2, int(nodes * degree)))
    same = labels[edges[0]] == labels[edges[1]]
    edges = edges[:, same | (rng.random(edges.shape[1]) < 0.2)]
    edges = edges[:, (edges != 7).all(0) & (edges != nodes - 1).all(0)]
    centre = rng.normal(size=(classes, features))
    x = (1.5 * centre[labels] + rng.normal(size=(nodes, features))).astype(np.float32)
    given: np.ndarray | SparseFeatures = x
    if sparse:
        mask = x > 1.0
        counts = mask.sum(1)
        given = SparseFeatures(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
                               np.nonzero(mask)[1].astype(np.int32), np.ones(int(counts.sum()), np.float32), x.shape)
    elif not signed:
        given = np.maximum(x, 0)
    split = rng.choice(np.array([0, 1, 2, 3], np.int8), nodes, p=[0.1, 0.3, 0.3, 0.3])
    labels[rng.random(nodes) < 0.05] = -1
    return Graph(name="small", num_nodes=nodes, edges=lambda: iter([edges.astype(np.int64)]), features=given,
                 labels=labels, num_classes=classes, split=split)


def npz_graph(path: Path, nodes: int) -> Path:
    """A file of 500 random edges, 6 features of which 3 tell the class, and splits of 40, 40 and the rest."""
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 3, nodes)
    x = rng.random((nodes, 6)).astype(np.float32) + np.eye(3, 6, dtype=np.float32)[classes]
    np.savez(path, edge_index=rng.integers(0, nodes, (2, 500)), x=x, y=classes, train_idx=np.arange(40),
             valid_idx=np.arange(40, 80), test_idx=np.arange(80, nodes))
    return path


def as_pyg(graph: Graph) -> Any:
    """A PyG `Data` of the same graph: sparse features in CSR form, edges as they come, masks for splits."""
    from torch_geometric.data import Data

    x: Any = graph.features
    if isinstance(x, SparseFeatures):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch calls its CSR tensors beta
            x = torch.sparse_csr_tensor(torch.from_numpy(x.indptr), torch.from_numpy(x.indices.astype(np.int64)),
                                        torch.from_numpy(x.values), x.shape)
    else:
        x = torch.from_numpy(x)
    split, names = graph.split, {"train_mask": TRAIN, "val_mask": VALID, "test_mask": TEST}
    masks = {} if split is None else {name: torch.from_numpy(split == number) for name, number in names.items()}
    labels = None if graph.labels is None else torch.from_numpy(graph.labels.astype(np.int64))
    edges = torch.from_numpy(np.concatenate(list(graph.edges()), 1))
    return Data(x=x, edge_index=edges, y=labels, num_nodes=graph.num_nodes, **masks)


def make_store(graph: Graph, path: Path, parts: int, method: str = "random", seed: int = 0,
               order: str = "source") -> Store:
    """Partition in this process."""
    partition_graph(graph, parts=parts, out=path, method=method, order=order, seed=seed)
    return Store.open(path)


def features_of(store: Store) -> np.ndarray:
    """Dense features of all parts, float32 (N, F), by source index."""
    rows = np.empty((store.num_nodes, store.num_features), np.float32)
    for part in (store.part(i) for i in range(store.num_parts)):
        rows[np.asarray(part.source_index)] = part.features_dense(0, part.num_local)
    return rows


def edit_manifest(store: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a store's manifest, and its checksum with it."""
    manifest = json.loads((store / MANIFEST).read_text())
    change(manifest)
    if CHECKSUM in manifest:
        manifest[CHECKSUM] = manifest_checksum(manifest)
    (store / MANIFEST).write_text(json.dumps(manifest))


def goes_on_alone(store: Store, other: Store, run: Path, key: str, message: str) -> None:
    """A complete run on `store`, also one that knows no `key` yet, is resumed there, and refused on `other`."""
    config = settings()
    run.mkdir()
    (run / "config.toml").write_text(config.to_toml())
    for older in (True, False):
        identity = _identity(store, config)
        if older:
            del identity[key]
        (run / "summary.json").write_text(json.dumps({"identity": identity}))
        assert prepare_run(run, store, config, resume=True, overwrite=False)[1] is not None
        with pytest.raises(InputError, match=message):
            prepare_run(run, other, config, resume=True, overwrite=False)


@contextmanager
def train_pool(store: Store, config: RunConfig, server: Any = None, device: str | None = None) -> Iterator[LocalPool]:
    """TrainWorkers, one thread a part with real gloo between them, set up and calibrated.

    Args: device: torch's name of where training computes; None for our own kernels.
    """
    size = store.num_parts
    own = server or InProcessServer(
        MultiplierServer(size, MultiplierRule.of(config, store.num_edges), config.timeouts.server_s))
    pool = LocalPool(TrainWorker, {"store": str(store.path), "config": config}, size, server=own, timeout_s=60,
                     device=device)
    try:
        loaded = pool.call("load", store.fingerprint, timeout_s=60)
        negative = sum(w["statistics"].negative for w in loaded)
        norm = config.model.feature_norm if config.model.feature_norm != "auto" else "none"
        pool.call("setup", norm, negative > 0, sum(w["nodes"]["train"] for w in loaded), timeout_s=60)
        pool.call("calibrate", timeout_s=60)
        yield pool
    finally:
        pool.close()
        if server is None:
            own.close()


def settings(*words: str) -> RunConfig:
    """A configuration of a small network."""
    return load_config(overrides=["model.hidden=16", "train.epochs=5", "train.lr=0.05", "propagation.layers=4", *words])


def untrained_model(store: Store, *, bits: int = 2, residual: int = 8, kind: str = "smp", rounds: str = "merged",
                    coding: str = "innovation", layers: int = 4, signed: bool = False, hidden: int = 16,
                    method: str = "recipe", seed: int = 0) -> PackedModel:
    """A packed model with drawn weights and steps that roughly fit, made without training."""
    rng = np.random.default_rng(seed)
    f, c, residual = store.num_features, store.num_classes, 32 if bits == 32 else residual
    count = Propagation(kind, layers, 9.0, 0.1, rounds).num_rounds
    local = max(bits, 2)
    low, high = -(2 ** (local - 1)), 2 ** (local - 1) - 1
    weights = [rng.normal(size=s).astype(np.float32) if bits == 32 else
               np.clip(np.rint(rng.normal(size=s) * 0.4 * high), low, high).astype(np.int8)
               for s in ((f, hidden), (hidden, c))]
    step = 1.0 if bits == 32 else 2.0 / high
    grids = {}
    if method in AFFINE_METHODS:
        names = stage_names({"weights": local, "hidden": local, "messages": bits, "residual": residual}, count)
        for name in names:
            width = {"residual": residual}.get(name, bits if name.startswith("news") else local)
            low, reach = (0.0, 1.5) if name == "hidden" else (-1.1, 1.3)
            grids[name] = affine_grid(low * 4 if name == "residual" else low, reach, width, method, 1.2)
    info = ModelInfo(
        num_features=f, hidden=hidden, num_classes=c, method=method, coding=coding, feature_norm="l2",
        bits={"weights": local, "features": local, "hidden": local, "messages": bits, "residual": residual},
        feature_signed=signed, kind=kind, layers=layers, mu=9.0, eta=0.1, rounds=rounds,
        multipliers=[0.0, -0.3, -0.2, -0.1][:layers] if kind == "smp" else [],
        message_steps=[] if bits == 32 else [2.0**-(k // 2) for k in range(count)], weight_steps=[step, step],
        hidden_step=1.0 if bits == 32 else 2.0 / 2**local,
        residual_step=1.0 if residual == 32 else 2.0 ** (3 - residual),
        level=-1, feature_level=-1, class_names=None, graph=store.name, fingerprint=store.fingerprint,
        grids=as_lists(grids), elastic=Elastic(0.5, 3.0, "l21") if kind == "elastic" else None)
    if grids:
        info = replace(info, weight_steps=[grids["weights1"].step, grids["weights2"].step],
                       hidden_step=grids["hidden"].step, residual_step=grids["residual"].step,
                       message_steps=[grids[f"news/{k}"].step for k in range(count)])
    return PackedModel(info, weights[0], rng.normal(size=hidden).astype(np.float32) * np.float32(0.1), weights[1],
                       rng.normal(size=c).astype(np.float32))


def by_source(results: list[dict[str, np.ndarray]]) -> np.ndarray:
    """Rows of all workers' scores, in the order of the source."""
    index = np.concatenate([r["source_index"] for r in results])
    scores = np.concatenate([r["scores"] for r in results])
    return scores[np.argsort(index)]


def worst_excess(a: np.ndarray, b: np.ndarray) -> float:
    """Largest |a − b| over law 1's tolerance, 1e-4·|b| + 1e-6·max|b|; at most 1 where the law holds."""
    tolerance = 1e-4 * np.abs(b) + 1e-6 * np.abs(b).max(initial=0.0)
    return float((np.abs(a - b) / np.maximum(tolerance, 1e-30)).max(initial=0.0))


def thinned_rows(key: tuple[int, int, int, int], rows: np.ndarray, p: float, indptr: np.ndarray, indices: np.ndarray,
                 values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `kernels.thin_csr` keeps: row pointer, columns and values."""
    at, columns, kept = np.empty_like(indptr), np.empty_like(indices), np.empty_like(values)
    kernels.thin_csr(*key, rows, p, indptr, indices, values, at, columns, kept)
    return at, columns[:at[-1]], kept[:at[-1]]
