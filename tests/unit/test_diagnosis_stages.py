# SPDX-License-Identifier: Apache-2.0
"""Statistics of a grid, against arrays worked out by hand."""
from __future__ import annotations

import json
import math

import numpy as np
import pytest

from qgnn_dist import kernels
from qgnn_dist.diagnosis.stages import Tally, check_grids, finite
from qgnn_dist.errors import ModelError
from qgnn_dist.quant.clipped import Grid
from qgnn_dist.quant.grids import affine_grid
from tests.helpers import make_store, small_graph, untrained_model


def test_clipped_shares_are_those_outside_the_end_cells() -> None:
    # mid-rise, 2 bits, S = 1: cells [-2,-1) [-1,0) [0,1) [1,2)
    x = np.array([-2.0, -2.0000001, -0.5, 1.9999999, 2.0, 3.0, np.nan])
    assert Grid.midrise(2, 1.0).outside(x).tolist() == [False, True, False, False, True, True, True]
    # mid-tread, 2 bits, S = 2: levels -4 -2 0 2, cells end at -5 and 3
    assert Grid.midtread(2, 2.0).outside(np.array([-5.1, -5.0, 3.0, 3.1])).tolist() == [True, False, False, True]
    # unsigned, 2 bits, S = 1: levels 0 1 2 3, top cell ends at 3.5
    assert Grid.unsigned(2, 1.0).outside(np.array([0.0, 3.5, 3.6])).tolist() == [False, False, True]
    # 1 bit: cells [-S, 0) [0, S)
    assert Grid.midrise(1, 0.5).outside(np.array([-0.5, 0.49, 0.5])).tolist() == [False, False, True]


def test_affine_cells_are_the_coders_own() -> None:
    # Range [-1, 2], step 1. To nearest: end cells reach half a step past the range.
    x = np.array([-1.51, -1.5, 2.49, 2.5], np.float32)
    assert Grid.affine(2, affine_grid(-1.0, 2.0, 2, "qlr")).outside(x).tolist() == [True, False, False, True]
    # bt keeps two bits of q8 = round(x) here: 0…63 mean 0, 192…255 mean 255; the cells begin half a step of q8 lower.
    grid = Grid.affine(2, affine_grid(0.0, 255.0, 2, "bt"))
    assert grid.outside(np.array([-0.51, -0.5, 255.4, 255.6])).tolist() == [True, False, False, True]
    assert grid.values(np.arange(4)).tolist() == [0.0, 85.0, 170.0, 255.0]
    assert grid.outside(np.array([np.nan])).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grid_values_are_the_coders(bits: int) -> None:
    x = np.random.default_rng(bits).normal(size=(50, 7)).astype(np.float32)
    step, out, payload = 0.25, np.empty_like(x), np.empty((50, (7 * bits + 7) // 8), np.uint8)
    kernels.midrise(x, step, bits, out)
    kernels.code_news(x, np.ones(50, np.float32), None, step, bits, 0, 50, payload, None)
    codes = np.empty(x.shape, np.uint8)
    kernels.unpack(payload, bits, codes)
    grid = Grid.midrise(bits, step)
    np.testing.assert_array_equal(grid.values(codes), out)
    # A value inside lies at most half a step from what it is coded as, one outside farther.
    far = np.abs(x.astype(np.float64) - out) > step / 2
    np.testing.assert_array_equal(far, grid.outside(x))
    assert far.any() == (bits < 8)


def test_tally_counts_clips_codes_and_noise() -> None:
    x = np.array([[0.4, 1.6], [2.9, -1.0]])
    codes = np.array([[2, 3], [3, 1]])
    tally = Tally(2)
    tally.add(x, codes, Grid.midrise(2, 1.0))
    report = tally.report("mid-rise", 1.0)
    # Decoded 0.5 1.5 1.5 -0.5: errors -0.1 0.1 1.4 -0.5; only 2.9 lies outside.
    assert report["histogram"] == [0, 1, 1, 2]
    assert report["clipped"] == 0.25
    squares, errors = 0.16 + 2.56 + 8.41 + 1.0, 0.01 + 0.01 + 1.96 + 0.25
    assert report["snr_db"] == pytest.approx(10 * math.log10(squares / errors), rel=1e-12)
    assert report["rms"] == pytest.approx(math.sqrt(squares / 4), rel=1e-12)
    assert report["error_rms"] == pytest.approx(math.sqrt(errors / 4), rel=1e-12)


def test_tallies_of_blocks_with_scaled_rows_add_up() -> None:
    rng = np.random.default_rng(1)
    x, scale = rng.normal(size=(30, 5)), rng.uniform(0.5, 2, (30, 1))
    grid = Grid.midtread(4, 1.0)
    codes = np.clip(np.rint(x / scale), -8, 7).astype(np.int64) + 8
    whole, merged = Tally(4), Tally(4)
    whole.add(x, codes, grid, scale)
    whole.add_steps(scale[:, 0])
    for begin, end in ((0, 11), (11, 11), (11, 30)):
        part = Tally(4)
        part.add(x[begin:end], codes[begin:end], grid, scale[begin:end])
        part.add_steps(scale[begin:end, 0])
        merged.merge(part)
    a, b = whole.report("mid-tread", None), merged.report("mid-tread", None)
    assert a["histogram"] == b["histogram"] == np.bincount(codes.ravel(), minlength=16).tolist()
    assert a["step_range"] == b["step_range"] == [scale.min(), scale.max()]
    for key in ("rms", "snr_db", "step"):  # float64 sums in another order
        assert a[key] == pytest.approx(b[key], rel=1e-12)
    assert a["step"] == pytest.approx(scale.mean(), rel=1e-12)


def test_what_cannot_be_told_is_null_in_json() -> None:
    exact = Tally(2)
    exact.add(np.array([0.5, -0.5]), np.array([2, 1]), Grid.midrise(2, 1.0))
    report = exact.report("mid-rise", 1.0)
    assert (report["snr_db"], report["error_rms"], report["clipped"]) == (None, 0.0, 0.0)
    assert Tally(8).report("mid-rise", 1.0)["rms"] is None
    assert len(Tally(8).report("mid-rise", 1.0)["histogram"]) == 256
    odd = Tally(32)
    odd.add(np.array([np.inf, np.nan]))
    json.dumps(odd.report(None, None), allow_nan=False)
    assert [finite(v) for v in (math.inf, math.nan, 2.0)] == [None, None, 2.0]


def test_a_method_with_other_grids_is_refused(tmp_path) -> None:
    store = make_store(small_graph(), tmp_path / "s", 1)
    with pytest.raises(ModelError, match=r"m\.st: quant\.method=unheard: .* recipe, lsq, minmax, .* only"):
        check_grids(untrained_model(store, method="unheard").info, "m.st")
    check_grids(untrained_model(store, method="unheard", bits=32).info, "m.st")
