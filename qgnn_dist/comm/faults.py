# SPDX-License-Identifier: Apache-2.0
"""Faults that tests place in a run: off unless the variable QGNN_FAULT is set where the command is started.

    QGNN_FAULT="kill epoch=3 layer=2 rank=1 mark=/tmp/struck"

`kill`, `stop` and `term` send this process SIGKILL, SIGSTOP and SIGTERM; `memory` has an allocation fail under a limit
(RLIMIT_AS) of what the process holds; `call` waits until the file `mark`.done exists, so that a test can break
something outside. A fault strikes once: where the file `mark` exists already it doesn't. What is written to it says
where it struck.
"""
from __future__ import annotations

import json
import os
import resource
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["ENVIRONMENT", "Fault"]

ENVIRONMENT = "QGNN_FAULT"
KINDS = ("kill", "stop", "term", "memory", "call")
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
TOO_MUCH_BYTES = 1 << 30
CALL_S, TAKES_HOLD_S, LEAVES_S = 60.0, 0.5, 0.3


@dataclass(frozen=True)
class Fault:
    """Where to strike, and how.

    Attributes: direction: forward, backward or evaluation; of a prediction, which is epoch 1, evaluation, write (layer:
        a row group) or written.
    """

    kind: str
    mark: Path
    rank: int = 0
    epoch: int = 1
    layer: int = 0
    round: int = -1
    direction: str = "forward"

    @classmethod
    def of(cls, text: str) -> Fault:
        """Raises: ValueError: the text is not a fault."""
        kind, *words = text.split()
        given = dict(word.split("=", 1) for word in words)
        if kind not in KINDS or "mark" not in given:
            raise ValueError(f"{ENVIRONMENT}={text!r}: expected one of {', '.join(KINDS)} and mark=FILE")
        where = {name: int(given.pop(name)) for name in ("rank", "epoch", "layer", "round") if name in given}
        return cls(kind, Path(given.pop("mark")), direction=given.pop("direction", "forward"), **where)

    def look(self, rank: int, epoch: int, direction: str, layer: int, round: int) -> None:
        """Strike if this is the place; round −1 stands for any."""
        place = {"rank": rank, "epoch": epoch, "direction": direction, "layer": layer, "round": round}
        wanted = {name: getattr(self, name) for name in place}
        if self.round < 0:
            wanted["round"] = round
        if place != wanted:
            return
        time.sleep(LEAVES_S)  # what was posted before is sent by threads of Ray's, which would stop with this one
        try:
            with open(self.mark, "x", encoding="utf-8") as out:
                out.write(json.dumps({**place, "kind": self.kind, "pid": os.getpid(), "time": time.time()}))
        except FileExistsError:
            return
        if self.kind == "call":
            until, done = time.monotonic() + CALL_S, self.mark.with_name(self.mark.name + ".done")
            while not done.exists() and time.monotonic() < until:
                time.sleep(0.01)
        elif self.kind == "memory":
            _run_out_of_memory()
        else:
            os.kill(os.getpid(), SIGNALS[self.kind])
            time.sleep(TAKES_HOLD_S)  # another thread may take the signal, and this one end its work meanwhile


def _run_out_of_memory() -> None:
    """Ask for more than a limit just above what this process holds; the limit goes again, or Ray's threads would end
    the process before it could say what happened."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + TOO_MUCH_BYTES // 2, before[1]))
    try:
        np.empty(TOO_MUCH_BYTES, np.uint8)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
