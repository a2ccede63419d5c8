# SPDX-License-Identifier: Apache-2.0
"""Which failures a run goes on after, how often, and with how long a pause: deciding alone, the callers act.

What the input or the settings cause is the user's to mend and never tried again; a lost process or host, a message that
did not come or was wrong, is.
"""
from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

from ..config import ClusterConfig
from ..errors import DeadlineError, ExchangeError, QgnnError, WorkerLostError

__all__ = ["Restart", "Restarts"]

RETRIED = (WorkerLostError, ExchangeError, DeadlineError)
WITHOUT_PROGRESS = 3
"""Restarts in a row that may fail at the same epoch."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
GOES_ON = {"train": ("from the last checkpoint", "go on with --resume"),
           "predict": ("of what is not finished", "give the same command again")}
"""Command → what a restart of it does, and what its user can do after the last one."""


@dataclass(frozen=True)
class Restart:
    """One failure that a run went on after.

    Attributes:
        epoch: the last one that was finished before it. error: of the likely cause, in one line. host, rank, layer: of
            the likely cause, as far as known. time: seconds since the epoch of the system's clock.
    """

    number: int
    epoch: int
    error: str
    host: str | None
    rank: int | None
    layer: int | None
    time: float
    pause_s: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass
class Restarts:
    """The restarts of one command.

    Attributes: command: a key of GOES_ON. most: in all, `cluster.max_restarts`.
    """

    command: str
    most: int
    made: list[Restart] = field(default_factory=list)

    @classmethod
    def of(cls, command: str, cluster: ClusterConfig) -> Restarts:
        """As the settings allow, none made yet."""
        return cls(command, cluster.max_restarts)

    def told(self, restart: Restart) -> str:
        """One line for the log."""
        pause = f", after {restart.pause_s:g} s" if restart.pause_s else ""
        return f"{restart.error}; restart {restart.number} {GOES_ON[self.command][0]}{pause}"

    def after(self, error: QgnnError, epoch: int) -> Restart:
        """The restart to make after a failure.

        Args: epoch: the last one that was finished.
        Raises: the error itself, where it is not one to go on after, or there were too many; its message says so.
        """
        if not isinstance(error, RETRIED) or self.most == 0:
            raise error
        stuck = sum(1 for one in self.made if one.epoch == epoch)
        if len(self.made) >= self.most or stuck >= WITHOUT_PROGRESS:
            why = f"{len(self.made)} restarts were made (cluster.max_restarts={self.most})" \
                if len(self.made) >= self.most else f"{stuck} restarts got no farther than epoch {epoch}"
            error.message += f"; given up: {why}; mend the cause, then {GOES_ON[self.command][1]}"
            error.args = (error.message,)
            raise error
        pause_s = 0.0 if not stuck else min(FIRST_PAUSE_S * 2**(stuck - 1), LONGEST_PAUSE_S)
        restart = Restart(len(self.made) + 1, epoch, str(error), error.host, error.rank, error.layer, time.time(),
                          pause_s)
        self.made.append(restart)
        return restart
