# SPDX-License-Identifier: Apache-2.0
"""Folders of ours that appear as a whole: built under a hidden name beside their place, renamed into it, and swept
where a killed process left them.

`.NAME.WORD.tmp` is one under construction, locked for as long as its process lives; `.NAME.WORD.old` is what another
one has replaced. No WORD has a dot, so that those of `a` and of `a.b` are told apart.
"""
from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["LOCK", "abandoned", "held", "put_in_place", "remove_replaced", "sync_folder"]

LOCK = "lock"
"""File of a folder under construction."""
WITHOUT_LOCK_S = 3600.0
"""A folder without a lock was left between two steps of a process, or lies where there are no locks; it is taken for
abandoned once nothing in it has changed for so long.
"""


@contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock for the time of the block; it appears under its name only once it is held.

    Yields: False where another process holds it, or has just put the folder in its place. Where the file system has no
        locks nothing is held, and True given.
    """
    place, temp = folder / LOCK, folder / f"{LOCK}.{os.getpid()}"
    with open(place if place.exists() else temp, "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            temp.unlink(missing_ok=True)
            yield error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
            return
        if temp.exists():
            os.rename(temp, place)
        yield place.exists() and os.path.samestat(os.fstat(lock.fileno()), os.stat(place))


def abandoned(target: Path) -> list[Path]:
    """Folders under construction beside `target` that no process works on any more."""
    return [folder for folder in _beside(target, ".tmp") if _is_abandoned(folder)]


def _beside(target: Path, ending: str) -> list[Path]:
    found = target.parent.glob(f".{glob.escape(target.name)}.*{ending}")
    return sorted(one for one in found if "." not in one.name[len(target.name) + 2:-len(ending)])


def _is_abandoned(folder: Path) -> bool:
    try:
        with open(folder / LOCK, "r+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except FileNotFoundError:
        with contextlib.suppress(OSError):
            return folder.is_dir() and time.time() - folder.stat().st_mtime > WITHOUT_LOCK_S
        return False
    except OSError:
        return False


def put_in_place(folder: Path, target: Path) -> None:
    """Rename a finished folder to `target`; what was there goes once the new one is in its place, and comes back where
    that fails. What killed processes had replaced goes too."""
    remove_replaced(target)
    old = folder.with_suffix(".old")
    replaces = target.exists()
    if replaces:
        os.rename(target, old)
    try:
        os.rename(folder, target)
    except OSError:
        if replaces:
            os.rename(old, target)
        raise
    sync_folder(target.parent)
    remove_replaced(target)


def remove_replaced(target: Path) -> None:
    """Remove what was replaced by `target`, also by processes that were killed before they could.

    Nothing is removed where `target` is not there: its `.old` is the only one then.
    """
    if target.exists():
        for old in _beside(target, ".old"):
            shutil.rmtree(old, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
