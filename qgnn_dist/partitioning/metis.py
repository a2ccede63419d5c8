# SPDX-License-Identifier: Apache-2.0
"""METIS by pymetis: the best cut, at several times the graph's memory."""
from __future__ import annotations

import numpy as np

from ..errors import InputError

__all__ = ["assign"]


def assign(indptr: np.ndarray, indices: np.ndarray, parts: int, seed: int) -> np.ndarray:
    """Owners int32 (N,).

    Raises:
        InputError: pymetis is missing or METIS gives up.
    """
    try:
        import pymetis
    except ImportError:
        raise InputError("--method metis needs pymetis; `pip install pymetis`, or use --method stream") from None
    try:
        _, owners = pymetis.part_graph(parts, xadj=indptr, adjncy=indices, options=pymetis.Options(seed=seed))
    except (RuntimeError, MemoryError) as error:
        raise InputError(f"METIS gave up on {len(indptr) - 1} nodes in {parts} parts ({error}); "
                         "use --method stream") from None
    return np.asarray(owners, np.int32)
