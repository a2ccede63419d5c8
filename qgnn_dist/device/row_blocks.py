# SPDX-License-Identifier: Apache-2.0
"""The perceptron's training pass on a device, a block of rows at a time: the twin of model/row_blocks.py.

Weights and their optimiser stay on the host, where they are a few kilobytes; features, masks and activations are the
device's. Products of codes are sums of whole numbers below 2^24, exact in float32, and the rest is elementwise in the
kernels' order, so that coded H⁰ has the kernels' bits. Legend: n local rows, F features, H hidden width, C classes.
"""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..model.features import FeatureBlock
from ..model.perceptron import STAGE_HIDDEN, STAGE_INPUT, DropoutKey, Perceptron
from ..model.row_blocks import Pass
from ..quant.straight_through import scale_gradient
from .codes import moments
from .random import kept, kept_at

__all__ = ["DeviceRowBlocks"]

BLOCK_VALUES = 2**22
"""Values of a block's widest array; random numbers take some twenty times the bytes while they are drawn."""
LEAST_ROWS, MOST_ROWS = 256, 65536


@dataclass(frozen=True)
class _Rows:
    """Feature rows that dropout has thinned: float32 (n, F), or stored values beside their rows and columns.

    Sparse products accumulate by index_put_, which CUDA sorts first, so that sums have one order; index_add_ has none.
    Float features are the block's own memory where nothing is dropped, to be read only.
    """

    values: Tensor
    rows: Tensor | None = None
    columns: Tensor | None = None

    def times(self, weight: Tensor, num_rows: int) -> Tensor:
        """X·weight, (F, H) to (n, H)."""
        if self.rows is None or self.columns is None:
            return self.values @ weight
        out = weight.new_zeros(num_rows, weight.shape[1])
        return out.index_put_((self.rows,), self.values[:, None] * weight[self.columns], accumulate=True)

    def add_transposed(self, grad: Tensor, out: Tensor) -> None:
        """out += Xᵀ·grad, (n, H) to (F, H)."""
        if self.rows is None or self.columns is None:
            out += self.values.T @ grad
        else:
            out.index_put_((self.columns,), self.values[:, None] * grad[self.rows], accumulate=True)


@dataclass(frozen=True)
class _DevicePass(Pass):
    """With the weights on the device too."""

    codes1: Tensor
    bias1: Tensor
    codes2: Tensor


class DeviceRowBlocks:
    """H⁰ = MLP(X) of one worker's rows, and the gradients of the network's parameters, on the host."""

    def __init__(self, network: Perceptron, block: FeatureBlock, source_index: np.ndarray,
                 device: torch.device) -> None:
        def put(array: np.ndarray, kind: torch.dtype | None = None) -> Tensor:
            return torch.tensor(array).to(device, kind)

        self._network, self._device = network, device
        self._values, self._scale = put(block.values), put(block.scale)[:, None]
        self._source = put(np.asarray(source_index, np.int64))
        self._indptr, self._columns = block.indptr, None
        if block.indptr is not None and block.indices is not None:
            self._columns = put(block.indices, torch.int64)
        num_features, width = network.weight1.shape
        widest = max(width, 1 if self._columns is not None else num_features)
        if block.indptr is not None:
            widest = max(widest, width * -(-len(block.values) // max(len(block.scale), 1)))
        self._block_rows = min(max(BLOCK_VALUES // widest, LEAST_ROWS), MOST_ROWS)
        self._pass: _DevicePass | None = None

    def forward(self, key: DropoutKey, hidden_step: float | None) -> tuple[Tensor, list[float]]:
        """See RowBlocks.forward; H⁰ is on the device."""
        network, n = self._network, len(self._scale)
        host = Pass.of(network, key, hidden_step)
        now = self._pass = _DevicePass(**vars(host), codes1=torch.tensor(host.first.codes, device=self._device),
                                       bias1=network.bias1.detach().to(self._device),
                                       codes2=torch.tensor(host.second.codes, device=self._device))
        step, second = now.hidden_step, now.second
        scale = float((step or np.float32(1)) * second.step * now.kept)
        bias = network.bias2.detach().to(self._device)
        h0 = torch.empty(n, len(bias), device=self._device)
        figures = [0.0] * 4
        for begin, end in self._blocks():
            x = self._thinned(key, begin, end)
            value = self._hidden(now, x, begin, end)
            squares, magnitudes, largest, count = moments(value)
            figures = [figures[0] + squares, figures[1] + magnitudes, max(figures[2], largest), figures[3] + count]
            codes = self._coded(now, value)[0] * self._mask(now, begin, end)
            h0[begin:end] = (codes @ now.codes2) * scale + bias
        return h0, figures

    def backward(self, grad: Tensor) -> None:
        """See RowBlocks.backward; `grad` is on the device."""
        now, network = self._pass, self._network
        assert now is not None
        self._pass = None
        back = torch.tensor(np.ascontiguousarray(now.second.codes.T * (now.second.step * now.kept)),
                            device=self._device)
        of_first, of_second = torch.zeros_like(now.codes1), torch.zeros_like(now.codes2)
        of_bias1, of_bias2 = (torch.zeros(len(bias), dtype=torch.float64, device=self._device)
                              for bias in (network.bias1, network.bias2))
        learned = network.hidden_step.requires_grad and now.hidden_step != 0
        errors = torch.zeros((), dtype=torch.float64, device=self._device)
        for begin, end in self._blocks():
            scores = grad[begin:end]
            x = self._thinned(now.key, begin, end)
            value = self._hidden(now, x, begin, end)
            codes, scaled, inside = self._coded(now, value)
            mask = self._mask(now, begin, end)
            through = (scores @ back) * mask
            passes = (value > 0) & inside
            if learned:
                errors += (through.double() * (codes - torch.where(passes, scaled, 0.0)).double()).sum()
            through = torch.where(passes, through, 0.0)
            of_second += (codes * mask).T @ scores
            x.add_transposed(self._scale[begin:end] * through, of_first)
            of_bias1 += through.sum(0, dtype=torch.float64)
            of_bias2 += scores.sum(0, dtype=torch.float64)
        now.first.backward(of_first.cpu().numpy(), now.kept)
        now.second.backward(of_second.cpu().numpy(), now.kept * (now.hidden_step or np.float32(1)))
        for bias, value in ((network.bias1, of_bias1), (network.bias2, of_bias2)):
            bias.grad = value.float().cpu()
        if learned:
            share = 1 / math.sqrt(len(network.bias1) * (2**network.bits_hidden - 1))
            step = scale_gradient(network.hidden_step.abs(), share)
            torch.autograd.backward(step, errors.to("cpu", step.dtype))

    def _blocks(self) -> Iterator[tuple[int, int]]:
        n = len(self._scale)
        return ((begin, min(begin + self._block_rows, n)) for begin in range(0, n, self._block_rows))

    def _thinned(self, key: DropoutKey, begin: int, end: int) -> _Rows:
        """Rows begin..end without what `key` drops; the factor 1/(1 − p) is the caller's."""
        source = self._source[begin:end]
        if self._columns is None or self._indptr is None:
            values = self._values[begin:end].float()
            if key.share > 0:
                values = values * kept(key.seed, key.epoch, STAGE_INPUT, source, values.shape[1], key.share)
            return _Rows(values)
        low, high = int(self._indptr[begin]), int(self._indptr[end])
        counts = torch.from_numpy(np.diff(self._indptr[begin:end + 1])).to(self._device)
        rows = torch.repeat_interleave(torch.arange(end - begin, device=self._device), counts)
        values, columns = self._values[low:high].float(), self._columns[low:high]
        if key.share > 0:
            values = values * kept_at(key.seed, key.epoch, STAGE_INPUT, source[rows], columns, key.share)
        return _Rows(values, rows, columns)

    def _hidden(self, now: _DevicePass, x: _Rows, begin: int, end: int) -> Tensor:
        """relu of the first layer, the twin of kernels.activate's v."""
        scale = self._scale[begin:end] * float(now.first.step * now.kept)
        return torch.relu(x.times(now.codes1, end - begin) * scale + now.bias1)

    def _coded(self, now: _DevicePass, value: Tensor) -> tuple[Tensor, Tensor, Tensor | bool]:
        """Codes of hidden values (themselves without a grid), values in steps, and which lie within the grid."""
        if not now.hidden_step:
            return value, value, True
        top = float(2**self._network.bits_hidden - 1)
        scaled = value / value.new_full((1,), float(now.hidden_step))
        return scaled.clamp(0.0, top).round_(), scaled, scaled <= top

    def _mask(self, now: _DevicePass, begin: int, end: int) -> Tensor:
        """1 where dropout keeps a hidden value, 0 elsewhere."""
        key, width = now.key, now.codes1.shape[1]
        if key.share == 0:
            return torch.ones(1, 1, device=self._device)
        return kept(key.seed, key.epoch, STAGE_HIDDEN, self._source[begin:end], width, key.share).float()
