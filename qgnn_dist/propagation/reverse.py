# SPDX-License-Identifier: Apache-2.0
"""The backward of a propagation whose messages clip, or that is elastic: every round transposed, the last one first.

Where every message passes its gradient, the backward is the forward's own operator (smp.Propagation) and keeps nothing.
Clipped elements break that symmetry: at reverse round k the gradient of what round k delivered comes back through
Aᵀ = A, stops at the elements that round k clipped, and goes to the round's bounds there. What each round clipped is
kept from the forward, so memory grows with depth here. The multipliers λ are constants. Elastic layers project, and are
not symmetric either; what each projection did is kept.

Legend: n local rows, C columns; H state, P = Â·H, Q what a round delivers of D̃^-½·H, R = A·Q.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .. import kernels
from .affine import Clipped
from .elastic import Elastic, Projected
from .messages import Messenger
from .neighbourhood import Neighbourhood
from .smp import Propagation

__all__ = ["Reverse"]


class Reverse:
    """One backward pass; all workers run it together.

    Args:
        messenger: carries gradients (FloatMessenger or GradientMessenger).
        multipliers: λ_0 … of the forward. clipped: of every round of the forward, in its order; empty where every
            element passes its gradient. projected: of every layer of an elastic forward; used up by `run`.
    After `run`: `residual`, float32 (n, C), is the gradient of the H⁰ term of all layers; `delivered[k]`, float32
    (n, C), that of Q of round k, before any clipping, and only where `clipped` is there.
    """

    def __init__(self, propagation: Propagation, graph: Neighbourhood, messenger: Messenger,
                 multipliers: Sequence[float], clipped: Sequence[Clipped],
                 projected: list[Projected] | None = None) -> None:
        self._propagation, self._graph, self._messenger = propagation, graph, messenger
        self._multipliers, self._clipped = list(multipliers), list(clipped)
        self._projected = projected if projected is not None else []
        self.residual = np.zeros((0, 0), np.float32)
        self.delivered: dict[int, np.ndarray] = {}

    def run(self, grad: np.ndarray) -> np.ndarray:
        """∂L/∂H of the first state, float32 (n, C), from `grad` = ∂L/∂H^K; the H⁰ term's share is not in it."""
        self.residual = np.zeros_like(grad)
        p = self._propagation
        if p.kind == "none":
            same: np.ndarray = grad.copy()
            return same
        if p.elastic is not None:
            return self._elastic(p.elastic, grad)
        return self._two(grad) if p.kind == "smp" and p.rounds == "two" else self._merged(grad)

    def _two(self, grad: np.ndarray) -> np.ndarray:
        for k in reversed(range(self._propagation.layers)):
            force = self._force(k)
            half, to_state, to_p = grad, np.zeros_like(grad), np.zeros_like(grad)
            if force != 0:  # H_{k+1} = H½ + force·(H½ − H − P' + P)
                pull = force * grad
                half = grad + pull + self._around(-pull, k, 2 * k + 1)
                to_state, to_p = -pull, pull
            more_p, more_state = self._half_step(half)
            grad = to_state + more_state + self._around(to_p + more_p, k, 2 * k)
        return grad

    def _merged(self, grad: np.ndarray) -> np.ndarray:
        """H_{k+1} = H½ + force·(H½ − H_k − P_k + P_{k−1}), where P_{−1} stands for P_0."""
        of_p = np.zeros_like(grad)  # what layer k + 1 had of P_k
        for k in reversed(range(self._propagation.layers)):
            pull = self._force(k) * grad
            to_p, to_state = self._half_step(grad + pull)
            to_p += of_p
            if k > 0:
                to_p, of_p = to_p - pull, pull
            grad = to_state - pull + self._around(to_p, k, k)
        return grad

    def _elastic(self, spec: Elastic, grad: np.ndarray) -> np.ndarray:
        """F = Y − γΔ̃ᵀΠ(Z + βΔ̃F̄) with F̄ = Y − γΔ̃ᵀZ, of the layers from the last one; see elastic.py."""
        incidence = self._graph.incidence
        gamma, beta = np.float32(spec.gamma), np.float32(spec.beta)
        of_z = np.zeros((incidence.num_edges, grad.shape[1]), np.float32)
        rows, edges = np.empty_like(grad), np.empty_like(of_z)
        for k in reversed(range(self._propagation.layers)):
            of_z -= np.multiply(gamma, incidence.differences(grad, edges), out=edges)
            self._projected.pop().pull(of_z)  # now of Z̄, and so of Z before the layer but for F̄'s share
            of_mean = beta * incidence.gathered(of_z, rows)  # of F̄
            of_z -= np.multiply(gamma, incidence.differences(of_mean, edges), out=edges)
            of_y = grad + of_mean
            self.residual += gamma * of_y
            grad = self._around(np.float32(spec.lambda2 * spec.gamma) * of_y, k, k)
        return grad

    def _force(self, layer: int) -> np.float32:
        """2ηλ of a layer."""
        value = self._multipliers[layer] if layer < len(self._multipliers) else 0.0
        twice: np.float32 = np.float32(2.0 * self._propagation.eta * value)
        return twice

    def _half_step(self, grad: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Through H½ = a·H + b·P + c·H⁰: the gradients of P and of H; that of H⁰ is added up."""
        p = self._propagation
        self.residual += np.float32(p.eta) * grad
        return np.float32(p.mu * p.eta) * grad, np.float32(1.0 - (1.0 + p.mu) * p.eta) * grad

    def _around(self, grad: np.ndarray, layer: int, number: int) -> np.ndarray:
        """Through P = D̃^-½·A·Q(D̃^-½·H) + D̃^-1·H: the gradient of H."""
        g, out = self._graph, np.empty_like(grad)
        delivered = self._messenger.gather(np.ascontiguousarray(grad), layer)
        if self._clipped:
            self.delivered[number] = delivered.copy()
            delivered = np.where(self._clipped[number].sides == 0, delivered, np.float32(0))
        kernels.propagated(delivered, grad, g.inv_sqrt_degree, 0, g.num_local, out)
        return out
