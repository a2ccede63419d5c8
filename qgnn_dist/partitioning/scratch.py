# SPDX-License-Identifier: Apache-2.0
"""Files of a store under construction: written by ordinary writes, read by memory maps.

A write to a memory map of a file that the disk cannot hold ends the process; an ordinary one raises OSError.
"""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

__all__ = ["append", "map_array", "save_array", "write_values"]


def append(path: Path, array: np.ndarray) -> None:
    """Add an array's values to the end of a file without a header, which is made where it is missing."""
    with open(path, "ab") as out:
        out.write(np.ascontiguousarray(array).data)


def map_array(path: Path, dtype: type) -> np.ndarray:
    """The values that were appended to a file, (n,), memory-mapped and read-only; none where there is no file."""
    if not path.exists() or path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r"))


def save_array(path: Path, array: np.ndarray) -> None:
    """numpy.save, which tells a full disk by its number of values alone."""
    write_values(path, array.shape, array.dtype, iter([array]))


def write_values(path: Path, shape: tuple[int, ...], dtype: np.dtype, blocks: Iterator[np.ndarray]) -> None:
    """A .npy file of an array whose rows come in blocks."""
    with open(path, "wb") as out:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(out, header)
        for block in blocks:
            out.write(np.ascontiguousarray(block, dtype).data)
