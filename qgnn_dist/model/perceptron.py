# SPDX-License-Identifier: Apache-2.0
"""The two-layer perceptron in training: H⁰ = MLP(X), quantised straight-through, dropped out by keyed random numbers.

Its parameters and quantisers, its input, and the pass by autograd over all rows at once that the methods with affine
grids take; row_blocks.py has the pass of all others.

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
from ..quant.clipped import Grid
from ..quant.grids import AFFINE_METHODS, AffineGrid, stage_names
from ..quant.learned import AffineWeightQuantizer, StageRanges, affine_codes
from ..quant.straight_through import WeightQuantizer
from .features import FeatureBlock

__all__ = ["AffineHidden", "DropoutKey", "FeatureMatrix", "Perceptron", "ThinnedRows"]

STAGE_INPUT, STAGE_HIDDEN = 1, 2
"""Stage numbers of the random-number key."""


@dataclass(frozen=True)
class DropoutKey:
    """Key of the dropout masks: they depend on the node's place in the source, never on the cut.

    Attributes: rows: int64 (n,), the places. share: of the values that are dropped; 0 drops nothing.
    """

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


@dataclass(frozen=True)
class ThinnedRows:
    """Coded feature rows that dropout has thinned, unscaled, ready for products in both directions.

    Attributes:
        values: float32 (n, F), 0 where dropped; or (nnz,) at least, without what is dropped, beside `indptr` int64
            (n+1,) and `indices` int32.
    """

    values: np.ndarray
    indptr: np.ndarray | None = None
    indices: np.ndarray | None = None

    def times(self, weight: np.ndarray, out: np.ndarray) -> np.ndarray:
        """X·weight, (F, H) to (n, H)."""
        if self.indptr is None or self.indices is None:
            kernels.matmul_thin(self.values, weight, out)
        else:
            kernels.matmul_float_csr(self.indptr, self.indices, self.values, weight, out)
        return out

    def add_transposed(self, row_scale: np.ndarray, grad: np.ndarray, out: np.ndarray) -> None:
        """out += Xᵀ·(row_scale·grad), (n, H) to (F, H)."""
        if self.indptr is None or self.indices is None:
            kernels.add_transposed(self.values, row_scale, grad, out)
        else:
            kernels.add_transposed_csr(self.indptr, self.indices, self.values, row_scale, grad, out)


class FeatureMatrix:
    """All coded feature rows of one worker, as they are stored: floats are made of some rows at a time."""

    def __init__(self, block: FeatureBlock) -> None:
        self._block = block
        self.scale, self.num_features = block.scale, block.num_features
        self.is_sparse = block.indptr is not None
        self.holds_codes = not self.is_sparse and block.values.dtype == np.int16

    @property
    def num_rows(self) -> int:
        """n."""
        return len(self.scale)

    def thinned(self, begin: int, end: int, key: DropoutKey, buffer: np.ndarray | None = None) -> ThinnedRows:
        """Rows begin..end without what `key` drops; the factor 1/(1 − p) is the caller's.

        Args: buffer: float32, at least end − begin rows of F, that dense values are written to.
        """
        block, rows = self._block, key.rows[begin:end]
        if block.indptr is not None and block.indices is not None:
            indptr = np.ascontiguousarray(block.indptr[begin:end + 1] - block.indptr[begin])
            stored = slice(int(block.indptr[begin]), int(block.indptr[end]))
            values, indices = block.values[stored].astype(np.float32), block.indices[stored]
            if key.share == 0:
                return ThinnedRows(values, indptr, indices)
            kept = np.empty_like(indptr), np.empty_like(indices), np.empty_like(values)
            kernels.thin_csr(key.seed, key.epoch, STAGE_INPUT, 0, rows, key.share, indptr, indices, values, *kept)
            return ThinnedRows(kept[2], *kept[:2])
        codes = block.values[begin:end]
        out = np.empty(codes.shape, np.float32) if buffer is None else buffer[:end - begin]
        if key.share == 0:
            out[:] = codes
        else:
            thin = kernels.thin_codes if codes.dtype == np.int16 else kernels.thin_values
            thin(key.seed, key.epoch, STAGE_INPUT, 0, rows, key.share, codes, out)
        return ThinnedRows(out)

    def times_codes(self, begin: int, end: int, key: DropoutKey, weight: np.ndarray, tables: np.ndarray | None,
                    out: np.ndarray) -> None:
        """`thinned(…).times(weight, out)` of dense codes and int8 weight codes (F, H), in whole numbers.

        Args: tables: see kernels.matmul_thinned.
        """
        kernels.matmul_thinned(key.seed, key.epoch, STAGE_INPUT, 0, key.rows[begin:end], key.share,
                               self._block.values[begin:end], weight, tables, out)

    def times(self, weight: Tensor, key: DropoutKey) -> Tensor:
        """(X ∘ mask)·weight of all rows, without the row scales, by autograd. weight: (F, H)."""
        product: Tensor = _Product.apply(weight, self.thinned(0, self.num_rows, key))  # type: ignore[no-untyped-call]
        return product * (1 / (1 - key.share))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: ThinnedRows) -> Tensor:
        ctx.rows, ctx.shape = rows, weight.shape
        num_rows = len(rows.values if rows.indptr is None else rows.indptr[1:])
        out = np.empty((num_rows, weight.shape[1]), np.float32)
        return torch.from_numpy(rows.times(np.ascontiguousarray(weight.detach().numpy()), out))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad, out = np.ascontiguousarray(grads[0].numpy()), np.zeros(tuple(ctx.shape), np.float32)
        ctx.rows.add_transposed(np.ones(len(grad), np.float32), grad, out)
        return torch.from_numpy(out), None


class Perceptron(nn.Module):
    """relu(X·W₁ + b₁)·W₂ + b₂ with every stage on its grid.

    Weights are (in, out), as the kernels read them. The same seed gives the same start on every worker.
    """

    def __init__(self, config: RunConfig, num_features: int, num_classes: int) -> None:
        super().__init__()
        quant, hidden = config.quant, config.model.hidden
        self.bits_weights, self.bits_hidden = int(quant.weights or 32), int(quant.hidden or 32)
        self.bits_features = int(quant.features or 32)
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

    def forward(self, x: FeatureMatrix, key: DropoutKey, hidden_grid: AffineHidden | None) -> tuple[Tensor, Tensor]:
        """H⁰ and the hidden activations before their grid; for the methods with affine grids.

        Args: hidden_grid: None leaves hidden values float (32 bits, calibration).
        Returns: float32 (n, C), and float32 (n, H) detached, for the running range.
        """
        scale = torch.from_numpy(x.scale)[:, None]
        before = _weighted(self.quantizer1, self.weight1, lambda w: x.times(w, key), scale) + self.bias1
        hidden, step = torch.relu(before), torch.ones(())
        activations = hidden.detach()
        if hidden_grid is not None:
            hidden, step = self._affine_hidden(hidden, hidden_grid), torch.tensor(hidden_grid.grid.step)
        if key.share > 0:
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

    @torch.no_grad()
    def weight_grids(self) -> list[tuple[np.ndarray, Grid]]:
        """Both weight matrices, float32, with the grids that they are coded on; none where weights are float or the
        grids affine."""
        return [(weight.detach().numpy(), Grid.midtread(quantizer.bits, float(quantizer.current_step(weight))))
                for weight, quantizer in ((self.weight1, self.quantizer1), (self.weight2, self.quantizer2))
                if isinstance(quantizer, WeightQuantizer)]

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
