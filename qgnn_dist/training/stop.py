# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and SIGINT end a run after its epoch, with a checkpoint, a second one at once; SIGTERM ends a prediction."""
from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from ..errors import QgnnError

__all__ = ["StopSignals", "StoppedError", "sigterm_stops"]

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


@contextmanager
def sigterm_stops(advice: str, enabled: bool = True) -> Iterator[None]:
    """Inside the block SIGTERM does what Ctrl-C does, and leaves it as StoppedError, with what to do then.

    Ray sets a handler of its own, SystemExit, when it is connected; so one such block belongs inside its session, and
    one around it for the time before. Outside the main thread it does nothing.
    """
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield
        return
    received = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = True
        raise KeyboardInterrupt  # which, unlike other exceptions, gets through Ray's waits

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        if not received and getattr(error, "code", None) != signal.SIGTERM:
            raise
        raise StoppedError(f"stopped by SIGTERM; {advice}") from None
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
