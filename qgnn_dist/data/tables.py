# SPDX-License-Identifier: Apache-2.0
"""Tables in one file or many, Parquet or Arrow IPC, read batch by batch from memory maps.

Mapped, a file's own bytes are no memory of ours, however large its row groups and batches are.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from qgnn_dist.errors import InputError

__all__ = ["Table", "open_table"]

SUFFIXES = (".parquet", ".arrow")


@dataclass(frozen=True)
class Table:
    """The files of one table, all of the same schema."""

    files: list[Path]
    schema: pa.Schema
    num_rows: int

    def batches(self, columns: Sequence[str], rows: int) -> Iterator[tuple[str, int, pa.RecordBatch]]:
        """(file, first row within the file, batch of up to `rows`) in the order of the files."""
        for path in self.files:
            start = 0
            try:
                for batch in (_arrow_batches if path.suffix == ".arrow" else _parquet_batches)(path, columns, rows):
                    yield str(path), start, batch
                    start += batch.num_rows
            except (pa.ArrowException, OSError) as error:
                raise InputError(f"is damaged after row {start} ({_line(error)})", file=str(path)) from error


def open_table(folder: Path, name: str) -> Table:
    """`folder/name.parquet` or `.arrow`, or all of such files in `folder/name`, sorted by name."""
    singles, parts = [folder / f"{name}{suffix}" for suffix in SUFFIXES], folder / name
    there = [path for path in (*singles, parts) if path.is_file()]
    if len(there) > 1:
        raise InputError(f"holds the table twice, as {there[0].name} and {there[1].name}; keep one", file=str(folder))
    if there:
        files = there
    elif parts.is_dir():
        files = sorted(path for suffix in SUFFIXES for path in parts.rglob(f"*{suffix}") if path.name[0] not in "_.")
        if not files:
            raise InputError("the folder holds no .parquet file and no .arrow file", file=str(parts))
    else:
        raise InputError(f"there is neither {name}.parquet nor {name}.arrow nor a folder {name}", file=str(folder))
    schema: pa.Schema | None = None
    num_rows = 0
    for path in files:
        try:
            found, rows = _look(path)
        except (pa.ArrowException, OSError) as error:
            kind = "Arrow IPC" if path.suffix == ".arrow" else "Parquet"
            raise InputError(f"is no {kind} file ({_line(error)})", file=str(path)) from error
        if schema is not None and found != schema:
            raise InputError(f"has other columns or types than {files[0].name}, expected the same", file=str(path))
        schema, num_rows = found, num_rows + rows
    assert schema is not None
    duplicates = {column for column in schema.names if schema.names.count(column) > 1}
    if duplicates:
        raise InputError(f"column {duplicates.pop()} appears twice", file=str(files[0]))
    return Table(files, schema, num_rows)


def _look(path: Path) -> tuple[pa.Schema, int]:
    """A file's schema and number of rows."""
    if path.suffix != ".arrow":
        with pq.ParquetFile(path) as file:
            return file.schema_arrow.remove_metadata(), file.metadata.num_rows
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        rows = sum(reader.get_batch(number).num_rows for number in range(reader.num_record_batches))
        return reader.schema.remove_metadata(), rows


def _parquet_batches(path: Path, columns: Sequence[str], rows: int) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path, memory_map=True) as file:
        yield from file.iter_batches(batch_size=rows, columns=list(columns))


def _arrow_batches(path: Path, columns: Sequence[str], rows: int) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number).select(list(columns))
            batch.validate()
            for start in range(0, batch.num_rows, rows):
                piece = batch.slice(start, rows)
                piece.validate(full=True)  # offsets and text: nothing else has looked at them
                yield piece


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
