# SPDX-License-Identifier: Apache-2.0
"""Arrow IPC files of a part: written once, synced, then memory-mapped without a copy."""
from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from ..errors import StoreError
from ..files.ipc import ARROW_DAMAGE, check_compression
from ..files.read import open_regular, reason, shown

__all__ = ["as_arrow", "as_numpy", "as_strings", "check_plain", "check_values", "checksum", "forget_pages", "map_file",
           "open_batches", "read_batch", "read_columns", "write_batches", "write_columns"]


_NUMPY = {pa.from_numpy_dtype(dtype): dtype for dtype in (
    np.int8, np.uint8, np.int32, np.int64, np.float16, np.float32)}


def as_numpy(column: pa.Array) -> np.ndarray:
    """A view of a column of numbers without nulls.

    Arrow's own `to_numpy` and `array` load pandas where it is installed: a second and 50 MB that nothing here needs.
    """
    dtype = np.dtype(_NUMPY[column.type])
    values = column.buffers()[1]
    if values is None or not len(column):
        return np.empty(0, dtype)
    return np.frombuffer(values, dtype, len(column), column.offset * dtype.itemsize)


def as_arrow(values: np.ndarray) -> pa.Array:
    """A view of a contiguous array (n,); see `as_numpy`."""
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def as_strings(words: Sequence[str]) -> pa.Array:
    """An array of strings; see `as_numpy`."""
    encoded = [word.encode() for word in words]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    return pa.StringArray.from_buffers(len(words), pa.py_buffer(ends), pa.py_buffer(b"".join(encoded)))


def write_columns(path: Path, columns: Mapping[str, np.ndarray | pa.Array]) -> None:
    """One record batch: every column is one contiguous piece of the file."""
    arrays = {name: c if isinstance(c, pa.Array) else pa.array(np.ascontiguousarray(c)) for name, c in columns.items()}
    batch = pa.record_batch(list(arrays.values()), names=list(arrays))
    write_batches(path, batch.schema, [batch])


def write_batches(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Any number of batches, as they come; the file is synced to disk before this returns."""
    with open(path, "wb") as out:
        with pa.ipc.new_file(out, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        out.flush()
        os.fsync(out.fileno())


def check_plain(path: Path) -> None:
    """Refuse a file whose batches are compressed, as a store's never are; done once, before the first is read.

    Raises:
        StoreError: also where it is missing or damaged.
    """
    try:
        check_compression(path, 0)
    except FileNotFoundError:
        raise StoreError("file is missing; partition the graph again", file=str(path)) from None
    except ARROW_DAMAGE as error:
        raise _damaged(path, error) from None


def map_file(path: Path) -> mmap.mmap:
    """Memory-map a file, read-only; it stays mapped as long as somebody holds the map or an array in it.

    Raises:
        StoreError: missing, empty, or no file.
    """
    try:
        with open_regular(path) as opened:
            return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise StoreError("file is missing; partition the graph again", file=str(path)) from None
    except ARROW_DAMAGE as error:
        raise _damaged(path, error) from None


def forget_pages(mapped: mmap.mmap) -> None:
    """Take a file's pages out of this process's memory. Arrays in it stay as they are: what is read of them later comes
    from the system's page cache, or from the disk."""
    if hasattr(mmap, "MADV_DONTNEED"):  # else they stay until the system wants them
        mapped.madvise(mmap.MADV_DONTNEED)


def open_batches(path: Path, mapped: mmap.mmap | None = None) -> pa.ipc.RecordBatchFileReader:
    """Read a file's batches as views. Args: mapped: a map of it (`map_file`) that the caller holds, too.

    Raises:
        StoreError: missing, or not an Arrow file.
    """
    try:
        reader = pa.ipc.open_file(pa.py_buffer(map_file(path) if mapped is None else mapped))
        list(reader.schema.names)  # decodes them: names that are no UTF-8 fail here, not in a caller
        return reader
    except ARROW_DAMAGE as error:
        raise _damaged(path, error) from None


def read_batch(reader: pa.ipc.RecordBatchFileReader, number: int, path: Path) -> pa.RecordBatch:
    """One record batch, a view of the file, whose buffers are known to hold all its rows.

    Raises:
        StoreError: damaged, or no such batch.
    """
    try:
        batch = reader.get_batch(number)
        batch.validate()
        return batch
    except ARROW_DAMAGE as error:
        raise _damaged(path, error) from None


def check_values(column: pa.Array, path: Path) -> None:
    """Every value of an array of any type can be read, and none is null; a pass over all of it.

    Raises:
        StoreError: damaged.
    """
    try:
        column.validate(full=True)
    except ARROW_DAMAGE as error:
        raise _damaged(path, error) from None
    if column.null_count:
        raise StoreError(f"has {column.null_count} nulls where none belong; partition the graph again", file=str(path))


def _damaged(path: Path, error: Exception) -> StoreError:
    return StoreError(f"damaged Arrow file ({reason(error)}); partition the graph again", file=str(path))


def read_columns(path: Path, names: Iterable[str], mapped: mmap.mmap | None = None) -> dict[str, pa.Array]:
    """The columns of a one-batch file, memory-mapped. Args: mapped: see `open_batches`.

    Raises:
        StoreError: also where a column is absent.
    """
    check_plain(path)
    reader = open_batches(path, mapped)
    if reader.num_record_batches != 1:
        raise StoreError(f"has {reader.num_record_batches} record batches, expected 1", file=str(path))
    batch = read_batch(reader, 0, path)
    found = {}
    for name in names:
        if name not in batch.schema.names:
            raise StoreError(f"column {name} is missing; found {shown(', '.join(batch.schema.names))}", file=str(path))
        found[name] = batch.column(name)
    return found


def checksum(path: Path) -> str:
    """BLAKE2b-256 of a file, hex."""
    digest = hashlib.blake2b(digest_size=32)
    with open_regular(path) as opened:
        while block := opened.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
