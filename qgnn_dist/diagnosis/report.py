# SPDX-License-Identifier: Apache-2.0
"""The controller of a diagnosis: all parts' sums together, as figures ready for JSON (no NaN, no infinity)."""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..comm.pool import LocalPool
from ..inference.examine import together
from ..model.packed import ModelInfo, PackedModel
from ..quant.clipped import Grid
from ..quant.straight_through import weight_levels
from ..store.reader import Store
from .stages import Tally, check_grids, finite
from .watch import LayerSums, RoundSums
from .worker import DiagnosisWorker, PartFigures

__all__ = ["combine", "diagnose"]

DIAGNOSIS_TIMEOUT_S = 24 * 3600.0
"""The diagnosis as a whole; the waits inside it have their own, shorter deadlines."""


def diagnose(store: Store, model: PackedModel, model_file: str, *, exchange_s: float) -> dict[str, Any]:
    """Measure a packed model on all nodes of a store, in this process: a thread a part, gloo between them.

    Args:
        store: with features that fit the model (the caller has checked). exchange_s: deadline of a round.
    Returns: see `combine`, with the graph's name and fingerprint.
    Raises: ModelError for a quantiser whose grids are unknown here, or features that don't fit the grid.
    """
    check_grids(model.info, model_file)
    kwargs = {"store": store.place, "exchange_s": exchange_s}
    pool = LocalPool(DiagnosisWorker, kwargs, store.num_parts, timeout_s=exchange_s)
    try:
        parts = pool.call("diagnose", model.to_bytes(), timeout_s=DIAGNOSIS_TIMEOUT_S)
    finally:
        pool.close()
    return {"graph": store.name, "fingerprint": store.fingerprint, "parts": store.num_parts,
            "same_graph": store.fingerprint == model.info.fingerprint, **combine(model, parts)}


def combine(model: PackedModel, parts: Sequence[PartFigures]) -> dict[str, Any]:
    """All parts' sums, added in rank order, as figures.

    Returns:
        `stages`: features, weights1, weights2, hidden, residual, each as Tally.report has it. Of weights the packed
        model keeps codes alone, so `clipped` and `snr_db` are None, and `at_ends` is the share of end codes.
        `messages`: one entry a round, likewise, of the news e (of y where `coding` is direct), with `round`, `layer`,
        and `believed_error` = ‖y − Ŷ‖/‖y‖ after it; empty for float messages.
        `layers`: entries k = 0 … K about H^k: `dirichlet` = tr(HᵀL̃H)/‖H‖², `mad`, `error` = ‖H^k − H^k_float‖ /
        ‖H^k_float‖, and, up to K − 1, `multiplier` λ_k, `constraint` = ⟨Δ,G⟩/‖H⁰‖², `change` = ‖Δ‖/‖H⁰‖. α is not
        part of a model, so the constraint's residual is not told here; a run's metrics.jsonl has it.
        `overall`: `agreement`, the share of nodes whose class is the float twin's; `worst_difference` of a score.
        `examined`: see inference.examine.together.
    """
    info = model.info
    nodes = sum(p.nodes for p in parts)
    return {
        "coding": info.coding,
        "range_gain": parts[0].gain,
        "stages": _stages(model, parts),
        "messages": [_message(info, [p.rounds[at] for p in parts]) for at in range(len(parts[0].rounds))],
        "layers": _layers(info, parts),
        "overall": {"nodes": nodes, "agreement": sum(p.agreeing for p in parts) / max(nodes, 1),
                    "worst_difference": finite(max(p.worst for p in parts))},
        "examined": together([p.examined for p in parts]),
    }


def _stages(model: PackedModel, parts: Sequence[PartFigures]) -> dict[str, dict[str, Any]]:
    info = model.info
    features = _together([p.features for p in parts])
    hidden = _together([p.hidden for p in parts])
    residual = _together([p.residual for p in parts])

    def kind(stage: str, name: str) -> str | None:
        name = "affine" if info.grid(stage) is not None else name
        return name if info.bits[stage] < 32 else None

    def step(stage: str, value: float) -> float | None:
        return value if info.bits[stage] < 32 else None

    return {
        "features": features.report(kind("features", "mid-tread" if info.feature_signed else "unsigned"), None),
        "weights1": _weights(info, "weights1", model.weight1, info.weight_steps[0]),
        "weights2": _weights(info, "weights2", model.weight2, info.weight_steps[1]),
        "hidden": hidden.report(kind("hidden", "unsigned"), step("hidden", info.hidden_step)),
        "residual": residual.report(kind("residual", "mid-rise"), step("residual", parts[0].residual_step)),
    }


def _weights(info: ModelInfo, stage: str, weight: np.ndarray, step: float) -> dict[str, Any]:
    """Only the codes are left of the weights: what was clipped or rounded away is not known any more."""
    bits = info.bits["weights"]
    tally = Tally(bits)
    if bits == 32:
        tally.add(weight)
        return tally.report(None, None)
    low, high = weight_levels(bits)
    affine = info.grid(stage)
    grid = Grid.affine(bits, affine) if affine is not None else Grid.midtread(bits, step)
    codes = weight.astype(np.int64) - low
    tally.add(grid.values(codes))
    tally.codes += np.bincount(codes.ravel(), minlength=2**bits)
    ends = int((weight == low).sum() + (weight == high).sum())
    return tally.report(grid.kind, step) | {"clipped": None, "error_rms": None, "at_ends": ends / weight.size}


def _message(info: ModelInfo, rounds: Sequence[RoundSums]) -> dict[str, Any]:
    report = _together([r.news for r in rounds]).report(
        "affine" if info.grids else "mid-rise", rounds[0].step)
    misbelieved, states = [r.misbelieved for r in rounds if r.misbelieved is not None], sum(r.states for r in rounds)
    believed = _root_ratio(sum(misbelieved), states) if misbelieved else None
    return {"round": rounds[0].number, "layer": rounds[0].layer, **report, "believed_error": believed}


def _layers(info: ModelInfo, parts: Sequence[PartFigures]) -> list[dict[str, Any]]:
    start = sum(p.layers[0].squares for p in parts)
    result = []
    for k in range(len(parts[0].layers)):
        sums = [p.layers[k] for p in parts]

        def total(name: str, sums: list[LayerSums] = sums) -> float:
            return math.fsum(getattr(s, name) for s in sums)

        entry: dict[str, Any] = {
            "layer": k, "dirichlet": _ratio(total("dirichlet"), total("squares")),
            "mad": _ratio(total("distances"), total("neighboured")),
            "error": _root_ratio(total("errors"), total("twin_squares")),
            "multiplier": None, "constraint": None, "change": None}
        if k < len(parts[0].layers) - 1:
            entry |= {"multiplier": info.multipliers[k] if k < len(info.multipliers) else 0.0,
                      "constraint": _ratio(total("constraint"), start), "change": _root_ratio(total("change"), start)}
        result.append(entry)
    return result


def _together(tallies: Sequence[Tally]) -> Tally:
    total = Tally(tallies[0].bits)
    for tally in tallies:
        total.merge(tally)
    return total


def _ratio(part: float, whole: float) -> float | None:
    return finite(part / whole) if whole > 0 else None


def _root_ratio(part: float, whole: float) -> float | None:
    return finite(math.sqrt(part / whole)) if whole > 0 and part >= 0 else None
