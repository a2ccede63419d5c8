# SPDX-License-Identifier: Apache-2.0
"""Graphs from Parquet or Arrow tables of nodes and edges, streamed batch by batch.

`DIR/nodes.parquet` (or .arrow) or the folder `DIR/nodes/` of parts, the same for edges. Nodes: ids (unique, no nulls,
any integer or string type), optional label (whole numbers, -1, NaN or null unlabelled, or text), optional split
(train, valid or val or validation, test, null), and the features: all other columns, either numbers or one list column.
Edges: the ids of both ends and nothing else. The index that pandas adds to either is left out. docs/inputs.md has an
example.
"""
from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qgnn_dist.data import checks
from qgnn_dist.data.arrays import CHUNK_EDGES
from qgnn_dist.data.graph import NO_SPLIT, SPLITS, VALID, Graph
from qgnn_dist.data.names import ColumnNames
from qgnn_dist.data.tables import Table, arrow_errors, open_table
from qgnn_dist.errors import InputError, QgnnWarning
from qgnn_dist.files.read import shown

__all__ = ["load_parquet"]

ROWS_AT_ONCE = 1 << 14
SPLIT_WORDS = {**SPLITS, "val": VALID, "validation": VALID}
FILL = "fill it, with 0 or the column's mean, or drop the column"


def load_parquet(folder: str | Path, names: ColumnNames, progress: Callable[[str], None] | None = None) -> Graph:
    """The graph in a folder with a table of nodes and a table of edges.

    Edges are read, looked up and checked in each pass of `Graph.edges`; all else is checked here.

    Raises:
        InputError: missing or damaged tables or columns, ids null or not unique, a row whose features, label or split
            is wrong, edge weights, several labels a node; while edges are read: an end that is no node.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError("there is no such folder, expected one with nodes and edges", file=str(folder))
    with arrow_errors(str(folder)):
        return checks.check_graph(_load(folder, names, progress), str(folder))


def _load(folder: Path, names: ColumnNames, progress: Callable[[str], None] | None) -> Graph:
    nodes, edges = open_table(folder, "nodes"), open_table(folder, "edges")
    _need(nodes, names.node_id, "node-id")
    for column, option in ((names.src, "src"), (names.dst, "dst")):
        _need(edges, column, option)
    _refuse_edge_columns(edges, (names.src, names.dst), _left_out(edges, (names.src, names.dst)))
    _check_optional(nodes, names)
    file = str(nodes.files[0])
    num_nodes = checks.check_num_nodes(nodes.num_rows, "nodes", file)
    if progress:
        progress(f"{folder}: {num_nodes:,} nodes, {edges.num_rows:,} rows of edges")
    lookup = _Ids(_read_ids(nodes, names.node_id))
    for column in (names.src, names.dst):
        lookup.check_type(edges.schema.field(column).type, column, str(edges.files[0]))
    labels, num_classes, class_names = _labels(nodes, names.label)
    return Graph(
        name=folder.resolve().name,
        num_nodes=num_nodes,
        edges=lambda: _edges(edges, names, lookup),
        features=_features(nodes, names, _left_out(nodes, (names.node_id, names.label, names.split))),
        labels=labels,
        num_classes=num_classes,
        split=_split(nodes, names.split),
        node_ids=lookup.ids,
        class_names=class_names,
        edge_rows=edges.num_rows,
    )


def _need(table: Table, column: str, option: str) -> None:
    if column not in table.schema.names:
        close = difflib.get_close_matches(column, table.schema.names, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise InputError(
            f"column {column} is missing{hint}; the table has {shown(', '.join(table.schema.names), 400)}; "
            f"--{option} names another",
            file=str(table.files[0]),
        )


def _check_optional(nodes: Table, names: ColumnNames) -> None:
    """A label or split column that was asked for must be there, and a near name must not pass for a feature."""
    for option, column, usual in (
        ("label", names.label, ColumnNames.label),
        ("split", names.split, ColumnNames.split),
    ):
        if column in nodes.schema.names:
            continue
        if column != usual:
            _need(nodes, column, option)
        near = difflib.get_close_matches(column, [name.lower() for name in nodes.schema.names], n=1, cutoff=0.85)
        if near:
            name = next(name for name in nodes.schema.names if name.lower() == near[0])
            raise InputError(
                f"unknown column {shown(name)} (did you mean {column}? then --{option} {shown(name)}); rename it if it "
                "is a feature",
                file=str(nodes.files[0]),
            )


def _left_out(table: Table, used: tuple[str, ...]) -> list[str]:
    """Columns that are a pandas index and have no other use; a warning names them."""
    left = [name for name in table.schema.names if name in table.index and name not in used]
    if left:
        warnings.warn(
            f"{table.files[0]}: left out {shown(', '.join(left))}, the index of a pandas table; index=False writes "
            "none, reset_index() makes it a column that is taken",
            QgnnWarning, stacklevel=2,
        )  # fmt: skip
    return left


def _refuse_edge_columns(edges: Table, known: tuple[str, str], left_out: list[str]) -> None:
    for column in edges.schema.names:
        if column in known or column in left_out:
            continue
        file = str(edges.files[0])
        if "weight" in column.lower():
            what = f"column {shown(column)}: edge weights are not supported"
        else:
            what = f"unknown column {shown(column)} in edges, expected only {known[0]} and {known[1]}"
        raise InputError(f"{what}; drop it to use the plain graph", file=file)


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _decoded(column: pa.Array) -> pa.Array:
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _refuse_nulls(column: pa.Array, name: str, file: str, start: int, advice: str = "") -> None:
    if column.null_count:
        at = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
        raise InputError(f"column {name} is null in row {start + at}, expected a value in every row"
                         + (f"; {advice}" if advice else ""), file=file)


def _read_ids(nodes: Table, column: str) -> pa.Array:
    kind = _plain(nodes.schema.field(column).type)
    if not (pa.types.is_integer(kind) or _is_text(kind)):
        raise InputError(f"column {column} is {kind}, expected integers or text", file=str(nodes.files[0]))
    pieces = []
    for file, start, batch in nodes.batches([column], CHUNK_EDGES):
        _refuse_nulls(batch.column(0), column, file, start)
        pieces.append(_decoded(batch.column(0)))
    if _is_text(kind) and (not pa.types.is_string(kind) or sum(piece.nbytes for piece in pieces) > 2**31 - 2**20):
        # One array of `string` ends at 2 GiB; views have no such end but cannot be looked up.
        pieces = [piece.cast(pa.large_string()) for piece in pieces]
    ids = pa.concat_arrays(pieces)
    _refuse_repeats(ids, column, str(nodes.files[0]))
    return ids


def _refuse_repeats(ids: pa.Array, column: str, file: str) -> None:
    """Numbers are sorted, 8 bytes a node; Arrow's hash, which text needs, takes some 200."""
    if _is_text(ids.type):
        counts = pc.value_counts(ids) if pc.count_distinct(ids).as_py() < len(ids) else None
        if counts is None:
            return
        at = int(np.argmax(counts.field("counts").to_numpy() > 1))
        value, count = counts.field("values")[at].as_py(), counts.field("counts")[at].as_py()
    else:
        ascending = np.sort(ids.to_numpy(zero_copy_only=False))
        repeated = ascending[1:][ascending[1:] == ascending[:-1]]
        if not len(repeated):
            return
        value, count = int(repeated[0]), int((ascending == repeated[0]).sum())
    raise InputError(f"column {column} holds {shown(repr(value))} {count} times, expected every id once", file=file)


class _Ids:
    """From ids to node indices: nothing for 0..N-1, a sorted array for other integers, a hash for text."""

    def __init__(self, ids: pa.Array) -> None:
        self.ids = ids
        self.text = _is_text(ids.type)
        self._sorted: np.ndarray | None = None
        self._order: np.ndarray | None = None
        if not self.text:
            values = ids.to_numpy(zero_copy_only=False)
            if not np.array_equal(values, np.arange(len(values))):
                self._order = np.argsort(values, kind="stable")
                self._sorted = values[self._order]

    def check_type(self, kind: pa.DataType, column: str, file: str) -> None:
        """Edges name nodes by the kind of id that the nodes have."""
        kind = _plain(kind)
        if not (_is_text(kind) if self.text else pa.types.is_integer(kind)):
            raise InputError(f"column {column} is {kind}, expected {self.ids.type} like the nodes' ids", file=file)

    def find(self, column: pa.Array) -> np.ndarray:
        """int64 index of each id, -1 where no node has it."""
        column = _decoded(column)
        if self.text:
            found = pc.index_in(column.cast(self.ids.type), value_set=self.ids)
            places: np.ndarray = found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
            return places
        values = column.to_numpy(zero_copy_only=False)
        if self._sorted is None or self._order is None:
            return np.where((values >= 0) & (values < len(self.ids)), values, -1).astype(np.int64)
        low, high = self._sorted[0], self._sorted[-1]
        # Compared before they are cast: a value outside the ids' type must not wrap to one inside.
        inside = (values >= low) & (values <= high)
        wanted = np.where(inside, values, 0).astype(self._sorted.dtype)
        at = np.minimum(np.searchsorted(self._sorted, wanted), len(self._sorted) - 1)
        return np.where(inside & (self._sorted[at] == wanted), self._order[at], -1)


def _edges(edges: Table, names: ColumnNames, lookup: _Ids) -> Iterator[np.ndarray]:
    # Arrow hashes all text ids anew for each batch: with as many edges as ids, that is as much work as looking up.
    rows = max(CHUNK_EDGES, len(lookup.ids)) if lookup.text else CHUNK_EDGES
    for file, start, batch in edges.batches([names.src, names.dst], rows):
        pair = np.empty((2, batch.num_rows), np.int64)
        for side, column in enumerate((names.src, names.dst)):
            values = batch.column(column)
            _refuse_nulls(values, column, file, start)
            with arrow_errors(file):
                pair[side] = lookup.find(values)
        _refuse_unknown(batch, pair, names, file, start)
        yield pair


def _refuse_unknown(batch: pa.RecordBatch, pair: np.ndarray, names: ColumnNames, file: str, start: int) -> None:
    """Every end has to be a node. Counted in the batch alone: a large table takes long to read to its end."""
    wrong = (pair < 0).any(axis=0)
    if not wrong.any():
        return
    at, count = int(np.argmax(wrong)), int(np.count_nonzero(wrong))
    column = names.src if pair[0, at] < 0 else names.dst
    value = _decoded(batch.column(column))[at].as_py()
    more = f" ({count} of the {batch.num_rows} edges from row {start} have such an end)" if count > 1 else ""
    raise InputError(
        f"column {column} names node {shown(repr(value))} in row {start + at}, which is not among the nodes{more}; add "
        f"{'them' if more else 'it'} there or drop the edge{'s' if more else ''}",
        file=file,
    )


def _labels(nodes: Table, column: str) -> tuple[np.ndarray | None, int, list[str] | None]:
    if column not in nodes.schema.names:
        return None, 0, None
    file = str(nodes.files[0])
    kind = _plain(nodes.schema.field(column).type)
    if _is_list(kind):
        raise InputError(f"column {column} holds lists: only one label a node is supported", file=file)
    if pa.types.is_null(kind):
        return None, 0, None
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or _is_text(kind)):
        raise InputError(f"column {column} is {kind}, expected integers or text", file=file)
    pieces = [_decoded(batch.column(0)) for _, _, batch in nodes.batches([column], CHUNK_EDGES)]
    values = pa.chunked_array(pieces, type=kind)
    if pa.types.is_floating(kind):  # pandas makes them of integers with gaps
        y = values.to_numpy().astype(np.float64)
        labels, num_classes = checks.labels_from(y, nodes.num_rows, f"column {column}", file)
        return labels, num_classes, None
    if pa.types.is_integer(kind):
        y = values.fill_null(-1) if pa.types.is_signed_integer(kind) else values.cast(pa.int64()).fill_null(-1)
        labels, num_classes = checks.labels_from(y.to_numpy(), nodes.num_rows, f"column {column}", file)
        return labels, num_classes, None
    names = sorted(name for name in values.unique().to_pylist() if name is not None)
    if not names:
        return None, 0, None
    found = pc.index_in(values.cast(pa.large_string()), value_set=pa.array(names, pa.large_string()))
    return found.fill_null(-1).to_numpy().astype(np.int32), len(names), names


def _split(nodes: Table, column: str) -> np.ndarray | None:
    if column not in nodes.schema.names:
        return None
    kind = _plain(nodes.schema.field(column).type)
    if pa.types.is_null(kind):
        return None
    if not _is_text(kind):
        first = str(nodes.files[0])
        raise InputError(f"column {column} is {kind}, expected text: train, valid, test or null", file=first)
    split = np.full(nodes.num_rows, NO_SPLIT, np.int8)
    known = pa.array(list(SPLIT_WORDS), pa.large_string())
    numbers = np.array(list(SPLIT_WORDS.values()), np.int8)
    done = 0
    for file, start, batch in nodes.batches([column], CHUNK_EDGES):
        values = _decoded(batch.column(0)).cast(pa.large_string())
        index = pc.index_in(values, value_set=known)
        wrong = pc.and_(index.is_null(), values.is_valid()).to_numpy(zero_copy_only=False)
        if wrong.any():
            at = int(np.argmax(wrong))
            raise InputError(
                f"column {column} is {shown(repr(values[at].as_py()))} in row {start + at}, expected train, "
                "valid, test or null",
                file=file,
            )
        rows = np.flatnonzero(index.is_valid().to_numpy(zero_copy_only=False))
        split[done + rows] = numbers[index.drop_null().to_numpy()]
        done += batch.num_rows
    if not split.any():
        return None
    for name in ("train", "valid"):
        if not (split == SPLITS[name]).any():
            raise InputError(f"column {column} has no row with {name}, expected at least one; {checks.MOVE_SOME}",
                             file=str(nodes.files[0]))
    return split


def _features(nodes: Table, names: ColumnNames, left_out: list[str]) -> np.ndarray | None:
    """All columns without another role: numbers side by side, or one list column."""
    others = (names.node_id, names.label, names.split, *left_out)
    fields = [field for field in nodes.schema if field.name not in others]
    file = str(nodes.files[0])
    if not fields:
        return None
    lists = [field.name for field in fields if _is_list(field.type)]
    if lists and len(fields) > 1:
        raise InputError(
            f"columns {shown(', '.join(field.name for field in fields[:8]))} cannot be features together: expected "
            f"numeric columns, or one list column ({lists[0]}) alone",
            file=file,
        )
    for field in fields:
        kind = field.type.value_type if lists else field.type
        if not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
            raise InputError(
                f"unknown column {shown(field.name)} ({shown(str(field.type))}), expected numbers as features, or "
                f"{names.node_id}, {names.label}, {names.split}; drop or rename it",
                file=file,
            )
    half = all(pa.types.is_float16(field.type.value_type if lists else field.type) for field in fields)
    dtype = np.dtype(np.float16 if half else np.float32)
    return _list_column(nodes, lists[0], dtype) if lists else _number_columns(nodes, [f.name for f in fields], dtype)


def _number_columns(nodes: Table, columns: list[str], dtype: np.dtype) -> np.ndarray:
    what = f"column {columns[0]}" if len(columns) == 1 else f"columns {columns[0]} … {columns[-1]}"
    sink = checks.FeatureSink((nodes.num_rows, len(columns)), dtype, what, str(nodes.files[0]))
    done = 0
    for file, start, batch in nodes.batches(columns, ROWS_AT_ONCE):
        block = np.empty((batch.num_rows, len(columns)), dtype)
        for at, name in enumerate(columns):
            _refuse_nulls(batch.column(name), name, file, start, FILL)
            with np.errstate(over="ignore"):
                block[:, at] = batch.column(name).to_numpy(zero_copy_only=False)
        sink.put(done, block)
        done += batch.num_rows
    return sink.done()


def _list_column(nodes: Table, column: str, dtype: np.dtype) -> np.ndarray:
    sink: checks.FeatureSink | None = None
    done = width = 0
    for file, start, batch in nodes.batches([column], ROWS_AT_ONCE):
        if not batch.num_rows:
            continue
        lists = batch.column(0)
        _refuse_nulls(lists, column, file, start, FILL)
        lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
        if sink is None:
            width = int(lengths[0])
            sink = checks.FeatureSink((nodes.num_rows, width), dtype, f"column {column}", str(nodes.files[0]))
        if (lengths != width).any():
            at = int(np.argmax(lengths != width))
            raise InputError(
                f"column {column} has {lengths[at]} values in row {start + at}, expected {width} as in the first row",
                file=file,
            )
        values = lists.flatten()
        if values.null_count:
            at = int(np.argmax(values.is_null().to_numpy(zero_copy_only=False))) // width
            raise InputError(f"column {column} holds a null in row {start + at}, expected {width} numbers; {FILL}",
                             file=file)
        sink.put(done, values.to_numpy(zero_copy_only=False).reshape(batch.num_rows, width))
        done += batch.num_rows
    assert sink is not None  # a table of nodes has rows
    return sink.done()
