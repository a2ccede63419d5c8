# SPDX-License-Identifier: Apache-2.0
"""Where the time of a layer goes on every rank: computing, packing, on the wire, waiting; Chrome's trace format."""
from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

__all__ = ["COMPUTE", "LANES", "PACK", "WAIT", "WIRE", "Span", "Trace", "chrome_trace", "overlap", "span"]

LANES = ("rows", "wire")
"""What runs on a rank at the same time: its kernels (and what they wait for), and messages under way."""
COMPUTE, PACK, WAIT, WIRE = "compute", "pack", "wait", "wire"


@dataclass(frozen=True)
class Span:
    """A stretch of one rank's time, in seconds since the epoch.

    Attributes: kind: compute, pack, wait or wire. round: of messages, from 0; −1 outside of one.
    """

    kind: str
    what: str
    start: float
    end: float
    layer: int = -1
    round: int = -1

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start


class Trace:
    """Collects one rank's spans; any of its threads may add to it. All clocks of a host agree."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._lock = threading.Lock()
        self._zero = time.time() - time.perf_counter()

    def now(self) -> float:
        """Seconds since the epoch, without the jumps of a clock that is set."""
        return self._zero + time.perf_counter()

    def add(self, one: Span) -> None:
        """Keep a span."""
        with self._lock:
            self.spans.append(one)

    @contextmanager
    def measure(self, kind: str, what: str, layer: int, round: int) -> Iterator[None]:
        """The span of a `with` block."""
        start = self.now()
        try:
            yield
        finally:
            self.add(Span(kind, what, start, self.now(), layer, round))


def span(trace: Trace | None, kind: str, what: str, layer: int = -1, round: int = -1) -> AbstractContextManager[None]:
    """Trace.measure, or nothing without a trace."""
    return nullcontext() if trace is None else trace.measure(kind, what, layer, round)


def chrome_trace(ranks: Sequence[Sequence[Span]]) -> dict[str, Any]:
    """All ranks' spans as a JSON object for ui.perfetto.dev or chrome://tracing: a process a rank, a row a lane."""
    first = min((one.start for spans in ranks for one in spans), default=0.0)
    events: list[dict[str, Any]] = []
    for rank, spans in enumerate(ranks):
        events.append({"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}})
        events += [{"name": "thread_name", "ph": "M", "pid": rank, "tid": lane, "args": {"name": name}}
                   for lane, name in enumerate(LANES)]
        events += [{"name": one.what, "cat": one.kind, "ph": "X", "pid": rank, "tid": int(one.kind == WIRE),
                    "ts": round((one.start - first) * 1e6, 1), "dur": round(one.seconds * 1e6, 1),
                    "args": {"layer": one.layer, "round": one.round}} for one in sorted(spans, key=lambda s: s.start)]
    return {"displayTimeUnit": "ms", "traceEvents": events}


def overlap(spans: Sequence[Span]) -> list[dict[str, float]]:
    """How well each round of one rank hides its messages, in seconds.

    Returns: a round each: `layer`, `round`, `compute` (with packing), `wire` (from the first send until all halo rows
        are there), `wait`, `wall` (until the next round's messages are sent, or the last span's end), and `ratio`, wall
        over the larger of compute and wire: 1 where the smaller one is hidden.
    """
    rounds = sorted({one.round for one in spans if one.round >= 0})
    starts = {r: min(one.start for one in spans if one.round == r) for r in rounds}
    last = max((one.end for one in spans if one.round >= 0), default=0.0)
    result = []
    for r, following in zip(rounds, [*rounds[1:], None]):
        own = [one for one in spans if one.round == r]
        seconds = {kind: sum(one.seconds for one in own if one.kind == kind) for kind in (COMPUTE, PACK, WAIT, WIRE)}
        compute, wall = seconds[COMPUTE] + seconds[PACK], (last if following is None else starts[following]) - starts[r]
        result.append({"layer": own[0].layer, "round": r, "compute": compute, "wire": seconds[WIRE],
                       "wait": seconds[WAIT], "wall": wall, "ratio": wall / max(compute, seconds[WIRE], 1e-9)})
    return result
