# SPDX-License-Identifier: Apache-2.0
"""How errors travel between Ray processes: as values, so that they arrive in their own type and with their rank."""
from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import DeadlineError, QgnnError, WorkerError, WorkerLostError

if TYPE_CHECKING:
    from .watch import StallWatch

__all__ = ["Failure", "attempt", "died", "unwrap", "wait_for_all"]

GRACE_S = 1.0
"""How long to wait, after a worker complained of another one, for that other one's own error."""
ALIKE_S = 0.1


@dataclass
class Failure:
    """An error that a remote method returns in place of its result."""

    error: QgnnError
    remote_traceback: str


def attempt(call: Callable[[], Any], *, host: str | None = None, rank: int | None = None) -> Any:
    """The result of `call`, or a Failure: our own errors as they are, others as WorkerError; a worker that is out of
    memory is as good as lost."""
    try:
        return call()
    except QgnnError as error:
        return failure(error, error, host, rank)
    except Exception as error:
        words = str(error).strip().splitlines()
        told = f"{type(error).__name__}: {words[0] if words else 'no message'}"
        if isinstance(error, MemoryError) or "can't allocate memory" in told:  # torch's has no type of its own
            lost = WorkerLostError(f"out of memory ({told}); use more parts on more hosts, or fewer bits")
            return failure(lost, error, host, rank)
        return failure(WorkerError(told), error, host, rank)


def failure(error: QgnnError, origin: BaseException, host: str | None, rank: int | None) -> Failure:
    """A Failure that knows where it happened."""
    error.host = error.host or host
    error.rank = rank if error.rank is None else error.rank
    return Failure(error, "".join(traceback.format_exception(origin)))


def unwrap(result: Any) -> Any:
    """Raise a Failure's error (its `remote_traceback` attached), return anything else."""
    if isinstance(result, Failure):
        result.error.remote_traceback = result.remote_traceback  # type: ignore[attr-defined]
        raise result.error
    return result


def died(error: Exception, *, who: str, host: str | None, rank: int | None) -> WorkerError:
    """Ray's many lines about a lost process, or about a call that never began, in one."""
    from ray.exceptions import RayTaskError

    if isinstance(error, RayTaskError):
        words = str(error.cause).strip().splitlines()
        lost = WorkerError(f"{who} could not take the call: {type(error.cause).__name__}: {words[0] if words else ''}",
                           host=host, rank=rank)
        lost.remote_traceback = str(error)  # type: ignore[attr-defined]
        return lost
    text = " ".join(line.strip() for line in str(error).splitlines() if line and not line.startswith("\t"))
    if "Worker exit detail:" in text:
        text = text.partition("Worker exit detail:")[2].partition("Some common causes")[0]
    text = text.strip()
    text = text if len(text) <= 240 else text[:237] + "..."
    return WorkerLostError(f"{who} was lost ({type(error).__name__}: {text}); was it killed, or the host out of "
                           "memory?", host=host, rank=rank)


def wait_for_all(refs: Mapping[int, Any], hosts: Mapping[int, str], timeout_s: float, what: str,
                 who: Callable[[int], str], setting: str = "", watch: StallWatch | None = None) -> list[Any]:
    """Results of all ranks' calls, in the order of `refs`; the first failing rank ends the wait.

    Args:
        refs: rank → ObjectRef. hosts: rank → host, for errors. what: the call's name. who: names a rank's process.
        setting: the setting that made the deadline, if any. watch: looks at the workers meanwhile.
    Raises:
        QgnnError: of the rank that is the likely cause. DeadlineError: names the ranks that have not answered, or the
            one that `watch` finds late.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    from ..comm.pool import blame, is_consequence

    ranks = {ref: rank for rank, ref in refs.items()}
    results: dict[int, Any] = {}
    failures: dict[int, Exception] = {}
    pending, until = list(ranks), time.monotonic() + timeout_s
    while pending and time.monotonic() < until:
        left = max(0.0, until - time.monotonic())
        ready, pending = ray.wait(pending, num_returns=1, timeout=min(left, watch.pause_s()) if watch else left)
        if watch is not None and not ready:
            watch.look()
            watch.check(ranks[ref] for ref in pending)
        for ref in ready:
            rank = ranks[ref]
            try:
                results[rank] = unwrap(ray.get(ref, timeout=max(until - time.monotonic(), 1.0)))
            except QgnnError as error:
                failures[rank] = error
            except GetTimeoutError:
                pending = [*pending, ref]
            except RayError as error:
                failures[rank] = died(error, who=who(rank), host=hosts.get(rank), rank=rank)
        if failures:
            # What others complain of may be about to arrive; a worker's own error waits for its equals alone.
            patience_s = GRACE_S if all(is_consequence(e) for e in failures.values()) else ALIKE_S
            until = min(until, time.monotonic() + patience_s)
    if failures:
        raise _with_peers_host(blame(failures), hosts)
    if pending:
        late = sorted(ranks[ref] for ref in pending)
        where = ", ".join(f"{r} on {hosts[r]}" if r in hosts else str(r) for r in late)
        advice = f", or raise {setting}" if setting else ""
        raise DeadlineError(f"rank(s) {where} did not answer {what} within {timeout_s:g} s; look at those workers"
                            f"{advice}", rank=late[0] if len(late) == 1 else None)
    return [results[rank] for rank in refs]


def _with_peers_host(error: Exception, hosts: Mapping[int, str]) -> Exception:
    """Who complains of a peer does not know its host."""
    if isinstance(error, QgnnError) and error.peer is not None and error.peer in hosts:
        error.message += f" (rank {error.peer} is on host {hosts[error.peer]})"
        error.args = (error.message,)
    return error
