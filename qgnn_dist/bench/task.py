# SPDX-License-Identifier: Apache-2.0
"""A store of one part as torch has it: what others than ours train on. Legend: n nodes, F features, C classes."""
from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import dropout

from ..data.graph import SPLITS, TRAIN
from ..model.features import DENSE_SHARE, FeatureScheme, FeatureStatistics, choose_norm, feature_statistics, read_block
from ..propagation.neighbourhood import Neighbourhood
from ..store.reader import Part, Store

__all__ = ["Task", "chosen_norm", "csr_tensor", "dropped"]


class Task:
    """Features, graph, labels and splits.

    Attributes:
        graph: of one part. classes: C. norm: the normalisation of the rows, as chosen. statistics: of the training
            rows' features. x: float32 (n, F), strided, or CSR where the store's features are sparse. y: int64 (n,), −1
            unlabelled. rows: split → its labelled rows, int64, ascending.
    """

    def __init__(self, store: Store, norm: str) -> None:
        """Args: norm: as `model.feature_norm`; `auto` looks at the training rows, as our own training does."""
        part = store.part(0)
        assert part.labels is not None
        assert part.split is not None
        self.graph, self.classes = Neighbourhood.of(part), store.num_classes
        self.y = torch.from_numpy(part.labels.astype(np.int64))
        self.rows = {name: np.flatnonzero((part.split == number) & (part.labels >= 0))
                     for name, number in SPLITS.items()}
        self.statistics = _statistics(part)
        self.norm = choose_norm(self.statistics, store.num_features) if norm == "auto" else norm
        self.x = _features(part, self.norm)


def chosen_norm(store: Store, norm: str) -> str:
    """What `model.feature_norm` comes to on a store of one part."""
    return choose_norm(_statistics(store.part(0)), store.num_features) if norm == "auto" else norm


def _statistics(part: Part) -> FeatureStatistics:
    assert part.labels is not None
    assert part.split is not None
    return feature_statistics(part, np.flatnonzero((part.split == TRAIN) & (part.labels >= 0)))


def _features(part: Part, norm: str) -> Tensor:
    block = read_block(part, FeatureScheme(norm, True, 32), 0, part.num_local)
    if block.indptr is None or block.indices is None:
        return torch.from_numpy(block.values)
    return csr_tensor(torch.from_numpy(np.array(block.indptr)), torch.from_numpy(block.indices.astype(np.int64)),
                      torch.from_numpy(block.values), (part.num_local, block.num_features))


def csr_tensor(indptr: Tensor, indices: Tensor, values: Tensor, size: tuple[int, ...]) -> Tensor:
    """A matrix in CSR form, without torch's two sentences on its being a beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(indptr, indices, values, size=size, check_invariants=False)


def dropped(x: Tensor, share: float, training: bool) -> Tensor:
    """Dropout of a matrix, strided or CSR: zeros that are not stored would be dropped to zeros.

    Returns: strided too where a third of a CSR matrix is stored: torch turns the other kind round for its gradient in
        every epoch, which takes 230 ms on amazon_photo and 10 ms so.
    """
    if not training or share == 0:
        return x
    if x.layout == torch.strided:
        return dropout(x, share)
    values = dropout(x.values(), share)
    if len(values) < DENSE_SHARE * x.numel():
        return csr_tensor(x.crow_indices(), x.col_indices(), values, tuple(x.shape))
    starts = torch.repeat_interleave(torch.arange(x.shape[0]) * x.shape[1], x.crow_indices().diff())
    return torch.zeros(x.numel()).index_add_(0, starts + x.col_indices(), values).view(x.shape)
