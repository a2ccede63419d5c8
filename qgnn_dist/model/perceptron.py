# SPDX-License-Identifier: Apache-2.0
"""The two-layer perceptron in training: H⁰ = MLP(X), quantised straight-through, dropped out by keyed random numbers.

Legend: n local rows, F features, H hidden width, C classes.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import kernels
from ..config import RunConfig
from ..quant.straight_through import WeightQuantizer, scale_gradient, unsigned_codes
from .features import FeatureBlock

__all__ = ["DropoutKey", "FeatureMatrix", "Perceptron"]

STAGE_INPUT, STAGE_HIDDEN = 1, 2
"""Stage numbers of the random-number key."""


@dataclass(frozen=True)
class DropoutKey:
    """Key of the dropout masks: they depend on the node's place in the source, never on the cut."""

    seed: int
    epoch: int
    rows: np.ndarray
    share: float


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
        self.quantizer1 = self.quantizer2 = None
        if self.bits_weights < 32:
            self.quantizer1 = WeightQuantizer(self.bits_weights, quant.method, self.weight1)
            self.quantizer2 = WeightQuantizer(self.bits_weights, quant.method, self.weight2)
        # Learned only by `lsq`; set by the calibration forward.
        self.hidden_step = nn.Parameter(torch.tensor(1.0), requires_grad=quant.method == "lsq")

    def forward(self, x: FeatureMatrix, key: DropoutKey | None, hidden_step: float | None) -> tuple[Tensor, Tensor]:
        """H⁰ and the hidden activations before their grid.

        Args:
            key: the dropout masks, or None for none (evaluation).
            hidden_step: step of the hidden grid; None leaves hidden values float (32 bits, calibration).
        Returns:
            float32 (n, C), and float32 (n, H) detached, for the running range.
        """
        codes1, step1 = self.quantizer1(self.weight1) if self.quantizer1 else (self.weight1, torch.ones(()))
        before = x.times(codes1, key) * (x.scale * step1) + self.bias1
        hidden, step = torch.relu(before), torch.ones(())
        activations = hidden.detach()
        if hidden_step is not None and self.bits_hidden < 32:
            step = torch.tensor(hidden_step)
            if self.method == "lsq":
                share = 1 / math.sqrt(hidden.shape[1] * (2**self.bits_hidden - 1))
                step = scale_gradient(self.hidden_step.abs(), share)
            hidden = unsigned_codes(hidden, step, self.bits_hidden)
        if key is not None and key.share > 0:
            mask = np.empty(tuple(hidden.shape), np.float32)
            kernels.dropout_dense(key.seed, key.epoch, STAGE_HIDDEN, 0, key.rows, mask.shape[1], key.share, mask)
            hidden = hidden * torch.from_numpy(mask)
        codes2, step2 = self.quantizer2(self.weight2) if self.quantizer2 else (self.weight2, torch.ones(()))
        return (hidden @ codes2) * (step * step2) + self.bias2, activations

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """For Adam: decay on the first weight matrix only."""
        rest = [p for name, p in self.named_parameters() if name != "weight1" and p.requires_grad]
        return [{"params": [self.weight1], "weight_decay": weight_decay}, {"params": rest}]

    def frozen_weights(self) -> dict[str, Any]:
        """Codes (int8) or float32 weights with their steps, as the packed model holds them."""
        result: dict[str, Any] = {"bias1": self.bias1.detach().numpy().copy(),
                                  "bias2": self.bias2.detach().numpy().copy(), "weight_steps": [1.0, 1.0]}
        for number, quantizer in ((1, self.quantizer1), (2, self.quantizer2)):
            weight = getattr(self, f"weight{number}").detach()
            if quantizer is None:
                result[f"weight{number}"] = weight.numpy().copy()
            else:
                result[f"weight{number}"], result["weight_steps"][number - 1] = quantizer.freeze(weight)
        return result
