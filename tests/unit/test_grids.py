# SPDX-License-Identifier: Apache-2.0
"""Affine grids: the definitions they stand for, the ranges under them, and the searched start."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from qgnn_dist import kernels
from qgnn_dist.config import load_config
from qgnn_dist.quant.grids import AFFINE_METHODS, affine_grid, stage_names
from qgnn_dist.quant.learned import SHRINK, AffineWeightQuantizer, StageRanges, affine_codes, gradient_share
from qgnn_dist.quant.ranges import Range, combine_moments, follow, wide_moments
from qgnn_dist.training.affine import protection


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("skewness", [0.0, 0.4, 1.7, -2.6, 40.0])
def test_bit_truncation_is_the_top_bits_of_the_eight_bit_code(bits: int, skewness: float) -> None:
    """Against the literal definition in float64; float32 may differ next to a cell's edge only."""
    x = np.random.default_rng(bits).normal(size=(500, 40)).astype(np.float32)
    low, high = -1.75, 2.5
    eight = np.clip(np.rint((x.astype(np.float64) - low) * 255 / (high - low)), 0, 255)
    near_edge = np.abs((x.astype(np.float64) - low) * 255 / (high - low) % 1 - 0.5) < 1e-3
    for method, shift in (("bt", 0), ("bt_star", round(skewness))):
        grid = affine_grid(low, high, bits, method, skewness)
        want = np.clip(np.floor((eight + shift) / 2 ** (8 - bits)), 0, 2**bits - 1)
        clear = ~near_edge
        if shift:  # the definition clips q8 first, the grid the code alone: they differ outside the range only
            clear &= (x >= low) & (x <= high)
        codes = grid.codes(x, bits)
        np.testing.assert_array_equal(codes[clear], want[clear])
        assert clear.mean() > 0.9
        assert len(np.unique(codes)) > 1
        np.testing.assert_allclose(grid.values(codes), low + codes * (high - low) / (2**bits - 1), atol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_other_methods_round_to_the_nearest_value(bits: int) -> None:
    x = np.random.default_rng(bits).normal(size=(300, 30)).astype(np.float32)
    grid = affine_grid(-1.75, 2.5, bits, "qlr")
    values = -1.75 + np.arange(2**bits) * 4.25 / (2**bits - 1)
    error = np.abs(grid.values(grid.codes(x, bits)) - x)
    np.testing.assert_allclose(error, np.abs(x[..., None] - values).min(-1), atol=1e-5)
    sides = grid.sides(x, bits)
    np.testing.assert_array_equal(sides, np.where(x < -1.75, -1, np.where(x > 2.5, 1, 0)))
    shifted = grid.shifted(5)
    np.testing.assert_array_equal(shifted.codes(x * 32, bits), grid.codes(x, bits))
    np.testing.assert_array_equal(shifted.values(grid.codes(x, bits)), 32 * grid.values(grid.codes(x, bits)))
    for low, high in ((0.0, 0.0), (3.0, 3.0), (2.0, -2.0)):
        empty = affine_grid(low, high, bits, "qlr")
        assert empty.step > 0
        assert np.isfinite(empty.values(empty.codes(x, bits))).all()


def test_moments_of_workers_together_are_those_of_all_values() -> None:
    rng = np.random.default_rng(0)
    x = (rng.exponential(size=(900, 7)) - 0.3).astype(np.float32)
    pieces = [x[:100], x[100:600], x[600:600], x[600:]]
    together = follow(None, combine_moments([wide_moments(p, percentiles=True) for p in pieces]))
    alone = follow(None, wide_moments(x, percentiles=True))
    exact = x.astype(np.float64)
    assert alone.skewness == pytest.approx((((exact - exact.mean()) / exact.std()) ** 3).mean(), rel=1e-9)
    assert (alone.low, alone.high) == (x.min(), x.max())
    assert alone.percentile_high == pytest.approx(np.quantile(exact, 0.999))
    for name in ("rms", "mean", "largest", "low", "high", "skewness"):
        assert getattr(together, name) == pytest.approx(getattr(alone, name), rel=1e-9), name
    weighted = sum(np.quantile(p.astype(np.float64), 0.999) * len(p) for p in pieces if len(p)) / len(x)
    assert together.percentile_high == pytest.approx(weighted, rel=1e-12)
    later = follow(alone, wide_moments(2 * x, percentiles=True))
    assert later.high == pytest.approx(0.9 * alone.high + 0.1 * 2 * alone.high)
    assert follow(alone, wide_moments(np.full((2, 2), np.nan, np.float32), percentiles=False)) == alone


@pytest.mark.parametrize("method", ["qlr", "bt", "bt_star"])
def test_weights_start_at_the_least_error(method: str) -> None:
    weight = torch.from_numpy(np.random.default_rng(1).standard_t(3, size=(60, 20)).astype(np.float32))
    quantizer = AffineWeightQuantizer(2, method, weight)
    w = weight.numpy()
    skewness = follow(None, wide_moments(w, percentiles=False)).skewness
    errors = []
    for factor in SHRINK:
        grid = affine_grid(float(factor * w.min()), float(factor * w.max()), 2, method, skewness)
        errors.append(float(np.abs(grid.values(grid.codes(w, 2)) - w).sum()))
    best = float(SHRINK[int(np.argmin(errors))])
    assert 0 < best < 1
    assert float(quantizer.low.detach()) == float(quantizer.high.detach()) == pytest.approx(best)
    codes, grid = quantizer.freeze(weight)
    values, step, offset = quantizer(weight)
    np.testing.assert_array_equal(values.detach().numpy(), codes)
    np.testing.assert_allclose(offset + codes * np.float32(step), grid.values((codes + 2).astype(np.uint8)), atol=1e-6)


@pytest.mark.parametrize("method", AFFINE_METHODS)
def test_gradients_follow_the_straight_through_rule(method: str) -> None:
    """Against autograd in float64, where rounding is a constant added to x and clipped elements are the bounds."""
    rng = np.random.default_rng(2)
    x = torch.from_numpy(rng.normal(size=(80, 6)).astype(np.float32)).requires_grad_()
    up = torch.from_numpy(rng.normal(size=(80, 6)).astype(np.float32))
    ends, bits, learned = (-2.1, 2.6), 2, method not in ("percentile", "degree_quant")
    low, high = (torch.tensor(v, requires_grad=learned) for v in (0.55, 0.4))
    grid = affine_grid(0.55 * ends[0], 0.4 * ends[1], bits, method, 1.2)
    codes = affine_codes(x, (low, high), grid, bits, ends, gradient_share(x.numel(), bits))
    ((codes * grid.step + grid.low) * up).sum().backward()
    x64, low64, high64 = (t.detach().double().requires_grad_() for t in (x, low, high))
    lower, upper = low64 * ends[0], high64 * ends[1]
    position = (x64 - lower) / (upper - lower) * 3
    rounding = (codes.detach() - position).detach()
    inside = lower + (position + rounding) * (upper - lower) / 3
    value = torch.where(x64 < lower, lower, torch.where(x64 > upper, upper, inside))
    (value * up).sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), x64.grad.numpy(), atol=1e-6)
    assert (x.grad == 0).any()
    if not learned:
        assert low.grad is None
        return
    share = 1 / np.sqrt(x.numel() * 3)
    for got, want in ((low, low64), (high, high64)):
        assert float(got.grad) == pytest.approx(float(want.grad) * share, rel=1e-4)


def test_stage_ranges_start_and_serve_grids() -> None:
    ranges = StageRanges(["hidden", "news/0"], {"hidden": 2, "news/0": 1}, "qlr")
    errors = np.ones(len(SHRINK))
    errors[9] = 0.5
    ranges.start("news/0", errors)
    figures = Range(1.0, 0.8, 4.0, -2.0, 4.0, 0.3, -1.0, 3.0)
    assert ranges.grid("news/0", figures) == affine_grid(-0.5, 1.0, 1, "qlr")
    assert ranges.grid("hidden", figures) == affine_grid(0.0, 4.0, 2, "qlr")
    fixed = StageRanges(["residual"], {"residual": 8}, "percentile")
    assert fixed.grid("residual", figures) == affine_grid(-1.0, 3.0, 8, "percentile")
    assert not fixed.low.requires_grad
    bits = {"weights": 2, "hidden": 32, "messages": 2, "residual": 8}
    assert stage_names(bits, 2) == ["weights1", "weights2", "residual", "news/0", "news/1"]


def test_protection_follows_the_rank_of_the_degree() -> None:
    degree = np.array([5, 0, 2, 2, 9], np.int32)
    np.testing.assert_allclose(protection(degree), 0.1 * np.array([3, 0, 1.5, 1.5, 4]) / 4)
    assert protection(np.array([3], np.int32)).tolist() == [0.0]


@pytest.mark.parametrize("method", AFFINE_METHODS)
def test_methods_are_chosen_by_one_word(method: str) -> None:
    assert load_config(overrides=[f"quant.method={method}"]).quant.method == method


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_kernel_codes_as_the_grid_does(bits: int) -> None:
    x = (3 * np.random.default_rng(bits).normal(size=(200, 33))).astype(np.float32)
    x[0, 0], x[1, 1], x[2, 2] = np.nan, np.inf, -np.inf
    grid = affine_grid(-1.3, 2.9, bits, "bt_star", 0.7)
    codes, values = np.empty(x.shape, np.uint8), np.empty(x.shape, np.float32)
    kernels.affine_codes(x, None, None, grid.low, grid.step, grid.scale, grid.bias, bits, 0, len(x), codes)
    kernels.affine_values(codes, grid.low, grid.step, values)
    np.testing.assert_array_equal(codes, grid.codes(x, bits))
    np.testing.assert_array_equal(values, grid.values(codes))
    assert (codes[0, 0], codes[1, 1], codes[2, 2]) == (0, 2**bits - 1, 0)
