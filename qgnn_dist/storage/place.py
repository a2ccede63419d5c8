# SPDX-License-Identifier: Apache-2.0
"""Places on object stores: `s3://bucket/prefix`, and what else pyarrow.fs opens by a URI.

An object appears whole or not at all, and nothing is renamed: whoever writes several puts the one that names the others
last. What may pass by itself is tried again, with growing pauses; what will not is one line that names the place.
Credentials come from where the store's own library looks for them, and are never shown.
"""
from __future__ import annotations

import hashlib
import logging
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import fs

from ..config import StorageConfig
from ..errors import InputError, StorageError
from ..files.read import open_regular, reason, shown
from ..files.write import disk_errors

__all__ = ["Place", "uri_of"]

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")
BLOCK_BYTES = 16 << 20
"""Of one request."""
CONNECT_S, REQUEST_S = 5.0, 30.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 15.0
LONGEST_WORDS = 240
_URI = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.DOTALL)
_CUT_URI = re.compile(r"(s3|gs|gcs|abfs|abfss|hdfs|viewfs):/[^/]")
_DENIED = re.compile(r"ACCESS_DENIED|INVALID_ACCESS_KEY|INVALID_CLIENT_TOKEN|SIGNATURE_DOES_NOT_MATCH|EXPIRED_TOKEN|"
                     r"UNRECOGNIZED_CLIENT|MISSING_AUTHENTICATION|INVALID_SIGNATURE|HTTP status (400|401|403)\b|"
                     r"[Cc]redential", re.ASCII)
_NO_BUCKET = re.compile(r"NO_SUCH_BUCKET|Bucket '[^']*' not found")
_ABSENT = re.compile(r"NO_SUCH_KEY|RESOURCE_NOT_FOUND|HTTP status 404|Path does not exist")
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")


def uri_of(path: Any) -> str | None:
    """The URI that a path is, without slashes at its end; None where it is a local one, or no path.

    Raises: InputError: it holds credentials or options, or lost a slash as a `Path`.

    >>> uri_of("s3://bucket/store/"), uri_of("store"), uri_of("parquet:s3://bucket/graph")
    ('s3://bucket/store', None, None)
    """
    if not isinstance(path, (str, os.PathLike)):
        return None
    text = str(os.fspath(path))
    if _CUT_URI.match(text):
        raise InputError("a Path drops one slash of a URI; give it as text", file=text)
    match = _URI.fullmatch(text)
    if match is None:
        return None
    scheme, rest = match.groups()
    if "?" in rest or "@" in rest.partition("/")[0]:
        raise InputError(f"{scheme}://…: expected a bucket and a prefix alone; credentials and options come from the "
                         "environment (docs/storage.md)")
    rest = rest.rstrip("/")
    if not rest or "//" in rest or {".", ".."} & set(rest.split("/")):
        raise InputError(f"expected {scheme}://BUCKET/PREFIX", file=text)
    return f"{scheme}://{rest}"


class Place:
    """One object, or the prefix of several; `at` leads from the one to the other.

    Args: uri: as `uri_of` returns it. settings: how long to try again.
    Raises: every call InputError: no such bucket, or credentials that are missing or denied; StorageError: the store
        fails, or cannot be reached, for `settings.retry_s`.
    """

    def __init__(self, uri: str, settings: StorageConfig) -> None:
        self.uri, self.settings = uri, settings
        self._path = uri.partition("://")[2]
        self._known: fs.FileSystem | None = None

    def __str__(self) -> str:
        return self.uri

    def at(self, name: str) -> Place:
        """The place under this one with a name, which may have slashes."""
        below = Place(f"{self.uri}/{name}", self.settings)
        below._known = self._known
        return below

    def size(self) -> int | None:
        """Bytes of the object; None where there is none, a prefix included."""
        info = self._try(lambda: self._fs().get_file_info(self._path))
        return int(info.size) if info.type == fs.FileType.File else None

    def names(self) -> dict[str, int]:
        """Name → bytes of all objects below this prefix, names relative to it."""
        chosen = fs.FileSelector(self._path, allow_not_found=True, recursive=True)
        found = self._try(lambda: self._fs().get_file_info(chosen))
        return {one.path[len(self._path) + 1:]: int(one.size) for one in found if one.type == fs.FileType.File}

    def read(self, limit: int) -> bytes | None:
        """The object's bytes; None where there is none. One that is replaced meanwhile is read again.

        Raises: InputError: it has more than `limit`.
        """
        def once() -> bytes | None:
            try:
                with self._fs().open_input_stream(self._path) as source:
                    found = bytes(source.read(limit + 1))
            except FileNotFoundError:
                return None
            if len(found) <= limit:
                self._check_read(len(found))
            return found

        data = self._try(once)
        if data is not None and len(data) > limit:
            raise InputError(f"is more than {limit} bytes, expected at most so many", file=self.uri)
        return data

    def write(self, data: bytes) -> None:
        """Put an object of these bytes there, in the place of another one."""
        def once() -> None:
            with self._fs().open_output_stream(self._path) as out:
                out.write(data)

        self._try(once)

    def put(self, file: Path) -> str:
        """Put a local file there; its BLAKE2b-256, hex. Raises: OSError: the file cannot be read."""
        def once() -> str:
            digest = hashlib.blake2b(digest_size=32)
            with open_regular(file) as source:
                out = self._fs().open_output_stream(self._path)
                while block := source.read(BLOCK_BYTES):
                    digest.update(block)
                    out.write(block)
                out.close()  # not by `with`, which would make an object of half a file, too
            return digest.hexdigest()

        return self._try(once)

    def fetch(self, to: Path, size: int | None = None, blake2b: str | None = None) -> None:
        """Bring the object to a local file, synced, which appears once it is whole and has this size and checksum.

        Raises: InputError: there is no such object, or another one, each time. OutputError: the disk.
        """
        temp = to.with_name(f".{to.name}.{os.getpid()}.tmp")
        needed = size or 0

        def once() -> None:
            digest, count = hashlib.blake2b(digest_size=32), 0
            with (self._fs().open_input_stream(self._path) as source,
                  disk_errors(to.parent, needed, str(to), "a file"), open(temp, "wb") as out):
                while block := self._block(source):
                    digest.update(block)
                    count += len(block)
                    out.write(block)
                out.flush()
                os.fsync(out.fileno())
            if blake2b is None:
                self._check_read(count)
            if size is not None and count != size:
                raise _OtherError(f"has {count} bytes, expected {size}")
            if blake2b is not None and digest.hexdigest() != blake2b:
                raise _OtherError(f"has the checksum {digest.hexdigest()[:16]}…, expected {blake2b[:16]}…")
            with disk_errors(to.parent, needed, str(to), "a file"):
                os.replace(temp, to)

        try:
            self._try(once)
        except FileNotFoundError:
            raise InputError("there is no such object", file=self.uri) from None
        finally:
            temp.unlink(missing_ok=True)

    def checksum(self) -> str:
        """BLAKE2b-256 of the object, hex, as it streams by. Raises: InputError: there is no such object."""
        def once() -> str:
            digest = hashlib.blake2b(digest_size=32)
            with self._fs().open_input_stream(self._path) as source:
                while block := source.read(BLOCK_BYTES):
                    digest.update(block)
            return digest.hexdigest()

        try:
            return self._try(once)
        except FileNotFoundError:
            raise InputError("there is no such object", file=self.uri) from None

    def remove(self) -> None:
        """Remove the object, if there is one."""
        def once() -> None:
            try:
                self._fs().delete_file(self._path)
            except FileNotFoundError:
                return

        self._try(once)

    def remove_below(self) -> None:
        """Remove all objects under this prefix, and what the file system put there for it to be a folder."""
        def once() -> None:
            try:
                self._fs().delete_dir(self._path)
            except FileNotFoundError:
                return

        self._try(once)

    def _block(self, source: Any) -> bytes:
        """The next block; what fails is the store's fault and not the disk's."""
        try:
            return bytes(source.read(BLOCK_BYTES))
        except (OSError, pa.ArrowException) as error:
            raise _ReadError(str(error)) from None

    def _check_read(self, count: int) -> None:
        """Refuse what a stream gave of an object that was replaced meanwhile.

        A stream asks for the size first: of a longer object it has the beginning alone, and behind a shorter one's end
        Arrow gives what happens to lie in memory.
        """
        size = self._fs().get_file_info(self._path).size
        if size is not None and size != count:
            raise _OtherError(f"has {size} bytes, {count} were read")

    def _fs(self) -> fs.FileSystem:
        """The file system, whose bucket is known to be there."""
        if self._known is None:
            bucket = self._path.partition("/")[0]
            found = _s3(bucket) if self.uri.startswith("s3://") else _other(self.uri)
            if self.uri.startswith("s3://") and not _there(found, bucket):
                raise InputError(f"there is no bucket {bucket}; correct the name, or make it first", file=self.uri)
            self._known = found
        return self._known

    def _try(self, call: Callable[[], _T]) -> _T:
        """What `call` returns; what may pass by itself is tried again for `storage.retry_s`.

        Raises: FileNotFoundError: no such object. InputError, StorageError: as the class says.
        """
        until, pause_s = time.monotonic() + self.settings.retry_s, FIRST_PAUSE_S
        while True:
            try:
                return call()
            except FileNotFoundError:
                raise
            except (OSError, pa.ArrowException, _ReadError, _OtherError) as error:
                words = _words(error)
                self._refuse(error, words)
                if time.monotonic() + pause_s > until:
                    raise self._given_up(error, words) from None
                _LOG.warning("%s: %s; tried again in %.1f s", self.uri, words, pause_s)
            time.sleep(pause_s * random.uniform(0.75, 1.0))  # so that many workers do not come at once
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _refuse(self, error: Exception, words: str) -> None:
        """Raise what does not pass by itself."""
        if _NO_BUCKET.search(words):
            raise InputError(f"there is no bucket {self._path.partition('/')[0]}; correct the name, or make it first",
                             file=self.uri) from None
        if _DENIED.search(words):
            raise InputError(f"credentials are missing, denied or expired ({words}); set AWS_ACCESS_KEY_ID and "
                             "AWS_SECRET_ACCESS_KEY or a role on every host, and allow it to read, write and list "
                             "there (docs/storage.md)", file=self.uri) from None
        if _ABSENT.search(words):
            raise FileNotFoundError(words) from None

    def _given_up(self, error: Exception, words: str) -> Exception:
        if isinstance(error, _OtherError):
            return InputError(f"{words}, also when it was fetched again; it was changed or damaged", file=self.uri)
        return StorageError(f"the object store fails, or cannot be reached{_endpoint_words(self.uri)} ({words}), and "
                            f"did for storage.retry_s={self.settings.retry_s:g} s; look at the network, at the "
                            "endpoint and at the region", file=self.uri)


class _ReadError(Exception):
    """A stream that broke."""


class _OtherError(Exception):
    """An object that is not the expected one."""


def _s3(bucket: str) -> fs.FileSystem:
    """By the variables that AWS's own tools know; without region and endpoint, the bucket's own region is asked for."""
    given = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    more: dict[str, Any] = {}
    if given:
        scheme, _, host = given.rpartition("://")
        more = {"endpoint_override": host.rstrip("/"), "scheme": scheme or "https"}
    elif not region:
        region = fs.resolve_s3_region(bucket)
    return fs.S3FileSystem(region=region or "us-east-1", connect_timeout=CONNECT_S, request_timeout=REQUEST_S, **more)


def _other(uri: str) -> fs.FileSystem:
    try:
        return fs.FileSystem.from_uri(uri)[0]
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError, ImportError) as error:
        raise InputError(f"no object store that this program opens ({reason(error)}); expected s3://BUCKET/PREFIX",
                         file=uri) from None


def _there(found: fs.FileSystem, bucket: str) -> bool:
    """Whether a bucket is there, as far as it may be asked for."""
    try:
        return bool(found.get_file_info(bucket).type != fs.FileType.NotFound)
    except OSError as error:
        if _DENIED.search(str(error)):  # who may use the objects need not be allowed to look at the bucket
            return True
        raise


def _endpoint_words(uri: str) -> str:
    given = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return f" at {given.rpartition('@')[2]}" if given and uri.startswith("s3://") else ""


def _words(error: Exception) -> str:
    """An error on one line, what the store said of it where it did, without what must not be shown."""
    words = re.sub(r".*(?=AWS Error )|\(Request ID:.*", "", str(error), flags=re.DOTALL)
    for name in _SECRETS:
        secret = os.environ.get(name)
        if secret:
            words = words.replace(secret, "…")
    return shown(words.strip().partition("\n")[0] or type(error).__name__, LONGEST_WORDS)
