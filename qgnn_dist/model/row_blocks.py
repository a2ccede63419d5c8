# SPDX-License-Identifier: Apache-2.0
"""The perceptron's training pass a block of rows at a time: nothing of (n, F), and of (n, H) only packed codes.

The backward draws the same dropout masks of the input again. The hidden layer it recalls from its codes and flags of
where the gradient passes, at most 9 bits a value; where it is float, or the step is learned, it computes it anew.
Blocks have a fixed size, so a part's gradients are the same whatever the threads. For the methods without
affine grids. Legend: n local rows, F features, H hidden width, C classes.
"""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import kernels
from ..quant.learned import AffineWeightQuantizer
from ..quant.packed import row_bytes
from ..quant.ranges import moments_of
from ..quant.straight_through import WeightQuantizer, scale_gradient
from .perceptron import STAGE_HIDDEN, DropoutKey, FeatureMatrix, Perceptron

__all__ = ["Pass", "RowBlocks", "Weights", "block_rows"]

KEPT_BITS = 8
"""Widest codes of the hidden layer that are kept. At 8 bits it is 288 bytes a row of 256 columns, and an epoch of
synthetic:arxiv still takes less than a third of the memory of torch's; float values would be 1056."""
CODE_PRODUCT_BITS = 12
"""Of features and weights together: their product is of whole numbers. Where both have 8, pairs of products leave 16
bits, and floats that skip what dropout took are faster: 0.56 µs against 0.80 for a row of 128 by 256 columns."""
BLOCK_VALUES = 2**20
"""Values of a block's widest array. It stays in the third level of the processor's memory, and calls of several threads
last long enough to be worth it: a quarter takes as long on one thread and a tenth longer on two; two and four times as
many take up to twice as long in the backward."""
LEAST_ROWS, MOST_ROWS = 64, 8192


def block_rows(widest: int) -> int:
    """Rows of a block whose widest array has `widest` columns."""
    return min(max(BLOCK_VALUES // widest, LEAST_ROWS), MOST_ROWS)


@dataclass(frozen=True)
class Weights:
    """A weight matrix as the products see it, and the way back to its parameters."""

    codes: np.ndarray
    step: np.float32
    tensors: tuple[Tensor, Tensor] | None
    parameter: Tensor

    @classmethod
    def of(cls, quantizer: WeightQuantizer | AffineWeightQuantizer | None, parameter: Tensor) -> Weights:
        """As they are now; float where nothing quantises them."""
        assert not isinstance(quantizer, AffineWeightQuantizer)
        if quantizer is None:
            return cls(np.ascontiguousarray(parameter.detach().numpy()), np.float32(1), None, parameter)
        codes, step = quantizer(parameter)
        return cls(np.ascontiguousarray(codes.detach().numpy()), np.float32(step.detach()), (codes, step), parameter)

    def backward(self, grad: np.ndarray, factor: np.float32) -> None:
        """From Xᵀ·grad, where the product was factor·step·(X·codes)."""
        if self.tensors is None:
            self.parameter.grad = torch.from_numpy(grad * factor)
            return
        codes, step = self.tensors
        of_codes = torch.from_numpy(grad * (factor * self.step))
        of_step = torch.tensor(float((grad.astype(np.float64) * self.codes).sum()) * float(factor))
        pairs = [(codes, of_codes), (step, of_step.to(step.dtype))]
        learned = [(tensor, value) for tensor, value in pairs if tensor.requires_grad]
        torch.autograd.backward([tensor for tensor, _ in learned], [value for _, value in learned])


@dataclass(frozen=True)
class CodeProduct:
    """Thinned feature codes times weight codes, in whole numbers.

    Attributes: codes: int8 (F, H). tables: of kernels.lookup_tables, or None where features are wider than 2 bits.
    """

    codes: np.ndarray
    tables: np.ndarray | None

    @classmethod
    def of(cls, weights: Weights, bits_features: int) -> CodeProduct:
        """Of coded weights, with tables where the features have 2 bits."""
        codes = weights.codes.astype(np.int8)
        if bits_features > 2:
            return cls(codes, None)
        tables = np.empty((codes.shape[1], (len(codes) + 1) // 2, 16), np.uint8)
        kernels.lookup_tables(codes, tables)
        return cls(codes, tables)


@dataclass(frozen=True)
class Pass:
    """What a forward leaves for its backward: the weights in use. What it leaves by row is RowBlocks' own."""

    key: DropoutKey
    first: Weights
    second: Weights
    hidden_step: np.float32
    kept: np.float32

    @classmethod
    def of(cls, network: Perceptron, key: DropoutKey, hidden_step: float | None) -> Pass:
        """As the network is now. Args: hidden_step: see RowBlocks.forward; 0 stands for float values."""
        step = np.float32(0 if hidden_step is None or network.bits_hidden == 32 else hidden_step)
        return Pass(key, Weights.of(network.quantizer1, network.weight1),
                    Weights.of(network.quantizer2, network.weight2), step, np.float32(1 / (1 - key.share)))


class RowBlocks:
    """H⁰ = MLP(X) of one worker's rows, and the gradients of the network's parameters."""

    def __init__(self, network: Perceptron, matrix: FeatureMatrix) -> None:
        self._network, self._matrix = network, matrix
        num_features, width = network.weight1.shape
        widest = max(width, 0 if matrix.is_sparse else num_features, 1)
        self._rows = block_rows(widest)
        rows = min(self._rows, matrix.num_rows)
        self._input = None if matrix.is_sparse else np.empty((rows, num_features), np.float32)
        self._hidden, self._grad = np.empty((rows, width), np.float32), np.empty((rows, width), np.float32)
        self._pass: Pass | None = None
        self._kept: np.ndarray | None = None

    def forward(self, key: DropoutKey, hidden_step: float | None) -> tuple[np.ndarray, list[float]]:
        """H⁰, float32 (n, C), a new array, and the moments of the hidden activations before their grid.

        Args: hidden_step: step of the hidden grid; None leaves hidden values float (32 bits, calibration).
        """
        network, n = self._network, self._matrix.num_rows
        now = self._pass = Pass.of(network, key, hidden_step)
        step = now.hidden_step
        scale, bias = (step or np.float32(1)) * now.second.step * now.kept, network.bias2.detach().numpy()
        h0, moments = np.empty((n, len(bias)), np.float32), np.empty((n, 3), np.float64)
        product = None
        if self._matrix.holds_codes and network.bits_features + network.bits_weights <= CODE_PRODUCT_BITS:
            product = CodeProduct.of(now.first, network.bits_features)
        self._kept = None
        if step and network.bits_hidden <= KEPT_BITS and not network.hidden_step.requires_grad:
            width = self._hidden.shape[1]
            self._kept = np.empty((n, row_bytes(width, network.bits_hidden) + row_bytes(width, 1)), np.uint8)
        for begin, end in self._blocks():
            hidden = self._hidden[:end - begin]
            if product is None:
                self._matrix.thinned(begin, end, key, self._input).times(now.first.codes, hidden)
            else:
                self._matrix.times_codes(begin, end, key, product.codes, product.tables, hidden)
            self._activate(now, begin, end, moments=moments[begin:end],
                           kept=None if self._kept is None else self._kept[begin:end])
            out = h0[begin:end]
            kernels.matmul_thin(hidden, now.second.codes, out)
            out *= scale
            out += bias
        return h0, [*moments_of(moments), float(n * self._hidden.shape[1])]

    def backward(self, grad: np.ndarray) -> None:
        """Set the parameters' gradients. grad: ∂L/∂H⁰ of the last forward, float32 (n, C)."""
        now, network, kept = self._pass, self._network, self._kept
        assert now is not None
        self._pass = self._kept = None
        back = np.ascontiguousarray(now.second.codes.T * (now.second.step * now.kept))
        ones = np.ones(len(self._hidden), np.float32)
        of_first = np.zeros(now.first.codes.shape, np.float32)
        of_second = np.zeros(now.second.codes.shape, np.float32)
        of_bias1, of_bias2 = (np.zeros(len(bias), np.float64) for bias in (network.bias1, network.bias2))
        learned = network.hidden_step.requires_grad and now.hidden_step != 0
        errors = np.zeros(self._matrix.num_rows if learned else 0, np.float64)
        for begin, end in self._blocks():
            scores, through = grad[begin:end], self._grad[:end - begin]
            kernels.matmul_thin(scores, back, through)
            rows, hidden = self._matrix.thinned(begin, end, now.key, self._input), self._hidden[:end - begin]
            if kept is not None:
                kernels.recall(kept[begin:end], network.bits_hidden, hidden, through)
            else:
                rows.times(now.first.codes, hidden)
                self._activate(now, begin, end, grad=through, errors=errors[begin:end] if learned else None)
            kernels.add_transposed(hidden, ones[:end - begin], scores, of_second)
            rows.add_transposed(self._matrix.scale[begin:end], through, of_first)
            of_bias1 += through.sum(0)
            of_bias2 += scores.sum(0)
        now.first.backward(of_first, now.kept)
        now.second.backward(of_second, now.kept * (now.hidden_step or np.float32(1)))
        for bias, value in ((network.bias1, of_bias1), (network.bias2, of_bias2)):
            bias.grad = torch.from_numpy(value.astype(np.float32))
        if learned:
            share = 1 / math.sqrt(self._hidden.shape[1] * (2**network.bits_hidden - 1))
            step = scale_gradient(network.hidden_step.abs(), share)
            torch.autograd.backward(step, torch.tensor(float(errors.sum()), dtype=step.dtype))

    def _blocks(self) -> Iterator[tuple[int, int]]:
        n = self._matrix.num_rows
        return ((begin, min(begin + self._rows, n)) for begin in range(0, n, self._rows))

    def _activate(self, now: Pass, begin: int, end: int, *, moments: np.ndarray | None = None,
                  grad: np.ndarray | None = None, errors: np.ndarray | None = None,
                  kept: np.ndarray | None = None) -> None:
        """Sums of some rows in the buffer to hidden codes, thinned; `grad` of the codes becomes that of the sums."""
        key, network, hidden = now.key, self._network, self._hidden[:end - begin]
        bits = min(network.bits_hidden, 8)  # unread without a grid
        kernels.activate(hidden, self._matrix.scale[begin:end], float(now.first.step * now.kept),
                         network.bias1.detach().numpy(), float(now.hidden_step), bits, key.seed, key.epoch,
                         STAGE_HIDDEN, 0, key.rows[begin:end], key.share, hidden, grad, errors, moments, kept)
