# SPDX-License-Identifier: Apache-2.0
"""The packed model's forward pass over one part: what prediction runs, and what training evaluates by.

All of it is integer kernels and elementwise float32 in a fixed order, so that scores are the same bits for every number
of parts, partitioner, thread count and instruction set. Legend: n local rows, F features, H hidden, C classes.
"""
from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np

from .. import kernels
from ..comm.exchange import Exchange
from ..comm.group import Group
from ..propagation.affine import AffineMessenger
from ..propagation.fused import FusedLayers
from ..propagation.fused_float import FusedFloatLayers
from ..propagation.messages import CodedMessenger, FloatMessenger, Messenger, value_moments
from ..propagation.neighbourhood import Neighbourhood
from ..propagation.smp import FrozenMultipliers
from ..quant.clipped import Clipped, Grid
from ..quant.grids import AffineGrid
from ..quant.levels import NUM_LEVELS, level_of, octaves
from ..quant.ranges import moments_of
from .affine import AffinePerceptron
from .features import BLOCK_ROWS, FeatureBlock, FeatureRows, FeatureScheme, feature_level, read_block, reads_dense
from .packed import PackedModel

__all__ = ["Observer", "PackedForward", "feature_gain", "model_reader"]


class Observer(Protocol):
    """Who looks at a propagation while it runs (the diagnosis); it may copy what it sees, and change nothing."""

    def start(self, h0: np.ndarray, residual: np.ndarray, gain: int, messenger: Messenger) -> Messenger:
        """H⁰, the term that stands for it in every layer, both float32 (n, C); returns the messenger to use."""

    def layer(self, layer: int, state: np.ndarray, half: np.ndarray) -> None:
        """See Propagation.run."""


class PackedForward:
    """Scores of a part's nodes under a packed model.

    Args:
        exchange: this part's halo plan, ready to send. group: all workers, None with one part.
        observer: looks at the propagation.
        record: collect, in `moments`, the moments of what each stage coded (not for models with affine grids).
        clipped: counts hidden activations, the H⁰ term and messages outside their grids (for those models neither).
    After `run`: `level` is the graph's own level of D̃^-½·H⁰, `gain` the power of two that steps were shifted by,
    and `seconds` the time of each stage.
    """

    def __init__(self, graph: Neighbourhood, exchange: Exchange, group: Group | None, direction: str,
                 observer: Observer | None = None, *, record: bool = False, clipped: Clipped | None = None) -> None:
        self._observer, self._record, self._clipped = observer, record, clipped
        self.moments: dict[str, list[float]] = {}
        self._graph, self._exchange, self._group, self._direction = graph, exchange, group, direction
        self.level, self.gain = -1, 0
        self.seconds = {"mlp": 0.0, "propagate": 0.0}

    def run(self, model: PackedModel, read: Callable[[int, int], FeatureBlock]) -> np.ndarray:
        """Scores float32 (n, C). `read(begin, end)` yields coded feature rows; every worker must call this together."""
        start = time.perf_counter()
        h0 = self._perceptron(model, read)
        self.seconds["mlp"] += time.perf_counter() - start
        start = time.perf_counter()
        scores = self._propagate(model, h0)
        self.seconds["propagate"] += time.perf_counter() - start
        return scores

    def _perceptron(self, model: PackedModel, read: Callable[[int, int], FeatureBlock]) -> np.ndarray:
        info, n = model.info, self._graph.num_local
        moments = np.zeros((n, 3), np.float64) if self._record and info.bits["hidden"] < 32 else None
        if info.grids:
            affine, scores = AffinePerceptron(model), np.empty((n, info.num_classes), np.float32)
            for begin in range(0, n, BLOCK_ROWS):
                end = min(begin + BLOCK_ROWS, n)
                scores[begin:end] = affine.rows(read(begin, end))
            return scores
        integer1 = info.bits["weights"] < 32 and info.bits["features"] < 32
        integer2 = info.bits["weights"] < 32 and info.bits["hidden"] < 32
        weight1 = model.weight1 if integer1 else model.weight1.astype(np.float32)
        weight2 = model.weight2 if integer2 else model.weight2.astype(np.float32)
        h0 = np.empty((n, info.num_classes), np.float32)
        for begin in range(0, n, BLOCK_ROWS):
            end = min(begin + BLOCK_ROWS, n)
            block = read(begin, end)
            rows = None if moments is None else moments[begin:end]
            if integer1 and integer2:
                block.scores(model, rows, h0[begin:end])
            else:
                h0[begin:end] = self._float_block(model, block, weight1, weight2, rows)
        if moments is not None:
            self.moments["hidden"] = [*moments_of(moments), float(n * info.hidden)]
        if self._clipped is not None and info.bits["hidden"] < 32:
            self._clipped.add("hidden", read(0, n).take(self._clipped.rows).active(model),
                              Grid.unsigned(info.bits["hidden"], info.hidden_step))
        return h0

    def _float_block(self, model: PackedModel, block: FeatureBlock, weight1: np.ndarray, weight2: np.ndarray,
                     moments: np.ndarray | None) -> np.ndarray:
        """Rows through a perceptron with a float stage: own kernels too, sums over columns in their order."""
        info, rows = model.info, len(block.scale)
        step1, step2 = (np.float32(s) for s in info.weight_steps)
        if weight1.dtype == np.int8:
            sums = block.times(weight1, np.empty((rows, info.hidden), np.int32)).astype(np.float32)
        else:
            sums = block.as_float().times(weight1, np.empty((rows, info.hidden), np.float32))
        hidden = np.maximum(sums * (block.scale[:, None] * step1) + model.bias1, np.float32(0))
        step = np.float32(1.0)
        if moments is not None:
            kernels.row_moments(hidden, moments)
        if info.bits["hidden"] < 32:
            step = np.float32(info.hidden_step)
            hidden = np.clip(np.rint(hidden / step), 0, 2 ** info.bits["hidden"] - 1)
        scores = np.empty((rows, info.num_classes), np.float32)
        kernels.matmul_float_dense(np.ascontiguousarray(hidden), weight2.astype(np.float32), scores)
        out: np.ndarray = scores * (step * step2) + model.bias2
        return out

    def _propagate(self, model: PackedModel, h0: np.ndarray) -> np.ndarray:
        info, bits = model.info, model.info.bits
        histogram = np.zeros(NUM_LEVELS, np.int64)
        kernels.level_histogram(h0, self._graph.inv_sqrt_degree, histogram)
        if self._group is not None:
            self._group.all_reduce_sum(histogram)
        self.level = level_of(histogram)
        self.gain = octaves(self.level, info.level)
        propagation = info.propagation
        steps = [float(np.ldexp(np.float32(s), self.gain)) for s in info.message_steps]
        residual_step = np.ldexp(np.float32(info.residual_step), self.gain)
        if bits["residual"] < 32 and not info.grids:
            self._record_rows("residual", h0)
            if self._clipped is not None:
                self._clipped.add("residual", h0[self._clipped.rows],
                                  Grid.midrise(bits["residual"], float(residual_step)))
        if steps and not info.grids and self._observer is None and FusedLayers.can_run(propagation, info.num_classes):
            layers = FusedLayers(propagation, self._graph, self._exchange, self._direction, bits=bits["messages"],
                                 steps=steps, innovation=info.coding == "innovation", residual_bits=bits["residual"],
                                 residual_step=float(residual_step), multipliers=FrozenMultipliers(info.multipliers),
                                 record=self._record, clipped=self._clipped)
            scores = layers.run(h0)
            self.moments.update(layers.moments)
            return scores
        residual = h0
        grid = info.grid("residual")
        if grid is not None:
            grid, codes, residual = grid.shifted(self.gain), np.empty(h0.shape, np.uint8), np.empty_like(h0)
            kernels.affine_codes(h0, None, None, grid.low, grid.step, grid.scale, grid.bias, bits["residual"], 0,
                                 len(h0), codes)
            kernels.affine_values(codes, grid.low, grid.step, residual)
        elif bits["residual"] < 32:
            residual = np.empty_like(h0)
            kernels.midrise(h0, np.float32(residual_step), bits["residual"], residual)
        if bits["messages"] == 32 and self._observer is None and FusedFloatLayers.can_run(propagation):
            float_layers = FusedFloatLayers(propagation, self._graph, self._exchange, self._direction)
            return float_layers.run(h0, residual, FrozenMultipliers(info.multipliers))
        messenger: Messenger
        if bits["messages"] == 32:
            messenger = FloatMessenger(self._graph, self._exchange, info.num_classes, self._direction)
        elif info.grids:
            grids = [AffineGrid(*info.grids[f"news/{k}"]).shifted(self.gain) for k in range(len(info.message_steps))]
            messenger = AffineMessenger(self._graph, self._exchange, info.num_classes, self._direction,
                                        bits=bits["messages"], grids=grids, innovation=info.coding == "innovation")
        else:
            messenger = CodedMessenger(self._graph, self._exchange, info.num_classes, self._direction,
                                       bits=bits["messages"], steps=steps, innovation=info.coding == "innovation",
                                       record=self._record)
        observer = self._observer
        coder = messenger
        if observer is not None:
            messenger = observer.start(h0, residual, self.gain, messenger)
        scores = propagation.run(self._graph, h0, residual, messenger, FrozenMultipliers(info.multipliers),
                                 observe=observer.layer if observer is not None else None)
        if self._record and isinstance(coder, CodedMessenger):
            self.moments.update(coder.moments)
        return scores

    def _record_rows(self, stage: str, x: np.ndarray) -> None:
        if self._record:
            self.moments[stage] = value_moments(x)


def feature_gain(part: FeatureRows, model: PackedModel, group: Group | None) -> int:
    """The powers of two that this graph's features are above those the model was trained on; every worker must call it.

    Only features that are taken as they are can differ: normalised rows, and models without the figure, give 0.
    """
    level = model.info.feature_level
    return octaves(feature_level(part, group), level) if level >= 0 else 0


def model_reader(part: FeatureRows, model: PackedModel, gain: int = 0) -> Callable[[int, int], FeatureBlock]:
    """Reads a part's feature rows as this model wants them coded.

    Args: gain: of `feature_gain`; rows are divided by 2^gain, which changes no code.
    """
    info = model.info
    scheme = FeatureScheme(info.feature_norm, info.feature_signed, info.bits["features"])
    as_dense = reads_dense(part, scheme)

    def read(begin: int, end: int) -> FeatureBlock:
        block = read_block(part, scheme, begin, end, as_dense=as_dense)
        return dataclasses.replace(block, scale=np.ldexp(block.scale, -gain)) if gain else block

    return read
