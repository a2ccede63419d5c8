# SPDX-License-Identifier: Apache-2.0
"""RUN/status.json: how a run stands just now, whole at any time, written by a thread so that no epoch waits for it."""
from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from .. import logs
from ..errors import OutputError
from ..files.write import write_atomically
from .observer import Observer, ended
from .run_folder import RunFolder

__all__ = ["BEAT_S", "RunStatus"]

_LOG = logging.getLogger(__name__)
SCHEMA = 1
EVERY_S = 1.0
"""Least time between two versions of the file, but for changes of the state."""
BEAT_S = 5.0
"""The file is written anew at least so often, while the command lives."""
MESSAGES = 8
REPORTED = ("train_s", "evaluation_s", "wait_s", "wire_bytes", "memory")
"""Of a worker's report of an epoch, what the file has."""


class RunStatus(Observer):
    """Writes the file. A context manager: the thread ends with it. What the disk refuses is told once in the log.

    Where the run has no folder yet nothing is written: what is refused at its start must leave nothing.
    """

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._lock, self._over = threading.Lock(), threading.Event()
        self._messages: deque[dict[str, Any]] = deque(maxlen=MESSAGES)
        self._kept = _Kept(self._messages)
        self._changed = self._refused = False
        self._now: dict[str, Any] = {
            "schema": SCHEMA, "state": "starting", "host": socket.gethostname(), "pid": os.getpid(),
            "started": time.time(), "epochs": 0, "epoch": 0, "wire_bytes": {}, "restarts": 0, "workers": []}
        self._thread = threading.Thread(target=self._beat, name="qgnn-status", daemon=True)

    def __enter__(self) -> RunStatus:
        logging.getLogger(logs.NAME).addHandler(self._kept)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if "reason" not in self._now:  # it ended before there were workers
            self.end(*ended(error))
        self._over.set()
        self._thread.join()
        logging.getLogger(logs.NAME).removeHandler(self._kept)

    def workers(self, workers: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]], epochs: int) -> None:
        sent: dict[str, int] = {}
        for record in records:
            sent = {kind: sent.get(kind, 0) + count for kind, count in record["wire_bytes"].items()}
        places = [{"rank": rank, **{key: worker[key] for key in ("host", "rows", "edges")}}
                  for rank, worker in enumerate(workers)]
        self._set(state="training", epochs=epochs, epoch=records[-1]["epoch"] if records else 0, wire_bytes=sent,
                  restarts=len(self._run.read_restarts()), workers=places)
        self._write()

    def epoch(self, record: dict[str, Any], reports: Sequence[dict[str, Any]]) -> None:
        sent = self._now["wire_bytes"]
        places = [{**place, **{key: report[key] for key in REPORTED if key in report}}
                  for place, report in zip(self._now["workers"], reports)]
        self._set(state="training", epoch=record["epoch"], workers=places,
                  wire_bytes={kind: sent.get(kind, 0) + count for kind, count in record["wire_bytes"].items()})

    def stall(self, epoch: int) -> None:
        self._set(state="stalled")
        self._write()

    def restart(self, restart: dict[str, Any]) -> None:
        self._set(state="recovering", restarts=self._now["restarts"] + 1)
        self._write()

    def end(self, state: str, reason: str, message: str) -> None:
        if message:
            self._messages.append({"time": time.time(), "level": "error", "text": logs.hidden(message)})
        self._set(state=state, reason=reason)
        self._write()

    def _set(self, **values: Any) -> None:
        with self._lock:
            self._now = {**self._now, **values}
            self._changed = True

    def _beat(self) -> None:
        written = time.monotonic()
        while not self._over.wait(EVERY_S):
            if self._changed or time.monotonic() - written >= BEAT_S:
                self._write()
                written = time.monotonic()

    def _write(self) -> None:
        with self._lock:
            self._changed = False
            if not self._run.path.exists():
                return
            now = {**self._now, "time": time.time(), "messages": list(self._messages)}
            try:
                write_atomically(self._run.status_path, json.dumps(now).encode())
            except OutputError as error:
                if not self._refused:
                    self._refused = True
                    _LOG.warning("%s; `qgnn top` shows an older state", error)


class _Kept(logging.Handler):
    """Keeps the last warnings. Where it is the only handler, it prints them as Python would without any."""

    def __init__(self, messages: deque[dict[str, Any]]) -> None:
        super().__init__(logging.WARNING)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append({"time": record.created, "level": record.levelname.lower(),
                               "text": logs.hidden(record.getMessage())})
        others = [h for h in logging.getLogger(logs.NAME).handlers if not isinstance(h, _Kept)]
        if not others and not logging.getLogger().handlers and logging.lastResort is not None:
            logging.lastResort.handle(record)
