# SPDX-License-Identifier: Apache-2.0
"""Figures over seeds, and how tables write them."""
from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["deviation", "error", "mean", "paired", "points", "quantile"]


def mean(values: Sequence[float]) -> float | None:
    """None of no values."""
    return math.fsum(values) / len(values) if values else None


def deviation(values: Sequence[float]) -> float | None:
    """The sample's standard deviation; None of fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def error(values: Sequence[float]) -> float | None:
    """Standard error of the mean."""
    spread = deviation(values)
    return None if spread is None else spread / math.sqrt(len(values))


def paired(own: Mapping[int, float], other: Mapping[int, float]) -> dict[str, Any]:
    """Mean of own − other over the seeds that both have, its standard error, and their number; seed → figure."""
    pairs = [own[seed] - other[seed] for seed in own if seed in other]
    return {"mean": mean(pairs), "se": error(pairs), "pairs": len(pairs)}


def quantile(values: Sequence[float], share: float) -> float | None:
    """Linear between order statistics, as numpy's."""
    if not values:
        return None
    ordered, place = sorted(values), share * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def points(middle: float | None, spread: float | None = None, sign: str = "") -> str:
    """A share as points of 100, with its spread; a dash where there is none."""
    if middle is None:
        return "–"
    text = f"{100 * middle:{sign}.2f}".replace("-", "−")
    return text if spread is None else f"{text} ± {100 * spread:.2f}"
