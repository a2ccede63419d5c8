# SPDX-License-Identifier: Apache-2.0
"""Arrays on disk: npz archives whose headers are checked before anything is allocated, and buffers for large rows."""
from __future__ import annotations

import math
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from qgnn_dist.errors import InputError

__all__ = ["CHUNK_EDGES", "ArrayHeader", "NpzArchive", "new_rows"]

CHUNK_EDGES = 1 << 18
"""Edges a chunk, for every source that can choose."""
CHUNK_BYTES = 8 << 20
IN_MEMORY_BYTES = 256 << 20

_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, KeyError, NotImplementedError, RuntimeError)
"""What zipfile and numpy raise on damaged, encrypted or foreign archives."""


def new_rows(shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
    """An array to be filled piece by piece: in memory, or from 256 MiB on a memory map of an unnamed temporary file.

    The file lies in TMPDIR and vanishes with the array.

    Raises:
        InputError: the temporary folder has no room.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size < IN_MEMORY_BYTES:
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile(prefix="qgnn-rows-") as file:
        try:
            # A map of a file that the disk cannot hold ends the process when it is written to.
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise InputError(
                f"{tempfile.gettempdir()}: no room for {size / 2**30:.1f} GiB of a graph's array ({error.strerror}); "
                "set TMPDIR to a folder on a larger disk"
            ) from error
        return np.memmap(file, dtype, mode="r+", shape=shape)


@dataclass(frozen=True)
class ArrayHeader:
    """What an archive says about one array; `offset` is where its data starts in the entry."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    offset: int


class NpzArchive:
    """A .npz file, read without pickle. Each array's header is compared with the bytes that are there first.

    Raises:
        InputError: (any method) file missing, no archive, damaged entry, an array of Python objects.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise InputError("there is no such file", file=str(path))
        try:
            self._zip = zipfile.ZipFile(path)
        except _DAMAGED as error:
            raise InputError(f"is no npz archive ({error}); write it with numpy.savez", file=str(path)) from error
        self.headers: dict[str, ArrayHeader] = {}
        for entry in self._zip.infolist():
            if entry.filename.endswith(".npy"):
                self.headers[entry.filename[:-4]] = self._header(entry)

    def close(self) -> None:
        """Closes the file; arrays that were read stay."""
        self._zip.close()

    def __enter__(self) -> NpzArchive:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __contains__(self, name: str) -> bool:
        return name in self.headers

    def _header(self, entry: zipfile.ZipInfo) -> ArrayHeader:
        name = entry.filename[:-4]
        try:
            with self._zip.open(entry) as file:
                version = npy.read_magic(file)
                read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
                shape, fortran, dtype = read(file)
                offset = file.tell()
        except _DAMAGED as error:
            raise InputError(f"array {name} is damaged ({error})", file=str(self.path)) from error
        if dtype.hasobject:
            raise InputError(
                f"array {name} holds Python objects, which are never loaded; store it as numbers or text",
                file=str(self.path),
            )
        expected = offset + math.prod(shape) * dtype.itemsize
        if entry.file_size != expected:
            raise InputError(
                f"array {name} is damaged: {entry.file_size} bytes, expected {expected} for shape {shape} of {dtype}",
                file=str(self.path),
            )
        return ArrayHeader(shape, dtype, fortran, offset)

    def read(self, name: str) -> np.ndarray:
        """The whole array, native byte order; a memory map of a temporary file where it is large (`new_rows`)."""
        header = self.headers[name]
        values = new_rows((math.prod(header.shape),), header.dtype.newbyteorder("="))
        step = max(1, CHUNK_BYTES // max(1, header.dtype.itemsize))
        with self._zip.open(f"{name}.npy") as file:
            self._read(file, name, header.offset)
            for start in range(0, len(values), step):
                count = min(step, len(values) - start)
                data = self._read(file, name, count * header.dtype.itemsize)
                values[start:start + count] = np.frombuffer(data, header.dtype)
        return values.reshape(header.shape, order="F" if header.fortran else "C")

    def rows(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, rows) of a two-dimensional array in C order, a few MiB at a time."""
        header = self.headers[name]
        width = header.shape[1] * header.dtype.itemsize
        step = max(1, CHUNK_BYTES // max(1, width))
        with self._zip.open(f"{name}.npy") as file:
            self._read(file, name, header.offset)
            for start in range(0, header.shape[0], step):
                count = min(step, header.shape[0] - start)
                block = np.frombuffer(self._read(file, name, count * width), header.dtype)
                yield start, block.reshape(count, header.shape[1])

    def columns(self, name: str) -> Iterator[np.ndarray]:
        """(2, k) pieces of a (2, E) array in C order: two streams over the same entry, the second one row ahead."""
        header = self.headers[name]
        row_bytes = header.shape[1] * header.dtype.itemsize
        with self._zip.open(f"{name}.npy") as first, self._zip.open(f"{name}.npy") as second:
            self._read(first, name, header.offset)
            skip = header.offset + row_bytes
            while skip:
                skip -= len(self._read(second, name, min(skip, CHUNK_BYTES)))
            for start in range(0, header.shape[1], CHUNK_EDGES):
                size = min(CHUNK_EDGES, header.shape[1] - start) * header.dtype.itemsize
                pair = [np.frombuffer(self._read(file, name, size), header.dtype) for file in (first, second)]
                yield np.stack(pair)

    def _read(self, file: IO[bytes], name: str, size: int) -> bytes:
        try:
            data = file.read(size)
        except _DAMAGED as error:
            raise InputError(f"array {name} is damaged ({error})", file=str(self.path)) from error
        if len(data) != size:
            raise InputError(f"array {name} is cut short", file=str(self.path))
        return data
