# SPDX-License-Identifier: Apache-2.0
"""Partitioning in bounded memory: sorted runs, a hub, what a full disk says, and what a killed process leaves."""
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qgnn_dist.data import arrays
from qgnn_dist.data.arrays import NpzArchive
from qgnn_dist.data.graph import Graph
from qgnn_dist.data.load import load_graph
from qgnn_dist.errors import InputError, OutputError
from qgnn_dist.files import write
from qgnn_dist.memory import available_bytes
from qgnn_dist.partitioning import api, build, sorting
from qgnn_dist.partitioning import clean as cleaning
from qgnn_dist.partitioning.api import partition_graph
from qgnn_dist.partitioning.clean import clean
from qgnn_dist.partitioning.sorting import GrowingArray, KeySorter
from qgnn_dist.store.reader import Store
from tests.disks import tiny_disk
from tests.helpers import small_graph

FULL = r"s: cannot write the store: No space left on device \(\d+.\d\d [MG]B are free(\)|, writing the store takes)"


def _hub(nodes: int) -> Graph:
    """Node 3 beside all others, each edge twice or both ways, on a ring; given in drawn order."""
    rng = np.random.default_rng(5)
    others = np.setdiff1d(np.arange(nodes), [3])
    star = np.stack([np.full(nodes - 1, 3), others])
    ring = np.stack([np.arange(nodes), (np.arange(nodes) + 1) % nodes])
    edges = np.concatenate([star, star[::-1, ::2], star, ring], axis=1)
    edges = edges[:, rng.permutation(edges.shape[1])]
    return Graph("hub", nodes, lambda: iter(np.array_split(edges, 11, axis=1)), edge_rows=edges.shape[1])


@pytest.mark.parametrize("limit", [1, 7, 64, 1000, 10**6])
def test_runs_merge_to_the_distinct_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Uneven runs: rising keys (each run apart from the others), then drawn ones, then one key alone; repeats lie
    across blocks."""
    monkeypatch.setattr(sorting, "BLOCK_KEYS", 7)
    rng = np.random.default_rng(0)
    given = [np.arange(500) * 3, rng.integers(0, 2**62, 700), rng.integers(0, 1500, 800), np.full(300, 17),
             np.empty(0, np.int64), np.array([2**62])]
    sorter = KeySorter(limit, tmp_path)
    for keys in given:
        sorter.add(keys)
    got = list(sorter.blocks())
    np.testing.assert_array_equal(np.concatenate(got), np.unique(np.concatenate(given)))
    assert list(tmp_path.iterdir()) == []
    assert list(sorter.blocks()) == [], "the sorter is empty"


def test_no_more_than_the_limit_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every range that is merged, and of every run; all keys alike but the last ones, and all in one run."""
    sizes: list[int] = []
    monkeypatch.setattr(np, "concatenate", lambda pieces, f=np.concatenate: sizes.append(len(f(pieces))) or f(pieces))
    for keys in (np.arange(20_000), np.arange(20_000) % 50, np.random.default_rng(0).integers(0, 10**6, 20_000)):
        sorter = KeySorter(512, tmp_path)
        sorter.add(keys)
        runs = [path.stat().st_size // 8 for path in tmp_path.iterdir()]
        assert (len(runs), max(runs) <= 512) == (20_000 // 512, True)
        found = sum(len(block) for block in sorter.blocks())
        assert found == len(np.unique(keys))
    assert 0 < max(sizes) <= 512


def test_growing_arrays_grow_in_place_and_let_go() -> None:
    array = GrowingArray(np.int32)
    pieces = [np.arange(k, dtype=np.int32) for k in (0, 1, 5, 1000, 3)]
    for piece in pieces:
        array.append(piece)
    np.testing.assert_array_equal(array.take(), np.concatenate(pieces))
    assert (array.size, len(array.take())) == (0, 0)


def test_a_hub_with_more_edges_than_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its keys are split among runs and ranges; as a row it is a block of its own."""
    graph = _hub(3000)
    want = clean(graph)
    assert np.diff(want.indptr)[3] == 2999
    got = clean(graph, tmp_path, 200)
    np.testing.assert_array_equal(got.indptr, want.indptr)
    np.testing.assert_array_equal(got.indices, want.indices)
    assert got.counts == want.counts
    assert want.counts["duplicates"] >= 2999
    found = []
    for name, least in (("one", 1 << 16), ("many", 100)):
        monkeypatch.setattr(build, "LEAST_EDGES", least)
        partition_graph(graph, parts=3, out=tmp_path / name, method="random", memory_gb=1e-9)
        found.append({path.name: path.read_bytes() for path in sorted((tmp_path / name).rglob("*.arrow"))})
    assert found[0] == found[1]
    blocks = list(build._row_blocks(want.indptr, 100))
    assert [b for b, _ in blocks[1:]] == [e for _, e in blocks[:-1]]
    assert (blocks[0][0], blocks[-1][1]) == (0, 3000)
    sizes = {(b, e): want.indptr[e] - want.indptr[b] for b, e in blocks}
    assert sizes.pop((3, 4)) == 2999
    assert max(sizes.values()) <= 100


def _measure(tmp_path: Path, edges: int, **options: Any) -> int:
    """Anonymous bytes above an idle process that partitioning Parquet tables takes at its peak, libraries aside."""
    nodes, folder = 100_000, tmp_path / str(edges)
    folder.mkdir()
    rng = np.random.default_rng(edges)
    pq.write_table(pa.table({"node_id": np.arange(nodes)}), folder / "nodes.parquet")
    with pq.ParquetWriter(folder / "edges.parquet", pa.schema([("src", pa.int64()), ("dst", pa.int64())])) as out:
        # One row group of all rows: its pages may not count either.
        out.write_table(pa.table({k: rng.integers(0, nodes, edges) for k in ("src", "dst")}), row_group_size=edges)
    program = f"""
import json, sys
from qgnn_dist.data.load import load_graph
from qgnn_dist.memory import MemoryWatch, status_bytes
from qgnn_dist.partitioning.api import partition_graph
options = {options!r} | dict(parts=2, method="random", order="source")
partition_graph(load_graph("synthetic:sbm?nodes=400&edges=900"), out={str(folder / "warm")!r}, **options)
idle, watch = status_bytes("RssAnon"), MemoryWatch(0.002)
found = partition_graph(load_graph("parquet:{folder}"), out={str(folder / "store")!r}, **options)
print(json.dumps([watch.peaks()["peak_anon_bytes"] - idle, found["num_edges"]]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    peak, found_edges = json.loads(done.stdout)
    shutil.rmtree(folder)
    assert found_edges > 0.99 * edges
    return int(peak)


def test_memory_does_not_grow_with_the_edges(tmp_path: Path) -> None:
    """Four times as many edges over the same nodes: keys of 32 MB and of 128 MB, of which 16 MB may be in memory."""
    few, many = (_measure(tmp_path, edges, memory_gb=0.032) for edges in (2_000_000, 8_000_000))
    print(f"anonymous memory above idle: {few / 1e6:.0f} MB with 2 M edges, {many / 1e6:.0f} MB with 8 M")
    assert many < few + 48e6  # allocators keep more or less; the keys of 6 M edges are 96 MB
    assert many < 150e6


def test_large_arrays_of_an_archive_are_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any layout, byte order and compression; small ones stay in memory."""
    monkeypatch.setattr(arrays, "IN_MEMORY_BYTES", 1000)
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 300)
    rng = np.random.default_rng(0)
    given = {"c": rng.integers(0, 9, (2, 700)), "f": np.asfortranarray(rng.random((70, 9))), "small": np.arange(5),
             "swapped": rng.integers(0, 9, 500).astype(">i4"), "scalar": np.int64(3), "none": np.empty((0, 4))}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **given)
        with NpzArchive(tmp_path / "a.npz") as archive:
            for name, want in given.items():
                got = archive.read(name)
                np.testing.assert_array_equal(got, want)
                assert got.dtype == want.dtype.newbyteorder("=")
                assert got.dtype.isnative
                base = got
                while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
                    base = base.base
                assert isinstance(base, np.memmap) == (name in ("c", "f", "swapped")), name


def test_memory_is_recorded_and_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = partition_graph(small_graph(), parts=2, out=tmp_path / "s", memory_gb=1.5)
    assert found["peak"]["memory_gb"] == 1.5
    assert set(found["peak"]["anon_bytes_by_stage"]) == {"read", "cut", "order", "build"}
    assert 0 < found["peak"]["builder_anon_bytes"] <= 1.01 * found["peak"]["peak_anon_bytes"]
    assert all("peak_anon_bytes" not in entry for entry in Store.open(tmp_path / "s").manifest["parts"])
    assert 0 < available_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(api, "available_bytes", lambda: 5 * 10**9)
    assert partition_graph(small_graph(), parts=2, out=tmp_path / "t")["peak"]["memory_gb"] == 2.5
    with pytest.raises(InputError, match="--memory -1: expected more than 0 GB"):
        partition_graph(small_graph(), parts=2, out=tmp_path / "u", memory_gb=-1)
    assert build.edges_at_once(10**9, 1) == build.MOST_EDGES
    assert build.edges_at_once(10**9, 8) == 10**9 // 1600
    assert build.edges_at_once(1, 8) == build.LEAST_EDGES


def test_room_is_asked_for_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = _hub(3000)
    free = [10**9]
    monkeypatch.setattr(write.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, free[0]))
    partition_graph(graph, parts=2, out=tmp_path / "s")
    free = [10_000]
    monkeypatch.setattr(write.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, free[0]))
    monkeypatch.setattr(api, "clean", lambda *_: pytest.fail("edges were read"))
    with pytest.raises(OutputError, match=r"new: writing the store takes about \d.\d\d MB of disk, 0.01 MB are free"):
        partition_graph(graph, parts=2, out=tmp_path / "deep" / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize(("size", "step"), [("512k", "reading"), ("2m", "reading"), ("2800k", "building")])
def test_a_disk_that_is_really_full(size: str, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the runs (1.6 MB), while they merge (0.8 MB more), and in the parts: one line, and nothing is left."""
    steps: list[str] = []
    monkeypatch.setattr(api, "LEAST_KEYS", 20_000)
    edges = np.random.default_rng(0).integers(0, 5000, (2, 100_000))
    graph = Graph("full", 5000, lambda: iter([edges]), np.ones((5000, 24), np.float32))
    with tiny_disk(size) as folder:
        monkeypatch.setattr(api, "check_room", lambda *_: None)
        with pytest.raises(OutputError, match=FULL):
            partition_graph(graph, parts=2, out=folder / "s", method="random", memory_gb=1e-9, progress=steps.append)
        assert steps[-1].split()[0] == step
        assert list(folder.iterdir()) == []
        monkeypatch.undo()
        with pytest.raises(OutputError, match=r"writing the store takes about \d.\d\d MB of disk, \d.\d\d MB are free"):
            partition_graph(graph, parts=2, out=folder / "s", method="random")
        assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("module", "name"), [(cleaning, "append"), (build, "append"), (build, "save_array"),
                                              (build, "write_values"), (build, "write_columns")])
def test_a_disk_that_fills_at_any_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, name, full)
    with pytest.raises(OutputError, match=FULL):
        partition_graph(small_graph(), parts=2, out=tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_goes_with_the_next(tmp_path: Path) -> None:
    """Of the same store alone, and not while its process lives."""
    program = f"""
import os, sys, time
from tests.disks import tiny_disk
from tests.helpers import small_graph
from qgnn_dist.partitioning.api import partition_graph
def wait(*_):
    print("building", flush=True)
    time.sleep(60)
partition_graph(small_graph(), parts=2, out={str(tmp_path / "s")!r}, run_builders=wait)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True,
                          cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "building\n"
        (left,) = tmp_path.iterdir()
        partition_graph(small_graph(), parts=2, out=tmp_path / "s")
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([left.name, "s"]), "its process lives"
        os.kill(process.pid, signal.SIGKILL)
    partition_graph(small_graph(), parts=2, out=tmp_path / "s2")
    assert left.exists(), "another store's"
    partition_graph(small_graph(), parts=2, out=tmp_path / "s", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s", "s2"]
    assert not (tmp_path / "s" / "lock").exists()


def test_sources_say_how_many_edges_they_yield(tmp_path: Path) -> None:
    pq.write_table(pa.table({"node_id": [1, 2, 3]}), tmp_path / "nodes.parquet")
    pq.write_table(pa.table({"src": [1, 2, 2, 3], "dst": [2, 3, 3, 3]}), tmp_path / "edges.parquet")
    np.savez(tmp_path / "g.npz", edge_index=np.array([[0, 1, 1], [1, 2, 0]]))
    for source in (f"parquet:{tmp_path}", str(tmp_path / "g.npz"), "synthetic:sbm?nodes=400&edges=900"):
        graph = load_graph(source)
        assert graph.edge_rows == sum(chunk.shape[1] for chunk in graph.edges()) > 0
