# SPDX-License-Identifier: Apache-2.0
"""Coded gradient rows: the same bits at every level, the two levels around each value, and right on average."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qgnn_dist import kernels
from qgnn_dist.kernels.dispatch import native
from qgnn_dist.quant.packed import row_bytes, unpack_codes
from tests.parity.test_kernels_levels import _everywhere, _graph

BITS = (2, 4, 8)
KEY = (2**63 + 5, 17, 4, 9, 1)  # seed, epoch, stage, layer, round


def coded(h: np.ndarray, bits: int, places: np.ndarray, d: np.ndarray | None = None,
          key: tuple[int, int, int, int, int] = KEY) -> np.ndarray:
    """Payload of all rows."""
    ones = np.ones(len(h), np.float32) if d is None else d
    payload = np.full((len(h), row_bytes(h.shape[1], bits) + 1), 77, np.uint8)
    kernels.code_gradients(h, ones, bits, *key, places, 0, len(h), payload)
    return payload


def decoded(payload: np.ndarray, bits: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Values, and the distance of two levels, in double: the format written down a second time."""
    scale = np.array([0.0 if byte % 128 == 0 else np.nan if byte % 128 == 127 else
                      (-1.0 if byte >= 128 else 1.0) * 2.0 ** (byte % 128 - 90) for byte in payload[:, -1].tolist()])
    codes = unpack_codes(np.ascontiguousarray(payload[:, :-1]), bits, columns).astype(np.float64)
    return scale[:, None] * (codes - (2 ** (bits - 1) - 1)), np.abs(scale)


def rows_of_all_kinds(columns: int, rows: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Rows of many sizes and shapes, with zeros, odd numbers, and values on levels; and their D̃^-½."""
    rng = np.random.default_rng(columns)
    h = (rng.normal(size=(rows, columns)) * 2.0 ** rng.integers(-60, 30, (rows, 1))).astype(np.float32)
    h[::4] *= rng.random((len(h[::4]), columns)) < 0.2
    h[1] = 0.0
    h[2, 0], h[3, -1], h[5, 0] = np.nan, np.inf, -np.inf
    h[6], h[7], h[8] = 1e-40, 3e38, -2.0**20
    h[9] = np.float32(2.0**-10) * rng.integers(-1, 3, columns).astype(np.float32)
    h[10, 0], h[11, 0] = -np.nan, -0.0
    return h, (1 / np.sqrt(rng.integers(1, 9, rows))).astype(np.float32)


@pytest.mark.parametrize("columns", range(1, 131))
def test_every_width_has_the_same_bits_and_the_levels_around_each_value(columns: int) -> None:
    h, d = rows_of_all_kinds(columns)
    n = len(h)
    places = np.random.default_rng(columns).integers(0, 2**40, n)
    for bits in BITS:
        def call(bits: int = bits) -> dict[str, np.ndarray]:
            payload = np.full((n + 3, row_bytes(columns, bits) + 1), 77, np.uint8)
            kernels.code_gradients(h, d, bits, *KEY, places, 1, n - 1, payload)
            return {"payload": payload}

        payload = _everywhere(call)["payload"]
        assert (payload[[0, n - 1, n, n + 2]] == 77).all()
        inside = slice(1, n - 1)
        value, step = decoded(payload[inside], bits, columns)
        with np.errstate(invalid="ignore", over="ignore"):
            y = (d[:, None] * h)[inside].astype(np.float64)
        odd = ~np.isfinite(y).all(1) | (np.abs(y).max(1) > 2.0 ** (36 + bits - 1))
        assert np.isnan(value[odd]).all()
        assert odd.sum() >= 5
        size, step = np.abs(y[~odd]).max(1), step[~odd]
        np.testing.assert_array_equal(step == 0, size == 0)
        assert (np.abs(value[~odd] - y[~odd]) < np.where(step > 0, step, 1.0)[:, None]).all(), "the levels around it"
        top, bottom = np.maximum(y[~odd].max(1), 0), np.maximum((-y[~odd]).max(1), 0)
        most, least = np.maximum(top, bottom), np.minimum(top, bottom)
        half = 2 ** (bits - 1)
        assert ((most <= half * step) & (least <= (half - 1) * step)).all(), "nothing is clipped"
        less = step[step > 2.0**-89] / 2
        clipped = (most[step > 2.0**-89] > half * less) | (least[step > 2.0**-89] > (half - 1) * less)
        assert clipped.all(), "the least scale"


@pytest.mark.parametrize("bits", BITS)
def test_values_on_a_level_are_exact(bits: int) -> None:
    half = 2 ** (bits - 1)
    levels = np.arange(1 - half, half + 1).astype(np.float32)
    h = np.stack([levels * np.float32(2.0**e) * sign for e in (-89, -60, 0, 36) for sign in (1, -1)])
    payload = coded(h, bits, np.arange(len(h)))
    np.testing.assert_array_equal(decoded(payload, bits, h.shape[1])[0], h)
    np.testing.assert_array_equal(payload[:, -1] >= 128, np.arange(len(h)) % 2 == 1)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("over", ["places", "epochs"])
def test_rounding_is_right_on_average(bits: int, over: str) -> None:
    """20,000 draws of one row: every mean within six of its standard deviations, and the draws of a row independent."""
    rng, draws, columns = np.random.default_rng(bits), 20_000, 37
    row = (rng.normal(size=columns) * rng.choice([1.0, 0.1, 0.001], columns)).astype(np.float32)
    if over == "places":
        payload = coded(np.repeat(row[None], draws, 0), bits, np.arange(draws) * 7)
    else:
        payload = np.concatenate([coded(row[None], bits, np.array([3]), key=(1, epoch, 4, 2, 0))
                                  for epoch in range(draws)])
    value, step = decoded(payload, bits, columns)
    assert len(np.unique(step)) == 1
    rest = np.abs(row.astype(np.float64)) / step[0] % 1.0
    deviation = step[0] * np.sqrt(rest * (1 - rest))
    error = value.mean(0) - row
    assert (np.abs(error) <= 6 * deviation / np.sqrt(draws) + 1e-12).all(), (error, deviation)
    np.testing.assert_allclose(value.std(0), deviation, rtol=0.1, atol=0.1 * step[0])
    # Four columns share a number: were their draws alike, the sum of a row would vary far more.
    spread = ((value - row).sum(1) ** 2).mean() / (deviation**2).sum()
    assert abs(spread - 1) <= 6 * np.sqrt(2 / draws), spread
    assert len(np.unique(value, axis=0)) > 100


@pytest.mark.parametrize("bits", BITS)
def test_a_draw_depends_on_key_and_place_alone(bits: int) -> None:
    h, _ = rows_of_all_kinds(50)
    places = np.random.default_rng(0).permutation(1000)[:len(h)].astype(np.int64)
    whole = coded(h, bits, places)
    other = np.random.default_rng(1).permutation(len(h))
    np.testing.assert_array_equal(coded(h[other], bits, places[other]), whole[other])
    for at in range(5):
        key = list(KEY)
        key[at] += 1
        assert (coded(h, bits, places, key=tuple(key)) != whole).any(), at  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [1, 2, 4, 7, 8, 15, 16, 17, 29, 33, 40, 64, 65, 130])
def test_sums_are_whole_numbers(bits: int, columns: int) -> None:
    rng = np.random.default_rng(columns)
    indptr, indices, buffer = _graph(rng, 90)
    n = len(indptr) - 1
    payload = rng.integers(0, 256, (buffer, row_bytes(columns, bits) + 1)).astype(np.uint8)
    payload[:, -1] = 90 + rng.integers(-12, -4, buffer) + 128 * rng.integers(0, 2, buffer)
    payload[::5, -1], payload[1::5, -1] = 0, 128
    indices[-200:] = buffer - 1  # the buffer's last row: nothing is read past its end
    value, _ = decoded(payload, bits, columns)

    def call() -> dict[str, np.ndarray]:
        out = np.full((n, columns), 7, np.float32)
        kernels.aggregate_scaled(indptr, indices, payload, bits, 2, n - 1, out)
        return {"out": out}

    got = _everywhere(call)["out"]
    for row in range(2, n - 1):  # whole numbers of 2^-12: no sum is rounded
        np.testing.assert_array_equal(got[row], value[indices[indptr[row]:indptr[row + 1]]].sum(0))
    assert (got[[0, 1, n - 1]] == 7).all()
    payload[indices[indptr[5]], -1] = 127 if indptr[6] > indptr[5] else 0
    np.testing.assert_array_equal(np.isnan(_everywhere(call)["out"][2:n - 1]).all(1), [
        (payload[indices[indptr[row]:indptr[row + 1]], -1] == 127).any() for row in range(2, n - 1)])


@pytest.mark.parametrize("bits", BITS)
def test_every_byte_means_something(bits: int) -> None:
    """A row that came with any bytes at all is read as the format says."""
    rng = np.random.default_rng(bits)
    payload = rng.integers(0, 256, (256, row_bytes(9, bits) + 1)).astype(np.uint8)
    payload[:, -1] = np.arange(256)
    indptr, indices = np.arange(257), np.arange(256, dtype=np.int32)

    def call() -> dict[str, np.ndarray]:
        out = np.empty((256, 9), np.float32)
        kernels.aggregate_scaled(indptr, indices, payload, bits, 0, 256, out)
        return {"out": np.nan_to_num(out, nan=-7)}

    want = decoded(payload, bits, 9)[0]
    np.testing.assert_array_equal(_everywhere(call)["out"], np.nan_to_num(want, nan=-7))


@pytest.mark.parametrize("bits", BITS)
def test_rows_of_very_many_neighbours(bits: int) -> None:
    rng, columns, count = np.random.default_rng(0), 40, 2**17 + 4321
    h = rng.normal(size=(500, columns)).astype(np.float32)
    payload = coded(h, bits, np.arange(500))
    indptr = np.array([0, 3, count, count + 2])
    indices = rng.integers(0, 500, count + 2).astype(np.int32)
    d, state = np.full(3, 0.25, np.float32), rng.normal(size=(3, columns)).astype(np.float32)

    def call() -> dict[str, np.ndarray]:
        sums, out, following = np.empty((3, columns), np.float32), np.empty_like(state), np.zeros_like(payload[:3])
        kernels.aggregate_scaled(indptr, indices, payload, bits, 0, 3, sums)
        kernels.layer_scaled(indptr, indices, payload, bits, d, state, state, None, out, None, False, False, 0.0, 0.0,
                             0.9, 0.1, following, *KEY, np.arange(3), 0, 3)
        return {"sums": sums, "out": out, "following": following}

    got = _everywhere(call)
    value, _ = decoded(payload, bits, columns)
    want = np.bincount(indices[3:count], minlength=500) @ value
    np.testing.assert_allclose(got["sums"][1], want, rtol=1e-3, atol=0.5)  # 135,389 additions in float32


@pytest.mark.parametrize("columns", [1, 4, 7, 16, 31, 40, 64, 65, 130])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("case", ["plain", "constrained", "first", "second", "last"])
def test_one_pass_is_the_kernels_in_turn(columns: int, bits: int, case: str) -> None:
    rng = np.random.default_rng(columns)
    indptr, indices, buffer = _graph(rng, 60)
    n = len(indptr) - 1
    d = (1 / np.sqrt(np.diff(indptr) + 1)).astype(np.float32)
    payload = coded(rng.normal(size=(buffer, columns)).astype(np.float32), bits, np.arange(buffer))
    h, h0, held, before = (rng.normal(size=(n, columns)).astype(np.float32) for _ in range(4))
    a, b, c = np.float32(0.05), np.float32(0.9), np.float32(0.1)
    second, coefficient = case == "second", 0.0 if case in ("plain", "last") else -0.3
    places, begin, end = rng.integers(0, 2**40, n), 3, n - 2

    def whole() -> dict[str, np.ndarray]:
        out = {"p": held.copy(), "next": np.full_like(payload, 77)}
        out["out"] = before.copy() if second else h.copy()  # it may be where h or before is
        kernels.layer_scaled(indptr, indices, payload, bits, d, h0, h if second else out["out"],
                             out["out"] if second else None, out["out"], None if case == "plain" else out["p"],
                             case == "first", second, coefficient, a, b, c, None if case == "last" else out["next"],
                             *KEY, places, begin, end)
        return out

    got = _everywhere(whole)
    sums, p, want = np.zeros_like(h), np.zeros_like(h), np.empty_like(h)
    kernels.aggregate_scaled(indptr, indices, payload, bits, begin, end, sums)
    kernels.propagated(sums, h, d, begin, end, p)
    if second:
        kernels.apply_multiplier(before, h, held, p, coefficient, want, None)
    else:
        kernels.half_step(h, p, h0, a, b, c, want)
        if coefficient:
            kernels.apply_multiplier(h, want, p if case == "first" else held, p, coefficient, want, None)
    follow = np.full_like(payload, 77)
    if case != "last":
        kernels.code_gradients(want, d, bits, *KEY, places, begin, end, follow)
    rows, outside = slice(begin, end), [*range(begin), *range(end, n)]
    np.testing.assert_array_equal(got["out"][rows], want[rows])
    np.testing.assert_array_equal(got["out"][outside], (before if second else h)[outside])
    np.testing.assert_array_equal(got["p"][rows], (held if second or case == "plain" else p)[rows])
    np.testing.assert_array_equal(got["p"][outside], held[outside])
    np.testing.assert_array_equal(got["next"], follow)


@pytest.mark.parametrize("columns", [479, 480, 481, 512, 1000, 2016, 2048, 4096])
def test_wide_rows(columns: int) -> None:
    """Fewer rows at a time fit the scratch, and their numbers are drawn row by row."""
    rng = np.random.default_rng(columns)
    h, places = rng.normal(size=(11, columns)).astype(np.float32), rng.integers(0, 2**40, 11)
    indptr, indices = np.array([0, 5, 9, 9]), rng.integers(0, 11, 9).astype(np.int32)
    for bits in BITS:
        def call(bits: int = bits) -> dict[str, np.ndarray]:
            payload, sums = coded(h, bits, places), np.empty((3, columns), np.float32)
            kernels.aggregate_scaled(indptr, indices, payload, bits, 0, 3, sums)
            return {"payload": payload, "sums": sums}

        _everywhere(call)


def _empty(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


@pytest.mark.skipif(native() is None, reason="the compiled kernels are not built")
def test_what_would_leave_a_buffer_is_refused() -> None:
    wide, one, none = kernels.LAYER_COLUMNS + 1, np.ones(1, np.float32), _empty(0, dtype=np.int32)
    h, pointer, place = _empty(1, wide), np.array([0, 0]), np.zeros(1, np.int64)
    payload = _empty(1, row_bytes(wide, 2) + 1, dtype=np.uint8)
    with pytest.raises(ValueError, match="code_gradients: h has 4097 columns, expected at most 4096"):
        kernels.code_gradients(h, one, 2, *KEY, place, 0, 1, payload)
    with pytest.raises(ValueError, match="aggregate_scaled: out has 4097 columns"):
        kernels.aggregate_scaled(pointer, none, payload, 2, 0, 1, h)
    with pytest.raises(ValueError, match="layer_scaled: h has 4097 columns"):
        kernels.layer_scaled(pointer, none, payload, 2, one, h, h, None, h.copy(), None, False, False, 0.0, 0.0, 0.9,
                             0.1, payload.copy(), *KEY, place, 0, 1)


@pytest.mark.parametrize("level", ["reference", kernels.isa()])
def test_wrong_calls_are_refused_by_name(level: str) -> None:
    h, one, place = _empty(2, 5), np.ones(2, np.float32), np.zeros(2, np.int64)
    payload, none = _empty(2, 3, dtype=np.uint8), _empty(0, dtype=np.int32)
    layer = (np.zeros(3, np.int64), none, payload, 2, one, h, h, None, h.copy())
    tail = (0.0, 0.9, 0.1, payload.copy(), *KEY, place, 0, 2)
    with kernels.using_isa(level):
        with pytest.raises(ValueError, match="code_gradients: bits is 1, expected 2, 4 or 8"):
            kernels.code_gradients(h, one, 1, *KEY, place, 0, 2, payload)
        with pytest.raises(ValueError, match=r"code_gradients: payload has shape \(2, 2\), expected 3 along axis 1"):
            kernels.code_gradients(h, one, 2, *KEY, place, 0, 2, payload[:, :2].copy())
        with pytest.raises(ValueError, match=r"payload has shape \(1, 3\), expected at least 2 along axis 0"):
            kernels.code_gradients(h, one, 2, *KEY, place, 0, 2, payload[:1])
        with pytest.raises(ValueError, match=r"rows\[1\] is -1, expected 0 to 2\^40 - 1"):
            kernels.code_gradients(h, one, 2, *KEY, np.array([0, -1]), 0, 2, payload)
        with pytest.raises(ValueError, match="layer_scaled: a multiplier needs p"):
            kernels.layer_scaled(*layer, None, False, False, 0.5, *tail)
        with pytest.raises(ValueError, match="its second round needs before"):
            kernels.layer_scaled(*layer, h.copy(), False, True, 0.0, *tail)
        with pytest.raises(ValueError, match="layer_scaled: next_payload shares memory with payload"):
            kernels.layer_scaled(*layer, None, False, False, 0.0, 0.0, 0.9, 0.1, payload, *KEY, place, 0, 2)
