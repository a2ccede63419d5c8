# SPDX-License-Identifier: Apache-2.0
"""Graphs from Parquet tables: ids, columns, parts, and what is refused in one line."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from qgnn_dist.data import ColumnNames, Graph, load_graph
from qgnn_dist.errors import InputError, QgnnWarning


def nodes_table(**changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "node_id": pa.array([30, 10, 20, 50, 40]),
        "a": pa.array([0.0, 1.0, 2.0, 3.0, 4.0]),
        "b": pa.array([5, 4, 3, 2, 1], pa.int16()),
        "label": pa.array([1, 0, None, 2, -1]),
        "split": pa.array(["train", "valid", None, "test", None]),
    }
    made.update(changes)
    return {key: value for key, value in made.items() if value is not None}


def edges_table(**changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"src": pa.array([30, 10, 20, 20]), "dst": pa.array([10, 20, 20, 40])}
    made.update(changes)
    return {key: value for key, value in made.items() if value is not None}


EXPECTED_EDGES = [[0, 1, 2, 2], [1, 2, 2, 4]]


def write(folder: Path, nodes: dict[str, Any], edges: dict[str, Any]) -> str:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(nodes), folder / "nodes.parquet")
    pq.write_table(pa.table(edges), folder / "edges.parquet")
    return f"parquet:{folder}"


def edges_of(graph: Graph) -> np.ndarray:
    return np.concatenate(list(graph.edges()), axis=1)


def refused(source: str, *parts: str, columns: ColumnNames | None = None) -> None:
    with pytest.raises(InputError) as caught:
        list(load_graph(source, columns=columns).edges())
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_whole_graph(tmp_path: Path) -> None:
    graph = load_graph(write(tmp_path / "g", nodes_table(), edges_table()))
    assert (graph.name, graph.num_nodes, graph.num_classes, graph.class_names) == ("g", 5, 3, None)
    assert edges_of(graph).tolist() == EXPECTED_EDGES
    assert edges_of(graph).dtype == np.int64
    assert isinstance(graph.features, np.ndarray)
    assert graph.features.dtype == np.float32
    assert graph.features.tolist() == [[0, 5], [1, 4], [2, 3], [3, 2], [4, 1]]
    assert graph.labels is not None
    assert graph.labels.tolist() == [1, 0, -1, 2, -1]
    assert graph.split is not None
    assert graph.split.tolist() == [1, 2, 0, 3, 0]
    assert graph.node_ids is not None
    assert graph.node_ids.to_pylist() == [30, 10, 20, 50, 40]


def as_text(values: list[int], kind: Callable[[], pa.DataType] = pa.string) -> pa.Array:
    return pa.array([f"n{value}" for value in values], kind())


@pytest.mark.parametrize("kind", [pa.int8, pa.int32, pa.uint8, pa.uint64, pa.int64])
def test_integer_ids_of_any_width(tmp_path: Path, kind: Callable[[], pa.DataType]) -> None:
    source = write(tmp_path / "g", nodes_table(node_id=pa.array([30, 10, 20, 50, 40], kind())), edges_table())
    graph = load_graph(source)
    assert graph.node_ids is not None
    assert graph.node_ids.type == kind()
    assert edges_of(graph).tolist() == EXPECTED_EDGES


def test_ids_beyond_signed_integers_do_not_wrap(tmp_path: Path) -> None:
    big = 2**64 - 1
    nodes = nodes_table(node_id=pa.array([30, 10, 20, 50, big], pa.uint64()))
    unsigned = pa.array([10, 20, 20, big], pa.uint64())
    assert edges_of(load_graph(write(tmp_path / "g", nodes, edges_table(dst=unsigned)))).tolist() == EXPECTED_EDGES
    refused(write(tmp_path / "g", nodes, edges_table(dst=pa.array([10, 20, 20, -1]))), "dst names node -1 in row 3")


def test_ends_outside_all_ids_are_not_taken_for_node_zero(tmp_path: Path) -> None:
    nodes = nodes_table(node_id=pa.array([30, 10, 20, 50, 0]))
    for wrong in (-1, 99):
        edges = edges_table(dst=pa.array([10, 20, 20, wrong]))
        refused(write(tmp_path / "g", nodes, edges), f"dst names node {wrong} in row 3")


@pytest.mark.parametrize("kind", [pa.string, pa.large_string, lambda: pa.dictionary(pa.int32(), pa.string())])
def test_text_ids(tmp_path: Path, kind: Callable[[], pa.DataType]) -> None:
    nodes = nodes_table(node_id=as_text([30, 10, 20, 50, 40]).cast(kind()))
    edges = edges_table(src=as_text([30, 10, 20, 20]), dst=as_text([10, 20, 20, 40]).cast(kind()))
    graph = load_graph(write(tmp_path / "g", nodes, edges))
    assert edges_of(graph).tolist() == EXPECTED_EDGES
    assert graph.node_ids is not None
    assert graph.node_ids.to_pylist() == ["n30", "n10", "n20", "n50", "n40"]


def test_ids_that_are_the_index(tmp_path: Path) -> None:
    nodes = nodes_table(node_id=pa.array(range(5)))
    edges = edges_table(src=pa.array([0, 1, 2, 2]), dst=pa.array([1, 2, 2, 4], pa.int32()))
    assert edges_of(load_graph(write(tmp_path / "g", nodes, edges))).tolist() == EXPECTED_EDGES
    refused(write(tmp_path / "g", nodes, edges_table(src=pa.array([0, 1, 2, 5]), dst=edges["dst"])), "node 5 in row 3")


def test_folders_of_parts_are_joined_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qgnn_dist.data.parquet.CHUNK_EDGES", 2)
    monkeypatch.setattr("qgnn_dist.data.parquet.ROWS_AT_ONCE", 2)
    for name, table in (("nodes", pa.table(nodes_table())), ("edges", pa.table(edges_table()))):
        (tmp_path / name).mkdir()
        for part, (start, count) in enumerate(((0, 3), (3, 0), (3, 9))):
            pq.write_table(table.slice(start, count), tmp_path / name / f"part-{part}.parquet")
        (tmp_path / name / "_SUCCESS").touch()
    graph = load_graph(f"parquet:{tmp_path}")
    whole = load_graph(write(tmp_path / "whole", nodes_table(), edges_table()))
    assert np.array_equal(edges_of(graph), EXPECTED_EDGES)
    for name in ("features", "labels", "split"):
        assert np.array_equal(getattr(graph, name), getattr(whole, name))
    pq.write_table(pa.table(edges_table(src=as_text([1, 2, 3, 4]))), tmp_path / "edges" / "part-9.parquet")
    refused(f"parquet:{tmp_path}", "part-9.parquet", "other columns or types than part-0.parquet")


def write_arrow(path: Path, table: dict[str, Any], rows: int, compression: str | None = None) -> None:
    made = pa.table(table)
    with pa.ipc.new_file(path, made.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as out:
        for batch in made.to_batches(max_chunksize=rows):
            out.write_batch(batch)


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("rows", [2, 100])
def test_arrow_tables_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, compression: str | None
) -> None:
    """Batches of the file are larger or smaller than those that are read; text ids in a folder beside Parquet."""
    monkeypatch.setattr("qgnn_dist.data.parquet.CHUNK_EDGES", 3)
    monkeypatch.setattr("qgnn_dist.data.parquet.ROWS_AT_ONCE", 3)
    ids, ends = as_text([30, 10, 20, 50, 40]), [as_text([30, 10, 20, 20]), as_text([10, 20, 20, 40])]
    given = (nodes_table(node_id=ids), edges_table(src=ends[0], dst=ends[1]))
    want = load_graph(write(tmp_path / "p", *given))
    (tmp_path / "a" / "edges").mkdir(parents=True)
    write_arrow(tmp_path / "a" / "nodes.arrow", given[0], rows, compression)
    write_arrow(tmp_path / "a" / "edges" / "1.arrow", {k: v[:3] for k, v in given[1].items()}, rows, compression)
    pq.write_table(pa.table({k: v[3:] for k, v in given[1].items()}), tmp_path / "a" / "edges" / "2.parquet")
    got = load_graph(f"parquet:{tmp_path / 'a'}")
    assert edges_of(got).tolist() == edges_of(want).tolist() == EXPECTED_EDGES
    assert (got.edge_rows, got.num_nodes, got.node_ids) == (4, 5, want.node_ids)
    for name in ("features", "labels", "split"):
        assert np.array_equal(getattr(got, name), getattr(want, name))


def test_damaged_arrow_tables(tmp_path: Path) -> None:
    source = write(tmp_path, nodes_table(), edges_table())
    (tmp_path / "edges.arrow").write_bytes(b"ARROW1 nothing")
    refused(source, "holds the table twice, as edges.parquet and edges.arrow")
    (tmp_path / "edges.parquet").unlink()
    refused(source, "edges.arrow", "is no Arrow IPC file")
    text = {"src": as_text([1] * 40), "dst": as_text([2] * 40)}
    write_arrow(tmp_path / "edges.arrow", text, 40)
    pq.write_table(pa.table({"node_id": as_text([1, 2])}), tmp_path / "nodes.parquet")
    assert edges_of(load_graph(source)).shape == (2, 40)
    whole = bytearray((tmp_path / "edges.arrow").read_bytes())
    offsets = np.arange(41, dtype=np.int32) * 2
    whole[(at := whole.index(offsets.tobytes())) + 40:at + 44] = np.int32(10**9).tobytes()
    (tmp_path / "edges.arrow").write_bytes(whole)
    refused(source, "edges.arrow", "is damaged after row 0")


LISTS = [[0.0, 5.0], [1.0, 4.0], [2.0, 3.0], [3.0, 2.0], [4.0, 1.0]]


@pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.list_(pa.float32(), 2), pa.large_list(pa.int8())])
def test_features_as_lists(tmp_path: Path, kind: pa.DataType) -> None:
    graph = load_graph(write(tmp_path / "g", nodes_table(a=None, b=None, emb=pa.array(LISTS, kind)), edges_table()))
    assert isinstance(graph.features, np.ndarray)
    assert graph.features.dtype == np.float32
    assert graph.features.tolist() == LISTS


def test_half_precision_stays_half(tmp_path: Path) -> None:
    half = pa.array(np.arange(5, dtype=np.float16))
    graph = load_graph(write(tmp_path / "g", nodes_table(a=half, b=None), edges_table()))
    assert isinstance(graph.features, np.ndarray)
    assert graph.features.dtype == np.float16
    mixed = load_graph(write(tmp_path / "g", nodes_table(a=half), edges_table())).features
    assert isinstance(mixed, np.ndarray)
    assert mixed.dtype == np.float32


def test_ids_and_edges_are_enough(tmp_path: Path) -> None:
    source = write(tmp_path / "g", {"node_id": nodes_table()["node_id"]}, edges_table())
    graph = load_graph(source)
    assert (graph.features, graph.labels, graph.split, graph.num_classes) == (None, None, None, 0)


def test_text_labels_become_classes(tmp_path: Path) -> None:
    labels = pa.array(["dog", "cat", None, "ant", "cat"])
    graph = load_graph(write(tmp_path / "g", nodes_table(label=labels), edges_table()))
    assert graph.class_names == ["ant", "cat", "dog"]
    assert graph.labels is not None
    assert graph.labels.tolist() == [2, 1, -1, 0, 1]


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
def test_labels_that_pandas_made_floats(tmp_path: Path, kind: pa.DataType) -> None:
    labels = pa.array(np.array([1, 0, np.nan, 2, -1]), pa.float64()).cast(kind)
    given = (pa.concat_arrays([labels.slice(0, 1), pa.nulls(1, kind), labels.slice(2)]), [1, -1, -1, 2, -1])
    for column, expected in (given, (labels, [1, 0, -1, 2, -1])):
        graph = load_graph(write(tmp_path / "g", nodes_table(label=column, split=None), edges_table()))
        assert graph.labels is not None
        assert (graph.labels.tolist(), graph.labels.dtype, graph.num_classes) == (expected, np.int32, 3)


def test_a_column_of_nothing_but_nulls_says_nothing(tmp_path: Path) -> None:
    nothing = pa.nulls(5)
    graph = load_graph(write(tmp_path / "g", nodes_table(label=nothing, split=nothing), edges_table()))
    assert (graph.labels, graph.split, graph.num_classes) == (None, None, 0)


def test_other_words_for_valid(tmp_path: Path) -> None:
    words = pa.array(["train", "val", "validation", "test", "valid"])
    labels = pa.array([1, 0, 1, 2, 0])
    graph = load_graph(write(tmp_path / "g", nodes_table(split=words, label=labels), edges_table()))
    assert graph.split is not None
    assert graph.split.tolist() == [1, 2, 2, 3, 2]


def test_a_graph_may_have_no_test_nodes(tmp_path: Path) -> None:
    words = pa.array(["train", "valid", None, None, None])
    graph = load_graph(write(tmp_path / "g", nodes_table(split=words), edges_table()))
    assert graph.split is not None
    assert graph.split.tolist() == [1, 2, 0, 0, 0]


INDEX = "__index_level_0__"


def write_frames(folder: Path, nodes: pd.DataFrame, edges: pd.DataFrame) -> str:
    folder.mkdir(exist_ok=True)
    nodes.to_parquet(folder / "nodes.parquet")
    edges.to_parquet(folder / "edges.parquet")
    return f"parquet:{folder}"


def test_the_index_of_pandas_is_left_out(tmp_path: Path) -> None:
    nodes = pd.DataFrame({"node_id": [30, 10, 20, 50, 40], "a": [0.0, 1, 2, 3, 4]}).sample(frac=1, random_state=1)
    edges = pd.DataFrame({"src": [30, 10, 20, 20], "dst": [10, 20, 20, 40]}).sample(frac=1, random_state=1)
    source = write_frames(tmp_path / "g", nodes, edges)
    assert INDEX in pq.read_schema(tmp_path / "g" / "nodes.parquet").names
    with pytest.warns(QgnnWarning) as caught:
        graph = load_graph(source)
    assert [f"{name}.parquet: left out {INDEX}" in str(one.message) for name, one in zip(("edges", "nodes"), caught)
            ] == [True, True]
    assert isinstance(graph.features, np.ndarray)
    assert graph.features.ravel().tolist() == nodes["a"].tolist()
    names = ColumnNames(node_id=INDEX, src=INDEX)
    numbered = write_frames(tmp_path / "n", nodes.drop(columns="node_id"), edges.drop(columns="src"))
    graph = load_graph(numbered, columns=names)  # one that is asked for is used
    assert graph.node_ids is not None
    assert graph.node_ids.to_pylist() == nodes.index.tolist()


def test_an_index_with_a_name_of_its_own(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    nodes = pd.DataFrame({"node_id": [30, 10, 20], "a": [0.0, 1, 2], "when": ["x", "y", "z"]})
    edges = pd.DataFrame({"src": [30, 10], "dst": [10, 20]})
    assert load_graph(write_frames(tmp_path / "g", nodes.set_index("node_id")[["a"]], edges)).num_features == 1
    assert not recwarn.list  # it is the ids, and a range has no column
    with pytest.warns(QgnnWarning, match="left out when"):
        assert load_graph(write_frames(tmp_path / "g", nodes.set_index("when"), edges)).num_features == 1
    write_arrow(tmp_path / "g" / "nodes.arrow", {"node_id": pa.array([30, 10, 20]), INDEX: pa.array([1, 0, 2])}, 9)
    (tmp_path / "g" / "nodes.parquet").unlink()
    with pytest.warns(QgnnWarning, match=INDEX):  # whoever copied the table left pandas' note behind
        assert load_graph(f"parquet:{tmp_path / 'g'}").features is None


@pytest.mark.parametrize("note", [b"", b"{", b"\xff", b'{"index_columns": 7}', b'{"index_columns": [["a"], {}]}',
                                  b"[" * 99, b'{"index_columns": ["a"]}' + b" " * (1 << 20)])
def test_a_damaged_note_of_pandas_says_nothing(tmp_path: Path, note: bytes, recwarn: pytest.WarningsRecorder) -> None:
    source = write(tmp_path / "g", nodes_table(), edges_table())
    table = pa.table(nodes_table()).replace_schema_metadata({b"pandas": note})
    pq.write_table(table, tmp_path / "g" / "nodes.parquet")
    assert load_graph(source).num_features == 2
    assert not recwarn.list


def test_renamed_columns(tmp_path: Path) -> None:
    names = ColumnNames(node_id="id", src="from", dst="to", label="kind", split="part")
    nodes = {getattr(names, key, key): value for key, value in nodes_table().items()}
    edges = {getattr(names, key, key): value for key, value in edges_table().items()}
    source = write(tmp_path / "g", nodes, edges)
    graph = load_graph(source, columns=names)
    assert np.array_equal(edges_of(graph), EXPECTED_EDGES)
    assert graph.num_features == 2
    assert graph.num_classes == 3
    refused(source, "column node_id is missing", "id, a, b, kind, part", "--node-id")
    wrong = ColumnNames("id", "from", "to", "kid", "part")
    refused(source, "column kid is missing", "did you mean kind?", columns=wrong)


@pytest.mark.parametrize(
    ("nodes", "edges", "parts"),
    [
        ({"node_id": None}, {}, ["column node_id is missing"]),
        ({"node_id": pa.array([30, 10, 20, 20, 40])}, {}, ["node_id holds 20 2 times"]),
        ({"node_id": pa.array([2**64 - 1, 10, 20, 40, 2**64 - 1], pa.uint64())}, {}, [f"holds {2**64 - 1} 2 times"]),
        ({"node_id": pa.array(["a", "b", "c", "b", "b"])}, {}, ["node_id holds 'b' 3 times"]),
        ({"node_id": pa.array([30, 10, None, 50, 40])}, {}, ["node_id is null in row 2"]),
        ({"node_id": pa.array([0.5] * 5)}, {}, ["node_id is double", "integers or text"]),
        ({}, {"dst": None}, ["column dst is missing"]),
        ({}, {"dst": pa.array([10, 20, 99, 40])}, ["edges.parquet", "dst names node 99 in row 2", "not among",
                                                   "nodes; add it there or drop the edge"]),
        ({}, {"src": pa.array([30, 99, 20, 99]), "dst": pa.array([10, 20, 20, 98])},
         ["src names node 99 in row 1", "nodes (2 of the 4 edges from row 0 have such an end); add them there or "]),
        ({}, {"src": pa.array([30, 10, 20, 99]), "dst": pa.array([10, 98, 20, 40])}, ["dst names node 98 in row 1"]),
        ({}, {"dst": pa.array([10, 20, None, 40])}, ["dst is null in row 2"]),
        ({}, {"dst": as_text([10, 20, 20, 40])}, ["dst is string", "int64 like the nodes' ids"]),
        ({}, {"edge_weight": pa.array([1.0] * 4)}, ["edge_weight", "edge weights are not supported"]),
        ({}, {"when": pa.array([1] * 4)}, ["unknown column when in edges"]),
        ({"label": pa.array([[1], [0], [2], [1], [0, 1]])}, {}, ["only one label a node"]),
        ({"label": pa.array([True] * 5)}, {}, ["label is bool"]),
        ({"label": pa.array([1.0, 0.0, None, 1.5, 0.0])}, {}, ["label is 1.5 in row 3", "whole class numbers, or NaN"]),
        ({"label": pa.array([1.0, np.inf, 0, 1, 0])}, {}, ["label is inf in row 1"]),
        ({"label": pa.array([1, 0, -2, 1, 0])}, {}, ["label is -2 in row 2"]),
        ({"label": pa.array([1, 0, 77, 1, 0])}, {}, ["label is 77 in row 2"]),
        ({"label": None, "labels": pa.array([1] * 5)}, {}, ["unknown column labels", "did you mean label?"]),
        ({"split": pa.array(["train", "value", None, "test", None])}, {}, ["split is 'value' in row 1", "valid"]),
        ({"split": pa.array(["train", "test", None, "test", None])}, {}, ["no row with valid", "split the labelled"]),
        ({"split": pa.array([0, 1, 2, 0, 0])}, {}, ["split is int64", "train, valid, test"]),
        ({"split": pa.array(["test", "valid", "train", None, None])}, {}, ["1 train node has no label", "first: 2"]),
        ({"name": as_text([1, 2, 3, 4, 5])}, {}, ["unknown column name (string)"]),
        ({"a": pa.array([0.0, None, 1, 1, 1])}, {}, ["a is null in row 1", "; fill it", "or drop the column"]),
        ({"a": pa.array([0.0, np.nan, 1, np.inf, 1])}, {}, ["columns a … b holds 2 values", "rows: 1, 3"]),
        ({"emb": pa.array(LISTS)}, {}, ["a, b, emb cannot be features together"]),
        ({"a": None, "b": pa.array([*LISTS[:4], [1.0]])}, {}, ["b has 1 values in row 4, expected 2"]),
        ({"a": None, "b": pa.array([*LISTS[:4], None])}, {}, ["b is null in row 4", "; fill it"]),
        ({"a": None, "b": pa.array([*LISTS[:4], [1.0, None]])}, {}, ["b holds a null in row 4", "; fill it"]),
        ({"a": None, "b": pa.array([[]] * 5, pa.list_(pa.float32()))}, {}, ["b has no columns"]),
        ({"a": None, "b": pa.array([["x"]] * 5)}, {}, ["unknown column b (list"]),
    ],
)
def test_wrong_tables_get_one_line(
    tmp_path: Path, nodes: dict[str, Any], edges: dict[str, Any], parts: list[str]
) -> None:
    refused(write(tmp_path / "g", nodes_table(**nodes), edges_table(**edges)), *parts)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    refused(f"parquet:{tmp_path / 'none'}", "no such folder")
    refused(f"parquet:{tmp_path}", "neither nodes.parquet nor nodes.arrow nor a folder nodes")
    source = write(tmp_path, nodes_table(), edges_table())
    (tmp_path / "edges.parquet").write_bytes(b"PAR1 nothing")
    refused(source, "edges.parquet", "no Parquet file")
    (tmp_path / "edges.parquet").unlink()
    (tmp_path / "edges").mkdir()
    refused(source, "edges", "no .parquet file")
    pq.write_table(pa.table(nodes_table()).slice(0, 0), tmp_path / "nodes.parquet")
    pq.write_table(pa.table(edges_table()), tmp_path / "edges" / "p.parquet")
    refused(source, "0 nodes")


@pytest.mark.parametrize("name", ["edges.csv", "edges.csv.gz", "edges/part 1.csv"])
def test_csv_is_told_how_to_become_parquet(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path, nodes_table(), edges_table())
    (tmp_path / "edges.parquet").unlink()
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    with pa.output_stream(str(file)) as out:  # which compresses by the name's ending
        pa_csv.write_csv(pa.table(edges_table()), out)
    with pytest.raises(InputError) as caught:
        load_graph(source)
    message = str(caught.value)
    assert message.startswith(f"{file}: csv is not read, expected Parquet; convert it in its folder: python -c ")
    monkeypatch.chdir(file.parent)
    exec(message.partition('-c "')[2].removesuffix('"'), {})
    assert edges_of(load_graph(source)).tolist() == EXPECTED_EDGES
