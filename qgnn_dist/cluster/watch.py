# SPDX-License-Identifier: Apache-2.0
"""Asks workers where they stand while a call of theirs takes long, and tells when none of them comes further.

Nothing is ended for it: deadlines decide. Of a call in which workers do not wait for one another, one that comes no
further makes it late (`check`). A call that is over within the first period is never asked about.
"""
from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..comm.standing import Deadline, Report
from ..errors import DeadlineError

__all__ = ["Stall", "StallWatch"]

_LOG = logging.getLogger(__name__)
ANSWER_S = 2.0
"""How long a worker may take to say where it stands; what is asked runs beside its own work."""
LOOK_S = 0.1
"""Between looks for answers that are still to come."""


@dataclass(frozen=True)
class Stall:
    """One standstill of all workers.

    Attributes: epoch: the latest that a worker is in. lines: what it is, and where each rank stands. stacks: of the
        threads of each rank that has not moved.
    """

    epoch: int
    lines: list[str]
    stacks: Mapping[int, str]

    def __str__(self) -> str:
        parts = ["\n".join(self.lines)]
        parts += [f"rank {rank}\n{text}" for rank, text in sorted(self.stacks.items())]
        return "\n\n".join(parts) + "\n"


class StallWatch:
    """Of one call to all workers; `look` is to be called at least every `pause_s()` seconds while it is out.

    Args:
        ask: sends a rank the question where it stands, with its stacks where it has not moved for so many seconds
            (Standing.report); the reference of the answer. taken: answers that are there, by reference.
        who: of each rank, host and process, in words. stall_s: `timeouts.stall_s`.
        tell: is given the stall, to be kept. step: until each worker has to have come further, for `check`.
    """

    def __init__(self, ask: Callable[[int, float], Any], taken: Callable[[Sequence[Any]], Mapping[Any, Report]],
                 who: Mapping[int, str], stall_s: float, what: str, tell: Callable[[Stall], None],
                 step: Deadline | None = None) -> None:
        self._ask, self._taken, self._who, self._tell, self._step = ask, taken, who, tell, step
        shortest_s = min(stall_s, step.seconds) if step is not None else stall_s
        self._stall_s, self._period_s, self._what = stall_s, shortest_s / 4, what
        self._answer_s = min(ANSWER_S, shortest_s / 2)
        self._begun = time.monotonic()
        self._next = self._begun + self._period_s
        self._questions: dict[Any, int] = {}
        self._answers: dict[int, Report] = {}
        self._told: dict[int, int] | None = None
        self._moved = dict.fromkeys(who, self._begun)  # when each was last known to have come further
        self._last: dict[int, Report] = {}

    def pause_s(self) -> float:
        """Seconds until the next look."""
        return LOOK_S if self._questions else max(self._next - time.monotonic(), 0.0)

    def look(self) -> None:
        """Ask, or collect answers, or neither, as the time is; does not wait."""
        now = time.monotonic()
        if not self._questions:
            if now < self._next:
                return
            self._questions = {self._ask(rank, self._stall_s): rank for rank in self._who}
            self._answers, self._next = {}, now + self._answer_s
        for ref, report in self._taken([ref for ref, r in self._questions.items() if r not in self._answers]).items():
            self._answers[self._questions[ref]] = report
        if len(self._answers) == len(self._who) or now >= self._next:
            self._questions, self._next = {}, now + self._period_s
            self._judge(now)

    def check(self, ranks: Iterable[int]) -> None:
        """Of workers whose call is still out.

        Raises: DeadlineError: one of them has not come further for as long as it may.
        """
        if self._step is None:
            return
        for rank in ranks:
            idle_s = time.monotonic() - self._moved[rank]
            if idle_s > self._step.seconds:
                last = self._last.get(rank)
                raise DeadlineError(
                    f"{self._who[rank]} has not come further in {self._what} for {idle_s:.1f} s"
                    f"{f' ({last.doing})' if last is not None else ''}; look at its host and its disk, or raise "
                    f"{self._step.setting} ({self._step.seconds:g})", rank=rank)

    def _judge(self, now: float) -> None:
        """Tell, once for each standstill, where all that answered have stood for `stall_s`."""
        for rank, one in self._answers.items():
            self._moved[rank], self._last[rank] = max(self._moved[rank], now - one.idle_s), one
        idle_s = min((one.idle_s for one in self._answers.values()), default=now - self._begun)
        steps = {rank: one.steps for rank, one in self._answers.items()}
        if idle_s < self._stall_s or steps == self._told:
            return
        self._told = steps
        lines = [f"no worker has come further for {idle_s:.1f} s ({self._what})",
                 *(self._line(rank, self._answers.get(rank)) for rank in self._who)]
        for line in lines:
            _LOG.warning(line)
        self._tell(Stall(max((one.epoch for one in self._answers.values()), default=0), lines,
                         {rank: one.stacks for rank, one in self._answers.items() if one.stacks}))

    def _line(self, rank: int, one: Report | None) -> str:
        if one is None:
            return (f"{self._who[rank]}: no answer within {self._answer_s:g} s; its process or its host is frozen or "
                    "cannot be reached")
        how = "computes" if one.cpu_s > one.idle_s / 2 else "waits"
        return f"{self._who[rank]}: epoch {one.epoch}, {one.doing}; it {how}, for {one.idle_s:.1f} s"
