# SPDX-License-Identifier: Apache-2.0
"""Random numbers that depend on a key and a place alone, as NumPy; csrc/random_body.h has the compiled twin."""
from __future__ import annotations

import numpy as np

__all__ = ["philox"]


def philox(seed: int, epoch: int, stage: int, layer: int, round: int, rows: np.ndarray,
           columns: np.ndarray) -> np.ndarray:
    """uint32 at every (row, column), arrays that broadcast; keyed_bits documents the counter."""
    rows, columns = np.broadcast_arrays(rows.astype(np.uint64), columns.astype(np.uint64))
    low = np.uint64(0xFFFFFFFF)
    c = [rows & low, (rows >> np.uint64(32)) | ((columns // np.uint64(4)) << np.uint64(8)) & low,
         np.full(rows.shape, epoch, np.uint64), np.full(rows.shape, layer | stage << 16 | round << 24, np.uint64)]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    shift = np.uint64(32)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(b >> shift) ^ c[1] ^ np.uint64(k0), b & low, (a >> shift) ^ c[3] ^ np.uint64(k1), a & low]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    words: np.ndarray = np.choose((columns % np.uint64(4)).astype(np.int64), c).astype(np.uint32)
    return words
