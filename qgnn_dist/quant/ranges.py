# SPDX-License-Identifier: Apache-2.0
"""Ranges that follow the statistics: from running moments to the steps of the grids.

Moments of a stage are four numbers, [sum of squares, sum of magnitudes, largest magnitude, count]; they add up over
rows and workers (the third by maximum), so that one running figure serves all workers. The paper's methods post six
more (`wide_moments`): [least, greatest, Σx, Σx³, count·0.1st percentile, count·99.9th percentile].
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass

import numpy as np

__all__ = [
    "EVALUATION",
    "EVALUATION_MOMENTUM",
    "HIDDEN_SHARE",
    "MIDRISE_STEP",
    "MOMENTUM",
    "Range",
    "combine_moments",
    "evaluation_ranges",
    "follow",
    "hidden_step",
    "is_sent",
    "message_steps",
    "midrise_step",
    "moments_of",
    "power_of_two",
    "wide_moments",
]

MOMENTUM = 0.1
"""Weight of the newest epoch in a running figure."""
EVALUATION = "evaluation/"
"""Prefix of the figures of evaluation forwards: without dropout values are smaller, and the packed model sees those."""
EVALUATION_MOMENTUM = 0.5
"""Evaluations have no dropout noise to average over, and lag behind the weights otherwise."""
MIDRISE_STEP = {1: 1.596, 2: 0.996, 4: 0.335, 8: 0.0308}
"""Best mid-rise step for a Gaussian, in units of its rms."""
HIDDEN_SHARE = {2: 0.8, 4: 1.2, 8: 2.0}
"""Top of the hidden grid in units of three times the rms: the more levels, the less has to be clipped."""
LEAST_STEP = 2.0**-100
"""A stage that has been all zero still has a step."""
PERCENTILES = (0.001, 0.999)
"""Ends of the range of `percentile` and `degree_quant`."""
DENSE_ROUNDS = 4
"""Rounds that are always sent: most of the change comes with them."""
LEAST_SHARE = {1: 2.0**-8, 2: 2.0**-8, 4: 2.0**-8, 8: 2.0**-14}
"""No round's step falls below this share of the first round's: believed states then fit fixed point of 16 bits, and
whole numbers in float32 where messages have 8."""


@dataclass(frozen=True)
class Range:
    """Running figures of one stage: root mean square, mean magnitude, largest magnitude.

    The others follow wide moments only: least and greatest value, third standardised moment, two percentiles.
    """

    rms: float
    mean: float
    largest: float
    low: float = 0.0
    high: float = 0.0
    skewness: float = 0.0
    percentile_low: float = 0.0
    percentile_high: float = 0.0


def moments_of(rows: np.ndarray) -> list[float]:
    """Add up per-row moments.

    Args:
        rows: float64 (N, 3), [Σe², Σ|e|, max|e|] of each row, without the count.
    Returns:
        [Σe², Σ|e|, max|e|]; zeros for no rows.
    """
    if len(rows) == 0:
        return [0.0, 0.0, 0.0]
    return [float(rows[:, 0].sum()), float(rows[:, 1].sum()), float(rows[:, 2].max())]


def wide_moments(x: np.ndarray, *, percentiles: bool) -> list[float]:
    """The ten moments of a worker's own values, in float64.

    Args:
        percentiles: take the 0.1st and 99.9th percentile, exactly (np.quantile); zeros otherwise.
    """
    exact = np.asarray(x, np.float64)
    if exact.size == 0:
        return [0.0] * 4 + [math.inf, -math.inf] + [0.0] * 4
    squares, size = exact * exact, float(exact.size)
    ends = np.quantile(exact, PERCENTILES) * size if percentiles else np.zeros(2)
    magnitudes = np.abs(exact)
    return [float(v) for v in (squares.sum(), magnitudes.sum(), magnitudes.max(), size, exact.min(), exact.max(),
                               exact.sum(), (squares * exact).sum(), *ends)]


def combine_moments(parts: Iterable[Sequence[float]]) -> list[float]:
    """Moments of several workers together, added in the order given; percentiles become their count-weighted mean."""
    posts = list(parts)
    total = [0.0, 0.0, 0.0, 0.0]
    for part in posts:
        total = [total[0] + part[0], total[1] + part[1], max(total[2], part[2]), total[3] + part[3]]
    if posts and all(len(part) > 4 for part in posts):
        total += [min(p[4] for p in posts), max(p[5] for p in posts)]
        total += [sum(p[i] for p in posts) for i in range(6, 10)]
    return total


def follow(running: Range | None, moments: Sequence[float], momentum: float = MOMENTUM) -> Range | None:
    """The running figures after one more epoch, whose weight is `momentum`; the first sets them. No values, no change.

    Figures that are not finite leave the range as it was: one bad epoch must not poison the later ones.
    """
    squares, magnitudes, largest, count = moments[:4]
    if count == 0 or not all(math.isfinite(m) for m in moments):
        return running
    new = Range(math.sqrt(squares / count), magnitudes / count, largest, *_wide_figures(moments))
    if running is None:
        return new
    return Range(*((1.0 - momentum) * before + momentum * now for before, now in zip(astuple(running), astuple(new))))


def evaluation_ranges(ranges: Mapping[str, Range]) -> dict[str, Range]:
    """Stage → the figures that a packed model's grids follow: of evaluations, and of training where there are none."""
    return {name: ranges.get(EVALUATION + name, figures) for name, figures in ranges.items()
            if not name.startswith(EVALUATION)}


def _wide_figures(moments: Sequence[float]) -> list[float]:
    """Least, greatest, skewness and percentiles of wide moments; nothing of others."""
    if len(moments) == 4:
        return []
    count, low, high, plain, cubes, *ends = moments[3:]
    mean, second = plain / count, moments[0] / count
    variance = max(second - mean * mean, 0.0)
    third = cubes / count - 3 * mean * second + 2 * mean**3
    skewness = third / variance**1.5 if variance > 1e-12 * second else 0.0
    return [low, high, skewness, *(end / count for end in ends)]


def power_of_two(step: float) -> float:
    """The nearest power of two on the logarithmic scale.

    >>> power_of_two(0.7), power_of_two(3.0)
    (0.5, 4.0)
    """
    return float(2.0 ** round(math.log2(step)))


def midrise_step(figures: Range, bits: int, method: str) -> float:
    """Step of a mid-rise grid of 2^bits levels, not yet rounded to a power of two.

    `recipe` follows the rms, `minmax` reaches the largest magnitude, `lsq` starts where LSQ starts a learned step
    (Esser et al., ICLR 2020: 2·mean/√Q); messages pass every gradient, so there it stays at that start.
    """
    if method == "minmax":
        return max(figures.largest / float(2 ** (bits - 1)), LEAST_STEP)
    if method == "lsq":
        return max(2.0 * figures.mean / math.sqrt(max(2 ** (bits - 1) - 1, 1)), LEAST_STEP)
    return max(MIDRISE_STEP[bits] * figures.rms, LEAST_STEP)


def message_steps(ranges: Mapping[str, Range], rounds: int, bits: int, method: str, *, floor: float,
                  innovation: bool, stride: int = 1) -> list[float]:
    """The step of every round's messages, exact in float32; 0 for a round that is not sent.

    The recipe floors a round's step at `floor` times the one before (clipped elements must be able to climb back),
    and only then rounds to a power of two: the other way round the step would never fall.

    Args:
        ranges: running figures by stage name; `news/k` is round k.
        floor: a layer; a round after others that were not sent may fall by as many.
        stride: rounds from DENSE_ROUNDS on are sent where it divides their number, and the last one is.

    >>> same = {f"news/{k}": Range(1.0, 0.8, 4.0) for k in range(9)}
    >>> message_steps(same, 9, 2, "recipe", floor=0.75, innovation=True, stride=3)
    [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0]
    """
    steps: list[float] = []
    before = first = 0.0
    fallen = 1.0
    for k in range(rounds):
        fallen *= floor
        if not is_sent(k, rounds, stride):
            steps.append(0.0)
            continue
        step = midrise_step(ranges[f"news/{k}"], bits, method)
        if method == "recipe":
            if innovation:
                step = max(step, fallen * before, LEAST_SHARE[bits] * first)
                before, fallen = step, 1.0
                first = first or step
            step = power_of_two(step)
        steps.append(float(np.float32(step)))
    return steps


def is_sent(number: int, rounds: int, stride: int) -> bool:
    """Whether a round of messages is sent: the first DENSE_ROUNDS, each stride-th after them, and the last."""
    return number < DENSE_ROUNDS or number % stride == 0 or number == rounds - 1


def residual_step(figures: Range, bits: int, method: str) -> float:
    """Step of the local H⁰ term's mid-rise grid, exact in float32."""
    step = midrise_step(figures, bits, method)
    return float(np.float32(power_of_two(step) if method == "recipe" else step))


def hidden_step(figures: Range, bits: int, method: str) -> float:
    """Step of the unsigned grid of hidden activations: 3c·rms/(2^bits − 1), or the largest value over the levels."""
    levels = 2**bits - 1
    top = figures.largest if method == "minmax" else 3.0 * HIDDEN_SHARE[bits] * figures.rms
    return float(np.float32(max(top / levels, LEAST_STEP)))
