# SPDX-License-Identifier: Apache-2.0
"""Places on object stores: what is put comes back, what may pass is tried again, the rest is told in a line."""
from __future__ import annotations

import hashlib
import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest

from qgnn_dist.config import StorageConfig
from qgnn_dist.errors import InputError, QgnnError, StorageError
from qgnn_dist.storage.local import fetched, work_folder
from qgnn_dist.storage.place import Place, uri_of
from tests.s3 import ACCESS, BUCKET, S3, SECRET, Door

QUICK, PATIENT = StorageConfig(retry_s=0.7), StorageConfig(retry_s=20)
LARGE = 17 << 20
"""More than a block, and than a part of an upload."""


def _place(name: str, settings: StorageConfig = QUICK) -> Place:
    return Place(f"s3://{BUCKET}/{name}", settings)


def test_what_is_a_uri() -> None:
    assert uri_of("s3://b/a/c/") == "s3://b/a/c"
    assert [uri_of(x) for x in ("store", Path("/a/b"), "parquet:s3://b/x", "synthetic:arxiv", None)] == [None] * 5
    for text, words in (("s3://b//c", "BUCKET/PREFIX"), ("s3://", "BUCKET/PREFIX"), ("s3://b/../c", "BUCKET/PREFIX"),
                        (Path("s3://b/c"), "as text"), ("s3://b/c?region=x", "options"),
                        (f"s3://{ACCESS}:{SECRET}@b/c", "credentials")):
        with pytest.raises(InputError, match=words) as caught:
            uri_of(text)
        assert SECRET not in str(caught.value)


def test_objects_come_back(s3: S3, tmp_path: Path) -> None:
    place, file = _place("run/a"), tmp_path / "file"
    assert place.size() is None
    assert place.read(10) is None
    place.write(b"hello")
    assert (place.size(), place.read(5)) == (5, b"hello")
    with pytest.raises(InputError, match="more than 4 bytes"):
        place.read(4)
    data = os.urandom(LARGE)
    file.write_bytes(data)
    digest = hashlib.blake2b(data, digest_size=32).hexdigest()
    assert _place("run/deep/large").put(file) == digest
    assert _place("run").names() == {"a": 5, "deep/large": LARGE}
    _place("run/deep/large").fetch(tmp_path / "back", LARGE, digest)
    assert (tmp_path / "back").read_bytes() == data
    assert _place("run/deep/large").checksum() == digest
    place.remove()
    place.remove()
    assert place.size() is None
    with pytest.raises(InputError, match=r"run/a: there is no such object"), fetched(place.uri, QUICK):
        pass


@pytest.mark.parametrize("later", [b"a longer one", b"x"])
def test_an_object_that_is_replaced_while_it_is_read_is_read_again(s3: S3, tmp_path: Path, later: bytes) -> None:
    place = Place(f"s3://{BUCKET}/replaced", QUICK)
    place.write(b"earlier")
    real, opened = place._fs(), list[str]()

    class Slow:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def open_input_stream(self, path: str) -> Any:
            source = real.open_input_stream(path)
            if not opened:
                Place(place.uri, QUICK).write(later)
            opened.append(path)
            return source

    place._known = Slow()  # type: ignore[assignment]
    assert place.read(100) == later
    place.write(b"earlier")
    opened.clear()
    place.fetch(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == later
    assert len(opened) == 2


def test_another_object_is_refused_and_leaves_nothing(s3: S3, tmp_path: Path) -> None:
    place = _place("a")
    place.write(b"hello")
    for size, digest, words in ((6, None, "5 bytes, expected 6"), (5, "00" * 32, "checksum")):
        with pytest.raises(InputError, match=rf"graphs/a: has .*{words}.*also when it was fetched again"):
            place.fetch(tmp_path / "to", size, digest)
    assert list(tmp_path.glob("*to*")) == []


def test_a_bucket_that_is_not_there(s3: S3) -> None:
    for call in (Place("s3://nobody/x", QUICK).size, lambda: Place("s3://nobody/x", QUICK).write(b"1"),
                 Place("s3://nobody/x", QUICK).names):
        start = time.monotonic()
        with pytest.raises(InputError, match=r"^s3://nobody/x: there is no bucket nobody; ") as caught:
            call()
        assert caught.value.exit_code == 2
        assert time.monotonic() - start < 5  # it was not tried again


def test_credentials_that_are_denied_are_not_shown(s3: S3, caplog: pytest.LogCaptureFixture) -> None:
    place = _place("x")
    with s3.credentials_are_looked_at():
        for call in (place.size, lambda: place.write(b"1"), place.names, place.remove):
            with pytest.raises(InputError, match=r"missing, denied or expired .*AWS_ACCESS_KEY_ID") as one:
                call()
            told = str(one.value) + repr(one.value.__context__) + caplog.text
            assert SECRET not in told
            assert "\n" not in str(one.value)
    assert place.size() is None


def test_an_error_that_repeats_a_secret(monkeypatch: pytest.MonkeyPatch, s3: S3) -> None:
    def fails() -> None:
        raise OSError(f"AWS Error ODD: {SECRET} and {ACCESS} are odd")

    with pytest.raises(StorageError, match="ODD: … and … are odd"):
        _place("x")._try(fails)


def test_an_endpoint_that_is_not_there(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    with Door(s3) as door:
        s3.use(monkeypatch, door.url)
        door.shut()
        start = time.monotonic()
        with pytest.raises(StorageError, match=rf"x: the object store fails, or cannot be reached at {door.url} "
                                               r"\(.*onnect.*storage.retry_s=0.7 s; look at the network") as caught:
            _place("x").size()
        assert caught.value.exit_code == 1
        assert 0.3 < time.monotonic() - start < 10


def test_what_passes_is_tried_again(s3: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                    caplog: pytest.LogCaptureFixture) -> None:
    """An endpoint that goes away before a call, and in the middle of an upload, and comes back."""
    (tmp_path / "file").write_bytes(os.urandom(LARGE))
    with Door(s3) as door, caplog.at_level(logging.WARNING):
        s3.use(monkeypatch, door.url)
        place = _place("large", PATIENT)
        thread = door.away(3.0)
        time.sleep(0.2)
        assert place.size() is None
        thread.join()
        assert "tried again in" in caplog.text
        caplog.clear()
        thread = door.away(4.0, after_bytes=3 << 20)
        digest = place.put(tmp_path / "file")
        thread.join()
        assert "tried again in" in caplog.text
        assert place.checksum() == digest == hashlib.blake2b((tmp_path / "file").read_bytes(), digest_size=32
                                                             ).hexdigest()


def test_half_an_upload_is_no_object(s3: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(LARGE))
    with Door(s3) as door:
        s3.use(monkeypatch, door.url)
        thread = door.away(4.0, after_bytes=3 << 20)
        with pytest.raises(StorageError, match=r"large: the object store fails"):
            _place("large").put(tmp_path / "file")
        thread.join()
        assert _place("large").size() is None


def test_work_folders_go(tmp_path: Path) -> None:
    settings = StorageConfig(cache_dir=str(tmp_path / "cache"))
    left = tmp_path / "cache" / ".work.1-2.tmp"
    (left / "files").mkdir(parents=True)
    (left / "lock").touch()  # of a process that was killed
    with work_folder(settings) as folder:
        (folder / "x").write_text("x")
        assert not left.exists()
        with work_folder(settings) as other:
            assert other != folder
            assert folder.exists()
    assert list((tmp_path / "cache").iterdir()) == []


def test_other_stores_are_told_of(tmp_path: Path) -> None:
    with pytest.raises(QgnnError, match=r"expected s3://BUCKET/PREFIX"):
        Place("ftp://host/x", QUICK).size()
