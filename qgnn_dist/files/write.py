# SPDX-License-Identifier: Apache-2.0
"""Files of ours: whole or not there at all, and what a disk says that is full or may not be written to."""
from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import OutputError

__all__ = ["check_room", "disk_errors", "make_folder", "remove_abandoned", "remove_halves",
           "write_atomically"]

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)


def write_atomically(path: Path, data: bytes) -> None:
    """Temp file beside it, fsync, rename: the file is the old one or the new one, never half of it.

    Raises: OutputError: names the file and its size; nothing is left of the new one.
    """
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path.parent, len(data), str(path), "the file"):
        try:
            with open(temp, "wb") as out:
                with contextlib.suppress(OSError):  # of a file system without locks
                    fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed: for `remove_abandoned`
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            os.replace(temp, path)
        finally:
            with contextlib.suppress(OSError):  # of a disk that is read-only: there is none then
                temp.unlink(missing_ok=True)


def remove_halves(folder: Path) -> None:
    """Remove what `write_atomically` had begun in processes that were killed; nobody else may be writing there."""
    for temp in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            temp.unlink()


def remove_abandoned(path: Path) -> None:
    """Remove what `write_atomically` had begun of this file in processes that were killed; others may be writing it."""
    for temp in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        number = temp.name[len(path.name) + 2:-len(".tmp")]
        if not number.isdigit() or not temp.is_file():
            continue
        with contextlib.suppress(OSError), open(temp, "r+b") as half:
            fcntl.flock(half, fcntl.LOCK_EX | fcntl.LOCK_NB)
            temp.unlink()


def make_folder(path: Path, what: str) -> None:
    """Make a folder and those above it. Raises: OutputError."""
    with disk_errors(path, 0, str(path), what):
        path.mkdir(parents=True, exist_ok=True)


def check_room(folder: Path, needed: int, out: str, what: str) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        folder: on that disk. needed: bytes that will be written beside what lies there. out, what: for the error.
    Raises:
        OutputError: fewer are free.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(f"writing {what} takes about {_size(needed)} of disk, {_size(free)} are free; free some, "
                          "or choose an --out on a larger disk", file=out)


@contextmanager
def disk_errors(folder: Path, needed: int, out: str, what: str) -> Iterator[None]:
    """Say what the disk said and, where it is full, how much of it is free at that moment.

    Args:
        folder: on that disk. needed: bytes that `what` takes, 0 if nobody knows. out: what the error names.
    Raises:
        OutputError: for any OSError of the block.
    """
    try:
        yield
    except OSError as error:
        words = os.strerror(error.errno) if error.errno else str(error)
        if error.errno in _FULL:
            takes = f", writing {what} takes about {_size(needed)}" if needed else ""
            words += f" ({_free(folder)} are free{takes}); free some, or choose an --out on a larger disk"
        elif error.errno in _FORBIDDEN:
            words += "; choose an --out that this user may write to"
        raise OutputError(f"cannot write {what}: {words}", file=out) from error


def _free(folder: Path) -> str:
    there = next(place for place in (folder, *folder.parents) if place.exists())
    return _size(shutil.disk_usage(there).free)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
