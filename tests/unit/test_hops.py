# SPDX-License-Identifier: Apache-2.0
"""Means over neighbours beside a node's own features: their numbers, whatever the cut, and what is refused."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qgnn_dist.data.graph import Graph
from qgnn_dist.errors import InputError, StoreError
from qgnn_dist.partitioning import hops as hops_module
from qgnn_dist.partitioning.api import partition_graph
from qgnn_dist.store.reader import Store
from tests.helpers import edit_manifest, features_of, goes_on_alone, small_graph


def _made(graph: Graph, path: Path, parts: int = 1, hops: int = 2, **more: Any) -> Store:
    partition_graph(graph, parts=parts, out=path, method="random" if "like" not in more else "auto", hops=hops, **more)
    return Store.open(path)


def _reference(graph: Graph, hops: int) -> tuple[np.ndarray, list[float]]:
    """By a dense matrix in double."""
    mean = np.eye(graph.num_nodes)
    for chunk in graph.edges():
        mean[chunk[0], chunk[1]] = mean[chunk[1], chunk[0]] = 1
    mean /= mean.sum(1, keepdims=True)
    x = np.asarray(graph.features, np.float64)
    pieces, scales = [x], []
    for hop in range(1, hops + 1):
        mixed = np.linalg.matrix_power(mean, hop) @ x
        scales.append(float(np.sqrt(np.square(x).mean() / np.square(mixed).mean())))
        pieces.append(mixed * scales[-1])
    return np.concatenate(pieces, 1), scales


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_numbers_whatever_the_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: type) -> None:
    monkeypatch.setattr(hops_module, "BLOCK_ROWS", 64)
    graph = small_graph(signed=True)
    graph = dataclasses.replace(graph, features=np.asarray(graph.features).astype(dtype))
    stores = [_made(graph, tmp_path / str(parts), parts, order=order)
              for parts, order in ((1, "source"), (3, "degree"))]
    expected, scales = _reference(graph, 2)
    for store in stores:
        assert (store.hops, store.num_features, store.feature_kind) == (2, 72, "dense")
        np.testing.assert_allclose(store.manifest["hops"]["scales"], scales, rtol=1e-6)
        np.testing.assert_allclose(features_of(store), expected, rtol=2e-5, atol=2e-6)
    np.testing.assert_array_equal(features_of(stores[0]), features_of(stores[1]))
    np.testing.assert_array_equal(features_of(stores[0])[:, :24], np.asarray(graph.features, np.float32))
    plain = _made(graph, tmp_path / "plain", hops=0)
    assert plain.hops == 0
    assert "hops" not in plain.manifest
    assert plain.fingerprint == stores[0].fingerprint
    assert not list((tmp_path / "1").glob("*.npy"))


def test_rows_that_a_disk_or_a_view_gives(tmp_path: Path) -> None:
    """A column-major array is copied; neighbours are read from rows in one piece."""
    graph = small_graph(signed=True)
    turned = dataclasses.replace(graph, features=np.asfortranarray(graph.features))
    one, other = (features_of(_made(g, tmp_path / str(i))) for i, g in enumerate((graph, turned)))
    np.testing.assert_array_equal(one, other)


def test_hops_and_codes_at_rest(tmp_path: Path) -> None:
    graph = small_graph(signed=True)
    store = _made(graph, tmp_path / "store", 2, features_bits=8)
    assert (store.hops, store.feature_bits, store.num_features) == (2, 8, 72)
    expected = _reference(graph, 2)[0]
    assert np.abs(features_of(store) - expected).max() <= 0.02 * np.abs(expected).max()


def test_a_later_graph_keeps_the_scales(tmp_path: Path) -> None:
    graph = small_graph(signed=True)
    first = _made(graph, tmp_path / "first", 2)
    later = dataclasses.replace(graph, features=2 * np.asarray(graph.features))
    half = dataclasses.replace(graph, edges=lambda: iter([next(graph.edges())[:, ::2]]))
    assert _made(half, tmp_path / "own", 2).manifest["hops"]["scales"] != first.manifest["hops"]["scales"]
    like = _made(half, tmp_path / "like", 2, like=tmp_path / "first")
    assert like.manifest["hops"]["scales"] == first.manifest["hops"]["scales"]
    np.testing.assert_allclose(features_of(like), features_of(_made(half, tmp_path / "own2", 2)) * np.repeat(
        [1.0, *np.divide(first.manifest["hops"]["scales"], Store.open(tmp_path / "own2").manifest["hops"]["scales"])],
        24), rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="has features of 2 hops, --hops is 1: expected the same"):
        _made(later, tmp_path / "other", 2, hops=1, like=tmp_path / "first")


def test_what_is_refused(tmp_path: Path) -> None:
    graph = small_graph()
    for hops in (-1, 9):
        with pytest.raises(InputError, match=f"--hops {hops}: expected 0 to 8"):
            _made(graph, tmp_path / "store", hops=hops)
    for features, what in ((None, "no"), (small_graph(sparse=True).features, "sparse")):
        with pytest.raises(InputError, match=f"small has {what} features, and only dense ones are mixed"):
            _made(dataclasses.replace(graph, features=features), tmp_path / "store")
    broken = np.array(graph.features)
    broken[17, 3] = np.nan
    with pytest.raises(InputError, match=r"NaN or infinity \(first row: 17\)"):
        _made(dataclasses.replace(graph, features=broken), tmp_path / "store")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("change", "message"), [
    (lambda m: m["hops"].update(count=1), "hops has count 1 and 2 scales"),
    (lambda m: m["hops"].update(scales=[1.0, 0.0]), "hops has count 2"),
    (lambda m: m["hops"].update(scales=[1.0, "x"]), "hops has count 2"),
    (lambda m: m["hops"].update(count=True), "hops"),
    (lambda m: m["hops"].update(scales=[1.0, 10**400]), "hops has count 2"),
    (lambda m: m.update(hops=3), "hops"),
])
def test_a_manifest_that_is_odd(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    _made(small_graph(), tmp_path / "store")
    edit_manifest(tmp_path / "store", change)
    with pytest.raises(StoreError, match=message):
        Store.open(tmp_path / "store")


def test_a_run_goes_on_with_the_same_hops_alone(tmp_path: Path) -> None:
    plain, mixed = (_made(small_graph(), tmp_path / str(hops), hops=hops) for hops in (0, 1))
    goes_on_alone(plain, mixed, tmp_path / "run", "hops", "features of other hops")
