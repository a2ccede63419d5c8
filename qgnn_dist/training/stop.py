# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and SIGINT end a run after its epoch, with a checkpoint; a second one ends it at once."""
from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from ..errors import QgnnError

__all__ = ["StopSignals", "StoppedError"]

_LOG = logging.getLogger(__name__)


class StoppedError(QgnnError):
    """The run was asked to stop, and did, with everything kept (exit code 1)."""


class StopSignals:
    """Context manager: inside it, `received` is the name of the signal that asked for the end, or None.

    It must be entered after Ray was connected, which sets a handler of its own. Outside the main thread, where Python
    lets nobody set handlers, it does nothing.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.received: str | None = None
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if self._enabled:
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        _LOG.warning("%s: stopping after this epoch, with a checkpoint; once more stops at once", self.received)
