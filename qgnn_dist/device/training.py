# SPDX-License-Identifier: Apache-2.0
"""What a training worker computes on a device: forward, layers, loss and backward of its rows, by torch operations.

It takes the steps, masks and multipliers of the host's path, so that coded forwards have the kernels' bits and
gradients differ by the order of float sums alone. Evaluation stays with the packed model on the host.
Legend: n local rows, C classes.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..comm.device import open_device_exchange
from ..config import RunConfig
from ..model.features import FeatureBlock
from ..model.perceptron import DropoutKey, Perceptron
from ..propagation.messages import GradientCoding
from ..propagation.neighbourhood import Neighbourhood
from ..propagation.smp import Multipliers
from .codes import DeviceGraph, moments
from .propagate import DeviceLayers
from .row_blocks import DeviceRowBlocks

if TYPE_CHECKING:
    from ..comm.pool import WorkerContext
    from ..store.reader import Part

__all__ = ["DeviceTraining"]


class DeviceTraining:
    """One worker's passes; all workers call the same method together.

    Args:
        config: settings that training.loop.device_can_train. block: the coded features of all local rows.
    """

    def __init__(self, device: torch.device, context: WorkerContext, config: RunConfig, network: Perceptron,
                 block: FeatureBlock, part: Part, graph: Neighbourhood) -> None:
        self.device = device
        self._blocks = DeviceRowBlocks(network, block, part.source_index, device)
        exchange = open_device_exchange(part.peers, part.num_local, part.num_boundary, part.num_halo, context.group,
                                        context.run_id, config.timeouts.exchange_s, device)
        self._layers = DeviceLayers(config, DeviceGraph.of(graph, device), exchange)

    def calibrate(self, key: DropoutKey) -> dict[str, list[float]]:
        """Moments of every stage in one forward with float messages and hidden values."""
        state, figures = self._blocks.forward(key, None)
        return {**self._layers.moments(state), "residual": moments(state), "hidden": figures}

    def forward(self, key: DropoutKey, hidden_step: float | None) -> tuple[Tensor, list[float], list[float]]:
        """H⁰, float32 (n, C), moments of the hidden values, and those of H⁰."""
        state, figures = self._blocks.forward(key, hidden_step)
        return state, figures, moments(state)

    def propagate(self, state: Tensor, multipliers: Multipliers, *, steps: list[float], residual_step: float,
                  record: bool) -> tuple[Tensor, dict[str, list[float]]]:
        """See DeviceLayers.forward."""
        return self._layers.forward(state, multipliers, steps=steps, residual_step=residual_step, record=record)

    def loss(self, scores: Tensor, rows: np.ndarray, labels: np.ndarray, count: int) -> tuple[float, Tensor]:
        """See training.metrics.loss_gradient; the gradient is on the device."""
        at, own = (torch.from_numpy(a).to(self.device) for a in (rows, labels))
        logs = torch.log_softmax(scores[at], 1)
        total = -logs.gather(1, own[:, None]).sum(dtype=torch.float64)
        some = logs.exp_()
        some[torch.arange(len(at), device=self.device), own] -= 1.0
        grad = torch.zeros_like(scores)
        grad[at] = some * float(np.float32(1 / count))
        return float(total) / count, grad

    def backward(self, grad: Tensor, multipliers: list[float], coding: GradientCoding | None) -> None:
        """Set the parameters' gradients, this worker's share, from ∂L/∂H^K. coding: None sends float gradients."""
        self._blocks.backward(self._layers.backward(grad, multipliers, coding))

    def memory(self) -> dict[str, int]:
        """Peak of the device's memory that torch has handed out, where it is a GPU."""
        if self.device.type != "cuda":
            return {}
        return {"peak_device_bytes": int(torch.cuda.max_memory_allocated(self.device))}

    @property
    def name(self) -> str:
        """For people: the device, and which GPU it is."""
        if self.device.type != "cuda":
            return str(self.device)
        return f"{self.device} ({torch.cuda.get_device_name(self.device)})"
