# SPDX-License-Identifier: Apache-2.0
"""Predictions on their way to an object store, where nothing can be renamed: every worker puts its own part.

    OUT/part-00000.parquet …   OUT/unfinished/about.json, part-00000.json …   OUT/summary.json

A part counts once its record is there, which is put after the part; predictions count once their summary is there,
which is put last. An older output stays whole until the first worker writes; then its summary goes first.
"""
from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ..config import StorageConfig
from ..errors import EXISTS, InputError, OutputError
from ..files.read import parse_json, reason, shown
from ..model.packed import PackedModel
from ..storage.place import Place
from ..store.reader import Store
from .output import ABOUT, LARGEST_RECORD, UNFINISHED, about, differs, part_file, plain_record, read_record, record_file

__all__ = ["SUMMARY", "RemotePredictions", "check_remote_output", "put_part"]

_LOG = logging.getLogger(__name__)
SUMMARY = "summary.json"
_NAME = re.compile(rf"part-\d+\.parquet|{UNFINISHED}/[^/]+|{SUMMARY}|trace\.json")


def check_remote_output(uri: str, settings: StorageConfig, overwrite: bool) -> None:
    """Refuse an output that exists and may not be replaced; what an unfinished command left is none.

    Raises: InputError.
    """
    there = Place(uri, settings).names()
    if SUMMARY in there and not overwrite:
        raise InputError(EXISTS, file=uri)
    if any(_NAME.fullmatch(name) is None for name in there):
        raise InputError("output exists and is not a folder of predictions; choose another --out", file=uri)


def put_part(uri: str, settings: StorageConfig, local: Path, part: int, result: Mapping[str, Any]) -> None:
    """Put a part's file and, after it, its record (inference.output.keep_part of a local output).

    Args: local: folder that has the file.
    Raises: OutputError: the object is not the one that was put.
    """
    place, file = Place(uri, settings), local / part_file(part)
    target = place.at(part_file(part))
    digest, size = target.put(file), file.stat().st_size
    if target.size() != size:
        raise OutputError(f"has {target.size()} bytes after {size} were put; look at the object store",
                          file=target.uri)
    record = {"bytes": size, "blake2b": digest, "result": plain_record(result)}
    place.at(f"{UNFINISHED}/{record_file(part)}").write(json.dumps(record).encode())


class RemotePredictions:
    """As inference.output.Predictions, with an object store in place of a hidden folder; `folder` is its URI.

    Two commands that write the same predictions at once are not told apart there.
    """

    def __init__(self, uri: str, store: Store, model: PackedModel, *, scores: bool, settings: StorageConfig) -> None:
        self.folder, self._place, self._parts = uri, Place(uri, settings), store.manifest["parts"]
        self._about = about(store, model, scores=scores)
        self.kept: dict[int, dict[str, Any]] = {}

    @property
    def complete(self) -> bool:
        """Every part is finished."""
        return len(self.kept) == len(self._parts)

    def __enter__(self) -> RemotePredictions:
        there = self._place.names()
        found = self._place.at(f"{UNFINISHED}/{ABOUT}").read(LARGEST_RECORD)
        if found is not None and (words := differs(found, self._about)):
            _LOG.warning("%s: starting over; what an earlier command left is %s", self.folder, words)
            self._place.at(UNFINISHED).remove_below()
        elif found is not None:
            self._find(there)
        if self.kept:
            _LOG.warning("%s: %d of %d parts are finished and kept", self.folder, len(self.kept), len(self._parts))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        """What is finished stays where it is."""

    def begin(self) -> None:
        """Parts are about to be written: from now on an older output is none any more."""
        self._place.at(SUMMARY).remove()
        self._place.at(f"{UNFINISHED}/{ABOUT}").write(json.dumps(self._about).encode())

    def commit(self, texts: Mapping[str, str]) -> None:
        """Put these files too, the summary last, and remove what is no part of the predictions."""
        for name, text in texts.items():
            if name != SUMMARY:
                self._place.at(name).write(f"{text}\n".encode())
        self._place.at(UNFINISHED).remove_below()
        wanted = {*(part_file(part) for part in range(len(self._parts))), *texts}
        for name in self._place.names().keys() - wanted:
            if _NAME.fullmatch(name):
                self._place.at(name).remove()
        self._place.at(SUMMARY).write(f"{texts[SUMMARY]}\n".encode())

    def _find(self, there: Mapping[str, int]) -> None:
        """The finished parts: those with a record, and an object of its size."""
        for part, entry in enumerate(self._parts):
            name = f"{UNFINISHED}/{record_file(part)}"
            data = self._place.at(name).read(LARGEST_RECORD) if name in there else None
            if data is None:
                continue
            try:
                record = parse_json(data)
                if there.get(part_file(part)) != record["bytes"]:
                    raise ValueError(f"it has {shown(there.get(part_file(part)))} bytes, expected {record['bytes']}")
                self.kept[part] = read_record(record["result"], entry["rows"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                _LOG.warning("%s/%s: is written again: %s", self.folder, part_file(part), reason(error))
                self._place.at(name).remove()
