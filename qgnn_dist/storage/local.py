# SPDX-License-Identifier: Apache-2.0
"""Folders of this host that stand in for places on object stores: a command works on files, which come from there
before, and go there after."""
from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from ..config import StorageConfig
from ..errors import InputError, QgnnError
from ..files.folders import abandoned, held
from ..files.write import check_room, make_folder
from .place import Place, uri_of

__all__ = ["cache_folder", "fetched", "fetched_folder", "is_safe", "put_all", "shown_as", "stand_in",
           "work_folder"]

AT_ONCE = 4
"""Files that are fetched or put side by side."""
WORK = "work"


def cache_folder(settings: StorageConfig) -> Path:
    """`storage.cache_dir`, QGNN_CACHE_DIR, or qgnn/storage in the user's cache."""
    given = settings.cache_dir or os.environ.get("QGNN_CACHE_DIR")
    if given:
        return Path(os.path.abspath(given))
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qgnn" / "storage"


@contextmanager
def work_folder(settings: StorageConfig) -> Iterator[Path]:
    """A folder for the time of the block; those of killed processes go before. Raises: OutputError: the disk."""
    target = cache_folder(settings) / WORK
    make_folder(target.parent, "the work folder")
    for left in abandoned(target):
        shutil.rmtree(left, ignore_errors=True)
    folder = target.with_name(f".{WORK}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    make_folder(folder / "files", "the work folder")
    try:
        with held(folder):
            yield folder / "files"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def shown_as(local: Path, uri: str) -> Iterator[None]:
    """Errors of the block that name a local file name the place that it stands for."""
    try:
        yield
    except QgnnError as error:
        if error.file is not None and (error.file == str(local) or error.file.startswith(f"{local}/")):
            error.file = uri + error.file[len(str(local)):]
        raise


@contextmanager
def stand_in(uri: str, settings: StorageConfig) -> Iterator[Path]:
    """A path of the place's own name in a work folder, where nothing lies yet; errors about it name the place."""
    with work_folder(settings) as folder:
        local = folder / uri.rpartition("/")[2]
        with shown_as(local, uri):
            yield local


@contextmanager
def fetched(path: str | Path, settings: StorageConfig) -> Iterator[Path]:
    """A local path that a file can be read at for the time of the block: the path itself, or a copy of the object at
    a URI.

    Raises: InputError: there is none. OutputError: the disk.
    """
    uri = uri_of(path)
    if uri is None:
        yield Path(path)
        return
    place = Place(uri, settings)
    size = place.size()
    if size is None:
        raise InputError("there is no such object", file=uri)
    with stand_in(uri, settings) as local:
        check_room(local.parent, size, uri, "a copy")
        place.fetch(local, size)
        yield local


def fetched_folder(place: Place, folder: Path, names: Mapping[str, int] | None = None) -> None:
    """Copy the objects below a place, or those of `names` with so many bytes, to a folder that is made for them.

    Raises: InputError: there are none, or one has a name that is no path inside a folder. OutputError: the disk.
    """
    names = place.names() if names is None else names
    if not names:
        raise InputError("nothing lies there", file=place.uri)
    odd = [name for name in names if not is_safe(name)]
    if odd:
        raise InputError(f"holds an object of the name {odd[0]!r}, which is no path inside a folder", file=place.uri)
    for above in {(folder / name).parent for name in names}:
        make_folder(above, "a copy")
    check_room(folder, sum(names.values()), place.uri, "a copy")
    with ThreadPoolExecutor(AT_ONCE, "qgnn-fetch") as pool:
        list(pool.map(lambda name: place.at(name).fetch(folder / name, names[name]), names))


def put_all(folder: Path, place: Place, names: list[str]) -> None:
    """Put files of a folder, by their relative names, under a place, side by side."""
    with ThreadPoolExecutor(AT_ONCE, "qgnn-put") as pool:
        list(pool.map(lambda name: place.at(name).put(folder / name), names))


def is_safe(name: str) -> bool:
    """Whether an object's name is that of a file inside a folder."""
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\0" not in name and str(path) == name
