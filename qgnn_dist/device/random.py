# SPDX-License-Identifier: Apache-2.0
"""Random numbers that depend on a key and a place alone, as torch operations: the kernels' numbers, on any device."""
from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["kept", "kept_at", "keyed_bits"]

LOW = 0xFFFFFFFF


def keyed_bits(seed: int, epoch: int, stage: int, layer: int, round: int, rows: Tensor, groups: Tensor) -> Tensor:
    """Philox4x32-10 as kernels.keyed_bits draws it: columns 4·group … 4·group + 3 of each row.

    Args: rows, groups: int64, of shapes that broadcast. Returns: int64 of that shape and four more, each below 2^32.
    """
    rows, groups = torch.broadcast_tensors(rows, groups)  # type: ignore[no-untyped-call]
    c0, c1 = rows & LOW, (rows >> 32) | ((groups << 8) & LOW)
    c2, c3 = torch.full_like(c0, epoch), torch.full_like(c0, layer | stage << 16 | round << 24)
    k0, k1 = seed & LOW, seed >> 32 & LOW
    for _ in range(10):
        high0, low0 = _product(0xD2511F53, c0)
        high2, low2 = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return torch.stack([c0, c1, c2, c3], -1)


def kept(seed: int, epoch: int, stage: int, rows: Tensor, columns: int, share: float) -> Tensor:
    """Which values dropout keeps, bool (n, columns): those of kernels.dropout_dense. rows: int64 (n,)."""
    groups = torch.arange(-(-columns // 4), device=rows.device)
    bits = keyed_bits(seed, epoch, stage, 0, 0, rows[:, None], groups[None])
    return bits.reshape(len(rows), -1)[:, :columns] >= round(share * 2**32)


def kept_at(seed: int, epoch: int, stage: int, rows: Tensor, columns: Tensor, share: float) -> Tensor:
    """`kept` at single places, bool (m,). rows, columns: int64 (m,)."""
    bits = keyed_bits(seed, epoch, stage, 0, 0, rows, columns // 4)
    return bits.gather(1, (columns % 4)[:, None])[:, 0] >= round(share * 2**32)


def _product(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Upper and lower 32 bits of factor·x, both below 2^32, in halves that never leave 63 bits."""
    first = x * (factor & 0xFFFF)
    second = x * (factor >> 16) + (first >> 16)
    return second >> 16, ((second & 0xFFFF) << 16) | (first & 0xFFFF)
