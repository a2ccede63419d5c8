# SPDX-License-Identifier: Apache-2.0
"""Smoothness-aware message propagation as a torch module, for a model of one's own on one machine.

The arithmetic is that of a training worker that holds the whole graph: training/layers.py on the host, and
device/propagate.py elsewhere. Legend: N nodes, C columns, K layers.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..comm.device import open_device_exchange
from ..config import RunConfig, load_config
from ..device import codes
from ..device.propagate import DeviceLayers
from ..errors import InputError
from ..model.memory import no_exchange, use_torch_threads
from ..propagation.messages import GradientCoding, value_moments
from ..propagation.multiplier import LocalMultipliers, MultiplierRule
from ..propagation.neighbourhood import Neighbourhood
from ..propagation.smp import FrozenMultipliers, Propagation
from ..quant.grids import AFFINE_METHODS, stage_names
from ..quant.learned import StageRanges
from ..quant.ranges import Range, residual_step
from ..training.affine import AffineTraining
from ..training.frozen import steps_of_rounds
from ..training.layers import HostLayers
from .figures import Figures, join_state, split_state
from .graph import Remembered, read_adjacency

__all__ = ["SMPConv"]


class SMPConv(nn.Module):
    """K layers of smoothness-aware propagation with quantised messages: H^K of H⁰, (N, C) to (N, C).

    Every layer is a gradient step on ½‖H − H⁰‖² + (μ/2)·tr(HᵀL̃H) under a constraint on what it changes, whose
    multipliers λ_k follow the training forwards (Wang et al., CIKM 2023; docs/method.md has the formulas). What a node
    hands to its neighbours is coded with `bits` bits a value, as innovation by default; sums of codes are whole
    numbers. It has no weights (`qlr`, `bt` and `bt_star` learn two factors a range): put it behind a perceptron.

    Training mode: ranges and multipliers follow every forward; gradients pass straight through the codes. Evaluation
    mode: both are frozen, so that equal inputs give equal outputs; the first evaluation after a training forward leaves
    figures that the next training forward takes up, and after several training forwards in a row it first sets those
    that are then in use (nn.figures.Figures). The first forward of all, in either mode, sets the ranges from a float
    pass over its input. `state_dict` holds all of it.

    Float32 on the CPU runs on the project's kernels, with as many threads as torch has. Other dtypes are computed in
    float32 and given back in their own; on other devices torch operations do the same, code for code.

    Args:
        layers: K, 1–1000. bits: of messages: 1, 2, 4, 8, or 32 for float (the local H⁰ term has at least 8).
        mu, eta: weight of the smoothness term, and a layer's step, below 2/(1 + 2μ).
        method: how ranges are found, any of `quant.method`: statistics (`recipe`, `minmax`, `lsq`, `percentile`,
            `degree_quant`) or learned (`qlr`, `bt`, `bt_star`, on the CPU like the two before them).
        seed: of random rounding; None draws one from torch's generator.
        overrides: `section.key=value` words for every other setting of `propagation.`, `messages.` and `quant.`, as for
            `qgnn.train`: `propagation.alpha=0.1`, `messages.coding=direct`, `quant.residual=32`. Gradients are float
            here unless `quant.gradients` says 2, 4 or 8: nothing travels.
    Raises: ConfigError: a setting that does not exist or does not fit; names all of them.

    >>> import torch, qgnn_dist as qgnn
    >>> conv = qgnn.SMPConv(layers=4, bits=2)
    >>> edge_index = torch.tensor([[0, 1, 2], [1, 2, 3]])
    >>> conv(torch.randn(4, 3), edge_index).shape
    torch.Size([4, 3])
    """

    def __init__(self, layers: int = 10, bits: int = 2, *, mu: float = 9.0, eta: float = 0.1, method: str = "recipe",
                 seed: int | None = None, overrides: Sequence[str] = ()) -> None:
        super().__init__()
        drawn = int(torch.randint(2**31, ()).item()) if seed is None else seed
        self.config = _config({"seed": drawn, "propagation": {"layers": layers, "mu": mu, "eta": eta},
                               "quant": {"bits": bits, "method": method, "gradients": 32}}, overrides)
        quant = self.config.quant
        self._rounds = Propagation.of(self.config).num_rounds
        stages = {**quant.stages(), "weights": 32, "hidden": 32}
        names = stage_names(stages, self._rounds)
        self.ranges: StageRanges | None = None
        if quant.method in AFFINE_METHODS:
            self.ranges = StageRanges(names, {name: stages["messages" if "/" in name else name] for name in names},
                                      quant.method)
        self.figures = Figures(names)
        self.epoch = 0
        self.multipliers: list[float] = []
        self._graph = Remembered[Neighbourhood]()
        self._device_graph = Remembered[codes.DeviceGraph]()

    def forward(self, x: Tensor, adjacency: Any) -> Tensor:
        """H^K of H⁰ = x.

        Args:
            x: float (N, C) on any device.
            adjacency: `edge_index` int64 (2, E) as in PyG, a sparse torch tensor (N, N), COO or CSR, or a
                torch_sparse.SparseTensor, all unweighted. One-way edges count both ways, duplicates once, self loops
                are dropped (each layer has the node itself). The cleaned and normalised graph is kept while the same
                object comes again unchanged.
        Returns: (N, C), of x's dtype and device. Nothing flows to the multipliers, which are numbers.
        Raises: InputError: shapes that do not fit, or weights other than 1.
        """
        if not isinstance(x, Tensor) or x.dim() != 2 or not x.is_floating_point() or not x.numel():
            got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise InputError(f"SMPConv: x is {got}, expected float (nodes, columns), at least one of each")
        use_torch_threads()
        graph, state = self.graph_of(adjacency, x.size(0)), x.float()
        self.calibrate(state.detach(), graph)
        if self.training:
            self.figures.begin()
            self.epoch += 1
        elif self.figures.stale and self.config.quant.method == "recipe":
            self.figures.evaluation.clear()
            look = self._run(graph, state)
            look.forward(state)
            self.figures.adopt(look.moments)
        run = self._run(graph, state)
        factors = (self.ranges.low, self.ranges.high) if self.ranges is not None else (None, None)
        out: Tensor = _Propagate.apply(state, *factors, run)  # type: ignore[no-untyped-call]
        if self.training:
            self.figures.follow(run.moments)
            self.multipliers = run.multipliers
        elif self.figures.listening:
            self.figures.note(run.moments if self.config.quant.method == "recipe" else {})
        return out.to(x.dtype)

    def graph_of(self, adjacency: Any, num_nodes: int) -> Neighbourhood:
        """The cleaned rows of an adjacency, see `forward`; those of the last one are kept."""
        graph = self._graph.of(adjacency, lambda: read_adjacency(adjacency, num_nodes))
        if graph.num_local != num_nodes:
            raise InputError(f"adjacency was given with {graph.num_local} rows of x before, now with {num_nodes}; the "
                             "same tensor is the same graph, pass a copy for another one")
        return graph

    @torch.no_grad()
    def calibrate(self, state: Tensor, graph: Neighbourhood) -> None:
        """Where no forward has set the ranges yet, do so by a float pass over H⁰, float32 (N, C)."""
        if self.figures.known:
            return
        layers, values = self._layers(graph, state), dict[str, np.ndarray]()
        if isinstance(layers, DeviceLayers):
            self.figures.follow({**layers.moments(state), "residual": codes.moments(state)})
        elif self.ranges is None:
            self.figures.follow({**layers.moments(_rows(state)), "residual": value_moments(_rows(state))})
        else:
            values = layers.values(_rows(state))
            self.figures.follow(self._affine(graph).moments({name: values[name] for name in self.figures.names}))
        if not self.figures.known:
            raise InputError("SMPConv: x, or what its layers make of it, holds NaN or infinity; no range can be set by "
                             "that")
        if values:
            self._affine(graph).start(values, self.figures.training)

    def reset_parameters(self) -> None:
        """Forget ranges, factors, multipliers and the count of training forwards."""
        self.figures.forget()
        self.epoch, self.multipliers = 0, []
        if self.ranges is not None:
            with torch.no_grad():
                self.ranges.low.fill_(1.0)
                self.ranges.high.fill_(1.0)

    def get_extra_state(self) -> Tensor:
        """Everything but the factors as one float64 tensor, so that a state_dict holds tensors alone."""
        layers, known = self.config.propagation.layers, len(self.multipliers)
        return join_state([self.epoch, known], self.multipliers + [0.0] * (layers - known), self.figures.to_list())

    def set_extra_state(self, state: Tensor) -> None:
        """See get_extra_state. Raises: InputError: of a module with other layers."""
        sizes = (2, self.config.propagation.layers, self.figures.size)
        (epoch, known), multipliers, figures = split_state(state, sizes, "SMPConv")
        self.epoch, self.multipliers = int(epoch), multipliers[:int(known)]
        self.figures.from_list(figures)

    def extra_repr(self) -> str:
        """What `print` shows."""
        p, quant = self.config.propagation, self.config.quant
        return f"layers={p.layers}, bits={quant.messages}, method={quant.method}, mu={p.mu:g}, eta={p.eta:g}"

    def _layers(self, graph: Neighbourhood, state: Tensor) -> HostLayers | DeviceLayers:
        if state.device.type == "cpu":
            return HostLayers(self.config, graph, no_exchange(graph), self._affine(graph) if self.ranges else None)
        if self.ranges is not None:
            raise InputError(f"method={self.config.quant.method} runs on the CPU only; expected recipe, lsq or minmax "
                             f"on {state.device}, or move x to the CPU")
        return DeviceLayers(self.config, self._device_graph_of(graph, state.device),
                            open_device_exchange([], graph.num_local, 0, 0, None, 0, 1.0, state.device))

    def _device_graph_of(self, graph: Neighbourhood, device: torch.device) -> codes.DeviceGraph:
        kept = self._device_graph.of(graph, lambda: codes.DeviceGraph.of(graph, device))
        if kept.device != device:
            self._device_graph = Remembered()
            kept = self._device_graph.of(graph, lambda: codes.DeviceGraph.of(graph, device))
        return kept

    def _affine(self, graph: Neighbourhood) -> AffineTraining:
        assert self.ranges is not None
        return AffineTraining(self.config, self.ranges, graph, no_exchange(graph), None,
                              source_index=np.arange(graph.num_local), num_nodes=graph.num_local)

    def _run(self, graph: Neighbourhood, state: Tensor) -> _Run:
        """One forward, at the ranges and multipliers that are in use now."""
        layers, quant, n = self._layers(graph, state), self.config.quant, graph.num_local
        on_device = isinstance(layers, DeviceLayers)
        moments = codes.moments(state.detach()) if on_device else value_moments(_rows(state))
        multipliers: LocalMultipliers | FrozenMultipliers = FrozenMultipliers(self.multipliers)
        if self.training and self.config.propagation.kind == "smp":
            multipliers = LocalMultipliers(MultiplierRule.of(self.config, len(graph.indices) // 2), moments[0])
        ranges = dict(self.figures.training) if self.training or quant.method != "recipe" else self.figures.frozen
        coding = None
        if quant.gradients != 32:
            coding = GradientCoding(int(quant.gradients or 32), self.config.seed, self.epoch, np.arange(n))
        residual = {} if quant.residual == 32 or self.ranges is not None else {"residual": moments}
        if isinstance(layers, DeviceLayers):
            return _DeviceRun(layers, self.config, multipliers, self.multipliers, ranges, coding, residual)
        protected = self._affine(graph).protected(self.epoch) if self.ranges is not None and self.training else None
        return _HostRun(layers, multipliers, self.multipliers, ranges, coding, residual, protected)


def _config(values: dict[str, Any], overrides: Sequence[str]) -> RunConfig:
    config = load_config(values=values, overrides=list(overrides))
    if config.propagation.kind not in ("smp", "appnp"):
        raise InputError(f"SMPConv: propagation.kind={config.propagation.kind}, expected smp or appnp; `qgnn.train` "
                         "has the others")
    return config


def _rows(x: Tensor) -> np.ndarray:
    return np.ascontiguousarray(x.detach().numpy())


class _Run(Protocol):
    """One forward and its backward. `moments` of what was coded, and λ as used, are there after `forward`."""

    moments: dict[str, list[float]]
    multipliers: list[float]

    def forward(self, state: Tensor) -> Tensor:
        """H^K, a new tensor."""

    def backward(self, grad: Tensor) -> tuple[Tensor, tuple[np.ndarray, np.ndarray] | None]:
        """∂L/∂H⁰, and the gradients of learned factors."""


class _HostRun:
    def __init__(self, layers: HostLayers, multipliers: LocalMultipliers | FrozenMultipliers, frozen: list[float],
                 ranges: dict[str, Range], coding: GradientCoding | None, moments: dict[str, list[float]],
                 protected: np.ndarray | None) -> None:
        self._layers, self._source, self.multipliers, self._ranges = layers, multipliers, frozen, ranges
        self._coding, self.moments, self._protected = coding, moments, protected

    def forward(self, state: Tensor) -> Tensor:
        out, moments = self._layers.forward(_rows(state).copy(), self._source, self._ranges, record=True,
                                            protected=self._protected)
        self.moments = {**self.moments, **moments}
        if isinstance(self._source, LocalMultipliers):
            self.multipliers = list(self._source.values)
        return torch.from_numpy(out)

    def backward(self, grad: Tensor) -> tuple[Tensor, tuple[np.ndarray, np.ndarray] | None]:
        first, factors = self._layers.backward(_rows(grad).copy(), self.multipliers, self._ranges, self._coding)
        return torch.from_numpy(first), factors


class _DeviceRun:
    def __init__(self, layers: DeviceLayers, config: RunConfig, multipliers: LocalMultipliers | FrozenMultipliers,
                 frozen: list[float], ranges: dict[str, Range], coding: GradientCoding | None,
                 moments: dict[str, list[float]]) -> None:
        quant = config.quant
        self._layers, self._source, self.multipliers = layers, multipliers, frozen
        self._coding, self.moments = coding, moments
        self._steps = [] if quant.messages == 32 else steps_of_rounds(config, ranges)
        self._residual = 1.0
        if quant.residual != 32:
            self._residual = residual_step(ranges["residual"], int(quant.residual or 32), quant.method)

    def forward(self, state: Tensor) -> Tensor:
        out, moments = self._layers.forward(state.detach().contiguous(), self._source, steps=self._steps,
                                            residual_step=self._residual, record=True)
        self.moments = {**self.moments, **moments}
        if isinstance(self._source, LocalMultipliers):
            self.multipliers = list(self._source.values)
        return out

    def backward(self, grad: Tensor) -> tuple[Tensor, tuple[np.ndarray, np.ndarray] | None]:
        return self._layers.backward(grad.contiguous(), self.multipliers, self._coding), None


class _Propagate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state: Tensor, low: Tensor | None, high: Tensor | None, run: _Run) -> Tensor:
        ctx.run, ctx.learned = run, low is not None and low.requires_grad
        return run.forward(state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        first, factors = ctx.run.backward(grad)
        if factors is None or not ctx.learned:
            return first, None, None, None
        return first, *(torch.from_numpy(values.astype(np.float32)) for values in factors), None
