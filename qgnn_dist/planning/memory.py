# SPDX-License-Identifier: Apache-2.0
"""Bytes that one worker takes, by item, as sums over the arrays that the code allocates.

Anonymous memory is what a host must have; the store is memory-mapped, and what is read of it can be read again. Each
phase of a run has its own states; what a worker needs is what it holds all the time and the largest of its phases.

Legend: n local rows, H halo rows, F features, h hidden width, C classes, P packed bytes of a row of messages.
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..config import RunConfig
from ..model.features import BLOCK_ROWS
from ..model.packed import ModelInfo
from ..model.row_blocks import KEPT_BITS, block_rows
from ..propagation.fused import fixed_point
from ..propagation.fused_float import MOMENT_COLUMNS
from ..propagation.smp import Propagation
from ..quant.grids import AFFINE_METHODS
from ..quant.packed import row_bytes
from .shapes import GraphSize, PartSize, weight_count
from .traffic import gradient_row_bytes

__all__ = ["BASE_BYTES", "RAY_BASE_BYTES", "Need", "multipliers_act", "prediction_need", "training_need", "worst_steps"]

BASE_BYTES, RAY_BASE_BYTES = 236 << 20, 255 << 20
"""Anonymous memory of a worker of a tiny graph: in the command's own process, and as a Ray actor; a prediction, which
wakes less of torch, takes PREDICT_LESS. Measured on Linux x86-64, CPU build of torch 2.13."""
PREDICT_LESS = 60 << 20
WRITTEN_ROWS = 1 << 20
"""Rows of a Parquet row group, which the writer encodes at once."""
_WORD_BYTES = 16
"""Of a class name beside its row in Arrow, roughly."""
_INCIDENCE_BYTES, _NORM_BYTES = 40, 37
"""Of an edge: propagation.incidence.Incidence, and moments, norms and factors of a projection."""


@dataclass(frozen=True)
class Need:
    """What one worker takes.

    Attributes:
        items: anonymous bytes by item, at the phase that takes most. phase: its name.
        mapped: bytes of the store that every round reads, and that should stay in the page cache.
        at_rest: bytes of mapped features, read in one pass at the start and never again.
    """

    items: dict[str, int]
    phase: str
    mapped: int
    at_rest: int

    @property
    def anonymous(self) -> int:
        """All items together."""
        return sum(self.items.values())

    @property
    def resident(self) -> int:
        """What a host needs for the worker to run at its speed: anonymous bytes, and the mapped graph."""
        return self.anonymous + self.mapped

    @property
    def largest(self) -> str:
        """The item that takes most."""
        return max(self.items, key=lambda name: self.items[name])


def training_need(part: PartSize, size: GraphSize, config: RunConfig, *, base: int = 0) -> Need:
    """Of one worker of a training run. Args: base: bytes of the idle process."""
    bits, n = config.quant.stages(), part.rows
    as_dense = size.codes_are_dense(bits["features"]) and (not size.sparse or config.quant.method not in AFFINE_METHODS)
    dense = size.features if as_dense else 0
    widest = max(config.model.hidden, dense, 1)
    held = {
        "process": base,
        # FeatureBlock.values, int16 codes or float32; indices of sparse rows stay mapped. FeatureBlock.scale.
        "features": (n * dense or _stored(part, size)) * (4 if bits["features"] == 32 else 2) + 4 * n,
        # Neighbourhood.inv_sqrt_degree; TrainWorker._labels, int64; _split_rows, int64.
        "node data": 4 * n + 8 * n + 8 * part.labelled,
        # RowBlocks._input, _hidden, _grad.
        "perceptron rows": 4 * min(n, block_rows(widest)) * (dense + 2 * config.model.hidden),
        # Parameters, gradients, both moments of Adam; codes, their gradient and what autograd keeps of them; parameters
        # and moments before the step (TrainWorker._before).
        "weights, optimiser": 52 * weight_count(size, config.model.hidden),
    }
    if config.propagation.kind == "elastic":
        held["edges, by nodes"] = _INCIDENCE_BYTES * (part.edges // 2)
        phases = _elastic_phases(part, size, config, bits)
    elif config.quant.method in AFFINE_METHODS:
        phases = _affine_phases(part, size, config)
    else:
        phases = _training_phases(part, size, config, bits)
    need = _largest(held, phases, part, size)
    return dataclasses.replace(need, mapped=need.mapped + 8 * n)  # source_index, the key of what is drawn


def prediction_need(part: PartSize, size: GraphSize, info: ModelInfo, *, base: int = 0, scores: bool = False) -> Need:
    """Of one worker of a prediction with a packed model. Args: scores: whether all scores are written."""
    bits, n, classes = info.bits, part.rows, info.num_classes
    held = {
        "process": max(base - PREDICT_LESS, 0),
        "node data": 4 * n,  # Neighbourhood.inv_sqrt_degree
        "send buffers": part.sends * row_bytes(classes, bits["messages"]),
        # PackedModel: int8 codes or float32.
        "weights": weight_count(size, info.hidden) * (4 if bits["weights"] == 32 else 1),
    }
    two = info.kind == "smp" and (info.rounds == "two" or any(info.multipliers))
    # read_block: codes of BLOCK_ROWS rows, and floats of as many where they are not float32 at rest.
    wide = size.features if size.codes_are_dense(bits["features"]) else size.stored
    block = {"perceptron rows": min(n, BLOCK_ROWS) * int(2 * wide + 4 * size.stored)}
    # PredictWorker._write: order, classes and confidence; of a row group they and ids, names, scores in its order, and
    # what Parquet encodes.
    a_row = 40 + (_WORD_BYTES + 4) * (info.class_names is not None) + 8 * classes * scores
    written = 16 * n + a_row * min(n, WRITTEN_ROWS)
    layers = _layers(part, classes, bits["messages"], [] if info.grids else info.message_steps,
                     innovation=info.coding == "innovation", two=two, before=info.rounds == "two", record=False,
                     live=False)
    if info.elastic is not None:
        layers = _elastic_layers(part, classes, bits["messages"], part.edges // 2 * (8 * classes + _NORM_BYTES))
        held["edges, by nodes"] = _INCIDENCE_BYTES * (part.edges // 2)
    phases = {"features": {"states": 4 * n * classes, **block}, "layers": layers,
              "writing": {"states": 4 * n * classes, "rows to write": written}}
    return _largest(held, phases, part, size)


def multipliers_act(config: RunConfig) -> bool:
    """Whether some λ may leave 0; at the default alpha = 1 a layer never changes states by as much as they are."""
    p = config.propagation
    return p.kind == "smp" and (p.constraint == "published" or p.alpha < 1 or p.lambda0 != 0)


def worst_steps(config: RunConfig) -> list[float]:
    """Steps that fall as fast as `quant.step_floor` lets them: fixed point has to hold the most then."""
    floor = max(float(config.quant.step_floor or 0.0), 2.0**-8)
    return [2.0 ** max(round(k * math.log2(floor)), -8) for k in range(Propagation.of(config).num_rounds)]


def _training_phases(part: PartSize, size: GraphSize, config: RunConfig,
                     bits: dict[str, int]) -> dict[str, dict[str, int]]:
    """Phase → item → bytes of what lives in it alone."""
    n, classes = part.rows, size.classes
    state, some = 4 * n * classes, min(classes, MOMENT_COLUMNS)
    smp = config.propagation.kind == "smp"
    two_rounds = smp and config.propagation.rounds == "two"
    # read_block and feature_level: rows as they are read, and ones beside them.
    reading = min(n, BLOCK_ROWS) * int(size.stored) * 8
    gradient = gradient_row_bytes(classes, bits["gradients"])
    moments = 24 * n  # float64 (n, 3), of whatever is coded
    innovation = config.messages.coding == "innovation"
    steps = worst_steps(config)
    phases = {
        "loading": {"perceptron rows": reading, "node data": 8 * n},  # the sorted source_index of an ordered part
        # H⁰; of some columns at a time them, a copy, and two buffers of float messages; with two rounds P and the
        # state before.
        "calibration": {"states": state + 4 * n * some * (3 + 2 * two_rounds + (some < classes)),
                        "halo rows": 8 * part.halo * some, "moments": moments, "send buffers": 4 * part.sends * some},
        "forward": _layers(part, classes, bits["messages"], steps, innovation=innovation, two=smp, before=smp,
                           record=True, live=smp),
        # ∂L/∂H^K, the state, and P of the layer before where multipliers act; two buffers of float messages, or what
        # coded gradients are kept in.
        "backward": {"states": (2 + multipliers_act(config) + two_rounds) * state + 2 * n * gradient,
                     "halo rows": 2 * part.halo * gradient},
    }
    kept = n * _kept_bytes(config, bits["hidden"])
    if config.propagation.kind == "none":
        # H⁰, its copies, and the buffers of a CodedMessenger, which is made though nothing is sent.
        return {"loading": phases["loading"],
                "forward": {"states": 6 * state, "moments": moments, "hidden codes": kept}}
    # PackedForward with moments, then scores, classes and confidence, and cross_entropy's three float64 arrays.
    phases["evaluation"] = _layers(
        part, classes, bits["messages"], steps, innovation=innovation, two=multipliers_act(config) or two_rounds,
        before=two_rounds, record=True, live=False)
    # Exchange._frames: one set for every width that was sent since the calibration.
    frames = {row_bytes(classes, bits["messages"]), gradient}
    for name in ("forward", "backward", "evaluation"):
        phases[name]["send buffers"] = part.sends * sum(frames)
    for name in ("forward", "backward"):
        phases[name]["hidden codes"] = kept
    phases["loss of the evaluation"] = {"states": state, "node data": 8 * n, "validation": 20 * part.valid * classes,
                                        "send buffers": part.sends * sum(frames)}
    return phases


def _kept_bytes(config: RunConfig, bits: int) -> int:
    """RowBlocks' hidden codes of a row, from the forward to the backward."""
    if bits > KEPT_BITS or config.quant.method == "lsq":
        return 0
    return row_bytes(config.model.hidden, bits) + row_bytes(config.model.hidden, 1)


def _layers(part: PartSize, classes: int, bits: int, steps: Sequence[float], *, innovation: bool, two: bool,
            before: bool, record: bool, live: bool) -> dict[str, int]:
    """One forward through the layers.

    Args:
        steps: of the rounds; none for affine grids. two: whether there are multipliers, and P and a state before with
        them. before: whether float layers keep it.
    """
    n, frame, degree = part.rows, row_bytes(classes, bits), part.edges / max(part.rows, 1)
    state = 4 * n * classes
    padded = -(-classes // 8) * 8  # FusedLayers keeps rows of whole vectors
    if bits == 32:
        # H⁰ or its coded form, the state, P, and a state before where one is looked back at: FusedFloatLayers.run.
        states = state * (2 + two + before)
    elif (fixed := fixed_point(steps, bits, innovation=innovation)) is None or fixed.most_neighbours < degree:
        # H, the state before; R, Ŷ and the H⁰ term in float32 (_FloatStorage); AffineMessenger has sums of codes too,
        # and degrees.
        states = state * ((2 if two else 1) + 2 + innovation + (2 if not steps else 0)) + (4 * n if not steps else 0)
    else:
        # H, the state before; R in 16 bits, Ŷ in 8 or 16, the H⁰ term in 8 (_FixedStorage).
        states = state * (2 if two else 1) + n * padded * (2 + fixed.believed_bytes * innovation + 1)
    return {"states": states + 2 * n * frame, "halo rows": 2 * part.halo * frame,
            "moments": (24 * n if record else 0) + (8 * n if live else 0)}


def _affine_phases(part: PartSize, size: GraphSize, config: RunConfig) -> dict[str, dict[str, int]]:
    """The pass by autograd over all rows at once, which methods with affine grids take; an upper estimate."""
    n, hidden, state = part.rows, config.model.hidden, 4 * part.rows * size.classes
    kept = 13 * _stored(part, size)  # ThinnedRows.values and indices, the values that they are of, and a flag
    layers = 8 * state + (config.propagation.layers * 5 * n * size.classes  # Clipped: error and side of every round
                          if config.messages.coding == "direct" else 0)
    return {"training": {"perceptron rows": kept + 10 * 4 * n * hidden, "states": layers + 4 * state,
                         "halo rows": 8 * part.halo * size.classes, "send buffers": 8 * part.sends * size.classes}}


def _elastic_phases(part: PartSize, size: GraphSize, config: RunConfig,
                    bits: dict[str, int]) -> dict[str, dict[str, int]]:
    """Of a run whose projections move every edge, the most there can be: what is kept for the backward is a value and
    an index of each that they move."""
    n, classes, edges, p = part.rows, size.classes, part.edges // 2, config.propagation
    kept = p.layers * edges * (4 * classes + 12 if p.elastic_norm == "l21" else classes)
    layers = _elastic_layers(part, classes, bits["messages"], kept + edges * (8 * classes + _NORM_BYTES))
    affine = _affine_phases(part, size, config)["training"] if config.quant.method in AFFINE_METHODS else {}
    plain = _training_phases(part, size, config, bits)
    return {**{name: plain[name] for name in ("loading", "loss of the evaluation")},
            "forward": {**affine, **layers, "moments": 24 * n},
            # Gradients of F, F̄, Y, the H⁰ term and of all edges; their differences, and the rows outside the ball.
            "backward": {**affine, "states": 36 * n * classes, "edges, by classes": kept + 16 * edges * classes}}


def _elastic_layers(part: PartSize, classes: int, bits: int, edges: int) -> dict[str, int]:
    """One forward of run_elastic: H⁰ and its coded form, F, Y, P, the pull of edges and a difference; a messenger's
    sums, and float rows or Ŷ, sums of codes and packed ones. Args: edges: bytes of what belongs to edges."""
    states = 4 * part.rows * classes * (7 + (2 if bits == 32 else 3))
    return {"states": states + part.rows * row_bytes(classes, bits) * (bits < 32), "edges, by classes": edges}


def _stored(part: PartSize, size: GraphSize) -> int:
    """Feature values of a part."""
    return int(part.rows * size.stored)


def _largest(held: dict[str, int], phases: dict[str, dict[str, int]], part: PartSize, size: GraphSize) -> Need:
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    items = {name: held.get(name, 0) + phases[phase].get(name, 0) for name in {**held, **phases[phase]}}
    # Part.indptr int64, indices int32, rows to send int32; sparse features' indices. All else of the store's nodes is
    # read once and left to the page cache.
    mapped = 8 * (part.rows + 1) + 4 * part.edges + 4 * part.sends
    if size.sparse:
        mapped += 4 * _stored(part, size) + 8 * part.rows
    at_rest = _stored(part, size) * 4
    return Need({name: count for name, count in items.items() if count}, phase, mapped, at_rest)
