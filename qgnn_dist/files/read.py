# SPDX-License-Identifier: Apache-2.0
"""Files that somebody else wrote: what they are and how large is known before anything is read, parsed or allocated.

All here raise OSError or ValueError and nothing else; a reader turns both into an error of its own that names the
file (`reason` has the words). docs/inputs.md tells all limits.
"""
from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
import sys
from pathlib import Path
from typing import Any, BinaryIO

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

__all__ = ["LARGEST_TOML", "check_regular", "is_inside", "open_regular", "parse_json", "parse_toml", "read_bytes",
           "read_json", "read_lines", "read_toml", "reason", "shown"]

MOST_LEVELS = 32
"""Objects and arrays inside one another, in JSON and TOML: ours have 5."""
LARGEST_TOML = 1 << 20
SHOWN = 80
_KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"),
          (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def check_regular(path: str | Path) -> int:
    """Size in bytes of what is a file, links followed.

    Raises: OSError: not there, or a folder, pipe, socket or device; none of them is opened, a pipe would wait for ever.
    """
    found = os.stat(path)
    _refuse_kind(found.st_mode, path)
    return found.st_size


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file to read; OSError as `check_regular`, also where it is swapped for a pipe meanwhile."""
    check_regular(path)
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _refuse_kind(os.fstat(handle).st_mode, path)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _refuse_kind(mode: int, path: str | Path) -> None:
    kind = next((word for test, word in _KINDS if test(mode)), None)
    if kind is not None:
        number = errno.EISDIR if kind == "a folder" else errno.EINVAL
        raise OSError(number, f"is {kind}, expected a file", str(path))


def _read(path: str | Path, limit: int) -> tuple[bytes, int]:
    """A file's bytes, one more than its size where it has grown since, and its size."""
    with open_regular(path) as opened:
        size = os.fstat(opened.fileno()).st_size
        if size > limit:
            raise ValueError(f"is {size} bytes, expected at most {limit}")
        return opened.read(size + 1), size


def read_bytes(path: str | Path, limit: int) -> bytes:
    """All of a file of at most `limit` bytes."""
    data, size = _read(path, limit)
    if len(data) != size:
        raise ValueError(f"has {size} bytes, but other than so many can be read; is it being written?")
    return data


def read_lines(path: str | Path, limit: int) -> tuple[list[bytes], bool]:
    """The finished lines of a file of at most `limit` bytes that may be growing, and whether it ends in half a line.

    What comes while it is read is left for the next look.
    """
    data, size = _read(path, limit)
    data = data[:size]
    whole = data[:data.rfind(b"\n") + 1]
    return whole.splitlines(), len(whole) < len(data)


def read_json(path: str | Path, limit: int) -> Any:
    """The value in a JSON file; see `parse_json`."""
    return parse_json(read_bytes(path, limit))


def parse_json(data: bytes) -> Any:
    """A JSON value whose keys are distinct, whose numbers are finite, whose texts are Unicode, and which is shallow.

    While it is parsed it takes some 25 times its bytes at most, so that callers bound those.
    """
    text = data.decode("utf-8")
    try:
        value = json.loads(text, object_pairs_hook=_distinct, parse_constant=_no_constant, parse_float=_finite)
        if _SURROGATE.search(text):  # half of a character, which no encoder takes
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError(f"is nested more than {MOST_LEVELS} deep") from None
    _check_depth(value)
    return value


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file of at most 1 MiB; see `parse_toml`."""
    return parse_toml(read_bytes(path, LARGEST_TOML).decode("utf-8"))


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a TOML text that is shallow."""
    try:
        tables: dict[str, Any] = tomllib.loads(text)
    except RecursionError:
        raise ValueError(f"is nested more than {MOST_LEVELS} deep") from None
    _check_depth(tables)
    return tables


def is_inside(path: str | Path, folder: str | Path) -> bool:
    """Whether a path, links followed, lies in a folder that may be reached by links itself."""
    real, base = os.path.realpath(path), os.path.realpath(folder)
    return os.path.commonpath([real, base]) == base


def reason(error: BaseException) -> str:
    """Why a file could not be read, on one line."""
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return shown(words.strip().partition("\n")[0] or type(error).__name__, 200)


def shown(value: Any, most: int = SHOWN) -> str:
    """A value from outside as an error may show it: its beginning, on one line, no control characters.

    >>> shown("a\\x1b[31m"), shown(["b", 1]), shown("long" * 100, 8)
    ('a\\\\x1b[31m', "['b', 1]", 'longlong…')
    """
    try:
        text = value if isinstance(value, str) else repr(value)
    except (ValueError, RecursionError):  # Python writes no number of more than 4300 digits
        text = f"a {type(value).__name__} too long to show"
    cut = text[:most] + ("…" if len(text) > most else "")
    return cut if cut.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in cut)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen = set[str]()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"has the key {shown(twice)!r} twice in one object")
    return found


def _no_constant(word: str) -> Any:
    raise ValueError(f"holds {word}, expected finite numbers")


def _finite(word: str) -> float:
    value = float(word)
    if not math.isfinite(value):
        raise ValueError(f"holds {shown(word)}, which is too large for a number")
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MOST_LEVELS + 1):
        level = [inner for outer in level if isinstance(outer, (dict, list))
                 for inner in (outer.values() if isinstance(outer, dict) else outer) if isinstance(inner, (dict, list))]
        if not level:
            return
    raise ValueError(f"is nested more than {MOST_LEVELS} deep")
