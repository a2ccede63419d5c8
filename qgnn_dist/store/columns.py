# SPDX-License-Identifier: Apache-2.0
"""Arrow IPC files of a part: written once, synced, then memory-mapped without a copy."""
from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from ..errors import StoreError
from ..files.ipc import ARROW_DAMAGE, check_compression
from ..files.read import open_regular, reason, shown

__all__ = ["check_plain", "check_values", "checksum", "open_batches", "read_batch", "read_columns", "write_batches",
           "write_columns"]


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


def open_batches(path: Path) -> pa.ipc.RecordBatchFileReader:
    """Memory-map a file.

    Raises:
        StoreError: missing, or not an Arrow file.
    """
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        list(reader.schema.names)  # decodes them: names that are no UTF-8 fail here, not in a caller
        return reader
    except FileNotFoundError:
        raise StoreError("file is missing; partition the graph again", file=str(path)) from None
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


def read_columns(path: Path, names: Iterable[str]) -> dict[str, pa.Array]:
    """The columns of a one-batch file, memory-mapped.

    Raises:
        StoreError: also where a column is absent.
    """
    check_plain(path)
    reader = open_batches(path)
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
