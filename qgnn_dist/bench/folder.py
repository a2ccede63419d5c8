# SPDX-License-Identifier: Apache-2.0
"""The output folder of a bench, continued or of one go: whose it is, who works in it, and small notes in it."""
from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import EXISTS, InputError
from ..files.read import read_json

__all__ = ["bench_folder", "read_note", "table_folder"]

LARGEST_NOTE, LARGEST_TABLE = 1 << 20, 64 << 20


@contextmanager
def bench_folder(folder: Path, bench: str, ours: Sequence[str], overwrite: bool) -> Iterator[None]:
    """OUT, made or found to be this bench's, and locked against a second one.

    Args: bench: its name, as on the command line. ours: files and folders in it that `overwrite` forgets.
    Raises: InputError: something else lies there, or another process works in it.
    """
    _check_ours(folder, bench)
    _mark(folder, bench)
    with open(folder / ".lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system gives it back, however this process ends
        except BlockingIOError:
            raise InputError(f"another `qgnn bench {bench}` works in this folder", file=str(folder)) from None
        if overwrite:
            for name in ours:
                place = folder / name
                if place.is_dir():
                    shutil.rmtree(place)
                else:
                    place.unlink(missing_ok=True)
        yield


def table_folder(out: str | Path, bench: str, *, overwrite: bool, pictures: bool = False) -> Path:
    """OUT of a bench that is run in one go, made and marked: new, empty, or this bench's, whose table only `overwrite`
    replaces.

    Raises: InputError: the table is there and not to be replaced; something else is; no matplotlib for pictures.
    """
    folder = Path(out)
    table = folder / "table.json"
    earlier = read_note(table, LARGEST_TABLE) if table.is_file() else None
    ours = isinstance(earlier, dict) and earlier.get("bench") == bench  # a table from before there were markers, too
    if ours and not overwrite:
        raise InputError(EXISTS, file=str(folder))
    if not ours:
        _check_ours(folder, bench)
    if pictures:
        from .pictures import check_pictures

        check_pictures()
    _mark(folder, bench)
    return folder


def _check_ours(folder: Path, bench: str) -> None:
    """Refuse what holds something, and is not marked as this bench's."""
    marker = folder / "bench.json"
    if folder.exists() and not marker.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"output exists and is not the folder of a `qgnn bench {bench}`; choose another --out",
                         file=str(folder))
    if marker.exists() and read_note(marker) != _marker(bench):
        raise InputError("the folder belongs to another kind or version of bench; choose another --out",
                         file=str(folder))


def _mark(folder: Path, bench: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(_marker(bench)) + "\n", encoding="utf-8")


def _marker(bench: str) -> dict[str, Any]:
    return {"bench": bench, "schema": 1}


def read_note(file: Path, largest: int = LARGEST_NOTE) -> Any:
    """The value in a JSON file; None where there is none that can be read, or one of more than `largest` bytes."""
    try:
        return read_json(file, largest)
    except (OSError, ValueError):
        return None
