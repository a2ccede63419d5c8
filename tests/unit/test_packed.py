# SPDX-License-Identifier: Apache-2.0
"""The bit order, byte by byte: what every store, model and message on the wire relies on."""
from __future__ import annotations

import numpy as np
import pytest

from qgnn_dist import kernels
from qgnn_dist.quant.packed import pack_codes, row_bytes, unpack_codes


@pytest.mark.parametrize(("columns", "bits", "want"), [
    (0, 2, 0), (1, 1, 1), (8, 1, 1), (9, 1, 2), (4, 2, 1), (5, 2, 2), (40, 2, 10), (3, 4, 2), (7, 8, 7), (40, 32, 160),
])
def test_row_bytes(columns: int, bits: int, want: int) -> None:
    assert row_bytes(columns, bits) == want


@pytest.mark.parametrize(("bits", "codes", "want"), [
    # 1 bit, 10 columns, B = 2: byte 0 holds columns 0, 2, 4, 6, 8; byte 1 holds 1, 3, 5, 7, 9.
    (1, [1, 0, 0, 1, 1, 0, 0, 0, 1, 1], [0b00010101, 0b00010010]),
    # 2 bits, 5 columns, B = 2: byte 0 holds columns 0, 2, 4; byte 1 holds 1, 3.
    (2, [3, 1, 0, 2, 1], [0b00010011, 0b00001001]),
    # 4 bits, 3 columns, B = 2: byte 0 holds columns 0, 2; byte 1 holds 1.
    (4, [0xA, 0x5, 0xF], [0xFA, 0x05]),
    (8, [200, 0, 255], [200, 0, 255]),
])
def test_bytes_by_hand(bits: int, codes: list[int], want: list[int]) -> None:
    row = np.array([codes, codes], np.uint8)
    assert pack_codes(row, bits).tolist() == [want, want]
    native = np.full((2, len(want)), 255, np.uint8)
    kernels.pack(row, bits, native)
    assert native.tolist() == [want, want]
    assert unpack_codes(native, bits, len(codes)).tolist() == [codes, codes]


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("level", ["reference", kernels.isa()])
def test_a_code_too_large_is_refused(bits: int, level: str) -> None:
    codes = np.zeros((3, 9), np.uint8)
    codes[2, 8] = 2**bits
    out = np.empty((3, row_bytes(9, bits)), np.uint8)
    with kernels.using_isa(level), pytest.raises(ValueError, match=f"pack: code {2**bits} does not fit {bits} bits"):
        kernels.pack(codes, bits, out)


def test_no_rows() -> None:
    assert pack_codes(np.empty((0, 7), np.uint8), 2).shape == (0, 2)
    assert unpack_codes(np.empty((0, 2), np.uint8), 2, 7).shape == (0, 7)
