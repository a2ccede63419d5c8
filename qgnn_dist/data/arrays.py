# SPDX-License-Identifier: Apache-2.0
"""Arrays on disk: npz archives whose headers are checked before anything is allocated, and buffers for large rows."""
from __future__ import annotations

import io
import math
import os
import struct
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from qgnn_dist.errors import InputError, OutputError
from qgnn_dist.files.read import open_regular, reason, shown

__all__ = ["CHUNK_EDGES", "ArrayHeader", "NpzArchive", "new_rows"]

CHUNK_EDGES = 1 << 18
"""Edges a chunk, for every source that can choose."""
CHUNK_BYTES = 8 << 20
IN_MEMORY_BYTES = 256 << 20
MOST_DEFLATED = 1032
"""Bytes that one byte of a deflate stream becomes at most, as its longest match takes two bits."""
LARGEST_DIRECTORY = 16 << 20
"""Bytes of an archive's list of arrays, which is read as a whole."""
LONGEST_END = 65557
"""Bytes of an archive's end, from where the count of its entries is known."""
LARGEST_VALUE, LARGEST_ROW = 4096, 64 << 20
"""Bytes of one value, a text of 1024 characters; and of a row where rows are read one by one."""

LAST_LETTER, FIRST_HALF, LAST_HALF = 0x10FFFF, 0xD800, 0xDFFF
"""Of Unicode; halves of letters are none."""

_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, KeyError, NotImplementedError, RuntimeError,
            SyntaxError, TypeError, IndexError, AttributeError, OverflowError, struct.error, tokenize.TokenError)
"""What zipfile and numpy raise on damaged, encrypted or foreign archives."""


class _Careful(io.FileIO):
    """A file that reads nothing large at once while `limit` is set, whatever the archive says of its own directory."""

    limit: int | None = LARGEST_DIRECTORY

    def read(self, size: int | None = -1) -> bytes:
        if self.limit is not None and size is not None and size > self.limit:
            raise ValueError(f"its directory has {size} bytes, expected at most {self.limit}")
        return super().read(-1 if size is None else size)


def new_rows(shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
    """An array to be filled piece by piece: in memory, or from 256 MiB on a memory map of an unnamed temporary file.

    The file lies in TMPDIR and vanishes with the array.

    Raises:
        OutputError: the temporary folder has no room.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size < IN_MEMORY_BYTES:
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile(prefix="qgnn-rows-") as file:
        try:
            # A map of a file that the disk cannot hold ends the process when it is written to.
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise OutputError(
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
        try:
            with open_regular(path) as opened:
                self._file = _Careful(os.dup(opened.fileno()))
        except FileNotFoundError:
            raise InputError("there is no such file", file=str(path)) from None
        except OSError as error:
            raise InputError(f"is no npz archive ({reason(error)}); write it with numpy.savez",
                             file=str(path)) from None
        try:
            self._zip = zipfile.ZipFile(self._file)
            self._file.limit = None
        except _DAMAGED as error:
            self._file.close()
            raise InputError(f"is no npz archive ({reason(error)}); write it with numpy.savez",
                             file=str(path)) from error
        self.headers: dict[str, ArrayHeader] = {}
        self._check_sizes()
        for entry in self._zip.infolist():
            name = entry.filename.removesuffix(".npy")
            if name == entry.filename or not name:
                raise InputError(f"holds {shown(repr(entry.filename))}, expected arrays alone, named NAME.npy",
                                 file=str(path))
            if name in self.headers:
                raise InputError(f"holds the array {shown(name)} twice", file=str(path))
            self.headers[name] = self._header(entry)

    def _check_sizes(self) -> None:
        """Refuse entries that would become more than their bytes can, or share them."""
        size = os.fstat(self._file.fileno()).st_size
        entries = self._zip.infolist()
        tail = os.pread(self._file.fileno(), LONGEST_END, max(size - LONGEST_END, 0))
        (count,) = struct.unpack_from("<H", tail, tail.rindex(b"PK\x05\x06") + 10)
        if count not in (len(entries), 0xFFFF):  # more are counted elsewhere
            raise InputError(f"is damaged: its directory says {count} arrays and lists {len(entries)}",
                             file=str(self.path))
        if sum(entry.compress_size for entry in entries) > size:
            raise InputError(f"is damaged: its arrays take more than the {size} bytes that it has", file=str(self.path))
        for entry in entries:
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise InputError(f"{shown(entry.filename)} is compressed in another way than numpy does (method "
                                 f"{entry.compress_type}); write it with numpy.savez", file=str(self.path))
            most = entry.compress_size * (MOST_DEFLATED if entry.compress_type == zipfile.ZIP_DEFLATED else 1)
            if entry.file_size > most:
                raise InputError(f"{shown(entry.filename)} is damaged: {entry.compress_size} bytes in the archive "
                                 f"cannot become {entry.file_size}", file=str(self.path))

    def close(self) -> None:
        """Closes the file; arrays that were read stay."""
        self._zip.close()
        self._file.close()

    def __enter__(self) -> NpzArchive:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __contains__(self, name: str) -> bool:
        return name in self.headers

    def _header(self, entry: zipfile.ZipInfo) -> ArrayHeader:
        name = shown(entry.filename[:-4])
        try:
            with self._zip.open(entry) as file:
                version = npy.read_magic(file)
                read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
                if read is None:
                    raise ValueError(f"npy version {version[0]}.{version[1]}, this program reads 1.0 and 2.0")
                shape, fortran, dtype = read(file)
                offset = file.tell()
            if min(shape, default=0) < 0 or len(shape) > 32:
                raise ValueError(f"its shape is {shown(shape)}")
        except _DAMAGED as error:
            raise InputError(f"array {name} is damaged ({reason(error)})", file=str(self.path)) from error
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
        header = self._numbers(name)
        values = new_rows((math.prod(header.shape),), header.dtype.newbyteorder("="))
        step = max(1, CHUNK_BYTES // max(1, header.dtype.itemsize))
        with self._zip.open(f"{name}.npy") as file:
            self._read(file, name, header.offset)
            for start in range(0, len(values), step):
                count = min(step, len(values) - start)
                data = self._read(file, name, count * header.dtype.itemsize)
                values[start:start + count] = np.frombuffer(data, header.dtype)
        if header.dtype.kind == "U":
            letters = values.view(np.uint32)
            if ((letters > LAST_LETTER) | ((letters >= FIRST_HALF) & (letters <= LAST_HALF))).any():
                raise InputError(f"array {shown(name)} is no Unicode text", file=str(self.path))
        return values.reshape(header.shape, order="F" if header.fortran else "C")

    def rows(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, rows) of a two-dimensional array in C order, a few MiB at a time."""
        header = self._numbers(name)
        width = header.shape[1] * header.dtype.itemsize
        if width > LARGEST_ROW:
            raise InputError(f"array {name} has rows of {width} bytes, expected at most {LARGEST_ROW}",
                             file=str(self.path))
        step = max(1, CHUNK_BYTES // max(1, width))
        with self._zip.open(f"{name}.npy") as file:
            self._read(file, name, header.offset)
            for start in range(0, header.shape[0], step):
                count = min(step, header.shape[0] - start)
                block = np.frombuffer(self._read(file, name, count * width), header.dtype)
                yield start, block.reshape(count, header.shape[1])

    def columns(self, name: str) -> Iterator[np.ndarray]:
        """(2, k) pieces of a (2, E) array in C order: two streams over the same entry, the second one row ahead."""
        header = self._numbers(name)
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

    def _numbers(self, name: str) -> ArrayHeader:
        """The header of an array that is about to be read."""
        header = self.headers[name]
        if header.dtype.kind not in "biufU" or not 0 < header.dtype.itemsize <= LARGEST_VALUE:
            raise InputError(f"array {name} is {shown(str(header.dtype))}, expected numbers or text of at most "
                             f"{LARGEST_VALUE // 4} characters", file=str(self.path))
        return header

    def _read(self, file: IO[bytes], name: str, size: int) -> bytes:
        try:
            data = file.read(size)
        except _DAMAGED as error:
            raise InputError(f"array {name} is damaged ({reason(error)})", file=str(self.path)) from error
        if len(data) != size:
            raise InputError(f"array {name} is cut short", file=str(self.path))
        return data
