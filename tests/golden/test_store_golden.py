# SPDX-License-Identifier: Apache-2.0
"""The store's format: logical content and file bytes of a tiny graph, and what is refused when it is opened."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from qgnn_dist.data.graph import Graph
from qgnn_dist.errors import InputError, OutputError, StoreError
from qgnn_dist.partitioning.api import partition_graph
from qgnn_dist.store.manifest import manifest_checksum
from qgnn_dist.store.reader import Store
from tests.helpers import edit_manifest

FINGERPRINT = "f1ef8aa8fb14ccc725c457b2edf63566fac30ef493e69e2966c508f20e0932cb"
CONTENT = {
    0: {"source_index": [0, 2, 1], "indptr": [0, 3, 5, 7], "indices": [2, 3, 4, 2, 3, 0, 1], "halo": [3, 5],
        "peers": [(1, [0, 1], 0, 2)]},
    1: {"source_index": [3, 5, 4], "indptr": [0, 3, 5, 7], "indices": [3, 4, 2, 3, 2, 0, 1], "halo": [0, 2],
        "peers": [(0, [0, 1], 0, 2)]},
}
"""What the arrays of each part say, whichever pyarrow wrote them; peers as (peer, rows to send, first slot, slots)."""
BYTES = {
    "0/features.arrow": "3a8f2827a1bbd31c60e11cd99733e3fd", "0/halo.arrow": "8cca09c5f46c1750cd50913fe5da47e0",
    "0/neighbours.arrow": "62d38cc6ed94732780e45d7825eb8718", "0/nodes.arrow": "a63901b93bc699ce925651413319904e",
    "0/peers.arrow": "e2fa3ea0cb7421f66f554c332ec3221a", "0/rows.arrow": "7060516db74ebdcd5620d4228f06e994",
    "0/send.arrow": "e8250fe9cfe8b930cfe70cd5ebe4a1fd",
    "1/features.arrow": "ae047468b8ada3ec9e5fe03183897aa8", "1/halo.arrow": "b6c344267ae5f4130f39087996620cf4",
    "1/neighbours.arrow": "05c7d7ed8cffa92a7f859eab74411532", "1/nodes.arrow": "ed0decbe5c2e1aafbbb6c680c4588fdf",
    "1/peers.arrow": "557853e55414385935ec4ef5e44f42f3", "1/rows.arrow": "7060516db74ebdcd5620d4228f06e994",
    "1/send.arrow": "e8250fe9cfe8b930cfe70cd5ebe4a1fd",
}
"""First half of each file's BLAKE2b, as written by the pinned pyarrow."""
PYARROW = "26.0.1"


def tiny() -> Graph:
    """Six nodes on a ring with one chord; labels, splits and string ids."""
    edges = np.array([[0, 1, 2, 3, 4, 5, 0, 2, 2], [1, 2, 3, 4, 5, 0, 3, 2, 1]])
    return Graph("tiny", 6, lambda: iter([edges]), np.arange(12, dtype=np.float32).reshape(6, 2),
                 np.array([0, 1, 0, 1, -1, 0], np.int32), 2, np.array([1, 1, 2, 2, 3, 3], np.int8),
                 pa.array(list("abcdef")), ["no", "yes"])


@pytest.fixture
def store(tmp_path: Path) -> Path:
    partition_graph(tiny(), parts=2, out=tmp_path / "s", method="random", seed=1)
    return tmp_path / "s"


def test_manifest_and_bytes(store: Path) -> None:
    manifest = json.loads((store / "manifest.json").read_text())
    assert manifest.pop("checksum") == manifest_checksum(manifest)
    del manifest["peak"]
    assert set(manifest.pop("seconds")) == {"read", "cut", "order", "build"}
    parts = manifest.pop("parts")
    assert manifest == {
        "format_version": 1, "name": "tiny", "fingerprint": FINGERPRINT, "num_nodes": 6, "num_edges": 7,
        "num_features": 2, "feature_kind": "dense", "num_classes": 2, "class_names": ["no", "yes"],
        "has_labels": True, "has_split": True,
        "partitioner": {"method": "random", "requested": "random", "reason": "asked for", "seed": 1},
        "order": {"method": "source", "requested": "auto", "reason": "6 nodes lie in the caches together"},
        "cleaned": {"self_loops": 1, "duplicates": 0, "one_way": 6, "isolated": 0}, "cut_fraction": 3 / 7,
        "balance": {"rows": 1.0, "edges": 1.0}, "halo_rows": 4, "bytes_per_round": {"2": 4, "4": 4, "32": 32}}
    assert [{k: v for k, v in p.items() if k != "files"} for p in parts] == [
        {"rows": 3, "boundary": 2, "halo": 2, "sends": 2, "peers": 1, "directed_edges": 7, "cut": 3,
         "train": train, "valid": 1, "test": test, "unsplit": 0} for train, test in ((2, 0), (0, 2))]
    assert sorted(parts[0]["files"]) == ["features.arrow", "halo.arrow", "neighbours.arrow", "nodes.arrow",
                                         "peers.arrow", "rows.arrow", "send.arrow"]
    if pa.__version__ != PYARROW:
        pytest.skip(f"bytes are golden under pyarrow {PYARROW}")
    assert {f"{i}/{name}": entry["blake2b"][:32] for i, p in enumerate(parts)
            for name, entry in p["files"].items()} == BYTES


@pytest.mark.parametrize("index", [0, 1])
def test_content(store: Path, index: int) -> None:
    part = Store.open(store).part(index)
    assert CONTENT[index] == {
        "source_index": part.source_index.tolist(), "indptr": part.indptr.tolist(), "indices": part.indices.tolist(),
        "halo": part.halo_source_index.tolist(),
        "peers": [(p.peer, p.send_rows.tolist(), p.recv_begin, p.recv_count) for p in part.peers]}
    assert part.num_boundary == 2
    assert part.degree.tolist() == np.diff(part.indptr).tolist()
    assert part.node_ids.to_pylist() == ["abcdef"[i] for i in part.source_index]
    np.testing.assert_array_equal(part.features_dense(0, 3), np.arange(12).reshape(6, 2)[part.source_index])


def test_equal_inputs_give_equal_files(store: Path, tmp_path: Path) -> None:
    partition_graph(tiny(), parts=2, out=tmp_path / "again", method="random", seed=1)
    first, second = (sorted(p.relative_to(root) for p in root.rglob("*.arrow"))
                     for root in (store, tmp_path / "again"))
    assert first == second
    for name in first:
        assert (store / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def _edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda store: edit_manifest(store, change)


@pytest.mark.parametrize(("damage", "text"), [
    (_edit(lambda m: m.update(format_version=4)), "store format 4, this program reads 1 to 3"),
    (_edit(lambda m: m.update(format_version=2)), "order is 'source' in store format 2"),
    (_edit(lambda m: m.update(order={"method": "rcm"})), "order is 'rcm' in store format 1"),
    (_edit(lambda m: (m.update(format_version=2), m.pop("order"))), "order is None"),
    (_edit(lambda m: m.update(format_version=2, order={})), "order: method is None"),
    (_edit(lambda m: m.pop("num_nodes")), "num_nodes is None"),
    (_edit(lambda m: m.update(num_nodes=7)), "the 2 parts hold 6 nodes, the manifest counts 7"),
    (_edit(lambda m: m.update(num_features=-1)), "num_features=-1 is out of range"),
    (_edit(lambda m: m["parts"][0]["files"].update({"../x.arrow": {"bytes": 1, "blake2b": ""}})), "'../x.arrow'"),
    (_edit(lambda m: m["parts"][0].pop("halo")), "part 0: halo is None"),
    (lambda s: (s / "manifest.json").write_text("{"), "manifest cannot be read"),
    (lambda s: (s / "manifest.json").unlink(), "not a store (no manifest.json)"),
    (lambda s: (s / "part-00001" / "send.arrow").unlink(), "send.arrow: file is missing"),
    (lambda s: (s / "part-00000" / "rows.arrow").write_bytes(b"x"), "rows.arrow: is 1 bytes"),
])
def test_damage_is_named_at_open(store: Path, damage: Callable[[Path], None], text: str) -> None:
    damage(store)
    with pytest.raises(StoreError) as caught:
        Store.open(store)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damage_inside_a_file_is_named(store: Path) -> None:
    file = store / "part-00000" / "nodes.arrow"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(StoreError, match=r"nodes.arrow: checksum is"):
        Store.open(store).verify()
    file.write_bytes(b"\0" * len(data))
    with pytest.raises(StoreError, match=r"nodes.arrow: damaged Arrow file"):
        Store.open(store).part(0)
    with pytest.raises(StoreError, match="no part 2"):
        Store.open(store).part(2)


def test_failed_builds_leave_nothing_and_keep_the_old(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p: p.read_bytes() for p in store.rglob("*") if p.is_file()}

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qgnn_dist.partitioning.build.write_columns", fail)
    with pytest.raises(OutputError, match="No space left on device"):
        partition_graph(tiny(), parts=2, out=store, overwrite=True)
    assert {p: p.read_bytes() for p in store.rglob("*") if p.is_file()} == before
    assert [p.name for p in store.parent.iterdir()] == ["s"]
    (store.parent / "mine").mkdir()
    with pytest.raises(InputError, match="is not a store"):
        partition_graph(tiny(), parts=2, out=store.parent / "mine", overwrite=True)
