# SPDX-License-Identifier: Apache-2.0
"""SIGN (Rossi et al., 2020): neighbours are mixed into the features once, then a perceptron is trained on rows.

Legend: n nodes, F features, H hidden, C classes.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, relu

from ..errors import InputError
from ..memory import available_bytes, byte_size
from .stock import operator, product_of
from .task import Task

__all__ = ["Sign", "mixed_features"]

SCORED_ROWS = 65536
"""Rows that are scored at a time."""


def mixed_features(task: Task, hops: int) -> list[Tensor]:
    """X, ÂX, …, Â^hops·X, each float32 (n, F) and dense.

    Raises: InputError: they do not fit into the memory that is free.
    """
    n, f = task.x.shape
    needed, free = 4 * n * f * (hops + 1), available_bytes()
    if needed > free:
        raise InputError(f"SIGN's mixed features take {byte_size(needed)} ({hops + 1} times {n} x {f} float32), "
                         f"{byte_size(free)} are free; use fewer propagation.layers")
    product = product_of("torch-csr", operator(task.graph))
    mixed = [task.x if task.x.layout == torch.strided else task.x.to_dense()]
    for _ in range(hops):
        mixed.append(product(mixed[-1]))
    return mixed


class Sign(nn.Module):
    """A linear layer a hop, then a perceptron over all of them.

    Args: share: of hidden values dropped. batch_norm: as published for large graphs; over 140 training rows it costs
        points (docs/benchmarks.md).
    """

    def __init__(self, features: int, hidden: int, classes: int, hops: int, share: float, *, batch_norm: bool) -> None:
        super().__init__()
        self.hops = nn.ModuleList(nn.Linear(features, hidden) for _ in range(hops + 1))
        self.norm = nn.BatchNorm1d(hidden * (hops + 1)) if batch_norm else nn.Identity()
        self.middle, self.out = nn.Linear(hidden * (hops + 1), hidden), nn.Linear(hidden, classes)
        self.share = share

    def forward(self, x: Sequence[Tensor]) -> Tensor:
        """Scores (n, C) of rows of every hop's features, each (n, F)."""
        h = relu(self.norm(torch.cat([hop(one) for hop, one in zip(self.hops, x)], 1)))
        h = relu(self.middle(dropout(h, self.share, self.training)))
        scores: Tensor = self.out(dropout(h, self.share, self.training))
        return scores

    @torch.no_grad()
    def all_rows(self, x: Sequence[Tensor]) -> Tensor:
        """Scores (n, C) of all rows, some at a time, without dropout."""
        self.eval()
        return torch.cat([self([one[begin:begin + SCORED_ROWS] for one in x])
                          for begin in range(0, len(x[0]), SCORED_ROWS)])
