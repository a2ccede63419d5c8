# SPDX-License-Identifier: Apache-2.0
"""Parts of stores from object stores on a host's own disk, bounded, shared by all of its processes.

    CACHE/lock            held while entries are counted, made or removed
    CACHE/parts/KEY/      KEY: of the names, sizes and checksums of the entry's files; wherever they come from
        use               shared lock of everyone who has it open; its text is the bytes that the entry takes, the time
                          of its last change that of its last use
        fill              lock of the one who looks at its files, and fetches those that are missing or damaged

Locks are flock's, which the kernel drops when a process ends, however it does. An entry is removed only under `lock`
and an exclusive lock on its `use`, so never while somebody has it open. Files are compared with their checksums
whenever an entry is opened.
"""
from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..config import StorageConfig
from ..errors import DeadlineError, InputError
from ..files.read import open_regular
from ..files.write import check_room, disk_errors, make_folder
from .local import AT_ONCE, cache_folder
from .place import BLOCK_BYTES, Place

__all__ = ["Cache", "CachedFiles", "FileEntry"]

_LOG = logging.getLogger(__name__)
LOCK_S = 120.0
"""For what is done under the cache's lock, removing included."""
LOOK_S = 0.05


@dataclass(frozen=True)
class FileEntry:
    """What a file has to be: its bytes, and their BLAKE2b-256 in hex."""

    size: int
    blake2b: str


class CachedFiles:
    """An entry that is open: `folder` holds its files for as long as this object, or its process, lives."""

    def __init__(self, folder: Path, lock: IO[bytes]) -> None:
        self.folder, self._lock = folder, lock

    def close(self) -> None:
        """Let others remove it; arrays that are mapped stay as they are."""
        self._lock.close()


class Cache:
    """The cache of this host.

    Args: settings: its folder and bound, and how long somebody else's fetching is waited for.
    """

    def __init__(self, settings: StorageConfig) -> None:
        self._settings, self._folder = settings, cache_folder(settings)
        self._parts, self._limit = self._folder / "parts", int(settings.cache_gb * 1e9)

    def open(self, place: Place, files: Mapping[str, FileEntry]) -> CachedFiles:
        """The files of these names below a place; what is not there, or damaged, is fetched.

        Raises: InputError: the cache's bound is too small for them and what is open, or the place has other files.
            OutputError: the disk. DeadlineError: somebody else fetches them for too long.
        """
        told = {name: [entry.size, entry.blake2b] for name, entry in files.items()}
        key = hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=16).hexdigest()
        folder, size = self._parts / key, sum(entry.size for entry in files.values())
        make_folder(self._parts, "the cache")
        with self._locked(self._folder / "lock", LOCK_S, "the cache's bookkeeping"):
            lock = self._reserve(folder, size)
        try:
            with self._locked(folder / "fill", self._settings.fetch_s, f"a fetch of {place.uri}"):
                self._fill(folder, place, files)
        except BaseException:
            lock.close()
            raise
        return CachedFiles(folder, lock)

    def _reserve(self, folder: Path, size: int) -> IO[bytes]:
        """Make the entry, make room for it, and hold its `use`; under the cache's lock."""
        entries = {one: _size_of(one) for one in self._parts.iterdir() if one.is_dir() and one != folder}
        taken = sum(entries.values())
        for one in sorted(entries, key=_last_use):
            if taken + size <= self._limit:
                break
            if _remove(one):
                taken -= entries[one]
        if taken + size > self._limit:
            raise InputError(f"a part of {size / 1e9:.2f} GB does not fit the cache's storage.cache_gb="
                             f"{self._settings.cache_gb:g}, of which {taken / 1e9:.2f} GB are open in other workers; "
                             "raise it, or have fewer workers a host", file=str(self._folder))
        with disk_errors(self._folder, size, str(self._folder), "a part"):
            folder.mkdir(exist_ok=True)
            lock = open(folder / "use", "a+b")  # noqa: SIM115
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                lock.truncate(0)
                lock.write(str(size).encode())
                lock.flush()
            except BaseException:
                lock.close()
                raise
        return lock

    def _fill(self, folder: Path, place: Place, files: Mapping[str, FileEntry]) -> None:
        """Fetch what is missing or damaged; under the entry's `fill`."""
        wanted = [name for name, entry in files.items() if not _is_whole(folder / name, entry)]
        for half in folder.glob(".*.tmp"):  # of a process that was killed: this one alone fetches here
            half.unlink(missing_ok=True)
        check_room(folder, sum(files[name].size for name in wanted), str(self._folder), "a part")

        def fetch(name: str) -> None:
            if (folder / name).exists():
                _LOG.warning("%s is damaged, and fetched again", folder / name)
            place.at(name).fetch(folder / name, files[name].size, files[name].blake2b)

        with ThreadPoolExecutor(AT_ONCE, "qgnn-fetch") as pool:
            list(pool.map(fetch, wanted))

    @contextmanager
    def _locked(self, file: Path, seconds: float, what: str) -> Iterator[None]:
        """Hold an exclusive lock. Raises: DeadlineError: others hold it. InputError: there are no locks there."""
        until = time.monotonic() + seconds
        with disk_errors(file.parent, 0, str(file), "the cache"):
            lock = open(file, "ab")  # noqa: SIM115
        with lock:  # whose block's errors are not this disk's
            while not _try_lock(lock, str(self._folder)):
                if time.monotonic() > until:
                    raise DeadlineError(f"another process was not done with {what} within {seconds:g} s; see what it "
                                        "does, or raise storage.fetch_s", file=str(file))
                time.sleep(LOOK_S)
            yield


def _try_lock(lock: IO[Any], folder: str) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise InputError(f"the cache's file system has no locks ({error.strerror}); choose a storage.cache_dir on the "
                         "host's own disk", file=folder) from None


def _size_of(entry: Path) -> int:
    try:
        return int((entry / "use").read_bytes())
    except (OSError, ValueError):  # one that is half removed
        return sum(file.stat().st_size for file in entry.iterdir() if file.is_file())


def _last_use(entry: Path) -> float:
    try:
        return (entry / "use").stat().st_mtime
    except OSError:
        return 0.0


def _remove(entry: Path) -> bool:
    """Remove an entry that nobody has open; whether it is gone."""
    with contextlib.suppress(FileNotFoundError), open(entry / "use", "rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        shutil.rmtree(entry, ignore_errors=True)
        return not entry.exists()
    shutil.rmtree(entry, ignore_errors=True)  # without its `use` nobody has it open
    return not entry.exists()


def _is_whole(file: Path, entry: FileEntry) -> bool:
    try:
        with open_regular(file) as opened:
            digest = hashlib.blake2b(digest_size=32)
            while block := opened.read(BLOCK_BYTES):
                digest.update(block)
            return opened.tell() == entry.size and digest.hexdigest() == entry.blake2b
    except OSError:
        return False
