# SPDX-License-Identifier: Apache-2.0
"""Building a store: reassembly over feature blocks, empty parts, bytes that do not vary, and all-or-nothing writes."""
from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from qgnn_dist.data.graph import Graph, SparseFeatures
from qgnn_dist.errors import InputError, OutputError, StoreError
from qgnn_dist.files import folders
from qgnn_dist.partitioning import api, build
from qgnn_dist.partitioning.api import partition_graph
from qgnn_dist.partitioning.clean import clean
from qgnn_dist.store import reader, writer
from qgnn_dist.store.reader import Store
from tests.helpers import make_store, small_graph


def _snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_dense_features_over_several_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: type) -> None:
    for module in (build, reader):
        monkeypatch.setattr(module, "FEATURE_BLOCK_ROWS", 16)
    x = np.random.default_rng(0).normal(size=(100, 7)).astype(dtype)
    store = make_store(dataclasses.replace(small_graph(nodes=100), features=x), tmp_path / "s", 2)
    part = store.part(1)
    assert part.num_local == 50
    want = x[part.source_index].astype(np.float32)
    for begin, end in ((0, 50), (0, 16), (15, 17), (16, 32), (31, 50), (48, 50), (20, 20), (50, 50)):
        got = part.features_dense(begin, end)
        assert got.dtype == np.float32
        assert got.flags.c_contiguous
        np.testing.assert_array_equal(got, want[begin:end])
    kind = pa.ipc.open_file(str(store.path / "part-00001" / "features.arrow")).schema.field("x").type
    assert kind == pa.list_(pa.from_numpy_dtype(dtype), 7)


def test_sparse_feature_blocks(tmp_path: Path) -> None:
    graph = small_graph(nodes=100, sparse=True)
    assert isinstance(graph.features, SparseFeatures)
    part = make_store(graph, tmp_path / "s", 2).part(0)
    for begin, end in ((0, 50), (10, 30), (50, 50)):
        got, want = part.features_sparse(begin, end), graph.features.rows(part.source_index[begin:end])
        for name in ("indptr", "indices", "values"):
            np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
            assert getattr(got, name).dtype == getattr(want, name).dtype


@pytest.mark.parametrize("sparse", [False, True])
def test_parts_without_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sparse: bool) -> None:
    def owners(indptr: np.ndarray, *_: Any) -> tuple[np.ndarray, dict[str, Any]]:
        given = np.zeros(len(indptr) - 1, np.int32)
        given[::3] = 2
        return given, {}

    monkeypatch.setitem(api.METHODS, "random", owners)
    monkeypatch.setattr(build, "MOST_EDGES", 16)
    store = make_store(small_graph(nodes=90, sparse=sparse), tmp_path / "s", 4)
    for index in (1, 3):
        part = store.part(index)
        assert (part.num_local, part.num_boundary, part.num_halo, part.peers) == (0, 0, 0, [])
        assert (part.indptr.tolist(), len(part.indices), len(part.node_ids)) == ([0], 0, 0)
        x = part.features_sparse(0, 0) if sparse else part.features_dense(0, 0)
        assert x.shape == (0, 24)
    assert [plan.peer for plan in store.part(0).peers] == [2]
    assert store.manifest["balance"]["rows"] == pytest.approx(60 / 22.5)
    assert store.verify() == len(list(store.path.rglob("*.arrow")))


def test_edges_alone(tmp_path: Path) -> None:
    edges = np.array([[0, 1, 1], [1, 0, 2]])
    graph = Graph("bare", 5, lambda: iter([edges]))
    store = make_store(graph, tmp_path / "s", 2)
    assert (store.num_features, store.feature_kind, store.num_classes) == (0, None, 0)
    assert not store.has_labels
    assert not store.has_split
    assert store.manifest["cleaned"] == {"self_loops": 0, "duplicates": 0, "one_way": 1, "isolated": 2}
    assert store.manifest["bytes_per_round"]["2"] == sum(e["sends"] for e in store.manifest["parts"])
    part = store.part(0)
    assert part.labels is None
    assert part.split is None
    assert part.node_ids.to_pylist() == part.source_index.tolist()


def test_plans_of_every_pair_agree_and_halo_names_its_rows(tmp_path: Path) -> None:
    store = make_store(small_graph(), tmp_path / "s", 5)
    parts = [store.part(i) for i in range(5)]
    pairs = 0
    for part in parts:
        filled = 0
        for plan in part.peers:
            back = next(p for p in parts[plan.peer].peers if p.peer == part.index)
            sent = parts[plan.peer].source_index[back.send_rows]
            np.testing.assert_array_equal(
                sent, part.halo_source_index[plan.recv_begin:plan.recv_begin + plan.recv_count])
            filled += plan.recv_count
            pairs += 1
        assert filled == part.num_halo
    assert pairs == 20


@pytest.mark.parametrize("method", ["metis", "stream", "random"])
def test_numbers_of_the_report(tmp_path: Path, method: str) -> None:
    graph = small_graph()
    cleaned = clean(graph)
    store = make_store(graph, tmp_path / "s", 3, method, seed=3)
    owners = np.empty(graph.num_nodes, np.int32)
    for i in range(3):
        owners[store.part(i).source_index] = i
    rows = np.repeat(np.arange(graph.num_nodes), np.diff(cleaned.indptr))
    cut = owners[rows] != owners[cleaned.indices]
    halo = {(int(owners[r]), int(c)) for r, c in zip(rows[cut], cleaned.indices[cut])}
    manifest = store.manifest
    assert manifest["cut_fraction"] == pytest.approx(cut.sum() / 2 / cleaned.num_edges)
    assert manifest["halo_rows"] == len(halo)
    assert [e["halo"] for e in manifest["parts"]] == [sum(p == i for p, _ in halo) for i in range(3)]
    assert [e["boundary"] for e in manifest["parts"]] == [
        len(np.unique(rows[cut & (owners[rows] == i)])) for i in range(3)]
    assert manifest["bytes_per_round"] == {"2": 2 * len(halo), "4": 3 * len(halo), "32": 20 * len(halo)}
    edges = np.bincount(owners[rows], minlength=3)
    assert manifest["balance"] == {"rows": pytest.approx(np.bincount(owners).max() / 100),
                                   "edges": pytest.approx(edges.max() / edges.mean())}
    assert graph.split is not None
    for name, number in (("unsplit", 0), ("train", 1), ("valid", 2), ("test", 3)):
        assert [e[name] for e in manifest["parts"]] == [
            int((graph.split[owners == i] == number).sum()) for i in range(3)]
    assert manifest["peak"]["peak_rss_bytes"] >= manifest["peak"]["peak_anon_bytes"] > 0


def test_fingerprint_is_of_the_graph_alone(tmp_path: Path) -> None:
    """Not of the cut, the order of its edges, their repeats, or how its ids lie in memory; but of all else."""
    graph = small_graph(nodes=60)
    ids = pa.array([f"n{i}" for i in range(62)])
    graph.node_ids = ids.slice(1, 60)
    edges = np.concatenate(list(graph.edges()), axis=1)
    shuffled = np.concatenate([edges[::-1], edges, [[3], [3]]], axis=1)[:, ::-1]
    assert isinstance(graph.features, np.ndarray)
    assert graph.labels is not None

    def fingerprint(given: Graph, parts: int = 2, **options: Any) -> str:
        return str(partition_graph(given, parts=parts, out=tmp_path / "s", overwrite=True, **options)["fingerprint"])

    first = fingerprint(graph)
    same = [fingerprint(graph, parts, method=method, seed=seed)
            for parts, method, seed in ((1, "auto", 0), (4, "random", 1), (3, "stream", 2), (7, "metis", 3))]
    same.append(fingerprint(dataclasses.replace(graph, edges=lambda: iter(np.array_split(shuffled, 9, axis=1)))))
    same.append(fingerprint(dataclasses.replace(graph, node_ids=pa.array(graph.node_ids.to_pylist()))))
    assert set(same) == {first}
    features, labels = graph.features.copy(), graph.labels.copy()
    features[59, 3] += 1
    labels[0] = (labels[0] + 1) % 5
    others = [dataclasses.replace(graph, features=features), dataclasses.replace(graph, labels=labels),
              dataclasses.replace(graph, node_ids=None), dataclasses.replace(graph, split=None),
              dataclasses.replace(graph, edges=lambda: iter([edges[:, :-1]])),
              dataclasses.replace(graph, node_ids=ids.slice(2, 60))]
    assert len({first, *(fingerprint(other) for other in others)}) == 7


@pytest.mark.parametrize("method", ["metis", "stream", "random"])
def test_equal_inputs_give_equal_bytes_and_seeds_matter(tmp_path: Path, method: str) -> None:
    graph = small_graph()
    snapshots = []
    for number, seed in enumerate((1, 1, 2)):
        make_store(graph, tmp_path / str(number), 3, method, seed=seed)
        snapshots.append({k: v for k, v in _snapshot(tmp_path / str(number)).items() if k != "manifest.json"})
    assert snapshots[0] == snapshots[1]
    assert (snapshots[0] != snapshots[2]) or method == "metis"


def test_builders_get_every_part_and_may_run_in_any_order(tmp_path: Path) -> None:
    asked: list[int] = []

    def backwards(task: Callable[[str, int], dict[str, Any]], scratch: str, parts: list[int]) -> list[dict[str, Any]]:
        asked.extend(parts)
        return [task(scratch, part) for part in reversed(parts)][::-1]

    partition_graph(small_graph(), parts=3, out=tmp_path / "a", method="random", run_builders=backwards)
    partition_graph(small_graph(), parts=3, out=tmp_path / "b", method="random")
    assert asked == [0, 1, 2]
    first, second = _snapshot(tmp_path / "a"), _snapshot(tmp_path / "b")
    assert {k: v for k, v in first.items() if k != "manifest.json"} == {
        k: v for k, v in second.items() if k != "manifest.json"}
    assert sorted(first) == sorted(["manifest.json", *(f"part-0000{i}/{name}.arrow" for i in range(3) for name in (
        "features", "halo", "neighbours", "nodes", "peers", "rows", "send"))])


def test_hosts_that_do_not_share_the_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="this host does not see the new store's folder"):
        build.build_part(str(tmp_path / "elsewhere"), 0)

    def elsewhere(task: Callable[[str, int], dict[str, Any]], scratch: str, parts: list[int]) -> list[dict[str, Any]]:
        entries = [task(scratch, part) for part in parts]
        (Path(scratch) / "part-00001" / "rows.arrow").unlink()
        return entries

    with pytest.raises(StoreError, match=r"part-00001/rows.arrow: file is missing"):
        partition_graph(small_graph(), parts=2, out=tmp_path / "s", run_builders=elsewhere)
    assert list(tmp_path.iterdir()) == []


def _fail(*_: Any, **__: Any) -> Any:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(("module", "name"), [(build, "write_columns"), (api, "spool"), (writer, "read_manifest"),
                                              (writer, "sync_folder"), (build, "write_batches")])
def test_a_failed_build_leaves_nothing_and_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any,
                                                         name: str) -> None:
    old = make_store(small_graph(seed=1), tmp_path / "s", 2)
    before = _snapshot(tmp_path)
    monkeypatch.setattr(module, name, _fail)
    for out in (tmp_path / "s", tmp_path / "new" / "deep" / "t"):
        with pytest.raises(OutputError, match="cannot write the store: No space left on device"):
            partition_graph(small_graph(), parts=3, out=out, overwrite=True)
    assert _snapshot(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    assert old.verify() == 14


def test_a_failed_rename_brings_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(small_graph(seed=1), tmp_path / "s", 2)
    before = _snapshot(tmp_path)
    rename = os.rename

    def fail_second(source: Any, target: Any) -> None:
        if str(source).endswith(".tmp"):
            _fail()
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_second)
    with pytest.raises(OutputError, match="No space left"):
        partition_graph(small_graph(), parts=3, out=tmp_path / "s", overwrite=True)
    assert _snapshot(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_interrupts_leave_nothing(tmp_path: Path) -> None:
    def stop(*_: Any) -> list[dict[str, Any]]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        partition_graph(small_graph(), parts=2, out=tmp_path / "a" / "s", run_builders=stop)
    assert list(tmp_path.iterdir()) == []


def test_overwriting(tmp_path: Path) -> None:
    store = make_store(small_graph(seed=1), tmp_path / "s", 2)
    mapped = store.part(0)
    rows = np.array(mapped.source_index)
    with pytest.raises(InputError, match=r"s: output exists; add --overwrite to replace it"):
        partition_graph(small_graph(), parts=3, out=tmp_path / "s")
    assert Store.open(tmp_path / "s").fingerprint == store.fingerprint
    partition_graph(small_graph(), parts=3, out=tmp_path / "s", overwrite=True)
    again = Store.open(tmp_path / "s")
    assert (again.num_parts, again.fingerprint != store.fingerprint) == (3, True)
    np.testing.assert_array_equal(mapped.source_index, rows)  # readers of the old one keep it
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="is not a store"):
        partition_graph(small_graph(), parts=2, out=tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    make_store(small_graph(seed=1), tmp_path / "disk" / "s", 2)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "s")
    partition_graph(small_graph(), parts=3, out=tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert Store.open(tmp_path / "disk" / "s").num_parts == 3
    assert sorted(p.name for p in tmp_path.rglob("*") if p.parent in (tmp_path, tmp_path / "disk")) == [
        "disk", "link", "s"]


def test_summary_is_the_manifest_without_files(tmp_path: Path) -> None:
    steps: list[str] = []
    summary = partition_graph(small_graph(), parts=2, out=tmp_path / "s", method="random", progress=steps.append)
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    count = sum(entry.pop("files")["features.arrow"]["bytes"] for entry in manifest["parts"])
    parts = [{"part": i, **entry} for i, entry in enumerate(manifest["parts"])]
    assert {**manifest, "feature_bytes": count, "num_parts": 2, "parts": parts} == summary
    assert steps == ["reading and sorting the edges", "partitioning into 2 by random", "ordering the nodes",
                     "building the parts"]


def test_what_killed_builds_left_goes_with_the_next(tmp_path: Path) -> None:
    store = make_store(small_graph(seed=1), tmp_path / "s", 2)
    kept = {name: tmp_path / name for name in (".s.1-aa.tmp", ".s.2-bb.tmp", ".other.3-cc.old", ".s.fresh.tmp",
                                                 ".s.t.7-aa.tmp", ".s.t.8-bb.old")}
    gone = {name: tmp_path / name for name in (".s.4-dd.old", ".s.5-ee.tmp", ".s.6-ff.tmp")}
    for folder in [*kept.values(), *gone.values()]:
        folder.mkdir()
        (folder / "file").write_text("x")
    for name in (".s.1-aa.tmp", ".s.2-bb.tmp", ".s.t.7-aa.tmp"):
        (kept[name] / "lock").touch()
    (gone[".s.5-ee.tmp"] / "lock").touch()  # nobody holds it
    os.utime(gone[".s.6-ff.tmp"], (1e9, 1e9))  # killed before it had a lock, or after it gave it back
    with folders.held(kept[".s.1-aa.tmp"]) as first, folders.held(kept[".s.2-bb.tmp"]) as second:
        assert first
        assert second
        with folders.held(kept[".s.1-aa.tmp"]) as taken:
            assert not taken
        partition_graph(small_graph(), parts=2, out=tmp_path / "s", overwrite=True)
    assert not any(folder.exists() for folder in gone.values())
    assert all((folder / "file").exists() for folder in kept.values())
    assert Store.open(tmp_path / "s").fingerprint != store.fingerprint


def test_a_store_that_only_lies_aside_stays_until_a_new_one_is_whole(tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that replaced it was killed between its two renames."""
    aside = tmp_path / ".s.1-aa.old"
    os.rename(make_store(small_graph(seed=1), tmp_path / "s", 1).path, aside)
    with monkeypatch.context() as patch:
        patch.setattr(build, "write_columns", _fail)
        with pytest.raises(OutputError):
            partition_graph(small_graph(), parts=1, out=tmp_path / "s")
    assert Store.open(aside).num_parts == 1
    partition_graph(small_graph(), parts=1, out=tmp_path / "s")
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
