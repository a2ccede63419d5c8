# SPDX-License-Identifier: Apache-2.0
"""File systems that are small or read-only; a test skips, with the reason, where none can be mounted."""
from __future__ import annotations

import gc
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
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True,
                              text=True, check=False) if shutil.which("mount") else None
        if made is None or made.returncode:
            pytest.skip(f"no file system can be mounted here ({made.stderr.strip() if made else 'no mount'})")
        try:
            yield Path(folder)
        finally:
            gc.collect()  # what an error's frames keep open would keep the disk busy
            subprocess.run(["umount", folder], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder of `tiny_disk` that nothing can be written to for the time of the block, not even by root."""
    gc.collect()
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)


def fill(folder: Path, leave: int) -> Path:
    """A file that leaves so many bytes free on the folder's disk, in whole blocks."""
    filler = folder / "filler"
    filler.unlink(missing_ok=True)
    room = os.statvfs(folder)
    with open(filler, "wb") as out:
        os.posix_fallocate(out.fileno(), 0, room.f_bavail * room.f_frsize - leave)
    return filler
