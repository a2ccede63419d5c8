# SPDX-License-Identifier: Apache-2.0
"""Dense features as codes in the store: what the grids keep, what readers get, and what is refused."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from qgnn_dist.data.graph import Graph
from qgnn_dist.errors import InputError, StoreError
from qgnn_dist.partitioning import build, features
from qgnn_dist.partitioning.api import partition_graph
from qgnn_dist.quant.columns import ColumnGrids
from qgnn_dist.quant.packed import unpack_codes
from qgnn_dist.store import reader
from qgnn_dist.store.columns import write_columns
from qgnn_dist.store.describe import describe_store
from qgnn_dist.store.reader import Store
from tests.helpers import edit_manifest, goes_on_alone, make_store, small_graph


def _grids(x: np.ndarray, bits: int) -> ColumnGrids:
    exact = x.astype(np.float64)
    return ColumnGrids.fit(x, exact.min(0), exact.max(0), exact.mean(0), bits)


def _mixed(rows: int = 5000) -> np.ndarray:
    """Columns of several kinds: normal, its thousandth, a few outliers, 0 and 1, constant, exponential, 0 alone."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 7))
    x[:, 1] *= 1e-3
    x[rng.integers(0, rows, 5), 2] = 50
    x[:, 3] = x[:, 3] > 1
    x[:, 4], x[:, 6] = 0.1, 0
    x[:, 5] = rng.exponential(size=rows)
    return x.astype(np.float32)


@pytest.mark.parametrize(("bits", "most"), [(8, 0.01), (4, 0.13), (2, 0.38)])
def test_what_the_grids_keep(bits: int, most: float) -> None:
    x = _mixed()
    grids = _grids(x, bits)
    payload = grids.pack(x)
    assert payload.shape == (5000, -(-7 * bits // 8))
    got = grids.unpack(payload)
    assert got.dtype == np.float32
    for exact in (3, 4, 6):
        np.testing.assert_array_equal(got[:, exact], x[:, exact])
    error = np.sqrt(np.square(got - x).mean(0)) / x.std(0).clip(1e-9)
    print(f"{bits} bits: error by column {np.round(error, 4)}")
    assert (np.delete(error, 2) <= most).all()
    own = dataclasses.replace(grids, low=x.min(0), high=x.max(0))
    gain = np.square(own.unpack(own.pack(x)) - x).sum(0) / np.square(got - x).sum(0).clip(1e-9)
    print(f"{bits} bits: squared error with the columns' own ends over that with the searched ones {np.round(gain, 2)}")
    assert (gain[[0, 1, 2, 5]] > 0.999).all()
    assert gain[[0, 2]].min() > (1.02 if bits < 8 else 0.999)
    assert (got.min(0) >= x.min(0)).all(), "non-negative columns stay so"
    codes = unpack_codes(payload, bits, 7).astype(np.float64)
    values = (grids.low + (grids.high.astype(np.float64) - grids.low) * codes / (2**bits - 1)).astype(np.float32)
    np.testing.assert_allclose(got, values, rtol=1e-7, atol=0)


def test_no_rows() -> None:
    grids = ColumnGrids(2, np.zeros(5, np.float32), np.ones(5, np.float32))
    assert grids.unpack(grids.pack(np.empty((0, 5), np.float32))).shape == (0, 5)


def _coded(graph: Graph, path: Path, parts: int, bits: int | None, **more: Any) -> Store:
    partition_graph(graph, parts=parts, out=path, method="random", features_bits=bits, **more)
    return Store.open(path)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_readers_get_the_same_numbers_whatever_the_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int,
                                                       dtype: type) -> None:
    for module in (build, reader):
        monkeypatch.setattr(module, "FEATURE_BLOCK_ROWS", 16)
    monkeypatch.setattr(features, "BLOCK_ROWS", 32)
    monkeypatch.setattr(features, "SAMPLE_ROWS", 40)
    x = _mixed(120).astype(dtype)
    graph = dataclasses.replace(small_graph(nodes=120), features=x)
    plain = make_store(graph, tmp_path / "plain", 2)
    stores = [_coded(graph, tmp_path / str(parts), parts, bits, order=order)
              for parts, order in ((1, "source"), (3, "degree"))]
    found = []
    for store in stores:
        rows = np.empty((120, 7), np.float32)
        for part in (store.part(i) for i in range(store.num_parts)):
            source = np.asarray(part.source_index)
            rows[source] = part.features_dense(0, part.num_local)
            for begin, end in ((0, 17), (15, 33), (20, 20), (part.num_local, part.num_local)):
                got = part.features_dense(begin, end)
                assert got.dtype == np.float32
                assert got.flags.c_contiguous
                np.testing.assert_array_equal(got, rows[source[begin:end]])
        found.append(rows)
        assert store.manifest["format_version"] == 3
        assert store.feature_bits == bits
        assert store.fingerprint == plain.fingerprint
        assert store.verify() == 8 * store.num_parts
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - x).max() > 0
    np.testing.assert_array_equal(found[0][:, 3], x[:, 3])


def test_bits_and_bytes_are_told(tmp_path: Path) -> None:
    graph = small_graph(nodes=4000, features=64)
    sizes = {bits: describe_store(_coded(graph, tmp_path / str(bits), 2, bits), verify=True)["feature_bytes"]
             for bits in (None, 8, 4, 2)}
    for bits in (8, 4, 2):
        payload = 4000 * 64 * bits / 8
        assert payload <= sizes[bits] <= payload + 4000, "a few headers and grids on top"
    assert sizes[None] >= 4000 * 64 * 4
    described = describe_store(Store.open(tmp_path / "4"))
    assert described["feature_bits"] == 4
    assert "feature_bits" not in describe_store(Store.open(tmp_path / "None"))


@pytest.mark.parametrize(("bits", "kind", "text"), [
    (3, "dense", "--features-bits 3: expected 8, 4 or 2"),
    (16, "dense", "--features-bits 16: expected 8, 4 or 2"),
    (4, "sparse", "--features-bits 4: small has sparse features, and only dense ones are coded"),
    (4, "none", "--features-bits 4: small has no features"),
    (8, "nan", "features hold NaN or infinity (first row: 77)"),
])
def test_refused(tmp_path: Path, bits: int, kind: str, text: str) -> None:
    graph = small_graph(sparse=kind == "sparse")
    if kind == "none":
        graph = dataclasses.replace(graph, features=None)
    if kind == "nan":
        assert isinstance(graph.features, np.ndarray)
        graph.features[77, 3] = np.inf
    with pytest.raises(InputError) as caught:
        _coded(graph, tmp_path / "s", 2, bits)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bits", [None, 4])
def test_what_was_read_does_not_stay_resident(tmp_path: Path, bits: int | None) -> None:
    """The features' file is mapped as long as somebody looks at its rows, and no longer."""
    part = _coded(small_graph(), tmp_path / "s", 1, bits).part(0)
    file = str(part.folder / "features.arrow")

    def mapped() -> bool:
        return file in Path("/proc/self/maps").read_text()

    rows = part.features_dense(0, 200)
    assert mapped() == (bits is None), "float rows are views, decoded ones are not"
    assert rows.sum() != 0
    del rows
    assert not mapped()


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(("change", "text"), [
    (lambda m: m.update(feature_bits=3), "feature_bits is 3 with dense features in store format 3"),
    (lambda m: m.update(feature_bits=True), "feature_bits is True with dense"),
    (lambda m: m.pop("feature_bits"), "feature_bits is None with dense features in store format 3"),
    (lambda m: m.update(format_version=1), "feature_bits is 4 with dense features in store format 1"),
    (lambda m: m.pop("order"), "order is None"),
    (lambda m: m["parts"][1]["files"].pop("feature_grids.arrow"), "does not list feature_grids.arrow"),
])
def test_manifests_that_contradict_are_refused(tmp_path: Path, change: Change, text: str) -> None:
    store = _coded(small_graph(), tmp_path / "s", 2, 4)
    edit_manifest(store.path, change)
    with pytest.raises(StoreError) as caught:
        Store.open(store.path)
    assert text in str(caught.value)


@pytest.mark.parametrize(("file", "columns", "text"), [
    ("feature_grids.arrow", {"low": np.full(24, np.nan, np.float32), "high": np.ones(24, np.float32)},
     "feature_grids.arrow: a column's grid is not a range"),
    ("feature_grids.arrow", {"low": np.full(24, 2, np.float32), "high": np.ones(24, np.float32)},
     "feature_grids.arrow: a column's grid is not a range"),
    ("feature_grids.arrow", {"low": np.zeros(23, np.float32), "high": np.ones(23, np.float32)},
     "feature_grids.arrow: a column is float with 23 values"),
    ("features.arrow", {"x": pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(150 * 24, np.float32)), 24)},
     "expected x: uint8 [12]"),
    ("features.arrow", {"x": pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(149 * 12, np.uint8)), 12)},
     "holds 149 of the rows 0…150"),
])
def test_damage_is_named(tmp_path: Path, file: str, columns: dict[str, Any], text: str) -> None:
    store = _coded(small_graph(), tmp_path / "s", 2, 4)
    path = store.path / "part-00000" / file
    write_columns(path, columns)
    edit_manifest(store.path, lambda m: m["parts"][0]["files"][file].update(bytes=path.stat().st_size))
    opened = Store.open(store.path)
    with pytest.raises(StoreError) as caught:
        opened.part(0).features_dense(0, 150)
    assert text in str(caught.value)
    with pytest.raises(StoreError, match=f"{file}: checksum is"):
        opened.verify()


def test_a_run_goes_on_with_the_same_features_alone(tmp_path: Path) -> None:
    plain, coded = make_store(small_graph(), tmp_path / "p", 1), _coded(small_graph(), tmp_path / "c", 1, 8)
    goes_on_alone(plain, coded, tmp_path / "run", "feature_bits", "features of another width")
