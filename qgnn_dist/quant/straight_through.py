# SPDX-License-Identifier: Apache-2.0
"""Quantisers of the perceptron in training: whole-number codes forward, straight-through gradients backward.

Codes and step are returned apart: products of codes are then exact in float32 (whole numbers under 2^24), so that the
training forward computes what the packed integer model computes, to the last bit.
"""
from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from .ranges import LEAST_STEP

__all__ = ["WeightQuantizer", "round_through", "scale_gradient", "weight_levels"]


def round_through(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes as if nothing had been rounded."""
    return x + (x.round() - x).detach()


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x itself, with its gradient multiplied by `factor` (LSQ's gradient scale, Esser et al., ICLR 2020).

    A node of its own, since x·f + (x − x·f) would already round x and the packed model would differ.
    """
    scaled: Tensor = _ScaleGradient.apply(x, factor)  # type: ignore[no-untyped-call]
    return scaled


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None  # type: ignore[attr-defined]


def weight_levels(bits: int) -> tuple[int, int]:
    """Lowest and highest code of the signed mid-tread grid."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


class WeightQuantizer(nn.Module):
    """Signed mid-tread grid {−2^(b−1) … 2^(b−1)−1}·S with one step a tensor.

    `recipe` and `lsq` learn the step with LSQ's gradient scale, from the best-MSE step and from LSQ's own start;
    `minmax` takes the largest magnitude over the highest code, every time anew.
    """

    def __init__(self, bits: int, method: str, weight: Tensor) -> None:
        super().__init__()
        self.bits, self.method = bits, method
        self.low, self.high = weight_levels(bits)
        start = torch.tensor(_best_step(weight, bits) if method == "recipe" else _lsq_step(weight, self.high))
        self.step = nn.Parameter(start, requires_grad=method != "minmax")

    def current_step(self, weight: Tensor) -> Tensor:
        """The positive step in use, float32 scalar."""
        if self.method == "minmax":
            return (weight.detach().abs().amax() / max(self.high, 1)).clamp_min(LEAST_STEP)
        return self.step.abs() + 1e-8

    def forward(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (whole numbers in float32, shape of `weight`) and step (scalar), both with gradients."""
        step = scale_gradient(self.current_step(weight), 1 / math.sqrt(weight.numel() * max(self.high, 1)))
        return round_through((weight / step).clamp(self.low, self.high)), step

    @torch.no_grad()
    def freeze(self, weight: Tensor) -> tuple[np.ndarray, float]:
        """Codes int8 and step of the packed model: the same numbers that `forward` uses."""
        step = self.current_step(weight)
        codes = (weight / step).round().clamp(self.low, self.high)
        return codes.to(torch.int8).numpy(), float(step)


def _best_step(weight: Tensor, bits: int) -> float:
    """The step of least squared error, of 80 candidates between 0.02 and 2.5 standard deviations."""
    low, high = weight_levels(bits)
    w = weight.detach()
    candidates = [float(c) * float(w.std()) + LEAST_STEP for c in np.linspace(0.02, 2.5, 80)]
    return min(candidates, key=lambda s: float((((w / s).round().clamp(low, high) * s - w) ** 2).sum()))


def _lsq_step(weight: Tensor, high: int) -> float:
    return 2 * float(weight.detach().abs().mean()) / math.sqrt(max(high, 1)) + LEAST_STEP
