# SPDX-License-Identifier: Apache-2.0
"""Tables in one file or many, Parquet or Arrow IPC, read batch by batch from memory maps.

Mapped, a file's own bytes are no memory of ours, however large its row groups and batches are. What a file says of its
rows is compared with what comes out of it, and text with UTF-8, before anybody sees either.
"""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from qgnn_dist.errors import InputError
from qgnn_dist.files.ipc import ARROW_DAMAGE, check_compression
from qgnn_dist.files.read import check_regular, parse_json, reason, shown

__all__ = ["Table", "arrow_errors", "open_table"]

SUFFIXES = (".parquet", ".arrow")
LARGEST_BATCH = 1 << 30
"""Bytes that a compressed batch of an Arrow file becomes; a page of Parquet has no more than twice as many."""
MOST_COLUMNS = 1 << 16
LARGEST_NOTE = 1 << 20
"""Bytes of what pandas says of its columns; with more, an index is known by its name alone."""
_INDEX_NAME = re.compile(r"__index_level_\d+__")
_CSV_NAMES = ("*.csv", "*.csv.gz")


@contextmanager
def arrow_errors(file: str) -> Iterator[None]:
    """What Arrow cannot convert is the file's fault."""
    try:
        yield
    except (pa.ArrowException, OverflowError) as error:
        raise InputError(f"holds values that do not fit ({reason(error)})", file=file) from error


@dataclass(frozen=True)
class Table:
    """The files of one table, all of the same schema, the rows that each says it has, and the columns that are no data
    but the index of a pandas table."""

    files: list[Path]
    schema: pa.Schema
    rows: list[int]
    index: frozenset[str] = frozenset()

    @property
    def num_rows(self) -> int:
        """All files' rows; what a pass over `batches` has seen is true."""
        return sum(self.rows)

    def batches(self, columns: Sequence[str], rows: int) -> Iterator[tuple[str, int, pa.RecordBatch]]:
        """(file, first row within the file, batch of up to `rows`) in the order of the files.

        Raises:
            InputError: a damaged file, or one that has other than the rows that it says.
        """
        for path, expected in zip(self.files, self.rows):
            start = 0
            pieces = (_arrow_batches if path.suffix == ".arrow" else _parquet_batches)(path, columns, rows)
            while True:
                try:
                    batch = next(pieces, None)
                    if batch is not None:
                        batch.validate(full=True)  # offsets and text: nothing else has looked at them
                except ARROW_DAMAGE as error:
                    raise InputError(f"is damaged after row {start} ({reason(error)})", file=str(path)) from error
                if batch is None or start + batch.num_rows > expected:
                    break
                yield str(path), start, batch
                start += batch.num_rows
            if batch is not None or start != expected:
                got = f"{start}" if batch is None else f"more than {expected}"
                raise InputError(f"is damaged: it has {got} rows and says {expected}", file=str(path))


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
            _refuse_csv(parts, "*")
            raise InputError("the folder holds no .parquet file and no .arrow file", file=str(parts))
    else:
        _refuse_csv(folder, name)
        raise InputError(f"there is neither {name}.parquet nor {name}.arrow nor a folder {name}", file=str(folder))
    schema: pa.Schema | None = None
    rows, index = [], frozenset[str]()
    for path in files:
        try:
            found, count = _look(path)
            index |= _index_columns(found)
            found = found.remove_metadata()
            if len(found.names) > MOST_COLUMNS:  # decodes them: names that are no UTF-8 fail here
                raise ValueError(f"{len(found.names)} columns, expected at most {MOST_COLUMNS}")
        except ARROW_DAMAGE as error:
            kind = "Arrow IPC" if path.suffix == ".arrow" else "Parquet"
            raise InputError(f"is no {kind} file ({reason(error)})", file=str(path)) from error
        if schema is not None and found != schema:
            raise InputError(f"has other columns or types than {files[0].name}, expected the same", file=str(path))
        schema = found
        rows.append(count)
    assert schema is not None
    duplicates = [column for column, count in Counter(schema.names).items() if count > 1]
    if duplicates:
        raise InputError(f"column {shown(duplicates[0])} appears twice", file=str(files[0]))
    return Table(files, schema, rows, index)


def _refuse_csv(folder: Path, name: str) -> None:
    """A folder of csv files gets the line that converts one."""
    found = sorted(path for ending in _CSV_NAMES for path in folder.glob(ending.replace("*", name)))
    if found:
        plain = found[0].name.removesuffix(".gz").removesuffix(".csv")
        raise InputError(
            "csv is not read, expected Parquet; convert it in its folder: python -c \"import pyarrow.csv as c, "
            f"pyarrow.parquet as p; p.write_table(c.read_csv({found[0].name!r}), {plain + '.parquet'!r})\"",
            file=str(found[0]),
        )


def _index_columns(schema: pa.Schema) -> frozenset[str]:
    """Columns that pandas wrote as an index, by what it noted in the file, or by their names where others copied it."""
    names = {name for name in schema.names if _INDEX_NAME.fullmatch(name)}
    note = (schema.metadata or {}).get(b"pandas", b"")
    try:
        told = parse_json(note)["index_columns"] if len(note) <= LARGEST_NOTE else []
        names |= {name for name in told if isinstance(name, str)}  # an index that is a range has no column
    except (ValueError, KeyError, TypeError):
        pass  # a note that is none says nothing
    return frozenset(names.intersection(schema.names))


def _look(path: Path) -> tuple[pa.Schema, int]:
    """A file's schema with what is noted there, and the rows that it says it has."""
    check_regular(path)
    if path.suffix != ".arrow":
        with pq.ParquetFile(path) as file:
            about = file.metadata
            groups = [about.row_group(number).num_rows for number in range(about.num_row_groups)]
            if min(groups, default=0) < 0 or sum(groups) != about.num_rows:
                raise ValueError(f"it says {about.num_rows} rows, its row groups {sum(groups)}")
            return file.schema_arrow, about.num_rows
    check_compression(path, LARGEST_BATCH)
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        rows = sum(reader.get_batch(number).num_rows for number in range(reader.num_record_batches))
        return reader.schema, rows


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
                yield batch.slice(start, rows)
