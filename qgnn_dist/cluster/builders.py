# SPDX-License-Identifier: Apache-2.0
"""Builds the parts of a store side by side, in Ray actors that each take one part after the other."""
from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import DeadlineError
from .failure import attempt, died, unwrap

__all__ = ["BuilderActor", "count_builders", "ray_builders"]

BUILD_TIMEOUT_S = 24 * 3600.0
START_TIMEOUT_S = 120.0


class BuilderActor:
    """Ray actor that builds parts. Each takes one CPU."""

    def where(self) -> str:
        """This host's name."""
        return socket.gethostname()

    def build(self, build_part: Callable[[str, int], dict[str, Any]], scratch: str, part: int) -> Any:
        """build_part(scratch, part), or a Failure."""
        return attempt(lambda: build_part(scratch, part), host=socket.gethostname())


def count_builders(parts: int, *, here: bool = False) -> int:
    """How many actors build that many parts, on all hosts together; a RaySession must be open.

    Args: here: on this process's host alone; then 0 where that has no CPU for any.
    """
    import ray

    if not here:
        return max(1, min(parts, int(ray.cluster_resources().get("CPU", 1))))  # type: ignore[no-untyped-call]
    own = ray.get_runtime_context().get_node_id()
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    cpus = next((node["Resources"].get("CPU", 0) for node in nodes if node["NodeID"] == own), 0)
    return min(parts, int(cpus))


def ray_builders(timeout_s: float = BUILD_TIMEOUT_S, start_s: float = START_TIMEOUT_S, *,
                 here: bool = False) -> Callable[..., list[Any]]:
    """A `run_builders` for partition_graph; a RaySession must be open.

    It runs build_part(scratch, part) for every part in actors, at most one a CPU, and returns the results in the order
    of the parts. `scratch` must be a folder that all hosts share. The first part that fails ends the rest.

    Args:
        timeout_s: deadline of all parts together. start_s: deadline of the first actor's start.
        here: on this process's host alone; `scratch` may be its own then.
    """
    def run(build_part: Callable[[str, int], dict[str, Any]], scratch: str, parts: Sequence[int]) -> list[Any]:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        where = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {"num_cpus": 1, "max_restarts": 0, **({"scheduling_strategy": where} if here else {})}
        actors: list[Any] = [ray.remote(BuilderActor).options(**options).remote()
                             for _ in range(count_builders(len(parts), here=here))]
        try:
            return _run(actors, build_part, scratch, list(parts), timeout_s, start_s)
        finally:
            for actor in actors:
                ray.kill(actor, no_restart=True)

    return run


def _run(actors: list[Any], build_part: Callable[[str, int], dict[str, Any]], scratch: str, parts: list[int],
         timeout_s: float, start_s: float) -> list[Any]:
    """Hand each part to the next actor that is free; actors that never get a CPU are not waited for."""
    import ray
    from ray.exceptions import RayError

    deadline = time.monotonic() + timeout_s
    starting = {actor.where.remote(): actor for actor in actors}
    building: dict[Any, tuple[Any, int]] = {}
    waiting = list(reversed(parts))
    results: dict[int, Any] = {}
    limit_s = start_s
    while len(results) < len(parts):
        left_s = max(0.0, min(limit_s, deadline - time.monotonic()))
        ready, _ = ray.wait([*starting, *building], num_returns=1, timeout=left_s)
        if not ready:
            done = sorted(part for _, part in building.values())
            free = ray.available_resources().get("CPU", 0)  # type: ignore[no-untyped-call]
            raise DeadlineError(f"building parts {done} was not done within {timeout_s:g} s" if done else
                                f"no CPU for building the parts within {start_s:g} s; {len(actors)} builders of 1 CPU "
                                f"asked for, free: {free:g}")
        limit_s = timeout_s
        ref = ready[0]
        actor, part = building.pop(ref) if ref in building else (starting.pop(ref), None)
        try:
            value = unwrap(ray.get(ref))
        except RayError as error:
            raise died(error, who=f"the builder of part {part}", host=None, rank=None) from None
        if part is not None:
            results[part] = value
        if waiting:
            following = waiting.pop()
            building[actor.build.remote(build_part, scratch, following)] = actor, following
    return [results[part] for part in parts]
