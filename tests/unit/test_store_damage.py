# SPDX-License-Identifier: Apache-2.0
"""Damage inside files, and manifests that contradict themselves: named, and never computed on."""
from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from qgnn_dist.data.graph import SparseFeatures
from qgnn_dist.errors import StoreError
from qgnn_dist.store.columns import write_columns
from qgnn_dist.store.describe import describe_store
from qgnn_dist.store.reader import Part, Store
from tests.helpers import edit_manifest, make_store, small_graph

Change = Callable[[np.ndarray], Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(small_graph(nodes=60, features=6), tmp_path_factory.mktemp("whole") / "s", 3).path


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "s")


def _rewrite(store: Path, file: str, column: str, change: Change) -> None:
    """Change one array of part 1 and let the manifest believe it."""
    path = store / "part-00001" / file
    batch = pa.ipc.open_file(path.read_bytes()).get_batch(0)
    columns: dict[str, Any] = {name: batch.column(name) for name in batch.schema.names}
    array = columns[column].to_numpy().copy()
    returned = change(array)
    columns[column] = array if returned is None else returned
    write_columns(path, columns)
    edit_manifest(store, lambda m: m["parts"][1]["files"][file].update(bytes=path.stat().st_size))


def _set(at: int, value: int) -> Change:
    def change(array: np.ndarray) -> None:
        array[at] = value
    return change


def _swap(first: int, second: int) -> Change:
    def change(array: np.ndarray) -> None:
        array[[first, second]] = array[[second, first]]
    return change


@pytest.mark.parametrize(("file", "column", "change", "text"), [
    ("rows.arrow", "indptr", _set(0, 1), "rows.arrow: row pointer runs from 1 to"),
    ("rows.arrow", "indptr", _set(3, 10**12), "rows.arrow: row pointer falls after row 3"),
    ("rows.arrow", "indptr", lambda a: a[:-1], "rows.arrow: a column is int64 with 20 values"),
    ("rows.arrow", "indptr", lambda a: a.astype(np.int32), "rows.arrow: a column is int32 with 21 values"),
    ("neighbours.arrow", "index", _set(5, -1), "neighbours.arrow: neighbour 5 is -1, expected 0 to"),
    ("neighbours.arrow", "index", _set(6, 2**31 - 1), "neighbours.arrow: neighbour 6 is 2147483647, expected 0 to"),
    ("nodes.arrow", "source_index", _set(0, 60), "nodes.arrow: source_index 0 is 60, expected 0 to 59"),
    ("nodes.arrow", "source_index", _swap(1, 2), "nodes.arrow: source_index does not rise after row"),
    ("nodes.arrow", "degree", _set(2, 77), "nodes.arrow: degrees differ"),
    ("nodes.arrow", "label", _set(4, 5), "nodes.arrow: label 4 is 5, expected -1 to 4"),
    ("nodes.arrow", "split", _set(4, 9), "nodes.arrow: split 4 is 9, expected 0 to 3"),
    ("peers.arrow", "peer", _set(0, 1), "peers.arrow: peer 1 follows -1 in the plan of part 1 of 3"),
    ("peers.arrow", "peer", _set(1, 3), "peers.arrow: peer 3 follows 0"),
    ("peers.arrow", "peer", _set(0, -2), "peers.arrow: peer -2 follows -1"),
    ("peers.arrow", "recv_begin", _set(1, 0), "peers.arrow: peer 2: "),
    ("peers.arrow", "recv_count", _set(1, -5), "peers.arrow: peer 2: -5 halo slots"),
    ("peers.arrow", "recv_count", _set(1, 2**40), "peers.arrow: plans receive"),
    ("peers.arrow", "send_count", _set(0, 2**40), "peers.arrow: rows to send do not follow"),
    ("peers.arrow", "send_begin", _set(1, 2), "peers.arrow: rows to send do not follow"),
    ("send.arrow", "row", _set(0, 20), "send.arrow: peer 0: row to send 0 is 20, expected 0 to"),
    ("send.arrow", "row", _swap(0, 1), "send.arrow: peer 0: rows to send do not rise"),
    ("send.arrow", "row", lambda a: a[:-1], "send.arrow: a column is int32"),
])
def test_arrays_that_contradict_are_refused_on_load(store: Path, file: str, column: str, change: Change,
                                                    text: str) -> None:
    _rewrite(store, file, column, change)
    opened = Store.open(store)
    opened.part(0)
    with pytest.raises(StoreError) as caught:
        opened.part(1)
    assert text in str(caught.value)
    assert str(store / "part-00001") in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(StoreError, match=f"{file}: checksum is"):
        opened.verify()


def test_a_missing_column_is_named(store: Path) -> None:
    write_columns(store / "part-00000" / "send.arrow", {"rows": np.zeros(3, np.int32)})
    edit_manifest(store, lambda m: m["parts"][0]["files"]["send.arrow"].update(
        bytes=(store / "part-00000" / "send.arrow").stat().st_size))
    with pytest.raises(StoreError, match=r"send.arrow: column row is missing; found rows"):
        Store.open(store).part(0)


@pytest.mark.parametrize(("kind", "text"), [
    ("width", "columns are .*expected x: float32 or float16 \\[6\\]"), ("rows", "holds 19 of the rows 0…20")])
def test_dense_features_of_another_shape(store: Path, kind: str, text: str) -> None:
    rows, width = (20, 5) if kind == "width" else (19, 6)
    column = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(rows * width, np.float32)), width)
    path = store / "part-00001" / "features.arrow"
    write_columns(path, {"x": column})
    edit_manifest(store, lambda m: m["parts"][1]["files"]["features.arrow"].update(bytes=path.stat().st_size))
    part = Store.open(store).part(1)
    assert part.num_local == 20
    with pytest.raises(StoreError, match=text):
        part.features_dense(0, 20)


@pytest.mark.parametrize(("file", "column", "change", "text"), [
    ("features.arrow", "index", _set(0, 6), "feature index 0 is 6, expected 0 to 5"),
    ("feature_rows.arrow", "indptr", _set(1, 10**9), "row pointer falls after row 1"),
    ("feature_rows.arrow", "indptr", _set(-1, -1), "row pointer falls after row 19"),
])
def test_sparse_features_out_of_range(tmp_path: Path, file: str, column: str, change: Change, text: str) -> None:
    store = make_store(small_graph(nodes=60, features=6, sparse=True), tmp_path / "s", 3).path
    _rewrite(store, file, column, change)
    part = Store.open(store).part(1)
    with pytest.raises(StoreError, match=text):
        part.features_sparse(0, 20)


@pytest.mark.parametrize(("change", "text"), [
    (lambda m: m.update(format_version=True), "format_version is True"),
    (lambda m: m.update(format_version="1"), "store format 1, this program reads 1"),
    (lambda m: m.update(feature_kind="dens"), "feature_kind is 'dens' with 6 features"),
    (lambda m: m.update(feature_kind=None), "feature_kind is None with 6 features"),
    (lambda m: m.update(class_names=["a"]), "class_names are not 5 texts"),
    (lambda m: m.update(fingerprint="../../etc"), "fingerprint is '../../etc', expected 64 hex digits"),
    (lambda m: m.update(cut_fraction=float("nan")), "holds NaN, expected finite numbers"),
    (lambda m: m.update(cut_fraction=1.5), "cut_fraction is 1.5"),
    (lambda m: m.update(num_classes=2**31), "num_classes is 2147483648, expected at most 65536"),
    (lambda m: m.update(name="\ud800"), "manifest cannot be read"),
    (lambda m: m["partitioner"].update(seed="7"), "partitioner: seed is '7'"),
    (lambda m: m["balance"].update(rows=10**400), "balance: rows=1000"),
    (lambda m: m.update(seconds=[1]), "seconds is no object"),
    (lambda m: m["parts"][0].update(train="many"), "part 0: train is 'many'"),
    (lambda m: m.update(num_edges=1), "directed edges, the manifest counts 2"),
    (lambda m: m.update(halo_rows=1), "halo rows, the manifest counts 1"),
    (lambda m: m.update(parts=[]), "the 0 parts hold 0 nodes, the manifest counts 60"),
    (lambda m: m["parts"][1].update(boundary=21), "part 1: 21 boundary rows"),
    (lambda m: m["parts"][1]["files"].pop("rows.arrow"), "part 1: the manifest does not list rows.arrow"),
    (lambda m: m["parts"][1]["files"].update({"/etc/passwd": {"bytes": 1, "blake2b": ""}}), "'/etc/passwd' is not one"),
    (lambda m: m["parts"][1]["files"].update({"a.arrow\n": {"bytes": 1, "blake2b": ""}}), "is not one that a store"),
    (lambda m: m["parts"][1]["files"]["rows.arrow"].pop("blake2b"), "part 1: rows.arrow has no size and checksum"),
    (lambda m: m["parts"].append(7), "part 3 is no object"),
    (lambda m: m.pop("cleaned"), "cleaned is None"),
])
def test_manifests_that_contradict_are_refused(store: Path, change: Callable[[dict[str, Any]], Any],
                                               text: str) -> None:
    edit_manifest(store, change)
    with pytest.raises(StoreError) as caught:
        Store.open(store)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[1]", "null", "[" * 100_000, '{"format_version": 1', "\ufeff{}", "\0"])
def test_manifests_that_are_no_manifest(store: Path, text: str) -> None:
    (store / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match=r"manifest.json: (store format None|manifest cannot be read)"):
        Store.open(store)


def test_paths_that_are_no_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="not a store but a file"):
        Store.open(tmp_path / "file")
    with pytest.raises(StoreError, match=r"not a store \(no manifest.json\)"):
        Store.open(tmp_path / "absent")


def _read_all(part: Part) -> None:
    part.node_ids.to_pylist()
    if part.feature_kind == "dense":
        part.features_dense(0, part.num_local)
    else:
        part.features_sparse(0, part.num_local)
    part.halo_source_index.sum()


@pytest.mark.parametrize("sparse", [False, True])
def test_flipped_bytes_never_crash_and_are_always_seen_by_verify(tmp_path: Path, sparse: bool) -> None:
    """Bytes of every file are flipped in turn; loading either works or says which file."""
    store = make_store(small_graph(nodes=40, features=6, sparse=sparse), tmp_path / "s", 2)
    rng = np.random.default_rng(0)
    errors: list[str] = []
    for file in sorted((store.path / "part-00000").iterdir()):
        whole = file.read_bytes()
        for at in rng.integers(0, len(whole), 25):
            broken = bytearray(whole)
            broken[at] ^= int(rng.integers(1, 256))
            file.unlink()  # a new file: the old one may still be mapped
            file.write_bytes(broken)
            try:
                _read_all(Store.open(store.path).part(0))
            except StoreError as error:
                errors.append(str(error))
            with pytest.raises(StoreError, match=f"{file.name}: checksum is"):
                store.verify()
        file.unlink()
        file.write_bytes(whole)
    assert len(errors) > 20
    assert all("part-00000" in text and "\n" not in text for text in errors)
    assert store.verify() == len(list(store.path.rglob("*.arrow")))


def test_describe_is_json_and_counts_verified_files(store: Path) -> None:
    opened = Store.open(store)
    described = json.loads(json.dumps(describe_store(opened, verify=True)))
    assert described["verified_files"] == len(list(store.rglob("*.arrow"))) == 21
    assert described["num_parts"] == 3
    assert [p["part"] for p in described["parts"]] == [0, 1, 2]
    assert "files" not in described["parts"][0]
    assert "verified_files" not in describe_store(opened)
    (store / "part-00002" / "rows.arrow").write_bytes(b"\0" * (store / "part-00002" / "rows.arrow").stat().st_size)
    with pytest.raises(StoreError, match=r"part-00002/rows.arrow: checksum is"):
        describe_store(opened, verify=True)


def test_arrays_are_views_of_the_file(store: Path) -> None:
    part = Store.open(store).part(0)
    for array in (part.indptr, part.indices, part.source_index, part.degree, part.labels, part.split):
        assert array is not None
        assert not array.flags.owndata
        assert not array.flags.writeable
    rows = part.features_dense(3, 9)
    assert not rows.flags.owndata
    assert rows.flags.c_contiguous


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="no /proc here")
def test_pages_that_only_the_checks_read_are_given_back(tmp_path: Path) -> None:
    """Ids, labels, splits and source indices of an open part take no memory until somebody asks for them."""
    part = make_store(small_graph(nodes=40_000, classes=5, features=2, degree=2), tmp_path / "s", 1).part(0)

    def resident(name: str) -> int:
        lines, found = Path("/proc/self/smaps").read_text(encoding="ascii").splitlines(), 0
        for head, line in enumerate(lines):
            if line.endswith(str(part.folder / name)):
                found += int(next(row for row in lines[head:] if row.startswith("Rss:")).split()[1]) * 1024
        return found

    assert resident("nodes.arrow") == 0
    assert resident("rows.arrow") >= part.indptr.nbytes
    assert part.source_index.sum() == 40_000 * 39_999 // 2
    assert 0 < resident("nodes.arrow") < part.source_index.nbytes + 2**18


def test_sparse_pieces_are_views(tmp_path: Path) -> None:
    part = make_store(small_graph(nodes=60, features=6, sparse=True), tmp_path / "s", 1).part(0)
    piece = part.features_sparse(10, 20)
    assert isinstance(piece, SparseFeatures)
    assert piece.shape == (10, 6)
    assert not piece.values.flags.owndata
    assert not piece.values.flags.writeable
