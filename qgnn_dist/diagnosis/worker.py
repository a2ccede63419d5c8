# SPDX-License-Identifier: Apache-2.0
"""One worker of a diagnosis: a forward of a packed model over its part, measured stage by stage and layer by layer.

Legend: n local rows, F features, H hidden, C classes.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..comm.exchange import Exchange
from ..inference.examine import Examined, examine
from ..model.affine import AffinePerceptron
from ..model.features import FeatureBlock, FeatureScheme, read_block, refuse_negative
from ..model.forward import PackedForward, feature_gain, model_reader
from ..model.packed import PackedModel
from ..propagation.neighbourhood import Neighbourhood
from ..quant.clipped import Grid
from ..store.reader import Part, Store
from .stages import Tally
from .watch import DIRECTION, LayerSums, PropagationWatch, RoundSums

if TYPE_CHECKING:
    from ..comm.pool import WorkerContext

__all__ = ["DiagnosisWorker", "PartFigures"]


@dataclass
class PartFigures:
    """What a part adds to the diagnosis: sums only, which add up over the parts.

    Attributes:
        agreeing: nodes whose class is the float twin's. worst: largest |score − twin's score|. gain: of PackedForward.
        examined: what its answers are, beside their labels.
    """

    features: Tally
    hidden: Tally
    residual: Tally
    residual_step: float
    rounds: list[RoundSums]
    layers: list[LayerSums]
    nodes: int
    agreeing: int
    worst: float
    gain: int
    examined: Examined


class DiagnosisWorker:
    """Owns part `context.rank` of a store during one diagnosis.

    Args:
        store: path of the store, or its URI. exchange_s: deadline of a round of messages.
    """

    def __init__(self, context: WorkerContext, *, store: str, exchange_s: float) -> None:
        self._context, self._store, self._exchange_s = context, store, exchange_s

    def diagnose(self, model: bytes) -> PartFigures:
        """Run the forward and its float twin; every worker must be called together.

        Raises:
            ModelError: the features don't fit the model's grid. ExchangeError, DeadlineError: as for any message.
        """
        context, packed, store = self._context, PackedModel.from_bytes(model), Store.open(self._store)
        part = store.part(context.rank)
        info = packed.info
        refuse_negative(part, FeatureScheme(info.feature_norm, info.feature_signed, info.bits["features"]), self._store)
        graph = Neighbourhood.of(part)
        exchange = Exchange(part.peers, part.num_local, part.num_halo, context.group, context.run_id, self._exchange_s)
        watch = PropagationWatch(info, graph, exchange)
        reader = _MeasuringReader(part, packed, feature_gain(part, packed, context.group))
        forward = PackedForward(graph, exchange, context.group, DIRECTION, watch)
        # A model that diverges on this graph has figures, too: those that are not finite become null.
        with np.errstate(invalid="ignore", over="ignore"):
            scores = forward.run(packed, reader)
            watch.finish(scores)
            twin = watch.twins[-1]
            worst = float(np.abs(scores.astype(np.float64) - twin).max(initial=0.0))
        return PartFigures(
            features=reader.features, hidden=reader.hidden, residual=watch.residual,
            residual_step=watch.residual_step, rounds=watch.rounds, layers=watch.layers, nodes=len(scores),
            agreeing=int((scores.argmax(1) == twin.argmax(1)).sum()),
            worst=worst, gain=forward.gain,
            examined=examine(part, scores, max(info.num_classes, store.num_classes), context.size))


class _MeasuringReader:
    """Reads a part's feature blocks as the model wants them, and measures the first two stages on each."""

    def __init__(self, part: Part, model: PackedModel, gain: int) -> None:
        info, bits = model.info, model.info.bits
        self._part, self._model, self._read = part, model, model_reader(part, model, gain)
        self._float = FeatureScheme(info.feature_norm, info.feature_signed, 32)
        self._grid = Grid.midtread(bits["features"], 1.0) if info.feature_signed else Grid.unsigned(bits["features"],
                                                                                                    1.0)
        self._affine, self._gain = AffinePerceptron(model) if info.grids else None, gain
        self.features, self.hidden = Tally(bits["features"]), Tally(bits["hidden"])

    def __call__(self, begin: int, end: int) -> FeatureBlock:
        block = self._read(begin, end)
        self._measure_features(block, begin, end)
        self._measure_hidden(block)
        return block

    def _measure_features(self, block: FeatureBlock, begin: int, end: int) -> None:
        """Stored values only where features are sparse: the zeros between them stay exact zeros."""
        if self.features.bits == 32:
            self.features.add(block.values)
            return
        rows = read_block(self._part, self._float, begin, end)
        exact = np.ldexp(rows.values, -self._gain)
        scale, values = block.scale.astype(np.float64)[:, None], block.values
        self.features.add_steps(block.scale)
        if rows.indptr is not None and rows.indices is not None:
            of = np.repeat(np.arange(end - begin), np.diff(rows.indptr))
            scale = scale[of, 0]
            values = values[of, rows.indices] if block.indptr is None else values
        # A row's grid begins at code 0 of this tally: signed codes are counted from their lowest one up.
        codes = values - np.int16(round(self._grid.lowest))
        self.features.add(exact, codes, self._grid, scale)

    def _measure_hidden(self, block: FeatureBlock) -> None:
        """The activations again, as the forward computes them before it rounds."""
        active, bits = self._active(block), self.hidden.bits
        affine = self._model.info.grid("hidden")
        if bits == 32:
            self.hidden.add(active)
        elif affine is not None:
            self.hidden.add(active, affine.codes(active, bits), Grid.affine(bits, affine))
        else:
            step = self._model.info.hidden_step
            codes = np.rint(np.minimum(active / np.float32(step), np.float32(2**bits - 1))).astype(np.int64)
            self.hidden.add(active, codes, Grid.unsigned(bits, step))

    def _active(self, block: FeatureBlock) -> np.ndarray:
        """relu(X·W₁ + b₁), float32 (n, H), by the forward's kernels."""
        return self._affine.active(block) if self._affine is not None else block.active(self._model)
