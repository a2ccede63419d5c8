# SPDX-License-Identifier: Apache-2.0
"""Outputs on object stores: written to a local folder first, and put there once they are finished.

Data go first and the file that names them last, so that what has none is not seen as an output: readers look for it.
"""
from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..config import StorageConfig
from ..errors import EXISTS, InputError
from .local import put_all, stand_in
from .place import Place, uri_of

__all__ = ["published_file", "published_folder"]

_LOG = logging.getLogger(__name__)


@contextmanager
def published_file(out: str | Path, settings: StorageConfig, overwrite: bool) -> Iterator[Path]:
    """A local path to write one file to: `out` itself, or a stand-in that is put there at the block's end.

    Raises: InputError: the object exists, and `overwrite` is not set.
    """
    uri = uri_of(out)
    if uri is None:
        yield Path(out)
        return
    place = Place(uri, settings)
    if place.size() is not None and not overwrite:
        raise InputError(EXISTS, file=uri)
    with stand_in(uri, settings) as local:
        yield local
        place.put(local)


@contextmanager
def published_folder(out: str | Path, settings: StorageConfig, overwrite: bool, *, last: str, data: re.Pattern[str],
                     what: str) -> Iterator[Path]:
    """A local path for a folder: `out` itself, or a stand-in that is put there at the block's end, the file `last`
    after all others. An older output stays until the new one is put; then its `last` goes first.

    Args: data: names that such a folder's other files have: objects of such names without a `last` are what an
        unfinished upload left, and are replaced. what: of it, for errors: "a store".
    Raises: InputError: the output exists and `overwrite` is not set, or is something else.
    """
    uri = uri_of(out)
    if uri is None:
        yield Path(out)
        return
    place = Place(uri, settings)
    there = place.names()
    if last in there and not overwrite:
        raise InputError(EXISTS, file=uri)
    if there.keys() - {last} and not all(data.fullmatch(name) for name in there.keys() - {last}):
        raise InputError(f"output exists and is not {what}; choose another --out", file=uri)
    if there and last not in there:
        _LOG.warning("%s: what an unfinished upload left is replaced", uri)
    with stand_in(uri, settings) as local:
        yield local
        names = sorted(str(file.relative_to(local)) for file in local.rglob("*") if file.is_file())
        place.at(last).remove()
        put_all(local, place, [name for name in names if name != last])
        for name in there.keys() - {last, *names}:
            place.at(name).remove()
        place.at(last).put(local / last)
