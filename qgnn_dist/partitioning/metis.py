# SPDX-License-Identifier: Apache-2.0
"""METIS by pymetis: the best cut, at several times the graph's memory."""
from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import InputError
from .balance import Balance

__all__ = ["assign"]

LARGEST = 1.1
"""Rows of the largest part over the mean, above which a second try is made; METIS itself aims at 1.03."""


def assign(indptr: np.ndarray, indices: np.ndarray, parts: int, seed: int,
           balance: Balance) -> tuple[np.ndarray, dict[str, Any]]:
    """Owners int32 (N,) and what a manifest tells of them. METIS evens out nodes alone, `balance` is not looked at.

    Raises:
        InputError: pymetis is missing or METIS gives up.
    """
    try:
        import pymetis
    except ImportError:
        raise InputError("--method metis needs pymetis; `pip install pymetis`, or use --method stream") from None
    n = len(indptr) - 1

    def run(recursive: bool | None) -> np.ndarray:
        _, owners = pymetis.part_graph(parts, xadj=indptr, adjncy=indices, recursive=recursive,
                                       options=pymetis.Options(seed=seed))
        return np.asarray(owners, np.int32)

    def largest(owners: np.ndarray) -> int:
        return int(np.bincount(owners, minlength=parts).max())

    try:
        owners = run(None)
        # With a handful of nodes a part, the k-way method may put them all into one; bisection does not.
        if largest(owners) > LARGEST * n / parts + 1:
            owners = min(owners, run(True), key=largest)
    except (RuntimeError, MemoryError) as error:
        raise InputError(f"METIS gave up on {n} nodes in {parts} parts ({error}); use --method stream") from None
    return owners, {"objective": "cut edges"}
