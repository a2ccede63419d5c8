# SPDX-License-Identifier: Apache-2.0
"""Ranges [a_l·min, a_u·max] of the paper's quantisers: learned factors, straight-through gradients, the searched start.

With x̂ the value that x is coded to, and r = x̂ − x: an element outside the range passes its gradient to the bound that
clipped it and none to x; one inside passes it to x, and r carries the range's: ∂x̂/∂u = r/(u − l) = −∂x̂/∂l, which is
LSQ's rule (Esser et al., ICLR 2020) for the step (u − l)/(2^b − 1). Bit truncation keeps the rule with its own x̂.
The factors' gradients are scaled by LSQ's 1/√(count·(2^b − 1)). `percentile` and `degree_quant` learn nothing.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .grids import LEARNED_METHODS, PERCENTILE_METHODS, AffineGrid, affine_grid
from .ranges import Range, follow, wide_moments

__all__ = ["AffineWeightQuantizer", "StageRanges", "affine_codes", "bound_gradients", "gradient_share", "shrink_errors",
           "weight_offset"]

SHRINK = np.arange(1, 41) / 40
"""Factors that the searched start tries, the same for both bounds."""


def gradient_share(count: int, bits: int) -> float:
    """LSQ's gradient scale for `count` values, those of all workers together."""
    return 1.0 / math.sqrt(max(count, 1) * (2**bits - 1))


def bound_gradients(grad: np.ndarray, error: np.ndarray, sides: np.ndarray, span: float,
                    ends: Sequence[float]) -> tuple[float, float]:
    """Gradients of the factors a_l and a_u, before LSQ's scale, added in float64.

    Args:
        grad: with respect to x̂. error: x̂ − x. sides: int8, −1 below the range, 1 above it, 0 inside.
        span: u − l. ends: min and max that the factors multiply.
    """
    exact = grad.astype(np.float64)
    inside = float((exact * error)[sides == 0].sum()) / span
    low, high = float(exact[sides < 0].sum()), float(exact[sides > 0].sum())
    return (low - inside) * ends[0], (high + inside) * ends[1]


def affine_codes(x: Tensor, factors: tuple[Tensor, Tensor], grid: AffineGrid, bits: int, ends: Sequence[float],
                 share: float) -> Tensor:
    """Codes of x (float32 (N, C)) as whole numbers in float32, with the gradients that the module's docstring tells.

    The value is low + code·step; a caller that uses it must not let gradients flow through low and step as well.
    """
    codes: Tensor = _AffineCodes.apply(x, *factors, grid, bits, ends, share)  # type: ignore[no-untyped-call]
    return codes


class _AffineCodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor, grid: AffineGrid, bits: int, ends: Sequence[float],
                share: float) -> Tensor:
        values = np.ascontiguousarray(x.detach().numpy())
        codes = grid.codes(values, bits)
        ctx.sides, ctx.grid, ctx.bits, ctx.ends, ctx.share = grid.sides(values, bits), grid, bits, ends, share
        ctx.error = grid.values(codes) - values if low.requires_grad or high.requires_grad else None
        return torch.from_numpy(codes.astype(np.float32))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        grad = grads[0].numpy() / np.float32(ctx.grid.step)  # of the value: a code is worth a step
        passed = torch.from_numpy(np.where(ctx.sides == 0, grad, np.float32(0)))
        if ctx.error is None:
            return passed, None, None, None, None, None, None
        low, high = bound_gradients(grad, ctx.error, ctx.sides, ctx.grid.step * (2**ctx.bits - 1), ctx.ends)
        return (passed, torch.tensor(low * ctx.share), torch.tensor(high * ctx.share), None, None, None, None)


def shrink_errors(x: np.ndarray, ends: Sequence[float], bits: int, method: str, skewness: float) -> np.ndarray:
    """Σ|x − x̂| for every factor of SHRINK, float64 (40,): add up those of all workers, then take the least."""
    errors = np.empty(len(SHRINK))
    for i, factor in enumerate(SHRINK):
        grid = affine_grid(factor * ends[0], factor * ends[1], bits, method, skewness)
        errors[i] = np.abs(grid.values(grid.codes(x, bits)) - x).sum(dtype=np.float64)
    return errors


class StageRanges(nn.Module):
    """The factors a_l, a_u of hidden, residual and message stages, one pair a stage; all ones where nothing is learned.

    Args:
        names: the stages. bits: stage → width.
    """

    def __init__(self, names: Sequence[str], bits: dict[str, int], method: str) -> None:
        super().__init__()
        self.names, self.bits, self.method = list(names), bits, method
        learned = method in LEARNED_METHODS
        self.low = nn.Parameter(torch.ones(len(names)), requires_grad=learned)
        self.high = nn.Parameter(torch.ones(len(names)), requires_grad=learned)

    def ends(self, name: str, figures: Range) -> tuple[float, float]:
        """What the factors multiply: running min and max, or percentiles; hidden values begin at relu's 0."""
        low, high = figures.low, figures.high
        if self.method in PERCENTILE_METHODS:
            low, high = figures.percentile_low, figures.percentile_high
        return (0.0 if name == "hidden" else low), high

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """a_l and a_u of a stage, with gradients."""
        at = self.names.index(name)
        return self.low[at], self.high[at]

    def grid(self, name: str, figures: Range) -> AffineGrid:
        """The stage's grid at these running figures."""
        low, high = self.ends(name, figures)
        a_low, a_high = (float(a.detach()) for a in self.factors(name))
        return affine_grid(a_low * low, a_high * high, self.bits[name], self.method, figures.skewness)

    @torch.no_grad()
    def start(self, name: str, errors: np.ndarray) -> None:
        """Both factors at the least of `shrink_errors`, all workers' together."""
        at, best = self.names.index(name), float(SHRINK[int(errors.argmin())])
        self.low[at], self.high[at] = best, best


class AffineWeightQuantizer(nn.Module):
    """A weight tensor's grid over [a_l·min, a_u·max] of what the tensor holds now, or its percentiles.

    The integer model multiplies signed codes q = code − 2^(b−1), so a weight is offset + q·step.
    """

    def __init__(self, bits: int, method: str, weight: Tensor) -> None:
        super().__init__()
        self.bits, self.method = bits, method
        learned, start = method in LEARNED_METHODS, 1.0
        if learned:
            ends, skewness = self._figures(weight)
            errors = shrink_errors(weight.detach().numpy(), ends, bits, method, skewness)
            start = float(SHRINK[int(errors.argmin())])
        self.low = nn.Parameter(torch.tensor(start), requires_grad=learned)
        self.high = nn.Parameter(torch.tensor(start), requires_grad=learned)

    def grid(self, weight: Tensor) -> AffineGrid:
        """The grid in use."""
        (low, high), skewness = self._figures(weight)
        return affine_grid(float(self.low.detach()) * low, float(self.high.detach()) * high, self.bits, self.method,
                           skewness)

    def forward(self, weight: Tensor) -> tuple[Tensor, float, float]:
        """Signed codes q (whole numbers in float32, shape of `weight`), step and offset."""
        grid, (ends, _) = self.grid(weight), self._figures(weight)
        codes = affine_codes(weight, (self.low, self.high), grid, self.bits, ends,
                             gradient_share(weight.numel(), self.bits))
        return codes - 2 ** (self.bits - 1), grid.step, weight_offset(grid, self.bits)

    @torch.no_grad()
    def freeze(self, weight: Tensor) -> tuple[np.ndarray, AffineGrid]:
        """Signed codes int8 and the grid: the same numbers that `forward` uses."""
        grid = self.grid(weight)
        codes = grid.codes(np.ascontiguousarray(weight.numpy()), self.bits)
        return (codes.astype(np.int16) - 2 ** (self.bits - 1)).astype(np.int8), grid

    def _figures(self, weight: Tensor) -> tuple[tuple[float, float], float]:
        """The ends that the factors multiply, and the skewness, of the tensor itself."""
        percentiles = self.method in PERCENTILE_METHODS
        figures = follow(None, wide_moments(weight.detach().numpy(), percentiles=percentiles))
        if figures is None:  # not finite: training is about to say so
            return (0.0, 0.0), 0.0
        ends = (figures.percentile_low, figures.percentile_high) if percentiles else (figures.low, figures.high)
        return ends, figures.skewness


def weight_offset(grid: AffineGrid, bits: int) -> float:
    """What signed code 0 means, exact in float32."""
    return float(np.float32(grid.low + 2 ** (bits - 1) * grid.step))
