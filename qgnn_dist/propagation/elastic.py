# SPDX-License-Identifier: Apache-2.0
"""Elastic message passing, a baseline: smoothing that lets some edges keep a jump (Liu, Jin, Ma, Li, Liu, Wang, Yan,
Tang: "Elastic Graph Neural Networks", ICML 2021).

With Δ̃ the incidence matrix of L̃ = Δ̃ᵀΔ̃, a row x_i/√d_i − x_j/√d_j for every edge {i, j} (d counts the node itself):

    minimise   λ₁·g(Δ̃F) + (λ₂/2)·tr(FᵀL̃F) + ½‖F − H⁰‖²      g: sum of the rows' l2 norms (`l21`), or of all |x| (`l1`)

by proximal alternating predictor-corrector. Z holds a dual value for each edge and column, 0 at first; a layer is

    Y = γ·H⁰ + (1 − γ)·Â·F        γ = 1/(1 + λ₂)        messages
    F̄ = Y − γ·Δ̃ᵀZ
    Z ← Π(Z + β·Δ̃F̄)              β = 1/(2γ)            Π: rows onto the ball of radius λ₁ (`l21`); all into [−λ₁, λ₁]
    F ← Y − γ·Δ̃ᵀZ

λ₁ = 0 leaves Z at 0, and the layers are APPNP with teleport γ. Only Â·F is a message that may be coded; Z and the
differences of edges are float32 and never leave the worker, which therefore must hold the whole graph.

All sums run in the order of a row's neighbours in this project's own kernels, the rest is elementwise: the answer does
not depend on threads, on the instruction set or on the order of rows.

Legend: n rows, E edges without direction, C columns.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .. import kernels
from ..errors import InputError
from .messages import Messenger
from .neighbourhood import Neighbourhood

__all__ = ["Elastic", "Projected", "refuse_parts", "run_elastic"]


def refuse_parts(parts: int, file: str | None = None) -> None:
    """Raise InputError where a graph has more than one part."""
    if parts > 1:
        raise InputError(f"propagation.kind=elastic takes one part, this is {parts}: what it keeps for each edge does "
                         "not travel; partition with --parts 1, or take smp or appnp", file=file)


@dataclass(frozen=True)
class Elastic:
    """What is minimised.

    Attributes: lambda1, lambda2: weights of the edge term and of the smoothness term, ≥ 0. norm: l21 or l1.
    """

    lambda1: float
    lambda2: float
    norm: str

    @property
    def gamma(self) -> float:
        """Step of F: the inverse of 1 + λ₂."""
        return 1.0 / (1.0 + self.lambda2)

    @property
    def beta(self) -> float:
        """Step of Z; stable up to 1/(γ·‖L̃‖), and ‖L̃‖ ≤ 2 on every graph."""
        return 0.5 * (1.0 + self.lambda2)


@dataclass(frozen=True)
class Projected:
    """Where a layer's projection moved Z, for its backward; whatever is not named here was left as it was.

    Attributes:
        at: l21: int64 (R,), the rows outside the ball. l1: bool (E, C), the values outside.
        unit: l21: float32 (R, C), their directions. shrink: float32 (R, 1), λ₁ over their norms. l1: None both.
    """

    at: np.ndarray
    unit: np.ndarray | None = None
    shrink: np.ndarray | None = None

    def pull(self, grad: np.ndarray) -> None:
        """From the gradient of Π(Z̄) to that of Z̄, in place: of a row outside λ₁/‖z̄‖·(I − uuᵀ), of a value 0."""
        if self.unit is None:
            grad[self.at] = 0
            return
        rows = grad[self.at]
        rows -= np.einsum("ec,ec->e", rows, self.unit)[:, None] * self.unit
        rows *= self.shrink
        grad[self.at] = rows


def run_elastic(spec: Elastic, layers: int, graph: Neighbourhood, h0: np.ndarray, residual: np.ndarray,
                messenger: Messenger, *, observe: Callable[[int, np.ndarray, np.ndarray], None] | None = None,
                keep: list[Projected] | None = None) -> np.ndarray:
    """F after some layers, float32 (n, C), a new array.

    Args:
        h0: float32 (n, C), the first F. residual: float32 (n, C), what stands for H⁰ in every layer.
        observe: called in every layer with its number, F before and after it.
        keep: gets what each layer's projection did, for `reverse.Reverse`: up to E·(4C + 12) bytes a layer.
    """
    incidence, n = graph.incidence, graph.num_local
    gamma, beta = np.float32(spec.gamma), np.float32(spec.beta)
    state: np.ndarray = h0.copy()
    p, y, pull = np.empty_like(h0), np.empty_like(h0), np.zeros_like(h0)
    z = np.zeros((incidence.num_edges, h0.shape[1]), np.float32)
    news = np.empty_like(z)
    for layer in range(layers):
        kernels.propagated(messenger.gather(state, layer), state, graph.inv_sqrt_degree, 0, n, p)
        kernels.half_step(state, p, residual, 0.0, spec.lambda2 * spec.gamma, gamma, y)
        incidence.differences(y - pull, news)  # of Z before this layer; 0 at first
        news *= beta
        z += news
        done = _project(z, spec, keep=keep is not None)
        if keep is not None and done is not None:
            keep.append(done)
        incidence.gathered(z, pull)
        pull *= gamma
        np.subtract(y, pull, out=p)
        if observe is not None:
            observe(layer, state, p)
        state, p = p, state
    return state


def _project(z: np.ndarray, spec: Elastic, *, keep: bool) -> Projected | None:
    """Π, in place. Norms are taken in double, in the kernel's order."""
    radius = spec.lambda1
    if spec.norm == "l1":
        outside = np.abs(z) > np.float32(radius) if keep else None
        np.clip(z, np.float32(-radius), np.float32(radius), out=z)
        return Projected(outside) if outside is not None else None
    moments = np.empty((len(z), 3), np.float64)
    kernels.row_moments(z, moments)
    norms = np.sqrt(moments[:, 0])
    rows = np.flatnonzero(norms > radius)
    shrink = np.ones((len(z), 1), np.float32)
    shrink[rows, 0] = radius / norms[rows]
    unit = z[rows] if keep else None
    z *= shrink
    if unit is None:
        return None
    unit /= norms[rows, None].astype(np.float32)
    return Projected(rows, unit, shrink[rows])
