# SPDX-License-Identifier: Apache-2.0
"""Every node anywhere: the worst cut, perfectly balanced. A baseline, and the harshest test of everything else."""
from __future__ import annotations

from typing import Any

import numpy as np

from .balance import Balance

__all__ = ["assign"]


def assign(indptr: np.ndarray, indices: np.ndarray, parts: int, seed: int,
           balance: Balance) -> tuple[np.ndarray, dict[str, Any]]:
    """Owners int32 (N,), whose sizes differ by at most one, and nothing to tell; `balance` is not looked at."""
    n = len(indptr) - 1
    return np.random.default_rng(seed).permutation(np.arange(n, dtype=np.int32) % np.int32(parts)), {}
