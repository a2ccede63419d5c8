# SPDX-License-Identifier: Apache-2.0
"""Smoothness-aware message propagation and its special case APPNP.

Legend: n local rows, C columns; H state, P = Â·H, Δ the change of a layer's gradient step, G = L̃·Δ.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .. import kernels
from ..comm.pool import MultiplierClient, Reply
from ..config import RunConfig
from .messages import Messenger
from .neighbourhood import Neighbourhood

__all__ = ["FrozenMultipliers", "LiveMultipliers", "Multipliers", "Propagation"]


class Multipliers(Protocol):
    """Where λ_k comes from."""

    def value(self, layer: int) -> float:
        """λ of a layer; may wait for the answer to the layer before."""

    def post(self, layer: int, dot: float) -> None:
        """Tell this worker's share of ⟨Δ, G⟩ of a layer."""

    @property
    def live(self) -> bool:
        """Whether `post` is listened to."""


class FrozenMultipliers:
    """The λ of an earlier training forward: evaluation, prediction, and every backward."""

    live = False

    def __init__(self, values: Sequence[float]) -> None:
        self._values = list(values)

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

    live = True

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
    """

    kind: str
    layers: int
    mu: float
    eta: float
    rounds: str

    @classmethod
    def of(cls, config: RunConfig) -> Propagation:
        """As configured."""
        p = config.propagation
        return cls(p.kind, p.layers, p.mu, p.eta, p.rounds)

    @property
    def num_rounds(self) -> int:
        """Rounds of messages at most (the last one falls away where λ_{K−1} = 0)."""
        if self.kind == "none":
            return 0
        if self.kind == "appnp":
            return self.layers
        return 2 * self.layers if self.rounds == "two" else self.layers + 1

    def run(self, graph: Neighbourhood, h0: np.ndarray, residual: np.ndarray, messenger: Messenger,
            multipliers: Multipliers, *, all_rounds: bool = False,
            observe: Callable[[int, np.ndarray, np.ndarray], None] | None = None) -> np.ndarray:
        """H^K of the local rows.

        The operator is linear and symmetric where messages are float, so the same call on a gradient
        (h0 = residual = ∂L/∂H^K) with the forward's λ gives ∂L/∂H⁰: nothing of the forward's layers is kept.

        Args:
            h0: float32 (n, C), the first state. residual: float32 (n, C), the H⁰ term of every layer (its quantised
                form where `quant.residual` is under 32 bits).
            multipliers: the source of λ; every worker must see the same values.
            all_rounds: run the last round even where λ makes it needless (calibration wants its range).
            observe: called with every layer's number, H^k and H½; it may look at them and keep copies, no more.
        Returns:
            float32 (n, C), a new array.
        """
        if self.kind == "none":
            return h0.copy()
        a = np.float32(1.0 - (1.0 + self.mu) * self.eta)
        b, c = np.float32(self.mu * self.eta), np.float32(self.eta)
        state, half = h0.copy(), np.empty_like(h0)
        p, p_next = np.empty_like(h0), np.empty_like(h0)
        dots = np.zeros(len(h0), np.float64) if multipliers.live else None
        if self.kind == "appnp":
            for layer in range(self.layers):
                self._around(graph, state, messenger, layer, p)
                kernels.half_step(state, p, residual, a, b, c, half)
                if observe is not None:
                    observe(layer, state, half)
                state, half = half, state
            return state
        merged = self.rounds == "merged"
        if merged:
            self._around(graph, state, messenger, 0, p)
        for layer in range(self.layers):
            if not merged:
                self._around(graph, state, messenger, layer, p)
            kernels.half_step(state, p, residual, a, b, c, half)
            if observe is not None:
                observe(layer, state, half)
            last = layer == self.layers - 1
            if last and multipliers.value(layer) == 0.0 and not all_rounds:
                return half
            self._around(graph, half, messenger, layer, p_next)
            coefficient = np.float32(2.0 * self.eta * multipliers.value(layer))
            kernels.apply_multiplier(state, half, p, p_next, coefficient, state, dots)
            if dots is not None and not last:
                multipliers.post(layer, float(dots.sum()))
            if merged:
                p, p_next = p_next, p
        return state

    def _around(self, graph: Neighbourhood, h: np.ndarray, messenger: Messenger, layer: int, out: np.ndarray) -> None:
        """out = Â·h: the neighbours' part from messages, the node's own part exact and local."""
        sums = messenger.gather(h, layer)
        kernels.propagated(sums, h, graph.inv_sqrt_degree, 0, graph.num_local, out)
