# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest

from qgnn_dist.quant.ranges import (
    EVALUATION,
    LEAST_SHARE,
    MIDRISE_STEP,
    Range,
    combine_moments,
    evaluation_ranges,
    follow,
    hidden_step,
    message_steps,
    moments_of,
    power_of_two,
    residual_step,
)


def _ranges(rms: list[float]) -> dict[str, Range]:
    return {f"news/{k}": Range(r, 0.8 * r, 4 * r) for k, r in enumerate(rms)}


def test_running_figures_follow_with_momentum_and_ignore_bad_epochs() -> None:
    first = follow(None, [8.0, 4.0, 3.0, 2])
    assert first == Range(2.0, 2.0, 3.0)
    second = follow(first, [32.0, 8.0, 5.0, 2])
    assert second.rms == pytest.approx(0.9 * 2 + 0.1 * 4)
    assert second.largest == pytest.approx(0.9 * 3 + 0.1 * 5)
    assert follow(second, [float("nan"), 1, 1, 1]) is second
    assert follow(second, [0.0, 0.0, 0.0, 0]) is second
    assert follow(None, [0.0, 0.0, 0.0, 0]) is None


def test_moments_add_up_over_workers() -> None:
    assert combine_moments([[1, 2, 3, 4], [10, 20, 1, 40]]) == [11, 22, 3, 44]
    assert moments_of(np.zeros((0, 3))) == [0.0, 0.0, 0.0]
    assert moments_of(np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 0.5]])) == [5.0, 7.0, 3.0]


def test_steps_are_powers_of_two_and_the_floor_comes_first() -> None:
    rms = [1.0, 0.2, 0.2, 0.2]
    steps = message_steps(_ranges(rms), 4, 2, "recipe", floor=0.75, innovation=True)
    unrounded = [0.996, 0.747, 0.56025, 0.4201875]
    assert steps == [power_of_two(s) for s in unrounded]
    assert all(math.log2(s).is_integer() for s in steps)
    # Rounded before the floor, the step would stay at 1.0 for ever.
    assert steps[-1] < steps[0]


def test_floor_ends_at_a_share_of_the_first_step() -> None:
    steps = message_steps(_ranges([1.0] + [1e-9] * 40), 41, 2, "recipe", floor=0.5, innovation=True)
    assert steps[-1] == power_of_two(0.996 * LEAST_SHARE[2])


def test_direct_messages_have_no_floor() -> None:
    steps = message_steps(_ranges([1.0, 0.01]), 2, 2, "recipe", floor=0.75, innovation=False)
    assert steps[1] == power_of_two(MIDRISE_STEP[2] * 0.01)


def test_other_methods() -> None:
    assert message_steps(_ranges([1.0]), 1, 2, "minmax", floor=0.75, innovation=True) == [2.0]
    assert message_steps(_ranges([1.0]), 1, 2, "lsq", floor=0.75, innovation=True) == [np.float32(1.6)]
    assert residual_step(Range(1.0, 0.8, 4.0), 8, "recipe") == 2.0**-5
    assert hidden_step(Range(1.0, 0.8, 4.0), 2, "recipe") == pytest.approx(0.8)
    assert hidden_step(Range(1.0, 0.8, 4.0), 4, "recipe") == pytest.approx(3.6 / 15)
    assert hidden_step(Range(1.0, 0.8, 4.0), 2, "minmax") == pytest.approx(4 / 3)
    assert hidden_step(Range(0.0, 0.0, 0.0), 2, "recipe") > 0


def test_packed_grids_follow_evaluations_and_training_where_there_are_none() -> None:
    training, evaluation = Range(2.0, 1.0, 3.0), Range(1.0, 0.5, 1.5)
    ranges = {"hidden": training, "news/0": training, EVALUATION + "hidden": evaluation}
    assert evaluation_ranges(ranges) == {"hidden": evaluation, "news/0": training}
    assert follow(training, [4.0, 2.0, 1.0, 4], 0.5) == Range(1.5, 0.75, 2.0)


def test_rounds_that_are_not_sent_have_no_step_and_let_the_next_one_fall_further() -> None:
    rms = [1.0] * 4 + [1e-3] * 9
    steps = message_steps(_ranges(rms), 13, 2, "recipe", floor=0.5, innovation=True, stride=3)
    assert [k for k, s in enumerate(steps) if s > 0] == [0, 1, 2, 3, 6, 9, 12]
    assert steps[6] == steps[3] / 8
    assert steps[9] == steps[6] / 8
    assert message_steps(_ranges(rms), 13, 2, "recipe", floor=0.5, innovation=True).count(0.0) == 0
