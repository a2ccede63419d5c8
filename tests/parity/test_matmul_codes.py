# SPDX-License-Identifier: Apache-2.0
"""Products of codes, exact at their extremes: the bytes' way ends where pairs of products leave 16 bits."""
from __future__ import annotations

import numpy as np
import pytest

from qgnn_dist import kernels
from tests.parity.test_kernels_levels import _everywhere


@pytest.mark.parametrize("features", [1, 2, 3, 4, 5, 31, 545, 2049, 8193])
@pytest.mark.parametrize(("low", "high", "weight"), [
    (-2, 1, 2), (0, 3, 2), (-8, 7, 8), (0, 15, 8), (0, 255, 2), (0, 255, 64), (0, 255, 128), (-128, 127, 128),
    (0, 0, 0), (-32768, 32767, 1)])
def test_exact_at_the_extremes(features: int, low: int, high: int, weight: int) -> None:
    rng = np.random.default_rng(features)
    n, hidden = 21, 35
    codes = rng.choice([low, high], (n, features)).astype(np.int16)
    codes[:6], codes[6:12] = high, low  # a tile of the largest sums, and one of no range at all
    weights = rng.choice([-weight, max(weight - 1, 0)], (features, hidden)).astype(np.int8)
    weights[:, 0], weights[:, 1] = -weight, max(weight - 1, 0)

    def call() -> dict[str, np.ndarray]:
        out = np.empty((n, hidden), np.int32)
        kernels.matmul_codes_dense(codes, weights, out)
        return {"out": out}

    exact = codes.astype(np.int64) @ weights.astype(np.int64)
    np.testing.assert_array_equal(_everywhere(call)["out"], exact)
    assert features == 1 or weight == 0 or np.abs(exact).max() > 0
