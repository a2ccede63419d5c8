# SPDX-License-Identifier: Apache-2.0
"""Every node anywhere: the worst cut, perfectly balanced. A baseline, and the harshest test of everything else."""
from __future__ import annotations

import numpy as np

__all__ = ["assign"]


def assign(indptr: np.ndarray, indices: np.ndarray, parts: int, seed: int) -> np.ndarray:
    """Owners int32 (N,); sizes differ by at most one."""
    n = len(indptr) - 1
    return np.random.default_rng(seed).permutation(np.arange(n, dtype=np.int32) % np.int32(parts))
