# SPDX-License-Identifier: Apache-2.0
"""The perceptron's training kernels: the same bits at every level, and the formulas that they stand for."""
from __future__ import annotations

import numpy as np
import pytest

from qgnn_dist import kernels
from qgnn_dist.quant.packed import row_bytes, unpack_codes
from tests.parity.test_kernels_levels import _everywhere

KEY = (7, 3, 2, 0)
WIDTHS = (1, 3, 7, 8, 16, 33, 63, 64, 65, 130, 256, 300)


def _mask(rows: np.ndarray, columns: int, p: float) -> np.ndarray:
    mask = np.empty((len(rows), columns), np.float32)
    kernels.dropout_dense(*KEY, rows, columns, p, mask)
    return mask > 0


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("p", [0.0, 0.5, 0.3, 1 - 1e-12])
def test_thin_keeps_what_dropout_keeps(columns: int, p: float) -> None:
    rng = np.random.default_rng(columns)
    rows = rng.integers(0, 2**40, 29)
    codes = rng.integers(-128, 256, (29, columns)).astype(np.int16)
    x = rng.normal(size=(29, columns)).astype(np.float32)
    x[0, 0], x[1, 0] = np.nan, np.inf

    def call() -> dict[str, np.ndarray]:
        a, b = np.full(codes.shape, 7, np.float32), x.copy()
        kernels.thin_codes(*KEY, rows, p, codes, a)
        kernels.thin_values(*KEY, rows, p, b, b)
        return {"codes": a, "values": b}

    got = _everywhere(call)
    mask = _mask(rows, columns, p)
    np.testing.assert_array_equal(got["codes"], np.where(mask, codes, 0))
    np.testing.assert_array_equal(got["values"], np.where(mask, x, 0))


@pytest.mark.parametrize("features", WIDTHS)
@pytest.mark.parametrize("columns", [1, 5, 16, 17, 40, 64, 70, 130])
def test_thin_products_in_both_directions(features: int, columns: int) -> None:
    rng = np.random.default_rng(features * 1000 + columns)
    x = rng.normal(size=(31, features)).astype(np.float32)
    x[rng.random(x.shape) < 0.6] = 0.0
    x[4] = 0.0
    weights = rng.normal(size=(features, columns)).astype(np.float32)
    grad = rng.normal(size=(31, columns)).astype(np.float32)
    start = rng.normal(size=weights.shape).astype(np.float32)
    scale = rng.random(31).astype(np.float32)

    def call() -> dict[str, np.ndarray]:
        forward, back = np.full((31, columns), 7, np.float32), start.copy()
        kernels.matmul_thin(x, weights, forward)
        kernels.add_transposed(x, scale, grad, back)
        return {"forward": forward, "back": back}

    got = _everywhere(call)
    dense = np.empty((31, columns), np.float32)
    kernels.matmul_float_dense(x, weights, dense)
    np.testing.assert_array_equal(got["forward"], dense)
    np.testing.assert_allclose(got["back"], start + x.astype(np.float64).T @ (scale[:, None] * grad), rtol=1e-4,
                               atol=1e-5)


@pytest.mark.parametrize("columns", [1, 3, 5, 7, 8, 9, 16, 40, 63, 64, 65, 70, 130])
def test_products_of_sparse_rows_in_both_directions(columns: int) -> None:
    rng = np.random.default_rng(columns)
    x = np.where(rng.random((50, 30)) < 0.2, rng.normal(size=(50, 30)), 0).astype(np.float32)
    indptr = np.concatenate([[0], np.cumsum((x != 0).sum(1))]).astype(np.int64)
    indices, values = np.nonzero(x)[1].astype(np.int32), x[x != 0]
    grad = rng.normal(size=(50, columns)).astype(np.float32)
    start, scale = rng.normal(size=(30, columns)).astype(np.float32), rng.random(50).astype(np.float32)

    def call() -> dict[str, np.ndarray]:
        forward, back = np.full((50, columns), 7, np.float32), start.copy()
        kernels.matmul_float_csr(indptr, indices, values, start, forward)
        kernels.add_transposed_csr(indptr, indices, values, scale, grad, back)
        return {"forward": forward, "back": back}

    got = _everywhere(call)
    dense = np.empty((50, columns), np.float32)
    kernels.matmul_float_dense(x, start, dense)
    np.testing.assert_array_equal(got["forward"], dense)
    np.testing.assert_allclose(got["back"], start + x.astype(np.float64).T @ (scale[:, None] * grad), rtol=1e-4,
                               atol=1e-5)


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("bits", [2, 4, 8, 32])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_hidden_layer_and_its_gradient(columns: int, bits: int, p: float) -> None:
    rng = np.random.default_rng(columns)
    n, step = 23, 0.0 if bits == 32 else 3.0 / 2**bits
    rows = rng.integers(0, 2**40, n)
    sums = rng.integers(-30, 30, (n, columns)).astype(np.float32)
    scale, bias = (rng.random(size).astype(np.float32) + np.float32(0.5) for size in (n, columns))
    grad = rng.normal(size=sums.shape).astype(np.float32)

    def call() -> dict[str, np.ndarray]:
        out = {"out": sums.copy(), "plain": np.empty_like(sums), "grad": grad.copy(), "errors": np.empty(n),
               "moments": np.empty((n, 3))}
        args = (scale, 0.125, bias, np.float32(step), min(bits, 8), *KEY, rows, p)
        kernels.activate(out["out"], *args, out["out"], out["grad"], out["errors"], out["moments"],
                         None)
        kernels.activate(sums, *args, out["plain"], None, None, None, None)
        return out

    got = _everywhere(call)
    np.testing.assert_array_equal(got["plain"], got["out"])
    value = np.maximum(sums * (scale * np.float32(0.125))[:, None] + bias, np.float32(0))
    scaled, top = (value / np.float32(step), 2**bits - 1) if step else (value, np.inf)
    code = np.clip(np.rint(scaled), 0, top) if step else value
    mask = _mask(rows, columns, p) if p else np.ones(sums.shape, bool)
    passes = (value > 0) & (scaled <= top)
    np.testing.assert_array_equal(got["out"], np.where(mask, code, 0))
    np.testing.assert_array_equal(got["grad"], np.where(mask & passes, grad, 0))
    exact = (np.where(mask, grad, 0).astype(np.float64) * (code - np.where(passes, scaled, 0))).sum(1)
    np.testing.assert_allclose(got["errors"], exact, rtol=1e-6, atol=1e-6)
    own = np.empty((n, 3))
    kernels.row_moments(value, own)
    np.testing.assert_array_equal(got["moments"], own)
    np.testing.assert_allclose(own, np.stack([(value.astype(np.float64)**2).sum(1), value.sum(1, dtype=np.float64),
                                              value.max(1)], 1), rtol=1e-12)


def test_errors_without_a_gradient_are_refused() -> None:
    one = np.ones((1, 1), np.float32)
    for level in ("reference", kernels.isa()):
        with kernels.using_isa(level), pytest.raises(ValueError, match="activate: errors need grad"):
            kernels.activate(one, one[0], 1.0, one[0], 1.0, 2, *KEY, np.zeros(1, np.int64), 0.5, one.copy(), None,
                             np.zeros(1), None, None)
        with kernels.using_isa(level), pytest.raises(ValueError, match="activate: kept needs a grid"):
            kernels.activate(one, one[0], 1.0, one[0], 0.0, 2, *KEY, np.zeros(1, np.int64), 0.5, one.copy(), None,
                             None, None, np.zeros((1, 2), np.uint8))


@pytest.mark.parametrize("columns", [*WIDTHS, 511, 513])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_the_hidden_layer_is_recalled_from_what_was_kept(columns: int, bits: int, p: float) -> None:
    rng = np.random.default_rng(columns + bits)
    n, step = 37, np.float32(3.0 / 2**bits)
    rows, sums = rng.integers(0, 2**40, n), rng.integers(-30, 30, (n, columns)).astype(np.float32)
    scale, bias = (rng.random(size).astype(np.float32) + np.float32(0.5) for size in (n, columns))
    grad = rng.normal(size=sums.shape).astype(np.float32)
    args = (scale, 0.125, bias, step, bits, *KEY, rows, p)

    def call() -> dict[str, np.ndarray]:
        kept = np.full((n, row_bytes(columns, bits) + row_bytes(columns, 1)), 0xA5, np.uint8)
        out = {"kept": kept, "hidden": np.empty_like(sums), "recalled": np.empty_like(sums), "grad": grad.copy()}
        kernels.activate(sums, *args, out["hidden"], None, None, None, kept)
        kernels.recall(kept, bits, out["recalled"], out["grad"])
        return out

    got = _everywhere(call)
    again, through = np.empty_like(sums), grad.copy()
    kernels.activate(sums, *args, again, through, None, None, None)
    np.testing.assert_array_equal(got["hidden"], again)
    np.testing.assert_array_equal(got["recalled"], again)
    np.testing.assert_array_equal(got["grad"], through)
    assert (through != 0).any() or columns == 1
    if columns <= 256:
        np.testing.assert_array_equal(unpack_codes(got["kept"][:, :row_bytes(columns, bits)], bits, columns), again)


@pytest.mark.parametrize("features", [1, 2, 3, 7, 31, 32, 33, 64, 100, 130, 257])
@pytest.mark.parametrize("columns", [1, 2, 7, 8, 9, 15, 16, 17, 31, 40, 130])
def test_thinned_codes_times_weights_are_exact(features: int, columns: int) -> None:
    """Two-bit codes by look-up, wider ones and codes that are too far apart without; ragged tiles of rows."""
    rng = np.random.default_rng(features * 1000 + columns)
    n = int(rng.integers(1, 300))
    rows, p = rng.integers(0, 2**40, n), float(rng.choice([0.0, 0.5]))
    for low, high, weight in ((-2, 2, 2), (0, 4, 2), (-2, 2, 127), (0, 16, 8), (-128, 128, 128), (0, 256, 128)):
        codes = rng.integers(low, high, (n, features)).astype(np.int16)
        weights = rng.integers(-weight, weight, (features, columns)).astype(np.int8)
        tables = np.full((columns, (features + 1) // 2, 16), 7, np.uint8)

        def call(codes: np.ndarray = codes, weights: np.ndarray = weights,
                 tables: np.ndarray = tables) -> dict[str, np.ndarray]:
            out = {"tables": tables.copy(), "looked up": np.full((n, columns), 7, np.float32),
                   "added": np.full((n, columns), 7, np.float32)}
            kernels.lookup_tables(weights, out["tables"])
            kernels.matmul_thinned(*KEY, rows, p, codes, weights, out["tables"], out["looked up"])
            kernels.matmul_thinned(*KEY, rows, p, codes, weights, None, out["added"])
            return out

        got = _everywhere(call)
        kept = codes if p == 0 else np.where(_mask(rows, features, p), codes, 0)
        exact = kept.astype(np.int64) @ weights.astype(np.int64)
        np.testing.assert_array_equal(got["looked up"], exact)
        np.testing.assert_array_equal(got["added"], exact)
        thin, floats = np.empty(codes.shape, np.float32), np.empty((n, columns), np.float32)
        kernels.thin_codes(*KEY, rows, p, codes, thin)
        kernels.matmul_thin(thin, weights.astype(np.float32), floats)
        np.testing.assert_array_equal(floats, exact, err_msg="what the product replaces gives the same bits")


def test_tables_of_another_width_are_refused() -> None:
    codes, weights = np.zeros((2, 5), np.int16), np.zeros((5, 3), np.int8)
    for level in ("reference", kernels.isa()):
        with kernels.using_isa(level), pytest.raises(ValueError, match="expected 3 along axis 1"):
            kernels.lookup_tables(weights, np.zeros((3, 2, 16), np.uint8))
        with kernels.using_isa(level), pytest.raises(ValueError, match="expected 3 along axis 1"):
            kernels.matmul_thinned(*KEY, np.zeros(2, np.int64), 0.5, codes, weights, np.zeros((3, 4, 16), np.uint8),
                                   np.zeros((2, 3), np.float32))
