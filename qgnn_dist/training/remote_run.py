# SPDX-License-Identifier: Apache-2.0
"""A run on an object store: its folder lies on the controller's host while it is trained, and is mirrored behind it.

    RUN/config.toml, metrics.jsonl, restarts.jsonl, stalls/, status.json, final.json, trace.json, summary.json
                                   as in a local run
    RUN/checkpoints/epoch-000010.safetensors …
    RUN/checkpoints/newest.json    {"version": 1, "checkpoints": [{"name", "bytes", "blake2b"}, …]}, the newest first

A checkpoint is put there whole, after the lines of its epochs, and is named in newest.json after that; only then older
ones are removed. So whatever a kill leaves, newest.json names checkpoints that are whole. The summary goes last.
"""
from __future__ import annotations

import contextlib
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..config import StorageConfig
from ..errors import RUN_EXISTS, InputError, OutputError, QgnnError
from ..files.read import parse_json, reason
from ..files.write import make_folder
from ..storage.local import cache_folder, fetched_folder, is_safe, stand_in
from ..storage.place import Place, uri_of
from .follow import Follow
from .run_folder import RunFolder

__all__ = ["fetched_run", "mirrored_run", "watched_run"]

_LOG = logging.getLogger(__name__)
VERSION = 1
LARGEST_LIST = 1 << 20
LOOK_S = 0.5
LINES_EVERY_S = 10.0
"""Between two copies of status.json and metrics.jsonl, which is put as a whole; a checkpoint does not wait for it."""
LOOK_AGAIN_S = 4.0
"""Between two looks of who watches a run there."""
_CONFIG, _SUMMARY, _NEWEST, _STATUS = "config.toml", "summary.json", "checkpoints/newest.json", "status.json"
_OWN = ("config.toml", "metrics.jsonl", "restarts.jsonl", "final.json", "trace.json", "summary.json")
"""Files of a run that another command goes on with; the status is of the command that writes it."""


@contextmanager
def fetched_run(path: str | Path, settings: StorageConfig) -> Iterator[Path]:
    """A run's folder to read: the path itself, or a copy with the newest checkpoint of what lies at a URI.

    Raises: InputError: no run lies there.
    """
    uri = uri_of(path)
    if uri is None:
        yield Path(path)
        return
    with stand_in(uri, settings) as local:
        _fetch(Place(uri, settings), local)
        yield local


@contextmanager
def watched_run(path: str | Path, settings: StorageConfig) -> Iterator[Callable[[], dict[str, Any]]]:
    """How a run stands, each time it is asked (training.follow.Follow.look), of a folder or at a URI.

    Raises: InputError: no run lies there, or it is damaged.
    """
    uri = uri_of(path)
    if uri is None:
        yield Follow(path).look
        return
    with stand_in(uri, settings) as local:
        copy = _Copy(Place(uri, settings), local)
        copy.renew()
        follow = Follow(local)

        def look() -> dict[str, Any]:
            copy.renew()
            return {**follow.look(), "run": uri}

        yield look


@contextmanager
def mirrored_run(out: str | Path, settings: StorageConfig, *, keep: int, resume: bool,
                 overwrite: bool) -> Iterator[Path]:
    """A run's folder to work in: `out` itself, or a local one whose files are put at a URI while they are written.

    With `resume` what lies there is fetched first, with `overwrite` it is removed. Where the object store fails
    meanwhile the run goes on, and is put there later; what is not there at the end stays on this host.

    Args: keep: checkpoints to keep there.
    Raises: InputError: the output exists and neither flag is set, or is no run. OutputError: at the end, not all could
        be put there; names the local folder.
    """
    uri = uri_of(out)
    if uri is None:
        yield Path(out)
        return
    place = Place(uri, settings)
    names = place.names()
    if names and not (resume or overwrite):
        raise InputError(RUN_EXISTS, file=uri)
    if names and _CONFIG not in names:
        raise InputError("output exists and is not a run's folder; choose another --out", file=uri)
    with stand_in(uri, settings) as local:
        mirror = _Mirror(place, local, keep)
        if names and resume:
            mirror.named = _fetch(place, local)
            mirror.take_as_put()
        elif names:
            _clear(place, names)
        with mirror:
            yield local


def _fetch(place: Place, local: Path) -> list[dict[str, Any]]:
    """Copy a run, of its checkpoints the newest that is whole; that one and those before it, as newest.json has them.

    Raises: InputError: no run, or no checkpoint that is named is whole.
    """
    names = place.names()
    if _CONFIG not in names:
        raise InputError("not a run (no config.toml); give the --out of `qgnn train`", file=place.uri)
    fetched_folder(place, local, {n: size for n, size in names.items() if n in _OWN or n.startswith("stalls/")})
    named = _read_named(place)
    (local / "checkpoints").mkdir()
    for number, one in enumerate(named):
        name = f"checkpoints/{one['name']}"
        try:
            place.at(name).fetch(local / name, one["bytes"], one["blake2b"])
            return named[number:]
        except InputError as error:
            if number == len(named) - 1:
                raise InputError(f"no checkpoint is whole ({error.message}); start again with --overwrite",
                                 file=error.file) from None
            _LOG.warning("%s; going back to %s", error, named[number + 1]["name"])
    return []


def _read_named(place: Place) -> list[dict[str, Any]]:
    """The checkpoints that newest.json names, the newest first; none where it is not there.

    Raises: InputError: it is damaged.
    """
    data = place.at(_NEWEST).read(LARGEST_LIST)
    if data is None:
        return []
    try:
        found = parse_json(data)
        if found["version"] != VERSION:
            raise ValueError(f"is of version {found['version']}, this program reads {VERSION}")
        for one in found["checkpoints"]:
            if not is_safe(one["name"]) or "/" in one["name"] or type(one["bytes"]) is not int:
                raise ValueError("names what is no checkpoint")
            str.encode(one["blake2b"])
        return [dict(one) for one in found["checkpoints"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"damaged: {reason(error)}; start again with --overwrite", file=f"{place.uri}/{_NEWEST}"
                         ) from None


def _clear(place: Place, names: dict[str, int]) -> None:
    """Remove a run: first what says that it is complete or can be gone on with, last what says that it is a run, and
    nothing that is no run's."""
    for name in (_SUMMARY, _NEWEST):
        place.at(name).remove()
    for name in names.keys() - {_SUMMARY, _NEWEST, _CONFIG}:
        if name in _OWN or name == _STATUS or name.startswith(("checkpoints/", "stalls/")):
            place.at(name).remove()
    place.at(_CONFIG).remove()


class _Copy:
    """What `Follow` reads of a run that lies elsewhere, renewed every LOOK_AGAIN_S at most."""

    def __init__(self, place: Place, local: Path) -> None:
        self._place, self._local = place, local
        self._there: dict[str, int] = {}
        self._at = -LOOK_AGAIN_S

    def renew(self) -> None:
        """Fetch what is of another size, and the status; drop what is gone. Raises: InputError: no run."""
        if time.monotonic() < self._at + LOOK_AGAIN_S:
            return
        names = self._place.names()
        if _CONFIG not in names:
            raise InputError("not a run (no config.toml); give the --out of `qgnn train`, which is there once its "
                             "workers are", file=self._place.uri)
        make_folder(self._local, "a copy")
        for name in (*_OWN, _STATUS):  # the summary late: a run that has one has its lines, too
            if name not in names:
                (self._local / name).unlink(missing_ok=True)
            elif name == _STATUS or names[name] != self._there.get(name):
                self._place.at(name).fetch(self._local / name)
        self._there, self._at = names, time.monotonic()


class _Mirror:
    """Puts a run's files to their place, in a thread of its own; leaving the block puts the last ones.

    Attributes: named: what newest.json says there.
    """

    def __init__(self, place: Place, local: Path, keep: int) -> None:
        self.named: list[dict[str, Any]] = []
        self._place, self._local, self._keep = place, local, keep
        self._put: dict[str, tuple[int, int]] = {}
        self._lines_at, self._failed = 0.0, ""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, name="qgnn-mirror", daemon=True)

    def __enter__(self) -> _Mirror:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._end.set()
        self._thread.join()
        try:
            self._sync(all_lines=True)
        except (QgnnError, OSError) as failed:
            kept = self._keep_here()
            lost = OutputError(f"the end of the run could not be put there: {failed}; it is in {kept}, where --out "
                               f"{kept} --resume goes on with it", file=self._place.uri)
            if error is None:
                raise lost from None
            _LOG.warning("%s", lost)

    def take_as_put(self) -> None:
        """What is in the folder now came from there."""
        self._put = {str(file.relative_to(self._local)): _stamp(file)
                     for file in self._local.rglob("*") if file.is_file()}

    def _work(self) -> None:
        while not self._end.wait(LOOK_S):
            try:
                self._sync()
                self._failed = ""
            except (QgnnError, OSError) as error:
                if str(error) != self._failed:
                    _LOG.warning("%s; the run goes on, and is put there later", error)
                self._failed = str(error)

    def _sync(self, all_lines: bool = False) -> None:
        """Put what is new, in the order in which it counts: settings and lines, checkpoints, their names, summary."""
        run = RunFolder(self._local)
        if not (self._local / _CONFIG).exists():
            return  # nothing has begun
        complete = run.summary_path.exists()
        # Looked for before the lines are read: those of their epochs are on disk by then.
        checkpoints = [f for f in run.checkpoint_files() if f.parent == run.checkpoints and self._is_new(f)]
        self._put_file(self._local / _CONFIG)
        if all_lines or complete or checkpoints or time.monotonic() >= self._lines_at + LINES_EVERY_S:
            for file in (run.metrics_path, run.restarts_path, run.status_path, *run.stall_files()):
                self._put_file(file)
            self._lines_at = time.monotonic()
        for file in reversed(checkpoints):
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile, as newer ones are there
                self._put_checkpoint(file)
        if complete:
            for file in (run.final_path, run.trace_path, run.summary_path):
                self._put_file(file)

    def _put_checkpoint(self, file: Path) -> None:
        stamp = _stamp(file)
        digest = self._place.at(f"checkpoints/{file.name}").put(file)
        one = {"name": file.name, "bytes": stamp[0], "blake2b": digest}
        named = sorted([one, *(o for o in self.named if o["name"] != file.name)], key=lambda o: _epoch(o["name"]),
                       reverse=True)
        told = {"version": VERSION, "checkpoints": named[:self._keep]}
        self._place.at(_NEWEST).write(json.dumps(told, indent=1).encode())
        self.named = named[:self._keep]
        for old in named[self._keep:]:
            self._place.at(f"checkpoints/{old['name']}").remove()
        self._put[f"checkpoints/{file.name}"] = stamp

    def _put_file(self, file: Path) -> None:
        if self._is_new(file):
            stamp, place = _stamp(file), self._place.at(str(file.relative_to(self._local)))
            if file.suffix == ".jsonl":  # the last line may be being written
                data = file.read_bytes()
                place.write(data[:data.rfind(b"\n") + 1])
            else:
                place.put(file)
            self._put[str(file.relative_to(self._local))] = stamp

    def _is_new(self, file: Path) -> bool:
        with contextlib.suppress(FileNotFoundError):  # a checkpoint may go at any time
            return self._put.get(str(file.relative_to(self._local))) != _stamp(file)
        return False

    def _keep_here(self) -> Path:
        """Move the folder to where nobody removes it."""
        kept = cache_folder(self._place.settings) / "kept" / f"{self._local.name}-{time.time_ns()}"
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(self._local, kept)
        return kept


def _stamp(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _epoch(name: str) -> tuple[int, str]:
    return len(name), name  # of six digits or more
