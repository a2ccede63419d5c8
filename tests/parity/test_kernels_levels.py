# SPDX-License-Identifier: Apache-2.0
"""AVX2, the scalar twin and NumPy give the same bits: every kernel, awkward widths and degrees, any thread count."""
from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qgnn_dist import kernels
from qgnn_dist.quant.packed import row_bytes
from tests.helpers import thinned_rows

WIDTHS = (1, 2, 3, 5, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 130)
DEGREES = (0, 1, 17, 84, 85, 86, 255, 256, 300, 1000)
LEVELS = ["scalar", "reference"] + (["avx2"] if kernels.isa() == "avx2" else [])


def _everywhere(call: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Run at every level and thread count; all results must have the same bits."""
    results = {}
    for level in LEVELS:
        for threads in (1, 3) if level != "reference" else (1,):
            kernels.set_threads(threads)
            with kernels.using_isa(level):
                results[level, threads] = call()
    kernels.set_threads(1)
    want = results["scalar", 1]
    for key, got in results.items():
        for name, value in want.items():
            bits = f"u{value.dtype.itemsize}"
            np.testing.assert_array_equal(got[name].view(bits), value.view(bits), err_msg=f"{key} {name}")
    return want


def _graph(rng: np.random.Generator, rows: int = 700) -> tuple[np.ndarray, np.ndarray, int]:
    counts = np.concatenate([rng.integers(0, 9, rows - len(DEGREES)), DEGREES])
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    buffer = rows + 50
    return indptr, rng.integers(0, buffer, indptr[-1]).astype(np.int32), buffer


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("columns", WIDTHS)
def test_pack_unpack_and_aggregate(bits: int, columns: int) -> None:
    rng = np.random.default_rng(columns)
    indptr, indices, buffer = _graph(rng)
    codes = rng.integers(0, 2**bits, (buffer, columns)).astype(np.uint8)
    codes[-1] = 2**bits - 1
    indices[-200:] = buffer - 1  # the last row of the buffer, at the highest code: no carry, no read past the end
    n = len(indptr) - 1

    def call() -> dict[str, np.ndarray]:
        payload = np.full((buffer, row_bytes(columns, bits)), 255, np.uint8)
        kernels.pack(codes, bits, payload)
        back = np.empty_like(codes)
        kernels.unpack(payload, bits, back)
        np.testing.assert_array_equal(back, codes)
        sums = np.full((n, columns), -7, np.int32)
        kernels.aggregate_codes(indptr, indices, payload, bits, 3, n, sums)
        return {"payload": payload, "sums": sums}

    got = _everywhere(call)
    assert (got["sums"][:3] == -7).all()
    for row in [*range(3, 40), *range(n - len(DEGREES), n)]:
        want = codes[indices[indptr[row]:indptr[row + 1]]].sum(0, dtype=np.int64)
        np.testing.assert_array_equal(got["sums"][row], want)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("columns", [1, 7, 16, 33, 40, 130])
@pytest.mark.parametrize("innovation", [True, False])
def test_messages(bits: int, columns: int, innovation: bool) -> None:
    rng = np.random.default_rng(columns)
    n = 300
    h = (3 * rng.normal(size=(n, columns))).astype(np.float32)
    h[5, 0], h[6, 0], h[7, 0], h[8] = np.nan, np.inf, -np.inf, 0.0
    d = (1 / np.sqrt(rng.integers(1, 9, n))).astype(np.float32)
    start = rng.normal(size=(n, columns)).astype(np.float32)
    sums = rng.integers(0, 900, (n, columns)).astype(np.int32)
    degree = rng.integers(0, 300, n).astype(np.int32)

    def call() -> dict[str, np.ndarray]:
        believed = start.copy() if innovation else None
        payload = np.full((n, row_bytes(columns, bits)), 255, np.uint8)
        moments = np.full((n, 3), -1.0)
        kernels.code_news(h, d, believed, 0.3, bits, 2, n - 1, payload, moments)
        r = start.copy()
        kernels.add_news(sums, degree, 0.25, bits, innovation, 1, n, r)
        out = {"payload": payload, "moments": np.nan_to_num(moments), "r": r}
        return out if believed is None else {**out, "believed": np.nan_to_num(believed)}

    got = _everywhere(call)
    # By the formula, in double where float32 cannot blur it.
    news = (d[:, None] * h - (start if innovation else 0)).astype(np.float32)
    level = np.floor(news / np.float32(0.3))
    codes = np.empty((n, columns), np.uint8)
    kernels.unpack(got["payload"], bits, codes)
    finite = np.isfinite(level) & (np.arange(n) >= 2)[:, None] & (np.arange(n) < n - 1)[:, None]
    want = np.clip(level, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 2 ** (bits - 1)
    np.testing.assert_array_equal(codes[finite], want[finite])
    assert codes[5, 0] == 0
    assert (got["payload"][:2] == 255).all()
    whole = sums.astype(np.float64) - 0.5 * (2**bits - 1) * degree[:, None]
    np.testing.assert_allclose(got["r"][1:], (start[1:] if innovation else 0) + 0.25 * whole[1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("columns", [1, 7, 16, 33, 130])
@pytest.mark.parametrize("innovation", [True, False])
def test_affine_grids(bits: int, columns: int, innovation: bool) -> None:
    rng = np.random.default_rng(columns)
    n, (low, step, scale, bias) = 300, (-1.3, 0.7, 1.4, 0.5)
    h = (3 * rng.normal(size=(n, columns))).astype(np.float32)
    h[5, 0], h[6, 0], h[7, 0], h[8] = np.nan, np.inf, -np.inf, 0.0
    d = (1 / np.sqrt(rng.integers(1, 9, n))).astype(np.float32)
    start = rng.normal(size=(n, columns)).astype(np.float32)
    sums = rng.integers(0, 900, (n, columns)).astype(np.int32)
    degree = rng.integers(0, 300, n).astype(np.int32)

    def call() -> dict[str, np.ndarray]:
        believed = start.copy() if innovation else None
        codes, plain = np.full((n, columns), 77, np.uint8), np.full((n, columns), 77, np.uint8)
        kernels.affine_codes(h, d, believed, low, step, scale, bias, bits, 2, n - 1, codes)
        kernels.affine_codes(h, None, None, low, step, scale, bias, bits, 0, n, plain)
        values, r = np.empty((n, columns), np.float32), start.copy()
        kernels.affine_values(plain, low, step, values)
        kernels.add_affine(sums, degree, low, step, innovation, 1, n, r)
        out = {"codes": codes, "plain": plain, "values": values, "r": r}
        return out if believed is None else {**out, "believed": np.nan_to_num(believed)}

    got = _everywhere(call)
    news = d[:, None].astype(np.float64) * h - (start if innovation else 0)
    position = (news - np.float32(low)) * np.float32(scale) + bias
    with np.errstate(invalid="ignore"):
        clear = np.isfinite(position) & (np.abs(position - np.rint(position)) > 1e-4)
    clear[:2] = clear[n - 1:] = False
    want = np.clip(np.floor(np.where(clear, position, 0)), 0, 2**bits - 1)
    np.testing.assert_array_equal(got["codes"][clear], want[clear])
    assert clear.mean() > 0.9
    assert got["plain"][5, 0] == got["plain"][7, 0] == 0
    assert (got["codes"][:2] == 77).all()
    np.testing.assert_allclose(got["values"], low + step * got["plain"], rtol=1e-5, atol=1e-5)
    added = low * degree[:, None].astype(np.float64) + step * sums
    np.testing.assert_allclose(got["r"][1:], (start[1:] if innovation else 0) + added[1:], rtol=1e-5, atol=1e-4)
    assert (got["r"][0] == start[0]).all()


@pytest.mark.parametrize("columns", [1, 7, 40, 65])
def test_elementwise(columns: int) -> None:
    rng = np.random.default_rng(columns)
    n = 333
    h, p, h0, q = (rng.normal(size=(n, columns)).astype(np.float32) for _ in range(4))
    d = rng.random(n).astype(np.float32)
    indptr, indices, buffer = _graph(rng, n)
    x = rng.normal(size=(buffer, columns)).astype(np.float32)

    def call() -> dict[str, np.ndarray]:
        out = {name: np.zeros((n, columns), np.float32) for name in
               ("propagated", "half", "multiplied", "midrise", "float_sums")}
        rows, dots, moments = np.zeros((buffer, columns), np.float32), np.zeros(n), np.zeros((n, 3))
        kernels.scale_rows(h, d, 1, n, rows)
        kernels.propagated(p, h, d, 1, n, out["propagated"])
        kernels.half_step(h, p, h0, 0.1, 0.9, -0.3, out["half"])
        kernels.apply_multiplier(h, h0, p, q, -0.4, out["multiplied"], dots)
        alias = h.copy()
        kernels.apply_multiplier(alias, h0, p, q, -0.4, alias, None)
        np.testing.assert_array_equal(alias, out["multiplied"])
        kernels.midrise(h, 0.03, 8, out["midrise"])
        kernels.row_moments(h, moments)
        kernels.aggregate_float(indptr, indices, x, 0, n, out["float_sums"])
        histogram = np.zeros(4096, np.int64)
        kernels.level_histogram(h, d, histogram)
        return {**out, "rows": rows, "dots": dots, "moments": moments, "histogram": histogram}

    got = _everywhere(call)
    delta = (h0 - h).astype(np.float64)
    np.testing.assert_allclose(got["dots"], (delta * (delta - (q - p))).sum(1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got["moments"][:, 0], (h.astype(np.float64) ** 2).sum(1), rtol=1e-12)
    np.testing.assert_allclose(got["midrise"], np.clip(h, -3.84, 3.84), atol=0.0151)
    assert got["histogram"].sum() == h.size


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("norm", [0, 1, 2])
def test_perceptron(bits: int, signed: bool, norm: int) -> None:
    rng = np.random.default_rng(bits)
    n, features, hidden = 77, 45, 37
    x = rng.normal(size=(n, features)).astype(np.float32)
    x = x if signed else np.maximum(x, 0)
    x[3] = 0
    mask = rng.random((n, features)) < 0.3
    indptr = np.concatenate([[0], np.cumsum(mask.sum(1))]).astype(np.int64)
    indices, values = np.nonzero(mask)[1].astype(np.int32), x[mask]
    weights = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (features, hidden)).astype(np.int8)
    bias = rng.normal(size=hidden).astype(np.float32)

    def call() -> dict[str, np.ndarray]:
        codes, scale = np.empty((n, features), np.int16), np.empty(n, np.float32)
        kernels.feature_codes_dense(x, norm, bits, signed, codes, scale)
        stored, stored_scale = np.empty(len(values), np.int16), np.empty(n, np.float32)
        kernels.feature_codes_csr(indptr, values, features, norm, bits, signed, stored, stored_scale)
        acc, acc_csr = np.empty((n, hidden), np.int32), np.empty((n, hidden), np.int32)
        kernels.matmul_codes_dense(codes, weights, acc)
        kernels.matmul_codes_csr(indptr, indices, stored, weights, acc_csr)
        np.testing.assert_array_equal(acc, codes.astype(np.int64) @ weights.astype(np.int64))
        dense = np.zeros((n, features), np.int64)
        dense[mask] = stored
        np.testing.assert_array_equal(acc_csr, dense @ weights.astype(np.int64))
        hidden_codes, scores = np.empty((n, hidden), np.int16), np.empty((n, hidden), np.float32)
        moments, plain = np.empty((n, 3)), np.empty_like(hidden_codes)
        kernels.hidden_codes(acc, scale, 0.1, bias, 0.3, bits, hidden_codes, moments)
        kernels.hidden_codes(acc, scale, 0.1, bias, 0.3, bits, plain, None)
        np.testing.assert_array_equal(plain, hidden_codes)
        kernels.scores_from_codes(acc, 0.01, bias, scores)
        plain, plain_csr = np.empty_like(x), np.empty_like(values)
        kernels.normalise_dense(x, norm, plain)
        kernels.normalise_csr(indptr, values, norm, plain_csr)
        product, product_csr = np.empty((n, hidden), np.float32), np.empty((n, hidden), np.float32)
        kernels.matmul_float_dense(plain, weights.astype(np.float32), product)
        kernels.matmul_float_csr(indptr, indices, plain_csr, weights.astype(np.float32), product_csr)
        return {"codes": codes, "scale": scale, "stored": stored, "stored_scale": stored_scale, "hidden": hidden_codes,
                "moments": moments, "scores": scores, "plain": plain, "product": product, "product_csr": product_csr,
                "acc": acc}

    got = _everywhere(call)
    np.testing.assert_allclose(got["product"], got["plain"].astype(np.float64) @ weights, rtol=1e-4, atol=1e-4)
    top = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    low = -(2 ** (bits - 1)) if signed else 0
    inside = (got["codes"] > low) & (got["codes"] < top)
    error = np.abs(got["codes"] * got["scale"][:, None] - got["plain"])
    assert (error <= 0.5001 * got["scale"][:, None])[inside].all()
    assert (got["scale"] > 0).all()
    value = got["acc"] * (got["scale"].astype(np.float64) * 0.1)[:, None] + bias
    assert (np.abs(np.clip(np.rint(value / 0.3), 0, 2**bits - 1) - got["hidden"]) > 0).mean() < 0.01


def test_zero_one_features_are_exact_when_normalised() -> None:
    x = (np.random.default_rng(0).random((50, 30)) < 0.3).astype(np.float32)
    for bits in (2, 4, 8):
        codes, scale, plain = np.empty(x.shape, np.int16), np.empty(50, np.float32), np.empty_like(x)
        kernels.feature_codes_dense(x, 1, bits, False, codes, scale)
        kernels.normalise_dense(x, 1, plain)
        np.testing.assert_allclose(codes * scale[:, None], plain, rtol=3e-7)


@pytest.mark.parametrize("columns", [1, 2, 7, 40])
def test_softmax(columns: int) -> None:
    rng = np.random.default_rng(columns)
    scores = (20 * rng.normal(size=(200, columns))).astype(np.float32)
    scores[0], scores[1], scores[2, 0], scores[3] = 0.0, -1e30, np.nan, 800.0 * np.arange(columns)

    def call() -> dict[str, np.ndarray]:
        classes, confidence = np.empty(200, np.int32), np.empty(200, np.float32)
        probabilities = np.empty_like(scores)
        kernels.softmax(scores, classes, confidence, probabilities)
        return {"classes": classes, "confidence": np.nan_to_num(confidence, nan=-1),
                "probabilities": np.nan_to_num(probabilities, nan=-1)}

    got = _everywhere(call)
    good = np.arange(200) != 2
    wide = scores[good].astype(np.float64)
    want = np.exp(wide - wide.max(1, keepdims=True))
    want /= want.sum(1, keepdims=True)
    np.testing.assert_array_equal(got["classes"][good], wide.argmax(1))
    # A difference of scores is rounded to 24 bits before it is an exponent: the smaller the result, the more it shows.
    np.testing.assert_allclose(got["probabilities"][good], want, rtol=6e-6, atol=1e-37)
    large = want > 1e-3
    np.testing.assert_allclose(got["probabilities"][good][large], want[large], rtol=1e-6)
    np.testing.assert_allclose(got["confidence"][good], want.max(1), rtol=1e-6)
    assert got["classes"][0] == 0
    assert got["classes"][2] == 0
    assert got["confidence"][2] == -1


def test_philox_is_the_published_generator() -> None:
    """Known answers of Random123: zero counter and key, reached by an all-zero place."""
    def call() -> dict[str, np.ndarray]:
        out = np.empty((1, 4), np.uint32)
        kernels.keyed_bits(0, 0, 0, 0, 0, np.zeros(1, np.int64), 4, out)
        return {"out": out}

    assert [hex(v) for v in _everywhere(call)["out"][0]] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]


@pytest.mark.parametrize("lengths", [[], [0] * 20, [0, 1, *[0] * 9, 40, 0, 3, 70, 7, 8, 9, *[0] * 5]], ids=str)
def test_dropout_of_stored_entries_in_any_order(lengths: list[int]) -> None:
    """Empty rows, parts without an entry, rows that come back to columns whose numbers were drawn together, and one
    that names a column seventy times."""
    rng = np.random.default_rng(1)
    rows = rng.permutation(1000)[:len(lengths)].astype(np.int64)
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    columns_of = [rng.permutation(50)[:n] if n < 50 else np.full(n, 3) for n in lengths]
    indices = np.concatenate([np.empty(0), *columns_of]).astype(np.int32)
    owner = np.repeat(np.arange(len(rows)), lengths)
    values = np.where(rng.random(len(indices)) < 0.2, 0, rng.normal(size=len(indices))).astype(np.float32)
    values[:2] = [np.nan, np.inf][:len(values)]

    def call() -> dict[str, np.ndarray]:
        dense = np.empty((len(rows), 50), np.float32)
        kernels.dropout_dense(7, 3, 1, 0, rows, 50, 0.5, dense)
        at, columns, kept = thinned_rows((7, 3, 1, 0), rows, 0.5, indptr, indices, values)
        mask = (dense[owner, indices] != 0) & (values != 0)
        np.testing.assert_array_equal(kept, values[mask])
        np.testing.assert_array_equal(columns, indices[mask])
        np.testing.assert_array_equal(np.diff(at), np.bincount(owner[mask], minlength=len(rows)))
        return {"indptr": at, "indices": columns, "values": kept}

    _everywhere(call)


def test_dropout_depends_on_the_place_alone() -> None:
    rng = np.random.default_rng(0)
    rows = rng.permutation(10**6)[:300].astype(np.int64)
    mask = rng.random((300, 50)) < 0.4
    indptr = np.concatenate([[0], np.cumsum(mask.sum(1))]).astype(np.int64)
    indices = np.nonzero(mask)[1].astype(np.int32)
    values = np.arange(1, len(indices) + 1, dtype=np.float32)

    def call() -> dict[str, np.ndarray]:
        dense = np.empty((300, 50), np.float32)
        kernels.dropout_dense(7, 3, 1, 0, rows, 50, 0.5, dense)
        at, columns, kept = thinned_rows((7, 3, 1, 0), rows, 0.5, indptr, indices, values)
        np.testing.assert_array_equal(kept, values[dense[mask] != 0])
        return {"dense": dense, "indptr": at, "indices": columns, "values": kept}

    dense = _everywhere(call)["dense"]
    some, out = rows[100:200].copy(), np.empty((100, 50), np.float32)
    kernels.dropout_dense(7, 3, 1, 0, some, 50, 0.5, out)
    np.testing.assert_array_equal(out, dense[100:200])
    assert set(np.unique(dense)) == {0.0, 2.0}
    assert abs(dense.mean() - 1) < 0.03
    for key in ((8, 3, 1, 0), (7, 4, 1, 0), (7, 3, 2, 0), (7, 3, 1, 1)):
        other = np.empty_like(dense)
        kernels.dropout_dense(*key, rows, 50, 0.5, other)
        assert 0.4 < (other == dense).mean() < 0.6


def test_wrong_arguments_are_named() -> None:
    f, u = np.zeros((4, 3), np.float32), np.zeros((4, 3), np.uint8)
    cases: list[tuple[Any, type, str]] = [
        (lambda: kernels.pack(u.astype(np.int32), 2, u[:, :1].copy()), TypeError, "pack: codes is int32 (4, 3)"),
        (lambda: kernels.pack(u, 2, u), ValueError, "pack: out has shape (4, 3), expected 1 along axis 1"),
        (lambda: kernels.pack(u, 3, u), ValueError, "bits is 3"),
        (lambda: kernels.unpack(u[:, ::2], 2, u), ValueError, "unpack: payload is not C-contiguous"),
        (lambda: kernels.half_step(f, f, f[:3], 1, 1, 1, f), ValueError, "half_step: h0 has shape (3, 3), expected 4"),
        (lambda: kernels.scale_rows(f, f[:, 0].copy(), 0, 5, f), ValueError, "rows 0…5 are not inside 0…4"),
        (lambda: kernels.softmax(f.tolist(), u, f, None), TypeError, "softmax: scores is list"),
        (lambda: kernels.check_csr(np.array([0, 2, 1, 3]), np.zeros(3, np.int32), 1), ValueError, "falls at row 1"),
        (lambda: kernels.check_csr(np.array([0, 1, 2]), np.array([0, 9], np.int32), 9), ValueError,
         "row 1 has index 9, expected 0 to 8"),
        (lambda: kernels.set_threads(0), ValueError, "expected at least 1"),
    ]
    for call, kind, text in cases:
        with pytest.raises(kind) as caught:
            call()
        assert text in str(caught.value)
    frozen = f.copy()
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        kernels.half_step(f, f, f, 1, 1, 1, frozen)


@pytest.mark.parametrize(("value", "want"), [("scalar", "scalar"), ("", LEVELS[-1] if len(LEVELS) > 2 else "scalar"),
                                             ("avx512", "QGNN_SIMD=avx512: expected scalar or avx2")])
def test_environment_chooses_the_level(value: str, want: str) -> None:
    out = subprocess.run([sys.executable, "-c", "import qgnn_dist.kernels as k; print(k.isa())"], text=True,
                         capture_output=True, env={**os.environ, "QGNN_SIMD": value}, check=False)
    assert want in (out.stdout if out.returncode == 0 else out.stderr)


def test_another_build_has_to_be_there(tmp_path) -> None:
    text = tmp_path / "text.so"
    text.write_text("no library")
    for path in (tmp_path / "none.so", text):
        out = subprocess.run([sys.executable, "-c", "import qgnn_dist.kernels as k; k.isa()"], text=True, check=False,
                             capture_output=True, env={**os.environ, "QGNN_KERNELS": str(path)})
        assert out.returncode == 1
        assert f"InputError: QGNN_KERNELS={path}: expected a built _kernels extension" in out.stderr


def test_numpy_serves_without_a_compiler(tmp_path) -> None:
    """With the extension hidden, the reference runs and one warning says how to get the fast path."""
    code = ("import sys, warnings; sys.modules['qgnn_dist.kernels._kernels'] = None\n"
            "with warnings.catch_warnings(record=True) as seen:\n"
            "    warnings.simplefilter('always'); import qgnn_dist.kernels as k\n"
            "    print(k.isa(), k.threads(), len(seen))\n"
            "print(seen[0].message)")
    hidden = {name: value for name, value in os.environ.items() if name != "QGNN_KERNELS"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path,
                         env=hidden)
    assert out.stdout.splitlines()[0] == "reference 1 1"
    assert "C++20 compiler" in out.stdout
