# SPDX-License-Identifier: Apache-2.0
"""Graphs on object stores: `parquet:s3://bucket/graph` and `s3://bucket/graph.npz` are copied before they are read."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..config import StorageConfig
from ..errors import InputError
from ..storage.local import fetched, fetched_folder, stand_in
from ..storage.place import Place, uri_of

__all__ = ["local_source"]

_PARQUET, _TABLES = "parquet:", ("nodes", "edges")


@contextmanager
def local_source(source: Any, settings: StorageConfig) -> Iterator[Any]:
    """A source that can be read on this host for the time of the block: itself, or of a copy.

    Raises: InputError: nothing lies at its URI. OutputError: the disk.
    """
    tables = isinstance(source, str) and source.startswith(_PARQUET)
    uri = uri_of(source[len(_PARQUET):] if tables else source)
    if uri is None:
        yield source
    elif tables:
        place = Place(uri, settings)
        names = {name: size for name, size in place.names().items() if name.startswith(_TABLES)}
        if not names:
            raise InputError("there are no tables, expected nodes and edges", file=uri)
        with stand_in(uri, settings) as local:
            fetched_folder(place, local, names)
            yield f"{_PARQUET}{local}"
    elif uri.endswith(".npz"):
        with fetched(uri, settings) as local:
            yield str(local)
    else:
        raise InputError("no graph source; expected parquet:URI of a folder with nodes and edges, or the URI of a "
                         "FILE.npz", file=uri)
