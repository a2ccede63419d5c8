# SPDX-License-Identifier: Apache-2.0
"""What the benches of ours beside stock share: the graph, what fits in memory, what is compared with what."""
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qgnn_dist.bench.bars import draw_bars
from qgnn_dist.bench.beside import compare, tables
from qgnn_dist.bench.footprint import Need, Sizes, measure_apart, misfits, need
from qgnn_dist.bench.source import dense_features, drawn_store, write_npz
from qgnn_dist.bench.turns import spread, take_turns
from qgnn_dist.cluster import api
from qgnn_dist.errors import QgnnError
from qgnn_dist.store.reader import Store
from tests.helpers import make_store, small_graph


def _row(system: str, kind: str, ms: float | None) -> dict[str, Any]:
    times = {"ms_median": ms} if ms is None else {"ms_median": ms, "ms_p10": ms - 1, "ms_p90": ms + 1}
    return {"system": system, "kind": kind, "shape": "a", "threads": 2, "nodes": 3, **times,
            **({"why": "does not fit: needs much"} if ms is None else {})}


def test_rows_are_compared_with_the_fastest_eager_stock() -> None:
    rows = [_row("torch-csr", "smp-merged", 60.0), _row("torch-sparse", "smp-merged", 40.0),
            _row("torch-compile", "smp-merged", 20.0), _row("pyg", "smp-merged", None),
            _row("qgnn-int2", "smp-merged", 10.0), _row("torch-csr", "smp-two", 90.0),
            _row("qgnn-int2", "smp-two", 30.0)]
    compare(rows)
    assert [row.get("speedup") for row in rows] == [40 / 60, 1, 2, None, 4, 1, 3]
    assert [row.get("speedup_over_two") for row in rows] == [1.5, 90 / 40, 4.5, None, 9, None, None]
    assert rows[4]["stock"] == "torch-sparse"
    title, columns, lines = tables({"bench": "inference", "rows": rows})[0]
    assert title == "a, smp-merged, 2 threads: features to classes"
    assert columns == ["system", "ms", "10-90 %", "x stock", "x stock, two rounds"]
    assert lines[3] == ["pyg", "does not fit: needs much", "–", "–", "–"]
    assert lines[4] == ["qgnn-int2", "10.0", "9.0-11.0", "4.00", "9.00"]
    left, right = draw_bars(rows).axes
    assert [bar.get_width() for bar in left.patches] == [60, 40, 20, 10]
    assert [text.get_text() for text in left.texts][3] == "does not fit"
    assert [bar.get_width() for bar in right.patches] == [90, 30]


def test_what_fits_beside_what() -> None:
    needs = {"a": Need({"x": 100}, 10, 50), "b": Need({"x": 100, "y": 30}, 0, 60), "c": Need({"x": 100, "z": 80}, 0, 1),
             "d": Need({"x": 100}, 5, 40)}
    assert misfits(needs, 1000) == {}
    # Left: 200 for a; 200 - 110 for b, which wants 90; 200 - 140 for c, which wants 81, and for d, which wants 45.
    assert list(misfits(needs, 200)) == ["c"]
    assert list(misfits(needs, 159)) == ["a", "b", "c"]
    assert misfits({"a": Need({}, 3 << 30, 1 << 30)}, 1 << 30) == {
        "a": "does not fit: needs about 4.00 GiB, 1.00 GiB are left"}


def test_estimates_follow_the_arrays() -> None:
    sizes = Sizes(nodes=1000, edges=20000, features=10, hidden=64, classes=4)
    assert need("torch-csr", sizes, training=False) == Need({"features": 40_000, "torch-csr": 168_000}, 0, 272_000)
    pyg = need("pyg", sizes, training=False)
    assert pyg.working == 6 * 16_000 + 2 * 16 * 21_000
    assert need("qgnn-int2", sizes, training=False).shared["graph"] == 100_000
    # At products' shape PyG's messages alone are more than most machines have.
    products = Sizes(nodes=2_449_029, edges=123_718_280, features=100, hidden=256, classes=47)
    assert need("pyg", products, training=False).total > 48e9
    assert need("torch-csr", products, training=False).total < 8e9


def _allocate(size: int, more: int) -> Any:
    held = np.ones(size, np.uint8)
    return lambda: {"sum": int(np.ones(more, np.uint8)[:3].sum()) + int(held[0])}


def test_memory_of_a_process() -> None:
    found = measure_apart(_allocate, 40 << 20, 70 << 20, modules=["numpy"])
    assert found["sum"] == 4
    # Resident pages are counted up to some hundreds of KiB a process.
    assert 39 << 20 <= found["input_bytes"] < 45 << 20
    assert 109 << 20 <= found["peak_bytes"] < 118 << 20


def _free_and_take() -> Any:
    def run() -> None:
        small = []
        for size in (20, 18, 30):
            held = np.ones(size << 20, np.uint8)
            small.append(np.ones(100_000, np.uint8))  # lies behind what is freed now
            del held

    return run


def test_freed_arrays_do_not_count() -> None:
    """Left to itself, glibc keeps the second array of 18 MiB: its threshold has grown to the first one's size."""
    assert measure_apart(_free_and_take, modules=["numpy"])["peak_bytes"] < 36 << 20


def _refuse() -> Any:
    raise ValueError("too narrow\nby far")


def test_what_fails_in_a_process_is_one_line() -> None:
    with pytest.raises(QgnnError, match=r"^failed: too narrow$"):
        measure_apart(_refuse)
    with pytest.raises(QgnnError, match="process died"):
        measure_apart(os._exit, 9)


def test_turns_alternate_and_the_first_warms_up() -> None:
    order: list[str] = []
    systems = {name: lambda name=name: order.append(name) or len(order) for name in "ab"}  # type: ignore[misc]
    times, results = take_turns(systems, 3, lambda _: None)
    assert "".join(order) == "abababab"
    assert [len(times[name]) for name in "ab"] == [3, 3]
    assert results == {"a": 7, "b": 8}
    assert spread([3.0, 1.0, 2.0]) == {"ms_median": 2.0, "ms_p10": 1.2, "ms_p90": 2.8, "repeats": 3}


def test_npz_is_the_same_graph(tmp_path: Path) -> None:
    graph = small_graph()
    assert graph.labels is not None
    graph.labels = np.maximum(graph.labels, 0)  # a source demands labels in its splits
    store = make_store(graph, tmp_path / "s", 1)
    write_npz(store, tmp_path / "graph.npz")
    api.partition(tmp_path / "graph.npz", parts=1, out=tmp_path / "again")
    one, two = store.part(0), Store.open(tmp_path / "again").part(0)
    for name in ("indptr", "indices", "labels", "split"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)
    np.testing.assert_array_equal(dense_features(one), dense_features(two))


def test_a_drawn_store_is_an_induced_subgraph(tmp_path: Path) -> None:
    store = make_store(small_graph(), tmp_path / "s", 1)
    assert drawn_store(store, 300, tmp_path / "none") is store
    whole, drawn = store.part(0), drawn_store(store, 120, tmp_path / "d").part(0)
    rows = np.sort(np.random.default_rng(0).choice(300, 120, replace=False))
    adjacency, found = np.zeros((300, 300), bool), np.zeros((120, 120), bool)
    adjacency[np.repeat(np.arange(300), whole.degree), whole.indices] = True
    found[np.repeat(np.arange(120), drawn.degree), drawn.indices] = True
    np.testing.assert_array_equal(found, adjacency[np.ix_(rows, rows)])
    assert found.any()
    assert whole.labels is not None
    np.testing.assert_array_equal(drawn.labels, whole.labels[rows])
    np.testing.assert_array_equal(dense_features(drawn), dense_features(whole)[rows])
