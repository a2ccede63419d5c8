# SPDX-License-Identifier: Apache-2.0
"""The network that `qgnn train` trains, as a torch module for one's own loop; it packs to the file that `qgnn export`
writes.

Legend: N nodes, F features, H hidden, C classes.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..data.pyg import features_of
from ..errors import ConfigError, InputError
from ..model.features import (
    NORMS,
    FeatureBlock,
    FeatureScheme,
    choose_norm,
    feature_level,
    feature_statistics,
    read_block,
    reads_dense,
    refuse_negative,
)
from ..model.forward import feature_gain
from ..model.memory import GraphRows, run_packed, use_torch_threads
from ..model.packed import PackedModel
from ..model.perceptron import DropoutKey, FeatureMatrix, Perceptron
from ..model.row_blocks import RowBlocks
from ..quant.grids import AFFINE_METHODS
from ..training.frozen import About, frozen_model, step_of_hidden
from .figures import Figures, join_state, split_state
from .graph import Remembered
from .smp_conv import SMPConv

__all__ = ["SMPNet"]


class SMPNet(nn.Module):
    """A quantised perceptron F → H → C and SMPConv behind it: features (N, F) to scores (N, C).

    `qgnn train` on a store of one part trains the same network; equal seeds, graphs and settings give equal gradients
    (with `quant.gradients=4` in `overrides`, its default). `pack` gives the PackedModel that `qgnn predict` takes.

    Training mode: codes with straight-through gradients, dropout drawn from `seed`. Evaluation mode: the packed model's
    own integer kernels, so the scores are those of `pack().predict(data)` to the last bit, and carry no gradient.
    Evaluate on the training graph after each epoch: the grids follow that (nn.figures.Figures), and the scale of its
    states is what other graphs are compared to. CPU only; `cluster.device=cuda` of `qgnn train` uses GPUs.

    Args:
        in_channels, hidden_channels, out_channels: F, H and C.
        bits: of weights, features, hidden activations and messages: 2, 4, 8, or 32 for float; at 1 the first three
            have 2. layers: K. dropout: of input and hidden values, in training.
        seed: of weights, dropout and random rounding; None draws one from torch's generator.
        overrides: `section.key=value` words for all other settings, as for `qgnn.train`. `quant.method` may be recipe,
            lsq or minmax; `train.` settings have no meaning here.
    Raises: ConfigError: settings that do not exist or do not fit.

    >>> import torch, qgnn_dist as qgnn
    >>> net = qgnn.SMPNet(8, 16, 3, bits=2)
    >>> net(torch.rand(5, 8), torch.tensor([[0, 1, 2], [1, 2, 3]])).shape
    torch.Size([5, 3])
    """

    def __init__(self, in_channels: int, hidden_channels: int, out_channels: int, *, bits: int = 2, layers: int = 10,
                 dropout: float = 0.5, seed: int | None = None, overrides: Sequence[str] = ()) -> None:
        super().__init__()
        if in_channels < 1 or out_channels < 1:
            raise ConfigError(f"SMPNet: {in_channels} features and {out_channels} classes, expected at least 1 of each")
        words = [f"model.hidden={hidden_channels}", f"model.dropout={float(dropout)!r}", *overrides]
        self.conv = SMPConv(layers, bits, seed=seed, overrides=words)
        self.config = self.conv.config
        if self.config.quant.method in AFFINE_METHODS:
            raise ConfigError(f"SMPNet: quant.method={self.config.quant.method}, expected recipe, lsq or minmax; "
                              "`qgnn.train` has all, and SMPConv by itself")
        self.perceptron = Perceptron(self.config, in_channels, out_channels)
        self._hidden = Figures(["hidden"])
        self._scheme: FeatureScheme | None = None
        self._feature_level = self._level = -1
        self._rows, self._block = Remembered[GraphRows](), Remembered[FeatureBlock]()

    def forward(self, x: Any, adjacency: Any) -> Tensor:
        """Scores, before any softmax.

        Args:
            x: features (N, F), float; a dense tensor, a sparse one or a torch_sparse.SparseTensor. They become codes,
                so no gradient reaches them; the codes are kept while the same object comes again. The first forward
                chooses the normalisation (`model.feature_norm`) by all of its rows.
            adjacency: see SMPConv.forward.
        Returns: float32 (N, C).
        Raises: InputError, ModelError: what comes does not fit, or lies on a GPU.
        """
        for what, tensor in (("x", x), ("the module", self.perceptron.weight1)):
            if isinstance(tensor, Tensor) and tensor.device.type != "cpu":
                raise InputError(f"SMPNet: {what} is on {tensor.device}, and integer kernels run on the CPU; move it "
                                 "there, put SMPConv behind a perceptron of your own, or set cluster.device=cuda for "
                                 "`qgnn train`")
        if self.perceptron.weight1.dtype != torch.float32:
            raise InputError(f"SMPNet: its parameters are {self.perceptron.weight1.dtype}, and integer kernels keep "
                             "biases and steps in float32; call .float() on it")
        if not hasattr(x, "size"):
            raise InputError(f"SMPNet: x is {type(x).__name__}, expected a dense or sparse matrix (nodes, features)")
        use_torch_threads()
        rows = self._rows.of(x, lambda: GraphRows(features_of(x, int(x.size(0)), "x")))
        if rows.num_features != len(self.perceptron.weight1):
            raise InputError(f"SMPNet: x has {rows.num_features} features, expected {len(self.perceptron.weight1)}")
        block = self._coded(x, rows)
        matrix = FeatureMatrix(block)
        if not self._hidden.known:
            self._calibrate(matrix, adjacency)
        if not self.training:
            return self._evaluate(rows, block, adjacency)
        self._hidden.begin()
        self._level = -1
        found: list[list[float]] = []
        step = step_of_hidden(self.config, self.perceptron, self._hidden.training)
        h0: Tensor = _Perceive.apply(RowBlocks(self.perceptron, matrix), self._dropout(matrix, self.conv.epoch + 1),
                                     step, found, *self.perceptron.parameters())  # type: ignore[no-untyped-call]
        self._hidden.follow({"hidden": found[0]})
        out: Tensor = self.conv(h0, adjacency)
        return out

    def pack(self, class_names: Sequence[str] | None = None) -> PackedModel:
        """The network as it is now, frozen: integer weights, steps, multipliers; `save(path)` writes it.

        Args: class_names: C names, which predictions then show.
        Raises: InputError: no forward has set the ranges yet, or another number of names.
        """
        if self._scheme is None or not (self._hidden.known and self.conv.figures.known):
            raise InputError("SMPNet.pack: no forward has set the ranges yet; call the module on your graph first")
        names, classes = list(class_names) if class_names is not None else None, self.perceptron.weight2.shape[1]
        if names is not None and len(names) != classes:
            raise InputError(f"SMPNet.pack: {len(names)} class names for {classes} classes")
        about = About(self._scheme, self._feature_level, names, "", "")
        ranges = {**self.conv.figures.frozen, **self._hidden.frozen}
        model = frozen_model(self.config, self.perceptron, ranges, self.conv.multipliers, about)
        return dataclasses.replace(model, info=dataclasses.replace(model.info, level=self._level))

    def parameter_groups(self, weight_decay: float = 1e-3) -> list[dict[str, Any]]:
        """For an optimiser: decay on the first weight matrix only, as `qgnn train` has it (`train.weight_decay`).

        Where rows of features are taken as they are (one-hot categories, signed values), `qgnn train` has none: give 0.
        """
        return self.perceptron.parameter_groups(weight_decay)

    def get_extra_state(self) -> Tensor:
        """What is no parameter, as one float64 tensor."""
        scheme = self._scheme
        norm = -1 if scheme is None else NORMS.index(scheme.norm)
        signed = scheme is not None and scheme.signed
        return join_state([norm, signed, self._feature_level, self._level], self._hidden.to_list())

    def set_extra_state(self, state: Tensor) -> None:
        """See get_extra_state."""
        numbers, figures = split_state(state, (4, self._hidden.size), "SMPNet")
        norm, signed, self._feature_level, self._level = (int(number) for number in numbers)
        self._scheme = None
        if norm >= 0:
            self._scheme = FeatureScheme(NORMS[norm], bool(signed), self.perceptron.bits_features)
        self._hidden.from_list(figures)
        self._block = Remembered()

    def _coded(self, x: Any, rows: GraphRows) -> FeatureBlock:
        """All rows as codes; the first ones that come decide the normalisation."""
        if self._scheme is None:
            statistics = feature_statistics(rows, np.arange(rows.num_local))
            norm = self.config.model.feature_norm
            norm = choose_norm(statistics, rows.num_features) if norm == "auto" else norm
            self._scheme = FeatureScheme(norm, statistics.negative > 0, self.perceptron.bits_features)
            if norm == "none" and self._scheme.bits < 32:
                self._feature_level = feature_level(rows, None)
        scheme = self._scheme

        def code() -> FeatureBlock:
            refuse_negative(rows, scheme, "x")
            return read_block(rows, scheme, 0, rows.num_local, as_dense=reads_dense(rows, scheme))

        return self._block.of(x, code)

    @torch.no_grad()
    def _calibrate(self, matrix: FeatureMatrix, adjacency: Any) -> None:
        """One forward with float messages and hidden values sets the first ranges."""
        state, moments = RowBlocks(self.perceptron, matrix).forward(self._dropout(matrix, 0), None)
        self._hidden.follow({"hidden": moments})
        self.conv.calibrate(torch.from_numpy(state), self.conv.graph_of(adjacency, matrix.num_rows))
        if self.config.quant.method == "lsq":
            levels = 2 ** int(self.config.quant.hidden or 32) - 1
            self.perceptron.hidden_step.fill_(2 * self._hidden.training["hidden"].mean / levels**0.5 + 1e-8)

    def _evaluate(self, rows: GraphRows, block: FeatureBlock, adjacency: Any) -> Tensor:
        """Scores of the packed model; the first ones since the last training forward say what its grids follow next."""
        graph, both = self.conv.graph_of(adjacency, rows.num_local), (self.conv.figures, self._hidden)
        record = self.config.quant.method == "recipe"
        gain = feature_gain(rows, self.pack(), None)
        if gain:
            block = dataclasses.replace(block, scale=np.ldexp(block.scale, -gain))
        if self._hidden.stale and record:
            for one in both:
                one.evaluation.clear()
            look = run_packed(self.pack(), graph, block.rows, record=True)[1]
            for one in both:
                one.adopt(look.moments)
        first = self._hidden.listening
        scores, forward = run_packed(self.pack(), graph, block.rows, record=first and record)
        if first:
            self._level = forward.level
            for one in both:
                one.note(forward.moments)
        return torch.from_numpy(scores)

    def _dropout(self, matrix: FeatureMatrix, epoch: int) -> DropoutKey:
        return DropoutKey(self.config.seed, epoch, np.arange(matrix.num_rows), self.config.model.dropout)


class _Perceive(torch.autograd.Function):
    """H⁰ by row blocks, whose backward leaves gradients in the parameters' own `.grad`."""

    @staticmethod
    def forward(ctx: Any, blocks: RowBlocks, key: DropoutKey, step: float | None, found: list[list[float]],
                *parameters: Tensor) -> Tensor:
        with torch.enable_grad():  # of weights to their codes, for the backward
            h0, moments = blocks.forward(key, step)
        found.append(moments)
        ctx.blocks, ctx.parameters = blocks, parameters
        return torch.from_numpy(h0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        blocks, ctx.blocks = ctx.blocks, None
        if blocks is None:
            raise RuntimeError("SMPNet: its graph was used by a backward before; run the forward again")
        rows = np.ascontiguousarray(grad.numpy())
        return None, None, None, None, *_gradients(ctx.parameters, lambda: blocks.backward(rows))


def _gradients(parameters: Sequence[Tensor], run: Callable[[], None]) -> list[Tensor | None]:
    """What `run` leaves in the gradients of parameters, which keep those they had."""
    before = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    with torch.enable_grad():  # a learned step builds its own small graph
        run()
    found = [p.grad for p in parameters]
    for p, grad in zip(parameters, before):
        p.grad = grad
    return found
