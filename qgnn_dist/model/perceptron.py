# SPDX-License-Identifier: Apache-2.0
"""The two-layer perceptron in training: H⁰ = MLP(X), quantised straight-through, dropped out by keyed random numbers.

Legend: n local rows, F features, H hidden width, C classes.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import kernels
from ..config import RunConfig
from ..propagation.smp import Propagation
from ..quant.grids import AFFINE_METHODS, AffineGrid, stage_names
from ..quant.learned import AffineWeightQuantizer, StageRanges, affine_codes
from ..quant.straight_through import WeightQuantizer, scale_gradient, unsigned_codes
from .features import FeatureBlock

__all__ = ["AffineHidden", "DropoutKey", "FeatureMatrix", "Perceptron"]

STAGE_INPUT, STAGE_HIDDEN = 1, 2
"""Stage numbers of the random-number key."""


@dataclass(frozen=True)
class DropoutKey:
    """Key of the dropout masks: they depend on the node's place in the source, never on the cut."""

    seed: int
    epoch: int
    rows: np.ndarray
    share: float


@dataclass(frozen=True)
class AffineHidden:
    """The hidden stage's grid where quant.method has affine grids; its range begins at 0, as relu does.

    Attributes:
        ends: what the learned factors multiply. share: scale of their gradients.
        protected: bool (n,), rows that stay at full precision (degree_quant's training).
    """

    grid: AffineGrid
    ends: tuple[float, float]
    share: float
    protected: np.ndarray | None = None


class FeatureMatrix:
    """All coded feature rows of one worker, ready for products in both directions."""

    def __init__(self, block: FeatureBlock) -> None:
        coded = block.as_float()
        self.scale = torch.from_numpy(coded.scale)[:, None]
        self.num_features = block.num_features
        self._indptr, self._indices, self._values = coded.indptr, coded.indices, coded.values
        if self._indptr is not None and self._indices is not None:
            # The transpose, for the weights' gradient: by column, rows ascending inside.
            self._order = np.argsort(self._indices, kind="stable")
            counts = np.bincount(self._indices, minlength=block.num_features)
            self._t_indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
            rows = np.repeat(np.arange(len(self._indptr) - 1, dtype=np.int32), np.diff(self._indptr))
            self._t_indices = np.ascontiguousarray(rows[self._order])

    def times(self, weight: Tensor, key: DropoutKey | None) -> Tensor:
        """(X ∘ mask)·weight, without the row scales. weight: (F, H)."""
        if self._indptr is None or self._indices is None:
            x = self._values
            if key is not None and key.share > 0:
                mask = np.empty_like(x)
                kernels.dropout_dense(key.seed, key.epoch, STAGE_INPUT, 0, key.rows, x.shape[1], key.share, mask)
                x = np.multiply(x, mask, out=mask)
            return torch.from_numpy(x) @ weight
        values = self._values
        if key is not None and key.share > 0:
            mask = np.empty_like(values)
            kernels.dropout_csr(key.seed, key.epoch, STAGE_INPUT, 0, key.rows, self._indptr, self._indices, key.share,
                                mask)
            values = values * mask
        return _SparseProduct.apply(weight, self, values)

    def product(self, values: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Sparse X·weight with the given stored values."""
        assert self._indptr is not None
        assert self._indices is not None
        out = np.empty((len(self._indptr) - 1, weight.shape[1]), np.float32)
        kernels.matmul_float_csr(self._indptr, self._indices, values, weight, out)
        return out

    def transposed_product(self, values: np.ndarray, grad: np.ndarray) -> np.ndarray:
        """Sparse Xᵀ·grad with the given stored values."""
        out = np.empty((self.num_features, grad.shape[1]), np.float32)
        kernels.matmul_float_csr(self._t_indptr, self._t_indices, values[self._order], grad, out)
        return out


class _SparseProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, matrix: FeatureMatrix, values: np.ndarray) -> Tensor:
        ctx.matrix, ctx.values = matrix, values
        return torch.from_numpy(matrix.product(values, np.ascontiguousarray(weight.detach().numpy())))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = np.ascontiguousarray(grads[0].numpy())
        return torch.from_numpy(ctx.matrix.transposed_product(ctx.values, grad)), None, None


class Perceptron(nn.Module):
    """relu(X·W₁ + b₁)·W₂ + b₂ with every stage on its grid.

    Weights are (in, out), as the kernels read them. The same seed gives the same start on every worker.
    """

    def __init__(self, config: RunConfig, num_features: int, num_classes: int) -> None:
        super().__init__()
        quant, hidden = config.quant, config.model.hidden
        self.bits_weights, self.bits_hidden = int(quant.weights or 32), int(quant.hidden or 32)
        self.method, self.dropout = quant.method, config.model.dropout
        generator = torch.Generator().manual_seed(config.seed)

        def uniform(*shape: int, fan_in: int) -> nn.Parameter:
            bound = 1 / math.sqrt(fan_in)
            return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator))

        self.weight1 = uniform(num_features, hidden, fan_in=num_features)
        self.bias1 = uniform(hidden, fan_in=num_features)
        self.weight2 = uniform(hidden, num_classes, fan_in=hidden)
        self.bias2 = uniform(num_classes, fan_in=hidden)
        self.quantizer1: WeightQuantizer | AffineWeightQuantizer | None = None
        self.quantizer2: WeightQuantizer | AffineWeightQuantizer | None = None
        affine = quant.method in AFFINE_METHODS
        if self.bits_weights < 32:
            kind = AffineWeightQuantizer if affine else WeightQuantizer
            self.quantizer1 = kind(self.bits_weights, quant.method, self.weight1)
            self.quantizer2 = kind(self.bits_weights, quant.method, self.weight2)
        self.ranges: StageRanges | None = None
        if affine:
            stages = quant.stages()
            names = stage_names({**stages, "weights": 32}, Propagation.of(config).num_rounds)
            self.ranges = StageRanges(names, {name: stages["messages" if "/" in name else name] for name in names},
                                      quant.method)
        # Learned only by `lsq`; set by the calibration forward.
        self.hidden_step = nn.Parameter(torch.tensor(1.0), requires_grad=quant.method == "lsq")

    def forward(self, x: FeatureMatrix, key: DropoutKey | None,
                hidden_step: float | AffineHidden | None) -> tuple[Tensor, Tensor]:
        """H⁰ and the hidden activations before their grid.

        Args:
            key: the dropout masks, or None for none (evaluation).
            hidden_step: step of the hidden grid, or an affine grid; None leaves hidden values float (32 bits,
                calibration).
        Returns:
            float32 (n, C), and float32 (n, H) detached, for the running range.
        """
        before = _weighted(self.quantizer1, self.weight1, lambda w: x.times(w, key), x.scale) + self.bias1
        hidden, step = torch.relu(before), torch.ones(())
        activations = hidden.detach()
        if isinstance(hidden_step, AffineHidden):
            hidden, step = self._affine_hidden(hidden, hidden_step), torch.tensor(hidden_step.grid.step)
        elif hidden_step is not None and self.bits_hidden < 32:
            step = torch.tensor(hidden_step)
            if self.method == "lsq":
                share = 1 / math.sqrt(hidden.shape[1] * (2**self.bits_hidden - 1))
                step = scale_gradient(self.hidden_step.abs(), share)
            hidden = unsigned_codes(hidden, step, self.bits_hidden)
        if key is not None and key.share > 0:
            mask = np.empty(tuple(hidden.shape), np.float32)
            kernels.dropout_dense(key.seed, key.epoch, STAGE_HIDDEN, 0, key.rows, mask.shape[1], key.share, mask)
            hidden = hidden * torch.from_numpy(mask)
        return _weighted(self.quantizer2, self.weight2, lambda w: hidden @ w, step) + self.bias2, activations

    def _affine_hidden(self, hidden: Tensor, how: AffineHidden) -> Tensor:
        assert self.ranges is not None
        codes = affine_codes(hidden, self.ranges.factors("hidden"), how.grid, self.bits_hidden, how.ends, how.share)
        if how.protected is None:
            return codes
        return torch.where(torch.from_numpy(how.protected)[:, None], hidden / how.grid.step, codes)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """For Adam: decay on the first weight matrix only."""
        rest = [p for name, p in self.named_parameters() if name != "weight1" and p.requires_grad]
        return [{"params": [self.weight1], "weight_decay": weight_decay}, {"params": rest}]

    def frozen_weights(self) -> dict[str, Any]:
        """Codes (int8) or float32 weights with their steps and affine grids, as the packed model holds them."""
        grids: dict[str, AffineGrid] = {}
        result: dict[str, Any] = {"bias1": self.bias1.detach().numpy().copy(), "grids": grids,
                                  "bias2": self.bias2.detach().numpy().copy(), "weight_steps": [1.0, 1.0]}
        for number, quantizer in ((1, self.quantizer1), (2, self.quantizer2)):
            weight = getattr(self, f"weight{number}").detach()
            if quantizer is None:
                result[f"weight{number}"] = weight.numpy().copy()
            elif isinstance(quantizer, AffineWeightQuantizer):
                result[f"weight{number}"], grid = quantizer.freeze(weight)
                grids[f"weights{number}"], result["weight_steps"][number - 1] = grid, grid.step
            else:
                result[f"weight{number}"], result["weight_steps"][number - 1] = quantizer.freeze(weight)
        return result


def _weighted(quantizer: WeightQuantizer | AffineWeightQuantizer | None, weight: Tensor,
              times: Callable[[Tensor], Tensor], scale: Tensor) -> Tensor:
    """x·weight where `times` multiplies x's codes by weight codes, and x's rows have a scale (n, 1) or one for all.

    An affine grid needs Σ x of every row beside the products: a column of ones gives it, a whole number as they are.
    """
    if isinstance(quantizer, AffineWeightQuantizer):
        codes, step, offset = quantizer(weight)
        sums = times(torch.cat([codes, torch.ones(len(codes), 1)], 1))
        return sums[:, :-1] * (scale * torch.tensor(step)) + sums[:, -1:] * (scale * torch.tensor(offset))
    codes, step = quantizer(weight) if quantizer else (weight, torch.ones(()))
    return times(codes) * (scale * step)
