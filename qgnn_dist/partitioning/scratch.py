# SPDX-License-Identifier: Apache-2.0
"""Files of a store under construction: written by ordinary writes, read by memory maps, and what a full disk says.

A write to a memory map of a file that the disk cannot hold ends the process; an ordinary one raises OSError.
"""
from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..errors import InputError

__all__ = ["append", "check_room", "disk_errors", "map_array", "save_array", "write_values"]


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


def check_room(folder: Path, needed: int, out: str) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        folder: on that disk. needed: bytes that will be written beside what lies there. out: the store, for the error.
    Raises:
        InputError: fewer are free.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(f"building the store takes about {_size(needed)} of disk, {_size(free)} are free; free some, "
                         "or choose an --out on a larger disk", file=out)


@contextmanager
def disk_errors(folder: Path, needed: int, out: str) -> Iterator[None]:
    """Say what the disk said and, where it is full, how much of it is free at that moment.

    Args:
        folder: of the store under construction. needed: bytes that building takes, 0 if nobody knows. out: as above.
    Raises:
        InputError: for any OSError of the block.
    """
    try:
        yield
    except OSError as error:
        room = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            takes = f", building the store takes about {_size(needed)}" if needed else ""
            room = (f" ({_size(shutil.disk_usage(folder).free)} are free{takes}); free some, or choose an --out on a "
                    "larger disk")
        raise InputError(f"cannot write the store: {error.strerror or error}{room}", file=out) from error


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
