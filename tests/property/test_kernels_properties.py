# SPDX-License-Identifier: Apache-2.0
"""Codes of any shape survive packing, sums of them are whole numbers whatever the cut, and coded news loses nothing."""
from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qgnn_dist import kernels
from qgnn_dist.quant.packed import pack_codes, row_bytes, unpack_codes
from tests.helpers import thinned_rows
from tests.parity.test_kernels_widths import LEVELS, Round

BITS = st.sampled_from([1, 2, 4, 8])


@settings(max_examples=200, deadline=None)
@given(BITS, st.integers(0, 9), st.integers(1, 140), st.integers(0, 2**32 - 1))
def test_packing_round_trips(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, columns)).astype(np.uint8)
    payload = np.empty((rows, row_bytes(columns, bits)), np.uint8)
    kernels.pack(codes, bits, payload)
    np.testing.assert_array_equal(payload, pack_codes(codes, bits))
    back = np.empty_like(codes)
    kernels.unpack(payload, bits, back)
    np.testing.assert_array_equal(back, codes)
    np.testing.assert_array_equal(unpack_codes(payload, bits, columns), codes)
    spare = payload.shape[1] * 8 // bits - columns
    if spare and rows:
        whole = unpack_codes(payload, bits, columns + spare)
        assert not whole[:, columns:].any(), "pad bits are zero"


@settings(max_examples=100, deadline=None)
@given(BITS, st.integers(1, 60), st.integers(1, 70), st.integers(0, 400), st.integers(0, 2**32 - 1), st.data())
def test_sums_do_not_depend_on_the_order_or_the_rows_asked_for(bits: int, rows: int, columns: int, edges: int,
                                                               seed: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (rows, columns)).astype(np.uint8)
    payload = pack_codes(codes, bits)
    ends = np.sort(rng.integers(0, edges + 1, rows - 1))
    indptr = np.concatenate([[0], ends, [edges]]).astype(np.int64)
    indices = rng.integers(0, rows, edges).astype(np.int32)
    kernels.check_csr(indptr, indices, rows)
    want = np.stack([codes[indices[indptr[r]:indptr[r + 1]]].sum(0, dtype=np.int64) for r in range(rows)])
    middle = data.draw(st.integers(0, rows))
    got = np.full((rows, columns), -1, np.int32)
    for r in range(rows):
        rng.shuffle(indices[indptr[r]:indptr[r + 1]])
    kernels.aggregate_codes(indptr, indices, payload, bits, middle, rows, got)
    assert (got[:middle] == -1).all()
    kernels.aggregate_codes(indptr, indices, payload, bits, 0, middle, got)
    np.testing.assert_array_equal(got, want)


@settings(max_examples=150, deadline=None)
@given(BITS, st.lists(st.integers(0, 300), min_size=1, max_size=30), st.integers(1, 60), st.integers(1, 140),
       st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from(LEVELS))
def test_a_round_of_any_graph_is_whole_numbers(bits: int, degrees: list[int], buffer: int, columns: int, seed: int,
                                               measured: bool, level: str) -> None:
    indices = np.random.default_rng(seed).integers(0, buffer, sum(degrees)).astype(np.int32)
    this = Round(np.array(degrees), indices, buffer, columns, bits, seed)
    with kernels.using_isa(level):
        np.testing.assert_array_equal(this.aggregated(), this.sums)
        for fixed in (False, True):
            got = this.run(fixed, measured)
            for name, value in this.wanted().items():
                np.testing.assert_array_equal(got[name], value, err_msg=name)


@settings(max_examples=60, deadline=None)
@given(BITS, st.integers(1, 40), st.floats(0.01, 10), st.integers(0, 2**32 - 1))
def test_what_a_round_misses_is_sent_later(bits: int, columns: int, scale: float, seed: int) -> None:
    """A state that stands still is believed to half a step after enough rounds of halving steps."""
    h = (scale * np.random.default_rng(seed).normal(size=(5, columns))).astype(np.float32)
    believed, ones = np.zeros_like(h), np.ones(5, np.float32)
    payload = np.empty((5, row_bytes(columns, bits)), np.uint8)
    step = float(2.0 ** np.ceil(np.log2(np.abs(h).max() + 1e-9))) * 2
    for _ in range(12):
        kernels.code_news(h, ones, believed, step, bits, 0, 5, payload, None)
        assert np.abs(h - believed).max() <= step
        step /= 2 if bits > 1 else 1.5
    assert np.abs(h - believed).max() <= 2 * step


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**31), st.integers(1, 3), st.integers(0, 1000),
       st.lists(st.integers(0, 2**40 - 1), min_size=1, max_size=20, unique=True), st.integers(1, 50))
def test_random_numbers_depend_on_key_and_place_alone(seed: int, epoch: int, stage: int, layer: int, rows: list[int],
                                                      columns: int) -> None:
    places = np.array(rows, np.int64)
    whole = np.empty((len(rows), columns), np.uint32)
    kernels.keyed_bits(seed, epoch, stage, layer, 0, places, columns, whole)
    for at in (0, len(rows) - 1):
        one = np.empty((1, columns), np.uint32)
        kernels.keyed_bits(seed, epoch, stage, layer, 0, places[at:at + 1].copy(), columns, one)
        np.testing.assert_array_equal(one[0], whole[at])
    with kernels.using_isa("reference"):
        again = np.empty_like(whole)
        kernels.keyed_bits(seed, epoch, stage, layer, 0, places, columns, again)
    np.testing.assert_array_equal(again, whole)
    if whole.size > 40:
        assert len(np.unique(whole)) > 0.9 * whole.size


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**64 - 1), st.floats(0.0, 0.99), st.integers(1, 90), st.integers(0, 2**32 - 1))
def test_dropout_is_unbiased_and_the_same_however_rows_are_cut(seed: int, p: float, columns: int, draw: int) -> None:
    rng = np.random.default_rng(draw)
    rows = np.sort(rng.choice(10**9, 400, replace=False)).astype(np.int64)
    dense = np.empty((400, columns), np.float32)
    kernels.dropout_dense(seed, 1, 2, 3, rows, columns, p, dense)
    kept = np.float32(1 / (1 - p))
    assert np.isin(dense, [0, kept]).all()
    # Six standard deviations of a mean of independent draws: one false alarm in 5·10^8.
    assert abs((dense != 0).mean() - (1 - p)) <= 6 * np.sqrt(p * (1 - p) / dense.size) + 1e-9
    part = rng.random(400) < 0.5
    if part.any():
        alone = np.empty((int(part.sum()), columns), np.float32)
        kernels.dropout_dense(seed, 1, 2, 3, rows[part], columns, p, alone)
        np.testing.assert_array_equal(alone, dense[part])
    mask = rng.random(dense.shape) < 0.3
    indptr = np.concatenate([[0], np.cumsum(mask.sum(1))]).astype(np.int64)
    values = np.arange(1, int(indptr[-1]) + 1, dtype=np.float32)
    indices = np.nonzero(mask)[1].astype(np.int32)
    at, columns_kept, stored = thinned_rows((seed, 1, 2, 3), rows, p, indptr, indices, values)
    np.testing.assert_array_equal(stored, values[dense[mask] != 0])
    np.testing.assert_array_equal(columns_kept, indices[dense[mask] != 0])
    assert at[-1] == len(stored)
