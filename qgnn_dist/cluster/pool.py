# SPDX-License-Identifier: Apache-2.0
"""Workers as Ray actors, one a part: reserved together, met over gloo, watched, and ended with their driver.

Actors are not detached and never restart: a restarted worker would have lost its state. Ray ends them when their driver
does, so that a controller that is killed leaves nothing behind.
"""
from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from types import TracebackType
from typing import Any

from .. import __version__
from ..comm import faults
from ..comm.formation import Formation
from ..comm.standing import Deadline, Report
from ..config import ClusterConfig, TimeoutsConfig
from ..errors import DeadlineError, InputError
from .actor import WATCH, WorkerActor
from .failure import Failure, wait_for_all
from .hosts import describe_hosts, place_off
from .server import call_server, start_server
from .telemetry import Telemetry
from .watch import Stall, StallWatch

__all__ = ["PlacementError", "RayPool"]

_LOG = logging.getLogger(__name__)
CLOSE_S = 5.0
LONG_CALL_S = 3600.0
"""Of the deadline of calls in which workers wait for one another, under deadlines of their own; those are watched."""
FORWARDED = ("QGNN_SIMD", faults.ENVIRONMENT, "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION",
             "AWS_DEFAULT_REGION")
"""Variables of the controller that every worker gets; no credentials, which Ray's head would keep."""


class PlacementError(DeadlineError):
    """The hosts that are there have no room for the workers."""


class RayPool:
    """A comm.pool.WorkerPool of Ray actors; use it as a context manager inside a RaySession.

    Args:
        worker_class, kwargs: each worker is worker_class(context, **kwargs), built in its own process; both must
            pickle. A `close` method, if any, ends it.
        size: number of workers. Several may share a host, and a CPU with `cluster.cpus_per_worker` below 1.
        cluster, timeouts: of the run's settings; `timeouts.start_s` bounds placement, and again the start. With
            cluster.device=cuda every worker gets a GPU of its own; with auto, where the cluster has so many, and uses
            it where every worker's torch can.
        server_factory: builds the multiplier server in an actor of its own, which takes no CPU; None: no server.
        place_s: deadline of the placement alone, default `timeouts.start_s`.
        strategy: Ray's placement strategy: PACK (few hosts), SPREAD (many), STRICT_SPREAD (one worker a host).
        formation: of the run's workers, whose secret this pool hands to each of them; default one of its own.
        without: ids of Ray's nodes where no worker may be placed. on_stall: is given what workers say of themselves
            where none of them has come further for `timeouts.stall_s`; default: their stacks go to the log.
        telemetry: what workers are to tell besides their results.
    Raises:
        InputError: cluster.device=cuda, and the cluster has fewer GPUs than workers; a host has another version.
        PlacementError: not placed in time; says what was asked for and what is there.
        DeadlineError: not started or met in time; says which rank.
        QgnnError: a worker failed while it was built, with its rank and host.
    """

    def __init__(self, worker_class: type, kwargs: Mapping[str, Any], size: int, *, cluster: ClusterConfig,
                 timeouts: TimeoutsConfig, server_factory: Callable[[], Any] | None = None,
                 place_s: float | None = None, strategy: str = "PACK", formation: Formation | None = None,
                 without: Collection[str] = (), on_stall: Callable[[Stall], None] | None = None,
                 telemetry: Telemetry | None = None) -> None:
        self.size, self._telemetry = size, telemetry
        self._cluster, self._timeouts = cluster, timeouts.resolved()
        self._formation = formation or Formation.new()
        self._without, self._on_stall = frozenset(without), on_stall or _log_stacks
        self._actors: list[Any] = []
        self._server: Any = None
        self._placement: Any = None
        self._num_gpus = 0
        self._where: list[dict[str, Any]] = []
        self._broken = True
        try:
            self._reserve(strategy, place_s or timeouts.start_s)
            self._start(server_factory)
            self._build(worker_class, kwargs)
        except BaseException:
            self.close()
            raise
        self._broken = False

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._broken = self._broken or kind is not None
        self.close()

    def pids(self) -> list[int]:
        """Process ids of the workers, in rank order."""
        return [int(w["pid"]) for w in self._where]

    def hosts(self) -> list[str]:
        """Host names of the workers, in rank order."""
        return [str(w["host"]) for w in self._where]

    def nodes(self) -> list[str]:
        """Ids of Ray's nodes that the workers are on, in rank order."""
        return [str(w["node"]) for w in self._where]

    def call(self, method: str, *args: Any, timeout_s: float, step: Deadline | None = None) -> list[Any]:
        """Call a method with the same arguments on every worker at once; the results in rank order.

        Args: step: see comm.pool.WorkerPool; only of calls that are watched (LONG_CALL_S).
        Raises:
            QgnnError: of the first failing worker, in its own type, with its rank and host; equal errors of several
                ranks as one. Other exceptions arrive as WorkerError; `remote_traceback` has the worker's own trace.
            WorkerError: a worker's process or host was lost. DeadlineError: names the ranks that did not answer, or
                the one that has not come further for `step`.
        """
        return self._wait({r: actor.call.remote(method, *args) for r, actor in enumerate(self._actors)}, timeout_s,
                          f"{method}()", watch=self._watch(f"{method}()", step) if timeout_s >= LONG_CALL_S else None)

    def call_one(self, rank: int, method: str, *args: Any, timeout_s: float) -> Any:
        """Call a method on one worker."""
        return self._wait({rank: self._actors[rank].call.remote(method, *args)}, timeout_s, f"{method}()")[0]

    def call_any(self, method: str, *args: Any, timeout_s: float) -> Any:
        """See comm.pool.WorkerPool."""
        import ray
        from ray.exceptions import RayError

        from ..comm.pool import nobody_answered

        waiting = [actor.call_aside.remote(method, *args) for actor in self._actors]
        until = time.monotonic() + timeout_s
        while waiting and time.monotonic() < until:
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, until - time.monotonic()))
            for ref in ready:
                try:
                    result = ray.get(ref, timeout=max(until - time.monotonic(), 1.0))
                except RayError:
                    continue  # that worker is gone, and another one asked
                if not isinstance(result, Failure):
                    return result
        raise nobody_answered(method, timeout_s)

    def server_call(self, method: str, *args: Any) -> Any:
        """Call a plain method of the multiplier server (`state`, `load_state`)."""
        return call_server(self._server, method, *args, timeout_s=self._timeouts.server_s)

    def close(self) -> None:
        """End the workers and the server and free their places; seconds at most. May be called twice."""
        import ray
        from ray.exceptions import RayError
        from ray.util.placement_group import remove_placement_group

        actors, server, placement = self._actors, self._server, self._placement
        self._actors, self._server, self._placement = [], None, None
        if not ray.is_initialized():
            return
        try:
            if actors and not self._broken:
                ray.wait([actor.close.remote() for actor in actors], num_returns=len(actors), timeout=CLOSE_S)
            for actor in [*actors, *([server] if server is not None else [])]:
                ray.kill(actor, no_restart=True)
            if placement is not None:
                remove_placement_group(placement)
        except RayError:
            # The cluster is gone, and all of this with it.
            return

    def _reserve(self, strategy: str, limit_s: float) -> None:
        """One bundle a worker, all at once or not at all."""
        from ray.util.placement_group import placement_group

        cpus, gpus = self._cluster.cpus_per_worker, self._gpus_per_worker()
        self._num_gpus = gpus
        bundle = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
        self._placement = placement_group([bundle] * self.size, strategy=strategy,
                                          **place_off(self._without, self.size))
        if not self._placement.wait(limit_s):
            raise PlacementError(
                f"{self.size} workers of {cpus:g} CPU{' and 1 GPU' * gpus} ({strategy}) could not be placed within "
                f"{limit_s:g} s; {describe_hosts()}; add hosts, lower cluster.cpus_per_worker, or raise "
                "timeouts.start_s")

    def _gpus_per_worker(self) -> int:
        """1 where each worker is to have a GPU, else 0."""
        import ray

        if self._cluster.device == "cpu":
            return 0
        there = int(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]
        if there < self.size and self._cluster.device == "cuda":
            raise InputError(f"cluster.device=cuda: {self.size} workers need a GPU each, and Ray knows {there}; "
                             f"{describe_hosts()}; set cluster.device=cpu or auto, or join hosts with GPUs")
        return int(there >= self.size)

    def _start(self, server_factory: Callable[[], Any] | None) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        of = f"{self._formation.run_id:016x}-{self._formation.generation}"
        if server_factory is not None:
            self._server = start_server(server_factory, f"qgnn-multiplier-{of}")
        cpus = self._cluster.cpus_per_worker
        threads = self._cluster.threads or max(1, int(cpus))
        environment = {name: os.environ[name] for name in FORWARDED if name in os.environ}
        remote: Any = ray.remote  # whose types know no groups
        actor = remote(concurrency_groups={WATCH: 1})(WorkerActor)
        for rank in range(self.size):
            place = PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=rank)
            self._actors.append(actor.options(
                name=f"qgnn-worker-{of}-{rank}", num_cpus=cpus, num_gpus=self._num_gpus,
                max_restarts=0, scheduling_strategy=place).remote(
                    rank, self.size, threads, environment, self._telemetry))
        self._where = self._wait({r: a.hello.remote() for r, a in enumerate(self._actors)}, self._timeouts.start_s,
                                 "its start", "timeouts.start_s")
        other = next((w for w in self._where if w.get("version") != __version__), None)
        if other is not None:
            raise InputError(f"has qgnn-dist {other.get('version', 'of an older version')}, this command is of "
                             f"{__version__}; install the same on all hosts", host=other["host"])

    def _build(self, worker_class: type, kwargs: Mapping[str, Any]) -> None:
        meeting = None
        if self.size > 1:
            (meeting,) = self._wait({0: self._actors[0].host_store.remote(self._timeouts.rendezvous_s)},
                                    self._timeouts.start_s, "its rendezvous store's start", "timeouts.start_s")
        on_gpu = self._num_gpus and (self._cluster.device == "cuda" or all(w["sees_gpu"] for w in self._where))
        device = "cuda" if on_gpu else None
        told = dict(kwargs), meeting, self._formation, self._timeouts, self._server, device
        self._wait({r: a.build.remote(worker_class, *told) for r, a in enumerate(self._actors)},
                   self._timeouts.rendezvous_s + self._timeouts.start_s, "the meeting of all workers",
                   "timeouts.rendezvous_s")

    def _wait(self, refs: Mapping[int, Any], timeout_s: float, what: str, setting: str = "",
              watch: StallWatch | None = None) -> list[Any]:
        hosts = dict(enumerate(self.hosts()))
        pids = dict(enumerate(self.pids()))
        try:
            return wait_for_all(refs, hosts, timeout_s, what, lambda r: f"the worker process {pids.get(r, '')}".strip(),
                                setting, watch)
        except BaseException:
            # Other workers may be in the middle of a call, so that only ending them is left.
            self._broken = True
            raise

    def _watch(self, what: str, step: Deadline | None) -> StallWatch:
        def ask(rank: int, stacks_after_s: float) -> Any:
            return self._actors[rank].report.remote(stacks_after_s)

        who = {r: f"host {w['host']}, rank {r}, process {w['pid']}" for r, w in enumerate(self._where)}
        stall_s = self._timeouts.stall_s
        assert stall_s is not None
        return StallWatch(ask, _taken, who, stall_s, what, self._on_stall, step)


def _taken(refs: Sequence[Any]) -> dict[Any, Report]:
    """Those answers that are there; a worker that is gone gives none."""
    import ray
    from ray.exceptions import RayError

    found = {}
    for ref in ray.wait(list(refs), num_returns=len(refs), timeout=0)[0] if refs else []:
        try:
            found[ref] = ray.get(ref, timeout=1.0)
        except RayError:
            continue
    return found


def _log_stacks(stall: Stall) -> None:
    for rank, text in sorted(stall.stacks.items()):
        _LOG.warning("rank %d\n%s", rank, text)
