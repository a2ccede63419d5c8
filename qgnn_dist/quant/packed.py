# SPDX-License-Identifier: Apache-2.0
"""THE bit order: how codes of 1, 2, 4 or 8 bits lie in bytes, on the wire, in stores, in models and in kernels.

Planar: a row of C codes takes B = ⌈C·b/8⌉ bytes; byte i holds columns i, i+B, i+2B, …, the first of them in the
lowest bits; bits of columns past C are zero. Adding up rows then needs shifts and masks only, no shuffles. Seven
columns at 2 bits take B = 2 bytes; byte 0 holds columns 0, 2, 4, 6, byte 1 holds columns 1, 3, 5 and two zero bits:

>>> codes = np.array([[1, 2, 3, 0, 1, 3, 2]], np.uint8)
>>> payload = pack_codes(codes, 2)
>>> [f"{byte:08b}" for byte in payload[0]]
['10011101', '00110010']
>>> unpack_codes(payload, 2, 7).tolist()
[[1, 2, 3, 0, 1, 3, 2]]
"""
from __future__ import annotations

import numpy as np

__all__ = ["CODE_BITS", "pack_codes", "row_bytes", "unpack_codes"]

CODE_BITS = (1, 2, 4, 8)


def row_bytes(columns: int, bits: int) -> int:
    """B, the bytes that a row of `columns` values of `bits` bits takes (32 bits: float32 rows)."""
    return (columns * bits + 7) // 8


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes uint8 (N, C), each under 2^bits, to payload uint8 (N, B)."""
    if codes.size and int(codes.max()) >= 2**bits:
        raise ValueError(f"pack: code {int(codes.max())} does not fit {bits} bits")
    size = row_bytes(codes.shape[1], bits)
    out = np.zeros((len(codes), size), np.uint8)
    for plane in range(8 // bits):
        piece = codes[:, plane * size:(plane + 1) * size]
        out[:, :piece.shape[1]] |= (piece << (plane * bits)).astype(np.uint8)
    return out


def unpack_codes(payload: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Payload uint8 (N, B) to codes uint8 (N, columns)."""
    planes = [(payload >> (plane * bits)) & (2**bits - 1) for plane in range(8 // bits)]
    return np.ascontiguousarray(np.concatenate(planes, axis=1)[:, :columns])
