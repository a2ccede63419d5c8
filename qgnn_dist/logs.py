# SPDX-License-Identifier: Apache-2.0
"""Log records as JSON, one a line on stderr, with where they come from and without secrets.

Without `start("json")` nothing here acts: Python's own logging prints warnings as text.
"""
from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
from collections import deque
from collections.abc import Iterable
from datetime import datetime, timezone
from typing import Any

__all__ = ["FORMATS", "KEYS", "collect", "hidden", "is_json", "pass_on", "place", "start", "stop"]

FORMATS = ("text", "json")
KEYS = ("time", "level", "run", "host", "rank", "epoch", "logger", "message")
"""Of every record, in this order; null where there is none. `trace` follows where there was an exception."""
NAME = "qgnn_dist"
MOST_KEPT = 200
"""Records that a worker keeps for the controller until its epoch ends; older ones are in its own log alone."""
LEAST_SECRET = 6
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY", re.IGNORECASE)
_NO_SECRET = re.compile(r"_(PATH|FILE|MODE|DIR)$")
_IN_TEXT = ((re.compile(r"(://)[^/\s:@]*:[^/\s@]+@"), r"\1***@"),
            (re.compile(r"(?i)\b(bearer\s+)[\w.~+/=-]+"), r"\1***"),
            (re.compile(r"(?i)\b((?:\w*token|\w*secret\w*|password)\s*[=:]\s*)[^\s,;]+"), r"\1***"))

_place: dict[str, Any] = {"run": None, "host": socket.gethostname(), "rank": None, "epoch": None}
_handler: logging.Handler | None = None


def place(**known: Any) -> None:
    """Say where records come from, from now on: run, host, rank, epoch."""
    unknown = known.keys() - _place.keys()
    if unknown:
        raise TypeError(f"a record has no {', '.join(sorted(unknown))}; expected of {', '.join(_place)}")
    _place.update(known)


def hidden(text: str) -> str:
    """The text without the values of the environment's secrets, and what looks like one.

    >>> hidden("s3://me:hunter22@host/x")
    's3://***@host/x'
    """
    for name, value in os.environ.items():
        if len(value) >= LEAST_SECRET and _SECRET_NAME.search(name) and not _NO_SECRET.search(name):
            text = text.replace(value, "***")
    for pattern, instead in _IN_TEXT:
        text = pattern.sub(instead, text)
    return text


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        values = {"time": when.replace("+00:00", "Z"), "level": record.levelname.lower(), **_place,
                  "logger": record.name, "message": hidden(record.getMessage())}
        told = {key: values[key] for key in KEYS}
        if record.exc_info:
            told["trace"] = hidden(self.formatException(record.exc_info))
        return json.dumps(told)


class _Stderr(logging.Handler):
    """To what stderr is when a record comes, and, in a worker, to a queue as well."""

    def __init__(self, queue: deque[str] | None) -> None:
        super().__init__()
        self.queue = queue
        self.setFormatter(_Json())

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        if self.queue is not None:
            self.queue.append(line)
        print(line, file=sys.stderr, flush=True)


def start(form: str, *, keep: bool = False) -> None:
    """From now on records of this package, `info` and above, go to stderr as JSON where `form` is json.

    Args: keep: for the controller too, which `collect` hands them to.
    """
    global _handler
    if form != "json" or _handler is not None:
        return
    _handler = _Stderr(deque(maxlen=MOST_KEPT) if keep else None)
    logger = logging.getLogger(NAME)
    logger.addHandler(_handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def stop() -> None:
    """Back to text."""
    global _handler
    if _handler is None:
        return
    logger = logging.getLogger(NAME)
    logger.removeHandler(_handler)
    logger.setLevel(logging.NOTSET)
    logger.propagate = True
    _handler = None


def is_json() -> bool:
    """Whether `start("json")` was called."""
    return _handler is not None


def collect() -> list[str]:
    """Lines that were kept since the last call, oldest first."""
    lines: list[str] = []
    if isinstance(_handler, _Stderr) and _handler.queue is not None:
        while _handler.queue:
            lines.append(_handler.queue.popleft())
    return lines


def pass_on(lines: Iterable[str]) -> None:
    """Print a worker's lines among this process's own, as they are."""
    for line in lines:
        print(line, file=sys.stderr, flush=True)
