# SPDX-License-Identifier: Apache-2.0
"""The layers of a training forward and their backward on the host, by our own kernels; device/layers has torch's.

Legend: n local rows, C columns.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .. import kernels
from ..comm.exchange import Exchange
from ..config import RunConfig
from ..propagation.affine import AffineMessenger
from ..propagation.elastic import Projected
from ..propagation.fused import FusedLayers
from ..propagation.fused_float import FusedFloatLayers, float_moments
from ..propagation.messages import CodedMessenger, FloatMessenger, GradientCoding, gradient_messenger
from ..propagation.neighbourhood import Neighbourhood
from ..propagation.reverse import Reverse
from ..propagation.smp import FrozenMultipliers, Multipliers, Propagation
from ..quant.ranges import Range, residual_step
from .affine import AffineTraining
from .frozen import steps_of_rounds

__all__ = ["HostLayers"]


class HostLayers:
    """K layers of one worker's rows; all workers call the same method together. Forward, then at most one backward.

    Args: affine: of the methods with affine grids; None for all others.
    """

    def __init__(self, config: RunConfig, graph: Neighbourhood, exchange: Exchange,
                 affine: AffineTraining | None) -> None:
        self._config, self._graph, self._exchange, self._affine = config, graph, exchange, affine
        self._propagation = Propagation.of(config)
        self._innovation = config.messages.coding == "innovation"
        self._projected: list[Projected] = []  # of the last training forward, where it is elastic

    def values(self, state: np.ndarray) -> dict[str, np.ndarray]:
        """What an error-free coder would have to code of every stage of the layers; for affine grids, whose start
        looks at the values themselves."""
        messenger = FloatMessenger(self._graph, self._exchange, state.shape[1], "forward", record=True,
                                   innovation=self._innovation, keep=True)
        self._propagation.run(self._graph, state, state, messenger, FrozenMultipliers([]), all_rounds=True)
        return {**messenger.news, "residual": state}

    def moments(self, state: np.ndarray) -> dict[str, list[float]]:
        """Moments of the same for the messages alone, in less memory; see propagation.fused_float.float_moments."""
        return float_moments(self._propagation, self._graph, self._exchange, state, innovation=self._innovation)

    def forward(self, state: np.ndarray, multipliers: Multipliers, ranges: Mapping[str, Range], *, record: bool,
                protected: np.ndarray | None = None) -> tuple[np.ndarray, dict[str, list[float]]]:
        """H^K, float32 (n, C), at fixed ranges, and the moments of what was coded; `state` is used up.

        Args: record: of a training forward. protected: of AffineTraining.protected.
        """
        quant, columns = self._config.quant, state.shape[1]
        bits, residual_bits = int(quant.messages or 32), int(quant.residual or 32)
        moments: dict[str, list[float]] = {}
        messenger: AffineMessenger | CodedMessenger | FloatMessenger | None = None
        residual = state
        if self._affine is not None:
            moments["residual"] = self._affine.moments({"residual": state})["residual"]
            grids = self._affine.grids(ranges)
            residual = self._affine.residual(state, grids, train=record)
            if bits < 32:
                messenger = self._affine.messenger(columns, grids, train=record, protected=protected)
        else:
            step = 1.0
            if residual_bits < 32:
                step = residual_step(ranges["residual"], residual_bits, quant.method)
            if bits < 32 and FusedLayers.can_run(self._propagation, columns):
                layers = FusedLayers(self._propagation, self._graph, self._exchange, "forward", bits=bits,
                                     steps=steps_of_rounds(self._config, ranges), innovation=self._innovation,
                                     residual_bits=residual_bits, residual_step=step, multipliers=multipliers,
                                     record=record)
                return layers.run(state), {**moments, **layers.moments}
            if residual_bits < 32:
                residual = np.empty_like(state)
                kernels.midrise(state, np.float32(step), residual_bits, residual)
            if bits < 32:
                messenger = CodedMessenger(self._graph, self._exchange, columns, "forward", bits=bits,
                                           steps=steps_of_rounds(self._config, ranges), innovation=self._innovation,
                                           record=record)
        if messenger is None and FusedFloatLayers.can_run(self._propagation):
            float_layers = FusedFloatLayers(self._propagation, self._graph, self._exchange, "forward")
            return float_layers.run(state, residual, multipliers), moments
        messenger = messenger or FloatMessenger(self._graph, self._exchange, columns, "forward")
        out = self._propagation.run(self._graph, state, residual, messenger, multipliers,
                                    keep=self._projected if record else None)
        return out, {**moments, **messenger.moments}

    def backward(self, grad: np.ndarray, multipliers: Sequence[float], ranges: Mapping[str, Range],
                 coding: GradientCoding | None) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
        """∂L/∂H⁰ of the last training forward from ∂L/∂H^K, float32 (n, C); `grad` is used up.

        Args: multipliers, ranges: of that forward. coding: of the gradient messages; None: float rows.
        Returns: with affine grids also the gradients of their factors, see AffineTraining.backward.
        """
        if self._affine is not None:
            return self._affine.backward(grad, list(multipliers), ranges, self._affine.grids(ranges), coding,
                                         self._projected)
        if FusedFloatLayers.can_run(self._propagation):
            layers = FusedFloatLayers(self._propagation, self._graph, self._exchange, "backward", coding=coding)
            return layers.run(grad, grad, FrozenMultipliers(multipliers)), None
        messenger = gradient_messenger(self._graph, self._exchange, grad.shape[1], coding)
        reverse = Reverse(self._propagation, self._graph, messenger, [], [], self._projected)
        return reverse.run(grad) + reverse.residual, None
