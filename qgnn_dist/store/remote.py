# SPDX-License-Identifier: Apache-2.0
"""A store on an object store: its manifest is read from there, its parts through this host's cache."""
from __future__ import annotations

from typing import Any

from ..config import StorageConfig
from ..errors import InputError, StoreError
from ..files.read import parse_json, reason
from ..storage.cache import Cache, CachedFiles, FileEntry
from ..storage.place import Place
from .manifest import LARGEST_MANIFEST, MANIFEST, check_manifest, part_folder

__all__ = ["RemoteParts"]


class RemoteParts:
    """The files of a store at a URI."""

    def __init__(self, uri: str, settings: StorageConfig) -> None:
        self._place, self._cache = Place(uri, settings), Cache(settings)

    def read_manifest(self) -> dict[str, Any]:
        """The manifest, checked, and the sizes of all objects that it lists.

        Raises:
            StoreError: no store there, or an upload without an end, another format version, fields missing or odd, an
            object missing or of another size.
        """
        place = self._place.at(MANIFEST)
        data = place.read(LARGEST_MANIFEST)
        if data is None:
            raise StoreError("not a store (no manifest.json, which is put there last); make one with `qgnn partition`",
                             file=self._place.uri)
        try:
            manifest = parse_json(data)
        except ValueError as error:
            raise StoreError(f"manifest cannot be read: {reason(error)}; partition the graph again",
                             file=place.uri) from None
        there = self._place.names()

        def look(part: int, files: dict[str, Any]) -> None:
            for name, entry in files.items():
                self._expect(there.get(f"{part_folder(part)}/{name}"), part, name, entry["bytes"])

        return check_manifest(manifest, place.uri, look)

    def open(self, part: int, files: dict[str, Any]) -> CachedFiles:
        """A part's files, as the manifest lists them, on this host; see Cache.open."""
        return self._cache.open(self._place.at(part_folder(part)), {
            name: FileEntry(entry["bytes"], entry["blake2b"]) for name, entry in files.items()})

    def checksum(self, part: int, name: str) -> str:
        """BLAKE2b-256 of an object, hex. Raises: StoreError: it is missing."""
        try:
            return self._place.at(f"{part_folder(part)}/{name}").checksum()
        except InputError as error:
            raise StoreError(f"{error.message}; partition the graph again", file=error.file) from None

    def _expect(self, size: int | None, part: int, name: str, wanted: int) -> None:
        uri = f"{self._place.uri}/{part_folder(part)}/{name}"
        if size is None:
            raise StoreError("file is missing; partition the graph again", file=uri)
        if size != wanted:
            raise StoreError(f"is {size} bytes, the manifest says {wanted}; partition the graph again", file=uri)
