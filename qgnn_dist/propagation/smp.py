# SPDX-License-Identifier: Apache-2.0
"""Smoothness-aware message propagation and its special case APPNP; the other kinds are called from here, too.

Legend: n local rows, C columns; H state, P = Â·H, Δ the change of a layer's gradient step, G = L̃·Δ; with merged rounds
D_k = H^k − H^{k−1} is what a layer changed, and its neighbours' part stands in G for Δ's.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .. import kernels
from ..comm.pool import MultiplierClient, Reply
from ..config import RunConfig
from .elastic import Elastic, Projected, run_elastic
from .messages import Messenger
from .neighbourhood import Neighbourhood

__all__ = ["FrozenMultipliers", "LiveMultipliers", "Multipliers", "Propagation"]


Observe = Callable[[int, np.ndarray, np.ndarray], None]
"""Takes a layer's number, H^k and H½."""


class Multipliers(Protocol):
    """Where λ_k comes from."""

    def value(self, layer: int) -> float:
        """λ of a layer; may wait for the answer to the layer before."""

    def post(self, layer: int, dot: float) -> None:
        """Tell this worker's share of ⟨Δ, G⟩ (merged rounds: ⟨D, L̃·D⟩) of a layer; `value` of it was taken before."""

    @property
    def live(self) -> bool:
        """Whether `post` is listened to."""

    @property
    def any(self) -> bool:
        """Whether some λ may differ from 0."""


class FrozenMultipliers:
    """The λ of an earlier training forward: evaluation, prediction, and every backward."""

    live = False

    def __init__(self, values: Sequence[float]) -> None:
        self._values = list(values)

    @property
    def any(self) -> bool:
        """See Multipliers."""
        return any(self._values)

    def value(self, layer: int) -> float:
        """λ of a layer; 0 past the end."""
        return self._values[layer] if layer < len(self._values) else 0.0

    def post(self, layer: int, dot: float) -> None:
        """Nobody listens."""


class LiveMultipliers:
    """λ from the multiplier server, one layer ahead: the answer to a layer is first needed at the next one's end.

    Args:
        client: this rank's way to the server (comm.pool.MultiplierClient).
        energy: this worker's share of ‖H⁰‖².
    """

    live = any = True

    def __init__(self, client: MultiplierClient, epoch: int, start: float, energy: float, timeout_s: float) -> None:
        self._client, self._epoch, self._energy, self._timeout_s = client, epoch, energy, timeout_s
        self._values = [start]
        self._reply: Reply | None = None

    def value(self, layer: int) -> float:
        """λ of a layer; waits for the server's answer to the layer before where it has not come yet."""
        if layer == len(self._values):
            assert self._reply is not None
            self._values.append(float(self._reply.result(self._timeout_s)))
        return self._values[layer]

    def post(self, layer: int, dot: float) -> None:
        """Send the share and go on; the answer is collected by `value(layer + 1)`."""
        self._reply = self._client.post_layer(self._epoch, layer, dot, self._energy)

    @property
    def values(self) -> list[float]:
        """λ_0 … λ_{K−1} as used in this forward."""
        return list(self._values)


@dataclass(frozen=True)
class Propagation:
    """K layers over one part's rows; the same numbers on every worker.

    With λ ≡ 0 and η = 1/(1+μ) this is APPNP (Gasteiger et al., ICLR 2019) with teleport 1/(1+μ).

    Attributes: elastic: the settings of that kind, which takes neither mu nor eta; None for all others.
    """

    kind: str
    layers: int
    mu: float
    eta: float
    rounds: str
    elastic: Elastic | None = None

    @classmethod
    def of(cls, config: RunConfig) -> Propagation:
        """As configured."""
        p = config.propagation
        elastic = Elastic(p.lambda1, p.lambda2, p.elastic_norm) if p.kind == "elastic" else None
        return cls(p.kind, p.layers, p.mu, p.eta, p.rounds, elastic)

    @property
    def num_rounds(self) -> int:
        """Rounds of messages at most (the last of `two` falls away where λ_{K−1} = 0)."""
        if self.kind == "none":
            return 0
        return 2 * self.layers if self.two_rounds else self.layers

    @property
    def two_rounds(self) -> bool:
        """Whether a layer has a round for Â·H^k and one for Â·H½; otherwise it has one."""
        return self.kind == "smp" and self.rounds == "two"

    def run(self, graph: Neighbourhood, h0: np.ndarray, residual: np.ndarray, messenger: Messenger,
            multipliers: Multipliers, *, all_rounds: bool = False, observe: Observe | None = None,
            keep: list[Projected] | None = None) -> np.ndarray:
        """H^K of the local rows.

        The operator of smp and appnp is linear and symmetric where messages are float, so the same call on a gradient
        (h0 = residual = ∂L/∂H^K) with the forward's λ gives ∂L/∂H⁰: nothing of the forward's layers is kept.

        Args:
            h0: float32 (n, C), the first state. residual: float32 (n, C), the H⁰ term of every layer (its quantised
                form where `quant.residual` is under 32 bits).
            multipliers: the source of λ; every worker must see the same values.
            all_rounds: run the last round even where λ makes it needless (calibration wants its range).
            observe: called in every layer; it may look at the arrays and keep copies, no more. For elastic its H½ is
                the state after the layer.
            keep: see elastic.run_elastic; the other kinds need nothing for their backward.
        Returns:
            float32 (n, C), a new array.
        """
        if self.kind == "none":
            same: np.ndarray = h0.copy()
            return same
        if self.elastic is not None:
            return run_elastic(self.elastic, self.layers, graph, h0, residual, messenger, observe=observe, keep=keep)
        layers = _Layers(self, graph, residual, messenger, observe, h0)
        return layers.two(multipliers, all_rounds) if self.two_rounds else layers.merged(multipliers)


class _Layers:
    """The arrays of one run."""

    def __init__(self, spec: Propagation, graph: Neighbourhood, residual: np.ndarray, messenger: Messenger,
                 observe: Observe | None, h0: np.ndarray) -> None:
        self._spec, self._graph, self._residual, self._messenger = spec, graph, residual, messenger
        self._observe = observe
        self._state: np.ndarray = h0.copy()
        self._half = np.empty_like(h0)
        self._p, self._p_other = np.empty_like(h0), np.empty_like(h0)

    def merged(self, multipliers: Multipliers) -> np.ndarray:
        """One round a layer, of H^k: G_k = Δ_k − (Â·H^k − Â·H^{k−1}), the constraint is on D_k.

        A mode ω of L̃ then moves by h ← h + (1 − m)·Δ + m·(1 − ω)·(h − h_before) with m = −2ηλ, which contracts
        wherever η < 2/(1 + 2μ) and −(2−η)/(2+η) < m < 1: smooth modes keep their pace and rough ones are held back.
        """
        before = np.empty_like(self._state) if multipliers.live else None
        dots = np.zeros(len(self._state) if multipliers.live else 0, np.float64)
        for layer in range(self._spec.layers):
            self._around(self._state, layer, self._p)
            coefficient = self._coefficient(multipliers.value(layer))
            p_before = self._p_other if layer else self._p  # no change came before the first layer
            if before is not None and layer < self._spec.layers - 1:
                if layer:
                    kernels.apply_multiplier(before, self._state, p_before, self._p, 0.0, before, dots)
                multipliers.post(layer, float(dots.sum()))
            self._half_step(layer)
            if coefficient != 0:
                kernels.apply_multiplier(self._state, self._half, p_before, self._p, coefficient, self._half, None)
            if before is None:
                self._state, self._half = self._half, self._state
            else:
                before, self._state, self._half = self._state, self._half, before
            self._p, self._p_other = self._p_other, self._p
        return self._state

    def two(self, multipliers: Multipliers, all_rounds: bool) -> np.ndarray:
        """The published schedule: a round for Â·H^k, and one for Â·H½."""
        dots = np.zeros(len(self._state), np.float64) if multipliers.live else None
        for layer in range(self._spec.layers):
            self._around(self._state, layer, self._p)
            self._half_step(layer)
            last = layer == self._spec.layers - 1
            if last and multipliers.value(layer) == 0.0 and not all_rounds:
                return self._half
            self._around(self._half, layer, self._p_other)
            kernels.apply_multiplier(self._state, self._half, self._p, self._p_other,
                                     self._coefficient(multipliers.value(layer)), self._state, dots)
            if dots is not None and not last:
                multipliers.post(layer, float(dots.sum()))
        return self._state

    def _coefficient(self, multiplier: float) -> float:
        return float(np.float32(2.0 * self._spec.eta * multiplier))

    def _half_step(self, layer: int) -> None:
        """H½ of the state, into its array."""
        mu, eta = self._spec.mu, self._spec.eta
        kernels.half_step(self._state, self._p, self._residual, np.float32(1.0 - (1.0 + mu) * eta),
                          np.float32(mu * eta), np.float32(eta), self._half)
        if self._observe is not None:
            self._observe(layer, self._state, self._half)

    def _around(self, h: np.ndarray, layer: int, out: np.ndarray) -> None:
        """out = Â·h: the neighbours' part from messages, the node's own part exact and local."""
        graph = self._graph
        kernels.propagated(self._messenger.gather(h, layer), h, graph.inv_sqrt_degree, 0, graph.num_local, out)
