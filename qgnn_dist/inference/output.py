# SPDX-License-Identifier: Apache-2.0
"""Predictions on their way: a hidden folder beside their place, where finished parts outlive who wrote them.

    .OUT.DIGEST.tmp/  part-00000.parquet …   unfinished/about.json, part-00000.json …   lock

The digest is that of all that decides what the files hold. A part counts once its record is there, which is written
after the file was read back; `unfinished/` goes right before the folder takes its place, so that whatever a kill
leaves tells that it is not whole.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from .. import __version__
from ..errors import InputError
from ..files.folders import LOCK, abandoned, held, put_in_place, remove_replaced
from ..files.read import check_regular, parse_json, read_bytes, read_json, reason
from ..files.write import disk_errors, make_folder, write_atomically
from ..model.packed import PackedModel
from ..store.columns import checksum
from ..store.reader import Store
from .groups import BINS, BUCKETS, Counts

__all__ = ["ABOUT", "LARGEST_RECORD", "UNFINISHED", "Predictions", "about", "differs", "keep_part", "open_part",
           "part_file", "plain_record", "read_record", "record_file"]

_LOG = logging.getLogger(__name__)
UNFINISHED, ABOUT = "unfinished", "about.json"
_HALF = ".part-*.tmp"
LARGEST_RECORD = 64 << 20
"""Bytes: three splits of 65,536 classes take 6 MB."""
_WORDS = {"graph": "another graph", "parts": "another partition", "model": "another model",
          "scores": "other columns (--scores)", "versions": "other versions of this program or Arrow"}


def part_file(part: int) -> str:
    """Name of a part's output file."""
    return f"part-{part:05d}.parquet"


def record_file(part: int) -> str:
    """Name of a finished part's record."""
    return f"part-{part:05d}.json"


def about(store: Store, model: PackedModel, *, scores: bool) -> dict[str, Any]:
    """All that decides what the files hold."""
    return {"graph": store.fingerprint,
            "parts": _digest(json.dumps(store.manifest["parts"], sort_keys=True).encode()),
            "model": _digest(model.to_bytes()), "scores": scores, "versions": f"{__version__}, {pa.__version__}"}


def differs(found: bytes, wanted: Mapping[str, Any]) -> str:
    """How predictions of an earlier command, by their `about` as JSON, differ from these; empty where they do not."""
    try:
        there = parse_json(found)
        other = [words for key, words in _WORDS.items() if there.get(key) != wanted[key]]
    except (ValueError, AttributeError):
        return "of nobody knows what"
    return "of " + " and ".join(other) if other else ""


@contextmanager
def open_part(folder: Path, part: int, size: int, run_id: int) -> Iterator[Path]:
    """The name under which a part's file is written; it gets its own, synced to disk, at the end of the block.

    Args: size: bytes that it may take. run_id: tells apart what an earlier command's worker may still be writing.
    Raises: OutputError: the disk; nothing is left of the file then.
    """
    file = folder / part_file(part)
    temp = folder / f".part-{part:05d}-{run_id:016x}.tmp"
    with disk_errors(folder, size, str(file), "the predictions"):
        try:
            yield temp
            with open(temp, "rb") as written:
                os.fsync(written.fileno())
            os.replace(temp, file)
        finally:
            with contextlib.suppress(OSError):  # of a disk that is read-only: there is none then
                temp.unlink(missing_ok=True)


def keep_part(folder: Path, part: int, result: Mapping[str, Any]) -> None:
    """Say that a part's file is whole, after it was read back.

    Args: folder: of `Predictions`. result: what PredictWorker.write returns.
    Raises: OutputError: the disk.
    """
    file = folder / part_file(part)
    with disk_errors(folder, 0, str(file), "the predictions"):
        record = {"bytes": file.stat().st_size, "blake2b": checksum(file), "result": plain_record(result)}
    write_atomically(folder / UNFINISHED / record_file(part), json.dumps(record).encode())


def plain_record(result: Mapping[str, Any]) -> dict[str, Any]:
    """What PredictWorker.write returns, for JSON; `read_record` is the way back."""
    return {**result, "classes": result["classes"].tolist(),
            "counts": {name: [one.by_degree.tolist(), one.by_class.tolist(), one.by_confidence.tolist()]
                       for name, one in result["counts"].items()}}


class Predictions:
    """A context manager around the work on one output.

    Entering it finds what an earlier command or try has finished of the same predictions (`kept`: result by part), and
    removes what belongs to others. Leaving it without `commit` keeps the parts that are finished by then, and nothing
    where none is.

    Args: out: absolute path of the output's folder.
    Raises:
        InputError: another process is writing this output. OutputError: the disk.
    """

    def __init__(self, out: Path, store: Store, model: PackedModel, *, scores: bool) -> None:
        self._out, self._parts = out, store.manifest["parts"]
        self._about = about(store, model, scores=scores)
        self.folder = out.with_name(f".{out.name}.{_digest(json.dumps(self._about).encode())[:16]}.tmp")
        self.kept: dict[int, dict[str, Any]] = {}
        self._held = ExitStack()

    @property
    def complete(self) -> bool:
        """Every part is finished."""
        return len(self.kept) == len(self._parts)

    def __enter__(self) -> Predictions:
        for left in abandoned(self._out):
            if left != self.folder:
                _LOG.warning("%s: starting over; what an earlier command left is %s", self._out, self._other(left))
                shutil.rmtree(left, ignore_errors=True)
        remove_replaced(self._out)
        make_folder(self.folder / UNFINISHED, "the predictions")
        with disk_errors(self.folder, 0, str(self._out), "the predictions"):
            if not self._held.enter_context(held(self.folder)):
                self._held.close()
                raise InputError("another process is writing these predictions; wait for it, or choose another --out",
                                 file=str(self._out))
        try:
            write_atomically(self.folder / UNFINISHED / ABOUT, json.dumps(self._about).encode())
            self.kept = self._find()
        except BaseException:
            self._leave()
            raise
        if self.kept:
            _LOG.warning("%s: %d of %d parts are finished and kept", self._out, len(self.kept), len(self._parts))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._leave()

    def begin(self) -> None:
        """Parts are about to be written; an older output stays until `commit`."""

    def commit(self, texts: Mapping[str, str]) -> None:
        """Write these files too, and put the folder in its place; an older one goes after that.

        Raises: OutputError: the disk.
        """
        for name, text in texts.items():
            write_atomically(self.folder / name, f"{text}\n".encode())
        with disk_errors(self._out.parent, 0, str(self._out), "the predictions"):
            for half in self.folder.glob(_HALF):
                half.unlink(missing_ok=True)
            shutil.rmtree(self.folder / UNFINISHED)
            (self.folder / LOCK).unlink(missing_ok=True)
            put_in_place(self.folder, self._out)

    def _leave(self) -> None:
        if self.folder.exists() and not list((self.folder / UNFINISHED).glob("part-*.json")):
            shutil.rmtree(self.folder, ignore_errors=True)
        self._held.close()

    def _find(self) -> dict[int, dict[str, Any]]:
        """The finished parts, their files compared with their records; what is not right is written again."""
        found = {}
        for part, entry in enumerate(self._parts):
            file, record = self.folder / part_file(part), self.folder / UNFINISHED / record_file(part)
            try:
                found[part] = _read_result(file, record, entry["rows"])
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                _LOG.warning("%s: is written again: %s", file, reason(error))
                record.unlink(missing_ok=True)
        return found

    def _other(self, folder: Path) -> str:
        """How predictions of an earlier command differ from these."""
        try:
            return differs(read_bytes(folder / UNFINISHED / ABOUT, LARGEST_RECORD), self._about)
        except (OSError, ValueError):
            return "of nobody knows what"


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=32).hexdigest()


def _read_result(file: Path, record: Path, rows: int) -> dict[str, Any]:
    """A part's result, as PredictWorker.write returned it.

    Raises: OSError, ValueError and what a record of another shape leads to: the part is not finished.
    """
    values = read_json(record, LARGEST_RECORD)
    if check_regular(file) != values["bytes"] or checksum(file) != values["blake2b"]:
        raise ValueError("its checksum is not that of its content")
    return read_record(values["result"], rows)


def read_record(result: dict[str, Any], rows: int) -> dict[str, Any]:
    """A part's result, of so many rows, from what `plain_record` made of it.

    Raises: ValueError and what a record of another shape leads to.
    """
    result["classes"] = np.array(result["classes"], np.int64)
    result["counts"] = {name: Counts(*(np.array(one, np.int64) for one in arrays))
                        for name, arrays in result["counts"].items()}
    for one in result["counts"].values():
        if (one.by_degree.shape, one.by_class.shape[1:], one.by_confidence.shape) != ((BUCKETS, 2), (3,), (BINS, 3)):
            raise ValueError("its counts have other shapes")
    if result["rows"] != rows or int(result["classes"].sum()) != rows:
        raise ValueError(f"it has {result['rows']} rows, expected {rows}")
    return dict(result)
