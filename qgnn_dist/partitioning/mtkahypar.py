# SPDX-License-Identifier: Apache-2.0
"""Mt-KaHyPar, where it is installed: the fewest cut edges, at many times METIS' time and uneven numbers of edges."""
from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np

from ..errors import InputError
from .balance import Balance

__all__ = ["assign"]


def assign(indptr: np.ndarray, indices: np.ndarray, parts: int, seed: int,
           balance: Balance) -> tuple[np.ndarray, dict[str, Any]]:
    """Owners int32 (N,) and what a manifest tells of them; of `balance` only nodes are kept. Equal seeds give equal
    cuts, at any number of threads (its deterministic preset).

    Raises:
        InputError: mtkahypar is missing or gives up.
    """
    try:
        import mtkahypar
    except ImportError:
        raise InputError("--method mtkahypar needs mtkahypar; `pip install 'qgnn-dist[quality]'`, or use --method "
                         "metis") from None
    n = len(indptr) - 1
    rows = np.repeat(np.arange(n, dtype=np.int32), np.diff(indptr))
    once = rows < indices
    if parts == 1 or not once.any():  # it takes no graph without edges
        return np.arange(n, dtype=np.int32) % np.int32(parts), {"objective": "cut edges"}
    edges = list(zip(rows[once].tolist(), indices[once].tolist()))
    try:
        library = _library()
        context = library.context_from_preset(mtkahypar.PresetType.DETERMINISTIC)
        context.set_partitioning_parameters(parts, balance.nodes - 1, mtkahypar.Objective.CUT)
        context.logging = False
        mtkahypar.set_seed(seed)
        found = library.create_graph(context, n, len(edges), edges).partition(context).get_partition()
    except (RuntimeError, ValueError, MemoryError, mtkahypar.InvalidInputError, mtkahypar.InvalidParameterError,
            mtkahypar.SystemError) as error:
        raise InputError(f"Mt-KaHyPar gave up on {n} nodes in {parts} parts ({error}); use --method metis") from None
    return np.asarray(found, np.int32), {"objective": "cut edges"}


@functools.cache
def _library() -> Any:
    """Its threads are started once a process."""
    import mtkahypar

    return mtkahypar.initialize(os.cpu_count() or 1, False)
