# SPDX-License-Identifier: Apache-2.0
"""A packed model's perceptron where quant.method has affine grids (quant.grids).

A weight is offset + q·step with signed codes q, so that Σ_f x_f·w_f = step·Σ x_f·q_f + offset·Σ x_f: one column of ones
beside the weight codes makes both sums whole numbers. The rest is elementwise float32 in the order that training uses.
Legend: n rows of a block, F features, H hidden, C classes.
"""
from __future__ import annotations

import numpy as np

from .. import kernels
from ..quant.grids import AffineGrid
from ..quant.learned import weight_offset
from .features import FeatureBlock
from .packed import ModelInfo, PackedModel

__all__ = ["AffinePerceptron"]


class AffinePerceptron:
    """relu(X·W₁ + b₁)·W₂ + b₂ of a model with affine grids; any of its stages may have 32 bits."""

    def __init__(self, model: PackedModel) -> None:
        self._info, self._model = model.info, model
        self._first = _Weights(model.info, 1, model.weight1, model.info.bits["features"])
        self._second = _Weights(model.info, 2, model.weight2, model.info.bits["hidden"])

    def active(self, block: FeatureBlock) -> np.ndarray:
        """relu(X·W₁ + b₁) of a block before it is coded, float32 (n, H)."""
        sums = self._first.product(block)
        hidden = self._first.value(sums, block.scale[:, None]) + self._model.bias1
        above: np.ndarray = np.maximum(hidden, np.float32(0))
        return above

    def rows(self, block: FeatureBlock) -> np.ndarray:
        """H⁰ of a block, float32 (n, C)."""
        hidden, scale = self.active(block), np.float32(1)
        grid, bits = self._info.grid("hidden"), self._info.bits["hidden"]
        if grid is not None:
            codes = np.empty(hidden.shape, np.uint8)
            kernels.affine_codes(hidden, None, None, grid.low, grid.step, grid.scale, grid.bias, bits, 0, len(hidden),
                                 codes)
            hidden, scale = codes.astype(np.int16), np.float32(grid.step)
        block = FeatureBlock(hidden, np.ones(len(hidden), np.float32), self._info.hidden)
        scores: np.ndarray = self._second.value(self._second.product(block), scale) + self._model.bias2
        return scores


class _Weights:
    """One weight matrix, with the column of ones where its grid is affine."""

    def __init__(self, info: ModelInfo, number: int, weight: np.ndarray, input_bits: int) -> None:
        self._integer = info.bits["weights"] < 32 and input_bits < 32
        self._grid: AffineGrid | None = info.grid(f"weights{number}")
        if self._grid is not None:
            weight = np.concatenate([weight, np.ones((len(weight), 1), weight.dtype)], 1)
            self._offset = np.float32(weight_offset(self._grid, info.bits["weights"]))
        self._weight = weight if self._integer else weight.astype(np.float32)

    def product(self, block: FeatureBlock) -> np.ndarray:
        """Whole-number sums int32, or float32 sums in a fixed order where either side is float."""
        shape = (len(block.scale), self._weight.shape[1])
        if self._integer:
            return block.times(self._weight, np.empty(shape, np.int32))
        return block.as_float().times(self._weight, np.empty(shape, np.float32))

    def value(self, sums: np.ndarray, scale: np.ndarray | np.float32) -> np.ndarray:
        """What the sums mean; `scale` is that of the input's codes."""
        sums = sums.astype(np.float32)
        if self._grid is None:
            plain: np.ndarray = sums * (scale * np.float32(1))
            return plain
        steps = scale * np.float32(self._grid.step)
        values: np.ndarray = sums[:, :-1] * steps + sums[:, -1:] * (scale * self._offset)
        return values
