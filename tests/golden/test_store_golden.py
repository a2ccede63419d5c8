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
from qgnn_dist.errors import InputError, StoreError
from qgnn_dist.partitioning.api import partition_graph
from qgnn_dist.store.reader import Store

FINGERPRINT = "9cac5110230655fb38098da14b7b6c8b70d517194b0b12a0c8938b790762a890"
NODES = {
    0: "a63901b93bc699ce925651413319904e5927d7244f85b94c83fc23bf7eadd9bf",
    1: "ed0decbe5c2e1aafbbb6c680c4588fdfb85262f78bba80fbf4e72afc463d6804",
}
"""BLAKE2b of each part's nodes.arrow, as written by the pinned pyarrow."""
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
    del manifest["peak"]
    parts = manifest.pop("parts")
    assert manifest == {
        "format_version": 1, "name": "tiny", "fingerprint": FINGERPRINT, "num_nodes": 6, "num_edges": 7,
        "num_features": 2, "feature_kind": "dense", "num_classes": 2, "class_names": ["no", "yes"],
        "has_labels": True, "has_split": True,
        "partitioner": {"method": "random", "requested": "random", "reason": "asked for", "seed": 1},
        "cleaned": {"self_loops": 1, "duplicates": 0, "one_way": 6, "isolated": 0}, "cut_fraction": 3 / 7,
        "balance": manifest["balance"], "halo_rows": sum(p["halo"] for p in parts),
        "bytes_per_round": {str(b): sum(p["sends"] for p in parts) * -(-2 * b // 8) for b in (2, 4, 32)}}
    assert sorted(parts[0]["files"]) == ["features.arrow", "halo.arrow", "neighbours.arrow", "nodes.arrow",
                                         "peers.arrow", "rows.arrow", "send.arrow"]
    if pa.__version__ != PYARROW:
        pytest.skip(f"bytes are golden under pyarrow {PYARROW}")
    assert {i: p["files"]["nodes.arrow"]["blake2b"] for i, p in enumerate(parts)} == NODES


def test_equal_inputs_give_equal_files(store: Path, tmp_path: Path) -> None:
    partition_graph(tiny(), parts=2, out=tmp_path / "again", method="random", seed=1)
    first, second = (sorted(p.relative_to(root) for p in root.rglob("*.arrow"))
                     for root in (store, tmp_path / "again"))
    assert first == second
    for name in first:
        assert (store / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def _edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(store: Path) -> None:
        manifest = json.loads((store / "manifest.json").read_text())
        change(manifest)
        (store / "manifest.json").write_text(json.dumps(manifest))
    return apply


@pytest.mark.parametrize(("damage", "text"), [
    (_edit(lambda m: m.update(format_version=2)), "store format 2, this program reads 1"),
    (_edit(lambda m: m.pop("num_nodes")), "num_nodes is None"),
    (_edit(lambda m: m.update(num_nodes=7)), "parts hold 6 rows, the manifest counts 7"),
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


def test_plans_out_of_range_are_refused(store: Path) -> None:
    from qgnn_dist.store.columns import write_columns

    _edit(lambda m: m["parts"][0]["files"].pop("send.arrow"))(store)
    send = store / "part-00000" / "send.arrow"
    count = Store.open(store).manifest["parts"][0]["sends"]
    write_columns(send, {"row": np.full(count, 99, np.int32)})
    with pytest.raises(StoreError, match="exchange plan is out of range"):
        Store.open(store).part(0)


def test_failed_builds_leave_nothing_and_keep_the_old(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p: p.read_bytes() for p in store.rglob("*") if p.is_file()}

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qgnn_dist.partitioning.build.write_columns", fail)
    with pytest.raises(InputError, match="No space left on device"):
        partition_graph(tiny(), parts=2, out=store, overwrite=True)
    assert {p: p.read_bytes() for p in store.rglob("*") if p.is_file()} == before
    assert [p.name for p in store.parent.iterdir()] == ["s"]
    (store.parent / "mine").mkdir()
    with pytest.raises(InputError, match="is not a store"):
        partition_graph(tiny(), parts=2, out=store.parent / "mine", overwrite=True)
