# SPDX-License-Identifier: Apache-2.0
"""The whole perceptron a few rows at a time gives the bits of its kernels in turn, by products and by look-up."""
from __future__ import annotations

import numpy as np
import pytest

from qgnn_dist import kernels
from tests.parity.test_kernels_levels import _everywhere


def _in_turn(sums: np.ndarray, scale: np.ndarray, bias1: np.ndarray, bits: int, weight2: np.ndarray,
             bias2: np.ndarray) -> dict[str, np.ndarray]:
    hidden, moments = np.empty(sums.shape, np.int16), np.empty((len(sums), 3))
    kernels.hidden_codes(sums, scale, 0.07, bias1, 0.3, bits, hidden, moments)
    second, out = (np.empty((len(sums), len(bias2)), t) for t in (np.int32, np.float32))
    kernels.matmul_codes_dense(hidden, weight2, second)
    kernels.scores_from_codes(second, np.float32(0.3) * np.float32(0.11), bias2, out)
    assert {0, 1, 2**bits - 1} <= set(hidden.ravel().tolist())  # both ends of the grid, and between
    return {"out": out, "moments": moments}


@pytest.mark.parametrize("shape", [
    (1, 1, 1, 1), (300, 33, 17, 5), (257, 128, 256, 40), (129, 7, 2, 3), (128, 2, 16, 2)], ids=str)
@pytest.mark.parametrize(("low", "high", "weights", "bits"), [
    (-2, 1, 2, 2), (0, 3, 2, 2), (0, 1, 2, 2), (-2, 1, 4, 2), (-2, 1, 2, 4), (-8, 7, 4, 4), (-128, 127, 8, 8),
    (-2, 1, 8, 2)])
@pytest.mark.parametrize("record", [False, True])
def test_dense_rows(shape: tuple[int, int, int, int], low: int, high: int, weights: int, bits: int,
                    record: bool) -> None:
    rows, features, hidden, classes = shape
    rng = np.random.default_rng(features)
    codes = rng.integers(low, high + 1, (rows, features)).astype(np.int16)
    top = 2 ** (weights - 1)
    weight1, weight2 = (rng.integers(-top, top, s).astype(np.int8) for s in ((features, hidden), (hidden, classes)))
    scale = (rng.random(rows) * 2.0**bits / (0.1 * top * max(-low, high) * np.sqrt(features))).astype(np.float32)
    bias1, bias2 = rng.normal(size=hidden).astype(np.float32), rng.normal(size=classes).astype(np.float32)

    def whole() -> dict[str, np.ndarray]:
        out, moments = np.full((rows, classes), 7, np.float32), np.zeros((rows, 3))
        kernels.perceptron_dense(codes, scale, weight1, 0.07, bias1, 0.3, bits, weight2, 0.11, bias2,
                                 moments if record else None, out)
        return {"out": out, "moments": moments}

    got = _everywhere(whole)
    sums = codes.astype(np.int32) @ weight1.astype(np.int32)
    if rows * hidden > 300:
        want = _in_turn(sums, scale, bias1, bits, weight2, bias2)
        np.testing.assert_array_equal(got["out"], want["out"])
        if record:
            np.testing.assert_array_equal(got["moments"], want["moments"])


def test_rows_of_wide_codes_stand_among_narrow_ones() -> None:
    """Look-up holds four neighbouring codes; a tile with others goes by products, and only that one."""
    rng = np.random.default_rng(3)
    codes = rng.integers(-2, 2, (700, 20)).astype(np.int16)
    codes[200, 3], codes[500, 0] = 117, -30000
    weight1, weight2 = rng.integers(-2, 2, (20, 30)).astype(np.int8), rng.integers(-2, 2, (30, 4)).astype(np.int8)
    scale, bias1, bias2 = (rng.random(n).astype(np.float32) for n in (700, 30, 4))

    def whole() -> dict[str, np.ndarray]:
        out = np.zeros((700, 4), np.float32)
        kernels.perceptron_dense(codes, scale, weight1, 0.07, bias1, 0.3, 2, weight2, 0.11, bias2, None, out)
        return {"out": out}

    got = _everywhere(whole)
    want = _in_turn(codes.astype(np.int32) @ weight1.astype(np.int32), scale, bias1, 2, weight2, bias2)
    np.testing.assert_array_equal(got["out"], want["out"])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_sparse_rows(bits: int) -> None:
    rng = np.random.default_rng(bits)
    counts = rng.integers(0, 30, 200)
    counts[[0, 199]] = 0
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    indices = rng.integers(0, 50, indptr[-1]).astype(np.int32)
    codes = rng.integers(0, 2**bits, indptr[-1]).astype(np.int16)
    top = 2 ** (bits - 1)
    weight1, weight2 = (rng.integers(-top, top, s).astype(np.int8) for s in ((50, 24), (24, 6)))
    scale = (rng.random(200) / (0.1 * top)).astype(np.float32)
    bias1, bias2 = rng.normal(size=24).astype(np.float32), rng.normal(size=6).astype(np.float32)

    def whole() -> dict[str, np.ndarray]:
        out, moments = np.zeros((200, 6), np.float32), np.zeros((200, 3))
        kernels.perceptron_csr(indptr, indices, codes, scale, weight1, 0.07, bias1, 0.3, bits, weight2, 0.11, bias2,
                               moments, out)
        return {"out": out, "moments": moments}

    got = _everywhere(whole)
    sums = np.empty((200, 24), np.int32)
    kernels.matmul_codes_csr(indptr, indices, codes, weight1, sums)
    want = _in_turn(sums, scale, bias1, bits, weight2, bias2)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])
