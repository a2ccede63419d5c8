# SPDX-License-Identifier: Apache-2.0
"""File systems that are small or read-only; a test skips, with the reason, where none can be mounted."""
from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["fill", "read_only", "tiny_disk"]


@contextmanager
def tiny_disk(size: str) -> Iterator[Path]:
    """A folder on a file system of its own, of a size as `mount` takes it."""
    with tempfile.TemporaryDirectory() as folder:
        _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder of `tiny_disk` that nothing can be written to for the time of the block, not even by root."""
    _mount("-o", "remount,ro", str(folder))
    try:
        yield
    finally:
        _mount("-o", "remount,rw", str(folder))


def fill(folder: Path, leave: int) -> Path:
    """A file that leaves so many bytes free on the folder's disk, in whole blocks."""
    filler = folder / "filler"
    filler.unlink(missing_ok=True)
    room = os.statvfs(folder)
    with open(filler, "wb") as out:
        os.posix_fallocate(out.fileno(), 0, room.f_bavail * room.f_frsize - leave)
    return filler


def _mount(*words: str) -> None:
    if shutil.which("mount") is None:
        pytest.skip("no file system can be mounted here (no mount)")
    made = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here ({made.stderr.strip()})")
