# SPDX-License-Identifier: Apache-2.0
"""Fetching and unpacking one zip file, all or nothing."""
from __future__ import annotations

import http.client
import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from qgnn_dist.errors import OutputError, QgnnError
from qgnn_dist.files.write import disk_errors

__all__ = ["fetch"]

TIMEOUT_S = 60.0
BLOCK_BYTES = 1 << 20


def fetch(url: str, folder: str, target: Path, progress: Callable[[str], None] | None = None) -> None:
    """Downloads the zip file at `url` and puts its folder `folder` at `target`, which must not exist yet.

    The size is shown through `progress` before the first byte is written. Everything happens in a temporary folder
    beside the target, so an interrupted download leaves no half graph.

    Raises:
        OutputError: the disk has less room than the file needs.
        QgnnError: the server cannot be reached, stops sending, or sends something else.
    """
    say = progress or (lambda _: None)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent) as scratch:
        archive = Path(scratch) / "archive.zip"
        try:
            _receive(url, archive, say)
            say(f"unpacking into {target}")
            with zipfile.ZipFile(archive) as file:
                need = sum(entry.file_size for entry in file.infolist())
                _check_room(target.parent, need)
                with disk_errors(target.parent, need, str(target), "the graph"):
                    file.extractall(Path(scratch) / "files")
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            reason = getattr(error, "reason", error)
            raise QgnnError(f"cannot download {url} ({reason}); get it elsewhere and unpack it as {target}") from error
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
            raise QgnnError(f"{url} is no zip file ({error}); get it elsewhere and unpack it as {target}") from error
        unpacked = Path(scratch) / "files" / folder
        if not unpacked.is_dir():
            raise QgnnError(f"{url} holds no folder {folder}; unpack it by hand as {target}")
        unpacked.rename(target)


def _receive(url: str, path: Path, say: Callable[[str], None]) -> None:
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response, path.open("wb") as file:
        size = int(response.headers.get("Content-Length") or 0)
        say(f"downloading {size / 2**30:.2f} GiB from {url}" if size else f"downloading (unknown size) from {url}")
        _check_room(path.parent, size)
        done = shown = 0
        while block := response.read(BLOCK_BYTES):
            file.write(block)
            done += len(block)
            if size and done * 10 // size > shown:
                shown = done * 10 // size
                say(f"{shown * 10} % of {size / 2**30:.2f} GiB")
    if size and done != size:
        raise QgnnError(f"{url} ended after {done} of {size} bytes; try again")


def _check_room(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if need > free:
        raise OutputError(
            f"{folder} has {free / 2**30:.2f} GiB free, needed {need / 2**30:.2f}; --root names another folder"
        )
