# SPDX-License-Identifier: Apache-2.0
"""The layers of a training forward and their backward on a device; training/layers.py is the host's.

Legend: n local rows, C columns.
"""
from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..comm.device import DeviceExchange
from ..config import RunConfig
from ..propagation.messages import GradientCoding
from ..propagation.smp import FrozenMultipliers, Multipliers, Propagation
from .codes import DeviceGraph, midrise
from .gradients import GradientRounds
from .layers import CodedRounds, FloatRounds, Rounds, run_layers

__all__ = ["DeviceLayers"]


class DeviceLayers:
    """K layers of one worker's rows; all workers call the same method together. Tensors lie on the graph's device."""

    def __init__(self, config: RunConfig, graph: DeviceGraph, exchange: DeviceExchange) -> None:
        self._quant, self._graph, self._exchange = config.quant, graph, exchange
        self._innovation = config.messages.coding == "innovation"
        self._propagation = Propagation.of(config)

    def moments(self, state: Tensor) -> dict[str, list[float]]:
        """Of what an error-free coder of messages would have to code."""
        rounds = FloatRounds(self._graph, self._exchange, state.shape[1], "forward", record=True,
                             innovation=self._innovation)
        run_layers(self._propagation, self._graph, state, state, rounds, FrozenMultipliers([]), all_rounds=True)
        return rounds.moments

    def forward(self, state: Tensor, multipliers: Multipliers, *, steps: Sequence[float], residual_step: float,
                record: bool) -> tuple[Tensor, dict[str, list[float]]]:
        """H^K, float32 (n, C), at fixed steps, and the moments of what was coded."""
        bits, residual_bits = int(self._quant.messages or 32), int(self._quant.residual or 32)
        residual = state if residual_bits == 32 else midrise(state, residual_step, residual_bits)
        if bits == 32:
            float_rounds = FloatRounds(self._graph, self._exchange, state.shape[1], "forward")
            return run_layers(self._propagation, self._graph, state, residual, float_rounds, multipliers), {}
        rounds = CodedRounds(self._graph, self._exchange, state.shape[1], "forward", bits=bits, steps=steps,
                             innovation=self._innovation, record=record)
        return run_layers(self._propagation, self._graph, state, residual, rounds, multipliers), rounds.moments

    def backward(self, grad: Tensor, multipliers: Sequence[float], coding: GradientCoding | None) -> Tensor:
        """∂L/∂H⁰ of a forward with these λ from ∂L/∂H^K. coding: None sends float gradients."""
        rounds: Rounds = FloatRounds(self._graph, self._exchange, grad.shape[1], "backward")
        if coding is not None:
            rounds = GradientRounds(self._graph, self._exchange, grad.shape[1], coding)
        return run_layers(self._propagation, self._graph, grad, grad, rounds, FrozenMultipliers(multipliers))
