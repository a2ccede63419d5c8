# SPDX-License-Identifier: Apache-2.0
"""The exception family, and the warning. Each error carries where it happened, and survives pickling: Ray sends it
between processes."""
from __future__ import annotations

from typing import Any

__all__ = [
    "EXISTS",
    "RUN_EXISTS",
    "ConfigError",
    "DeadlineError",
    "DivergedError",
    "ExchangeError",
    "HostLeavingError",
    "InputError",
    "ModelError",
    "OutputError",
    "QgnnError",
    "QgnnWarning",
    "StorageError",
    "StoreError",
    "WorkerError",
    "WorkerLostError",
]

EXISTS = "output exists; add --overwrite to replace it (in Python overwrite=True)"
RUN_EXISTS = "output exists; add --resume to go on or --overwrite to replace it (in Python resume=True, overwrite=True)"
"""What is said of an output that is not replaced unasked, to people at a command line and in Python."""


class QgnnWarning(RuntimeWarning):
    """What a user should know, and nothing fails by."""


class QgnnError(Exception):
    """Something failed while running (exit code 1).

    Args:
        message: one sentence that says what failed, what was got and expected, and what to try.
        host, rank, peer, layer, file: where it happened, as far as known; shown in front of the message.
    """

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        host: str | None = None,
        rank: int | None = None,
        peer: int | None = None,
        layer: int | None = None,
        file: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.host, self.rank, self.peer, self.layer, self.file = host, rank, peer, layer, file

    def __str__(self) -> str:
        where = []
        if self.host is not None:
            where.append(f"host {self.host}")
        if self.rank is not None:
            where.append(f"rank {self.rank}")
        if self.peer is not None:
            where.append(f"peer {self.peer}")
        if self.layer is not None:
            where.append(f"layer {self.layer}")
        if self.file is not None:
            where.append(self.file)
        return f"{', '.join(where)}: {self.message}" if where else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        places = {"host": self.host, "rank": self.rank, "peer": self.peer, "layer": self.layer, "file": self.file}
        return (_rebuild, (type(self), self.message, places))


def _rebuild(kind: type[QgnnError], message: str, places: dict[str, Any]) -> QgnnError:
    return kind(message, **places)


class InputError(QgnnError):
    """The user's input or use is wrong: refused before anything is written (exit code 2)."""

    exit_code = 2


class ConfigError(InputError):
    """A configuration key or value that does not exist or does not fit."""


class StoreError(InputError):
    """A graph store that is missing, damaged, or of another version."""


class ModelError(InputError):
    """A packed model that is damaged or does not fit the store."""


class DivergedError(QgnnError):
    """A training's loss or gradient is no number any more: its settings are wrong for the graph."""


class OutputError(QgnnError):
    """An output cannot be written: the disk is full or read-only, or a permission is missing (exit code 1)."""


class StorageError(QgnnError):
    """An object store that fails, or cannot be reached, for longer than it is tried again (exit code 1)."""


class WorkerError(QgnnError):
    """A worker process died or raised."""


class WorkerLostError(WorkerError):
    """A worker's process or its host is gone, or cannot be reached: another one can take its place."""


class HostLeavingError(WorkerLostError):
    """Hosts said that they are about to end their workers; all that was finished is kept.

    Attributes: ranks: the workers that have to go elsewhere.
    """

    ranks: tuple[int, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return (*super().__reduce__(), {"ranks": self.ranks})


class ExchangeError(QgnnError):
    """A message between workers was wrong or could not be sent."""


class DeadlineError(QgnnError):
    """Somebody did not arrive in time; the message names who, and the setting to change."""
