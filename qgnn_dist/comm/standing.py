# SPDX-License-Identifier: Apache-2.0
"""Where a worker stands, readable from another thread while its own one computes or waits."""
from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field

__all__ = ["Deadline", "Report", "Standing", "stacks"]


@dataclass(frozen=True)
class Deadline:
    """Until a worker has to have come further, and the setting that says so."""

    seconds: float
    setting: str


@dataclass(frozen=True)
class Report:
    """What a worker says of itself when it is asked.

    Attributes:
        pid: of its process. epoch: 0 before the first. doing: a method, a round of messages, or another wait, in words.
        steps: times that it came further, since its start. idle_s, cpu_s: seconds since the last one, by the clock and
        of the processor. stacks: of all threads, where they were asked for.
    """

    pid: int
    epoch: int
    doing: str
    steps: int
    idle_s: float
    cpu_s: float
    stacks: str = ""


@dataclass
class Standing:
    """One worker's; its own thread writes it, others read.

    Attributes: leaving: whether the host is about to end this process, so that the worker has to go elsewhere.
    """

    epoch: int = 0
    doing: str = "its start"
    steps: int = 0
    leaving: bool = False
    _since: float = field(default_factory=time.monotonic)
    _cpu: float = field(default_factory=time.process_time)

    def step(self, doing: str) -> None:
        """It came further, and does this now."""
        self.doing = doing
        self.steps += 1
        self._since, self._cpu = time.monotonic(), time.process_time()

    def round(self, direction: str, layer: int, round: int) -> None:
        """`step` of a round of messages (comm.exchange.Exchange.on_round)."""
        self.step(f"{direction}, layer {layer}, round {round}")

    def report(self, stacks_after_s: float) -> Report:
        """As it is now, with stacks where nothing has moved for so many seconds."""
        idle_s = time.monotonic() - self._since
        return Report(os.getpid(), self.epoch, self.doing, self.steps, idle_s, time.process_time() - self._cpu,
                      stacks() if idle_s >= stacks_after_s else "")


def stacks() -> str:
    """The stacks of all Python threads of this process but the one that asks, the main one first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = {ident: frame for ident, frame in sys._current_frames().items() if ident != threading.get_ident()}
    main = threading.main_thread().ident
    return "\n".join(f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frames[ident])).rstrip()}"
                     for ident in sorted(frames, key=lambda ident: (ident != main, ident)))
