# SPDX-License-Identifier: Apache-2.0
"""Putting a finished store in place: all or nothing, synced to disk; an older one goes once the new one is there."""
from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .manifest import CHECKSUM, MANIFEST, manifest_checksum, part_folder, read_manifest

__all__ = ["new_store"]

LOCK = "lock"
"""File of a store under construction, locked for as long as its process lives."""


class NewStore:
    """A store under construction in `folder`, beside its final place."""

    def __init__(self, target: Path, folder: Path) -> None:
        self.target, self.folder = target, folder

    def commit(self, manifest: dict[str, Any]) -> None:
        """Write the manifest, with a checksum of its own, check what was built as a reader would, and rename the folder
        into place.

        Raises:
            StoreError: this host does not see what the builders wrote. OSError: the disk.
        """
        manifest[CHECKSUM] = manifest_checksum(manifest)
        with open(self.folder / MANIFEST, "w", encoding="utf-8") as out:
            json.dump(manifest, out, indent=1)
            out.write("\n")
            out.flush()
            os.fsync(out.fileno())
        for part in range(len(manifest["parts"])):
            _sync_folder(self.folder / part_folder(part))
        (self.folder / LOCK).unlink(missing_ok=True)
        _sync_folder(self.folder)
        read_manifest(self.folder)
        self._put_in_place()

    def _put_in_place(self) -> None:
        old = self.folder.with_suffix(".old")
        replaces = self.target.exists()
        if replaces:
            os.rename(self.target, old)
        try:
            os.rename(self.folder, self.target)
        except OSError:
            if replaces:
                os.rename(old, self.target)
            raise
        _sync_folder(self.target.parent)
        if replaces:
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def new_store(target: Path) -> Iterator[NewStore]:
    """A temporary folder beside `target` (absolute) for the time of the block.

    Whatever happens before `commit` leaves nothing behind: neither the folder nor parents that were made for it. What
    processes left that were killed while they built the same store is removed first.
    """
    made: list[Path] = []
    folder = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        for parent in reversed([p for p in target.parents if not p.exists()]):
            parent.mkdir()
            made.append(parent)
        _remove_abandoned(target)
        folder.mkdir()
        with _locked(folder):
            yield NewStore(target, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not target.exists():
            for parent in reversed(made):
                with contextlib.suppress(OSError):
                    parent.rmdir()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; it appears under its name only once it is held. Nothing is held where no locks are."""
    with open(folder / f"{LOCK}.tmp", "wb") as lock:
        if _try_lock(lock):
            os.rename(lock.name, folder / LOCK)
        else:
            os.unlink(lock.name)
        yield


def _try_lock(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False


def _remove_abandoned(target: Path) -> None:
    """Remove temporary folders of this store whose lock nobody holds any more."""
    for folder in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        with contextlib.suppress(OSError), open(folder / LOCK, "r+b") as lock:
            if _try_lock(lock):
                shutil.rmtree(folder, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
