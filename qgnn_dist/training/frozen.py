# SPDX-License-Identifier: Apache-2.0
"""From a network in training to a packed model: the steps of its grids, and all that the file holds."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..config import RunConfig
from ..model.features import FeatureScheme
from ..model.packed import ModelInfo, PackedModel
from ..model.perceptron import Perceptron
from ..propagation.smp import Propagation
from ..quant.grids import AffineGrid, as_lists
from ..quant.ranges import Range, hidden_step, message_steps, residual_step

__all__ = ["About", "frozen_model", "step_of_hidden", "steps_of_rounds"]


@dataclass(frozen=True)
class About:
    """What a packed model tells of its training's graph.

    Attributes: scheme: how features are coded. feature_level: see ModelInfo. graph, fingerprint: empty where unknown.
    """

    scheme: FeatureScheme
    feature_level: int
    class_names: list[str] | None
    graph: str
    fingerprint: str


def steps_of_rounds(config: RunConfig, ranges: Mapping[str, Range]) -> list[float]:
    """The step of every round's messages at these ranges; see quant.ranges.message_steps."""
    quant = config.quant
    return message_steps(ranges, Propagation.of(config).num_rounds, int(quant.messages or 32), quant.method,
                         floor=float(quant.step_floor or 0.0), innovation=config.messages.coding == "innovation",
                         stride=config.messages.stride)


def step_of_hidden(config: RunConfig, network: Perceptron, ranges: Mapping[str, Range]) -> float | None:
    """The step of the hidden activations; None where they are float or on an affine grid."""
    quant = config.quant
    if quant.hidden == 32 or network.ranges is not None:
        return None
    if quant.method == "lsq":
        return float(network.hidden_step.detach().abs())
    return hidden_step(ranges["hidden"], int(quant.hidden or 32), quant.method)


def frozen_model(config: RunConfig, network: Perceptron, ranges: Mapping[str, Range], multipliers: Sequence[float],
                 about: About, affine: Mapping[str, AffineGrid] | None = None) -> PackedModel:
    """The network as it is now, frozen at these ranges and multipliers; `level` is left unknown.

    Args: affine: stage → grid, of the methods that have affine grids.
    """
    quant, p, weights = config.quant, config.propagation, network.frozen_weights()
    bits = {stage: width for stage, width in quant.stages().items() if stage != "gradients"}
    residual, hidden, messages = 1.0, step_of_hidden(config, network, ranges) or 1.0, list[float]()
    grids = weights.pop("grids")
    if affine is not None:
        grids.update(affine)
        residual, hidden = (grids[name].step if name in grids else 1.0 for name in ("residual", "hidden"))
        messages = [grid.step for name, grid in grids.items() if name.startswith("news/")]
    else:
        if bits["residual"] < 32:
            residual = residual_step(ranges["residual"], bits["residual"], quant.method)
        messages = steps_of_rounds(config, ranges) if bits["messages"] < 32 else []
    info = ModelInfo(
        num_features=network.weight1.shape[0], hidden=config.model.hidden, num_classes=network.weight2.shape[1],
        bits=bits, method=quant.method, coding=config.messages.coding, feature_norm=about.scheme.norm,
        feature_signed=about.scheme.signed, kind=p.kind, layers=p.layers, mu=p.mu, eta=p.eta, rounds=p.rounds,
        multipliers=list(multipliers) if p.kind == "smp" else [], message_steps=messages,
        weight_steps=weights.pop("weight_steps"), hidden_step=hidden, residual_step=residual, level=-1,
        feature_level=about.feature_level, class_names=about.class_names, graph=about.graph,
        fingerprint=about.fingerprint, grids=as_lists(grids), elastic=Propagation.of(config).elastic)
    return PackedModel(info, **weights)
