# SPDX-License-Identifier: Apache-2.0
"""The multiplier server as a named async Ray actor, and a worker's way to it.

A post returns at once with a reply that holds Ray's reference; it is asked for when the end of the next layer needs it,
so that the round trip passes while the layer computes.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import DeadlineError, QgnnError, WorkerError
from ..propagation.multiplier import ANSWER_S
from .failure import attempt, died, failure, unwrap

__all__ = ["RayMultiplierClient", "ServerActor", "call_server", "start_server"]

MAX_POSTS = 4096
"""Posts that may wait for the others' at the same time: a few a worker."""


class ServerActor:
    """Ray actor around a server object (propagation.multiplier.MultiplierServer); all runs on one event loop."""

    def __init__(self, factory: Callable[[], Any]) -> None:
        self._server = factory()

    async def post(self, method: str, *args: Any) -> Any:
        """Await an async method of the server; its answer, or a Failure."""
        try:
            return await getattr(self._server, method)(*args)
        except QgnnError as error:
            return failure(error, error, None, None)
        except Exception as error:
            return failure(WorkerError(f"multiplier server, {method}: {type(error).__name__}: {error}"), error, None,
                           None)

    async def call(self, method: str, *args: Any) -> Any:
        """Call a plain method of the server; its result, or a Failure."""
        return attempt(lambda: getattr(self._server, method)(*args))


def start_server(factory: Callable[[], Any], name: str) -> Any:
    """Start the actor, which takes no CPU, and return its handle. It ends with its driver.

    Args:
        factory: builds the server object inside the actor; must pickle. name: unique per run.
    """
    import ray

    return ray.remote(ServerActor).options(name=name, num_cpus=0, max_concurrency=MAX_POSTS,
                                           max_restarts=0).remote(factory)


def call_server(handle: Any, method: str, *args: Any, timeout_s: float) -> Any:
    """Call a plain method and wait.

    Raises:
        DeadlineError: no answer within `timeout_s` seconds. WorkerError: the actor is gone.
    """
    return RayReply(handle.call.remote(method, *args), method, None).result(timeout_s)


class RayReply:
    """An answer of the server that is still on its way."""

    def __init__(self, ref: Any, what: str, rank: int | None) -> None:
        self._ref, self._what, self._rank = ref, what, rank

    def result(self, timeout_s: float) -> Any:
        """Wait for the answer.

        Raises:
            DeadlineError: the server says which ranks did not post within `timeout_s` seconds, or nothing at all.
            WorkerError: the server is gone.
        """
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        try:
            return unwrap(ray.get(self._ref, timeout=timeout_s + ANSWER_S))
        except GetTimeoutError:
            raise DeadlineError(f"no answer of the multiplier server to {self._what} within {timeout_s:g} s; raise "
                                "timeouts.server_s if its host is busy", rank=self._rank) from None
        except RayError as error:
            raise died(error, who="the multiplier server", host=None, rank=self._rank) from None


class RayMultiplierClient:
    """One rank's way to the server (comm.pool.MultiplierClient)."""

    def __init__(self, handle: Any, rank: int) -> None:
        self._handle, self._rank = handle, rank

    def post_layer(self, epoch: int, layer: int, dot: float, energy: float) -> RayReply:
        """See propagation.multiplier.MultiplierServer.post_layer; does not wait."""
        ref = self._handle.post.remote("post_layer", epoch, layer, self._rank, dot, energy)
        return RayReply(ref, f"layer {layer} of epoch {epoch}", self._rank)

    def post_ranges(self, epoch: int, moments: Mapping[str, Sequence[float]]) -> RayReply:
        """See propagation.multiplier.MultiplierServer.post_ranges; does not wait."""
        ref = self._handle.post.remote("post_ranges", epoch, self._rank, dict(moments))
        return RayReply(ref, f"the ranges of epoch {epoch}", self._rank)
