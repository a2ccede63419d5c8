# SPDX-License-Identifier: Apache-2.0
"""A packed model on a graph in memory: the same bits as a batch prediction of a store, without store, Ray or Parquet.

Legend: N nodes, F features, C classes.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from .. import kernels
from ..comm.exchange import Exchange
from ..data.graph import Graph, SparseFeatures
from ..errors import InputError, ModelError
from ..partitioning.clean import check_arrays, clean
from ..propagation.neighbourhood import Neighbourhood
from .features import FeatureBlock, FeatureScheme, refuse_negative
from .forward import PackedForward, feature_gain, model_reader
from .packed import PackedModel

__all__ = ["GraphRows", "Prediction", "neighbourhood_of", "no_exchange", "predict_graph", "prediction_of",
           "run_packed", "use_torch_threads"]


class Prediction(NamedTuple):
    """What a packed model says of every node, rows in the graph's own order.

    Attributes:
        classes: int32 (N,), the class of the largest score, the lowest on ties.
        confidence: float32 (N,), that class's probability. probabilities: float32 (N, C).
        scores: float32 (N, C), before the softmax; what `qgnn predict --scores` writes.
    """

    classes: np.ndarray
    confidence: np.ndarray
    probabilities: np.ndarray
    scores: np.ndarray


class GraphRows:
    """Feature rows of a graph in memory, as its only part (model.features.FeatureRows)."""

    index = 0

    def __init__(self, features: np.ndarray | SparseFeatures) -> None:
        self._features = features
        self.num_local, self.num_features = (int(size) for size in features.shape)
        sparse = isinstance(features, SparseFeatures)
        self.feature_kind: str | None = "sparse" if sparse else "dense"
        self.stored_values = float(self.num_features)
        if isinstance(features, SparseFeatures):
            self.stored_values = len(features.values) / max(self.num_local, 1)

    def features_dense(self, begin: int, end: int) -> np.ndarray:
        """See FeatureRows; a view where the array is float32 and contiguous."""
        assert not isinstance(self._features, SparseFeatures)
        return np.ascontiguousarray(self._features[begin:end], np.float32)

    def features_sparse(self, begin: int, end: int) -> SparseFeatures:
        """See FeatureRows; values and indices are views."""
        assert isinstance(self._features, SparseFeatures)
        return self._features.block(begin, end)


def neighbourhood_of(graph: Graph) -> Neighbourhood:
    """The cleaned rows of a graph's edges: both directions, no self loops, no duplicates, neighbours ascending."""
    rows = clean(graph)
    return Neighbourhood.whole(rows.indptr, np.ascontiguousarray(rows.indices))


def no_exchange(graph: Neighbourhood) -> Exchange:
    """The rounds of a graph that is whole here, in which nothing is sent."""
    return Exchange([], graph.num_local, 0, None, 0, 1.0)


def use_torch_threads() -> None:
    """Kernels get as many threads as torch has (`torch.set_num_threads`); no result depends on it."""
    kernels.set_threads(torch.get_num_threads())


def run_packed(model: PackedModel, graph: Neighbourhood, read: Callable[[int, int], FeatureBlock], *,
               record: bool = False) -> tuple[np.ndarray, PackedForward]:
    """Scores float32 (N, C), and the forward that made them (its `level`, and its `moments` with `record`).

    Args: read: of coded feature rows, see model.forward.model_reader.
    """
    forward = PackedForward(graph, no_exchange(graph), None, "evaluation", record=record)
    return forward.run(model, read), forward


def prediction_of(scores: np.ndarray) -> Prediction:
    """From scores float32 (N, C), by our own softmax."""
    n = len(scores)
    found = Prediction(np.empty(n, np.int32), np.empty(n, np.float32), np.empty(scores.shape, np.float32), scores)
    kernels.softmax(scores, found.classes, found.confidence, found.probabilities)
    return found


def predict_graph(model: PackedModel, graph: Graph) -> Prediction:
    """Classify every node. Raises: InputError, ModelError: the graph has no features, or they don't fit the model."""
    if graph.features is None:
        raise InputError(f"{graph.name} has no features; prediction needs them")
    check_arrays(graph)
    info, rows = model.info, GraphRows(graph.features)
    if rows.num_features != info.num_features:
        raise ModelError(f"the model takes {info.num_features} features, {graph.name} has {rows.num_features}")
    refuse_negative(rows, FeatureScheme(info.feature_norm, info.feature_signed, info.bits["features"]), graph.name)
    use_torch_threads()
    read = model_reader(rows, model, feature_gain(rows, model, None))
    return prediction_of(run_packed(model, neighbourhood_of(graph), read)[0])
