# SPDX-License-Identifier: Apache-2.0
"""The cache of a host, and stores that are read through it: bounded, checked, shared, never emptied under a user."""
from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import qgnn_dist as qgnn
from qgnn_dist.config import StorageConfig
from qgnn_dist.errors import DeadlineError, InputError, StorageError, StoreError
from qgnn_dist.storage.cache import Cache, FileEntry
from qgnn_dist.storage.place import Place
from qgnn_dist.store.reader import Store
from tests.helpers import make_store, small_graph
from tests.s3 import BUCKET, S3

FILE_BYTES = 1000


def _settings(folder: Path, files: int = 100, fetch_s: float = 20.0) -> StorageConfig:
    """A cache with room for so many files."""
    return StorageConfig(cache_dir=str(folder / "cache"), cache_gb=files * FILE_BYTES / 1e9, retry_s=0.5,
                         fetch_s=fetch_s)


def _entry(name: str) -> tuple[Place, dict[str, FileEntry]]:
    """A place with one object, x, and what it has to be."""
    place = Place(f"s3://{BUCKET}/{name}", StorageConfig())
    place.at("x").write(name.encode().ljust(FILE_BYTES))
    return place, {"x": FileEntry(FILE_BYTES, place.at("x").checksum())}


@pytest.fixture
def fetches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """URIs of all objects that are fetched from now on."""
    found, fetch = list[str](), Place.fetch

    def note(self: Place, to: Path, size: int | None = None, blake2b: str | None = None) -> None:
        found.append(self.uri)
        fetch(self, to, size, blake2b)

    monkeypatch.setattr(Place, "fetch", note)
    return found


def test_fetched_once_and_again_where_damaged(s3: S3, tmp_path: Path, fetches: list[str],
                                              caplog: pytest.LogCaptureFixture) -> None:
    place, files = _entry("a")
    cache = Cache(_settings(tmp_path))
    for count in (1, 1):
        with caplog.at_level(logging.WARNING):
            held = cache.open(place, files)
        assert (held.folder / "x").read_bytes() == b"a".ljust(FILE_BYTES)
        assert len(fetches) == count
        held.close()
    assert caplog.text == ""
    for damage in (b"b".ljust(FILE_BYTES), b"short"):
        file = held.folder / "x"
        file.write_bytes(damage)
        with caplog.at_level(logging.WARNING):
            cache.open(place, files).close()
        assert file.read_bytes() == b"a".ljust(FILE_BYTES)
        assert "is damaged, and fetched again" in caplog.text
        caplog.clear()
    assert len(fetches) == 3
    (held.folder / ".x.1.tmp").write_bytes(b"of a process that was killed")
    cache.open(place, files).close()
    assert sorted(f.name for f in held.folder.iterdir()) == ["fill", "use", "x"]


def test_the_bound_is_kept(s3: S3, tmp_path: Path) -> None:
    """The longest unused goes; what is open stays, and what does not fit beside it is refused."""
    cache, places = Cache(_settings(tmp_path, files=2)), [_entry(name) for name in "abcd"]

    def there() -> int:
        return sum(file.stat().st_size for file in (tmp_path / "cache" / "parts").rglob("x"))

    a = cache.open(*places[0])
    b = cache.open(*places[1])
    with pytest.raises(InputError, match=r"a part of 0.00 GB does not fit .*storage.cache_gb=2e-06, of which 0.00 GB"):
        cache.open(*places[2])
    a.close()
    b.close()
    time.sleep(0.01)
    cache.open(*places[0]).close()  # so that b is the longest unused
    time.sleep(0.01)
    c = cache.open(*places[2])
    assert (a.folder.exists(), b.folder.exists(), c.folder.exists()) == (True, False, True)
    d = cache.open(*places[3])
    assert (a.folder.exists(), c.folder.exists(), d.folder.exists()) == (False, True, True)
    assert there() == 2 * FILE_BYTES
    (tmp_path / "cache" / "parts" / "half").mkdir()  # what a killed removal leaves
    (tmp_path / "cache" / "parts" / "half" / "x").write_bytes(bytes(FILE_BYTES))
    d.close()
    cache.open(*places[3]).close()
    assert there() == 2 * FILE_BYTES


HOLD = """
import sys, time
from tests.unit.test_storage_cache import _entry, _settings
from pathlib import Path
from qgnn_dist.storage.cache import Cache
held = Cache(_settings(Path(sys.argv[1]), 1)).open(*_entry("a"))
print(held.folder, flush=True)
time.sleep(60)
"""


def test_what_another_process_has_open_stays_until_it_is_killed(s3: S3, tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True,
                             cwd=Path(__file__).parents[2])
    try:
        assert other.stdout is not None
        folder, cache, b = Path(other.stdout.readline().strip()), Cache(_settings(tmp_path, files=1)), _entry("b")
        assert (folder / "x").exists()
        with pytest.raises(InputError, match="does not fit"):
            cache.open(*b)
        assert (folder / "x").exists()
    finally:
        other.kill()
        other.wait()
    cache.open(*b).close()
    assert not folder.exists()


def test_workers_of_a_host_fetch_once_between_them(s3: S3, tmp_path: Path, fetches: list[str]) -> None:
    place, files = _entry("a")
    found = list[bytes]()

    def work() -> None:
        found.append((Cache(_settings(tmp_path)).open(place, files).folder / "x").read_bytes())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == 8 * [b"a".ljust(FILE_BYTES)]
    assert len(fetches) == 1


def test_nobody_waits_for_ever(s3: S3, tmp_path: Path) -> None:
    import fcntl

    place, files = _entry("a")
    held = Cache(_settings(tmp_path)).open(place, files)
    with open(held.folder / "fill", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DeadlineError, match=r"a fetch of s3://graphs/a within 0.2 s; .*storage.fetch_s"):
            Cache(_settings(tmp_path, fetch_s=0.2)).open(place, files)


@pytest.fixture
def stores(s3: S3, tmp_path: Path) -> tuple[Store, str]:
    """The same store in a folder and on the object store."""
    local = make_store(small_graph(), tmp_path / "local", 2)
    for file in Path(local.path).rglob("*.*"):
        Place(f"s3://{BUCKET}/two/{file.relative_to(local.path)}", StorageConfig()).put(file)
    return local, f"s3://{BUCKET}/two"


def test_a_part_is_the_same_and_comes_alone(stores: tuple[Store, str], fetches: list[str]) -> None:
    local, uri = stores
    remote = Store.open(uri)
    assert fetches == []
    assert remote.manifest == local.manifest
    part, wanted = remote.part(1), local.part(1)
    assert fetches
    assert all(one.startswith(f"{uri}/part-00001/") for one in fetches)
    for name in ("indptr", "indices", "degree", "source_index", "labels", "split", "halo_source_index"):
        np.testing.assert_array_equal(getattr(part, name), getattr(wanted, name))
    np.testing.assert_array_equal(part.features_dense(0, part.num_local), wanted.features_dense(0, wanted.num_local))
    assert remote.verify() == local.verify()


def test_what_has_no_manifest_is_no_store(stores: tuple[Store, str]) -> None:
    _, uri = stores
    Place(f"{uri}/manifest.json", StorageConfig()).remove()
    with pytest.raises(StoreError, match=r"s3://graphs/two: not a store \(no manifest.json, which is put there last\)"):
        Store.open(uri)


def test_objects_that_are_not_what_the_manifest_says(stores: tuple[Store, str]) -> None:
    _, uri = stores
    place = Place(f"{uri}/part-00001/nodes.arrow", StorageConfig(retry_s=0.3))
    data = bytearray(place.read(1 << 20) or b"")
    data[len(data) // 2] ^= 1
    place.write(bytes(data))
    store = Store.open(uri, StorageConfig(retry_s=0.3))
    with pytest.raises(StoreError, match=r"two/part-00001/nodes.arrow: checksum is"):
        store.verify()
    with pytest.raises(InputError, match=r"nodes.arrow: has the checksum .*it was changed or damaged"):
        store.part(1)
    place.write(bytes(data[:-1]))
    with pytest.raises(StoreError, match=rf"nodes.arrow: is {len(data) - 1} bytes, the manifest says {len(data)}"):
        Store.open(uri)
    place.remove()
    with pytest.raises(StoreError, match=r"nodes.arrow: file is missing"):
        Store.open(uri)


def test_an_upload_that_broke_off_is_no_store_and_is_replaced(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, put, done = f"s3://{BUCKET}/store", Place.put, list[str]()

    def breaks(self: Place, file: Path) -> str:
        if len(done) == 3:
            raise StorageError("the object store fails", file=self.uri)
        done.append(self.uri)
        return put(self, file)

    with monkeypatch.context() as broken:
        broken.setattr(Place, "put", breaks)
        with pytest.raises(StorageError):
            qgnn.partition(small_graph(), parts=1, out=uri)
    assert len(Place(uri, StorageConfig()).names()) >= 3
    with pytest.raises(StoreError, match="not a store"):
        Store.open(uri)
    qgnn.partition(small_graph(), parts=1, out=uri)
    before = Store.open(uri)
    with pytest.raises(InputError, match=r"s3://graphs/store: output exists; add --overwrite"):
        qgnn.partition(small_graph(seed=1), parts=1, out=uri)
    assert Store.open(uri).manifest == before.manifest
    qgnn.partition(small_graph(seed=1), parts=1, out=uri, overwrite=True)
    assert Store.open(uri).fingerprint != before.fingerprint
    assert Store.open(uri).verify() == len(Store.open(uri).manifest["parts"][0]["files"])
    Place(f"s3://{BUCKET}/other/notes.txt", StorageConfig()).write(b"mine")
    with pytest.raises(InputError, match="exists and is not a store"):
        qgnn.partition(small_graph(), parts=1, out=f"s3://{BUCKET}/other", overwrite=True)
    assert list((Path(os.environ["QGNN_CACHE_DIR"])).glob(".work.*")) == []


def test_graphs_may_lie_there_too(s3: S3, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids = pa.array([10, 20, 30])
    pq.write_table(pa.table({"node_id": ids, "f": [0.0, 1.0, 2.0]}), tmp_path / "nodes.parquet")
    pq.write_table(pa.table({"src": ids, "dst": pa.array([20, 30, 10])}), tmp_path / "edges.parquet")
    for name in ("nodes", "edges"):
        Place(f"s3://{BUCKET}/tables/{name}.parquet", StorageConfig()).put(tmp_path / f"{name}.parquet")
    qgnn.partition(f"parquet:{tmp_path}", parts=1, out=tmp_path / "local")
    found = qgnn.partition(f"parquet:s3://{BUCKET}/tables", parts=1, out=tmp_path / "store")
    local = json.loads((tmp_path / "local" / "manifest.json").read_text())
    assert (found["name"], found["num_edges"]) == ("tables", 3)
    assert found["fingerprint"] == local["fingerprint"]
    np.savez(tmp_path / "g.npz", edge_index=np.array([[0, 1], [1, 2]]))
    Place(f"s3://{BUCKET}/g.npz", StorageConfig()).put(tmp_path / "g.npz")
    assert qgnn.partition(f"s3://{BUCKET}/g.npz", parts=1, out=tmp_path / "npz")["num_edges"] == 2
    for source, words in ((f"parquet:s3://{BUCKET}/none", "no tables"), (f"s3://{BUCKET}/none.npz", "no such object"),
                          (f"s3://{BUCKET}/tables", "no graph source")):
        with pytest.raises(InputError, match=words):
            qgnn.partition(source, parts=1, out=tmp_path / "no")
    pq.write_table(pa.table({"node_id": pa.array([1, 1])}), tmp_path / "nodes.parquet")
    Place(f"s3://{BUCKET}/tables/nodes.parquet", StorageConfig()).put(tmp_path / "nodes.parquet")
    with pytest.raises(InputError, match=r"^s3://graphs/tables/nodes.parquet: "):
        qgnn.partition(f"parquet:s3://{BUCKET}/tables", parts=1, out=tmp_path / "no")
