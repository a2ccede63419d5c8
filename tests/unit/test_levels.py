# SPDX-License-Identifier: Apache-2.0
"""Levels: how large values are, whatever their order."""
from __future__ import annotations

import numpy as np
import pytest

from qgnn_dist import kernels
from qgnn_dist.quant.levels import NUM_LEVELS, level_of, octaves


def level(x: np.ndarray) -> int:
    histogram = np.zeros(NUM_LEVELS, np.int64)
    kernels.level_histogram(x.astype(np.float32).reshape(-1, 1), np.ones(x.size, np.float32), histogram)
    assert histogram.sum() == x.size
    return level_of(histogram)


def test_level_is_the_ninetieth_percentile_in_sixteenths_of_an_octave() -> None:
    x = np.random.default_rng(0).normal(size=4001)
    where = np.quantile(np.abs(x), 0.9)
    fraction, exponent = np.frexp(where)
    assert level(x) == int(16 * (exponent - 1 + 127) + 16 * (2 * fraction - 1))
    assert level(np.concatenate([x, np.zeros(9000), [np.inf, np.nan]])) == level(x)
    assert level(np.zeros(5)) == -1


@pytest.mark.parametrize("power", [-3, -1, 1, 2])
def test_a_power_of_two_is_found_wherever_the_level_falls(power: int) -> None:
    for shift in np.linspace(0, 1, 23):
        x = np.random.default_rng(1).normal(size=999) * 2.0**shift
        assert octaves(level(x * 2.0**power), level(x)) == power
        assert octaves(level(x * 1.3), level(x)) == 0, "a small change moves nothing"


def test_unknown_levels_move_nothing() -> None:
    assert octaves(-1, 2000) == octaves(2000, -1) == octaves(-1, -1) == 0
