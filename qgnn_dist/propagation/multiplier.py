# SPDX-License-Identifier: Apache-2.0
"""The multiplier's mathematics, and the server that owns λ_k, s_k and the running ranges for all workers.

Platt & Barr's basic differential multiplier method (NIPS 1987); docs/method.md has the formulas. The server class knows
nothing of Ray: `cluster/` wraps it as an actor, and one process calls it through `InProcessServer`.
"""
from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import asdict, astuple, dataclass, field
from typing import Any, TypeVar

from ..config import RunConfig
from ..errors import DeadlineError
from ..quant.ranges import EVALUATION, EVALUATION_MOMENTUM, MOMENTUM, Range, combine_moments, follow

__all__ = ["ANSWER_S", "InProcessServer", "LocalMultipliers", "MultiplierRule", "MultiplierServer"]

_Answer = TypeVar("_Answer")
ANSWER_S = 2.0
"""Seconds past the deadline that an asker waits: the server, whose own began a moment later, knows who is late."""


@dataclass(frozen=True)
class MultiplierRule:
    """How λ moves from one layer to the next.

    `normalised` holds ⟨Δ,G⟩/‖H⁰‖² under α and clamps λ to [λ_min, 0], where the iteration is stable on every graph;
    `published` holds ⟨Δ,G⟩ at α·E − s² and clamps nothing (for reproduction: it can diverge on large graphs).
    """

    constraint: str
    eta: float
    alpha: float
    lambda0: float
    slack0: float
    eta_lambda: float
    eta_slack: float
    num_edges: int

    @classmethod
    def of(cls, config: RunConfig, num_edges: int) -> MultiplierRule:
        """The rule that a configuration asks for; `num_edges` is E, undirected."""
        p = config.propagation
        return cls(p.constraint, p.eta, p.alpha, p.lambda0, p.slack0, p.eta_lambda, p.eta_slack, num_edges)

    @property
    def lambda_min(self) -> float:
        """−0.8/(4η): two rounds diverge below −1/(4η) on every graph, merged ones below −1/(2η)."""
        return -0.8 / (4 * self.eta)

    def start(self) -> tuple[float, float]:
        """λ_0 and s_0."""
        if self.constraint == "published":
            return self.lambda0, self.slack0
        return min(max(self.lambda0, self.lambda_min), 0.0), 0.0

    def advance(self, multiplier: float, slack: float, dot: float, energy: float) -> tuple[float, float, float, bool]:
        """One step of the ascent on λ.

        Args:
            dot: ⟨Δ, G⟩ over all nodes. energy: ‖H⁰‖² over all nodes.
        Returns:
            λ_{k+1}, s_{k+1}, the constraint's residual c (negative: violated), and whether the stable range's lower
            end clamped λ.
        """
        if self.constraint == "published":
            residual = self.alpha * self.num_edges - slack * slack - dot
            return (multiplier + self.eta_lambda * residual, slack + 2 * self.eta_slack * multiplier * slack,
                    residual, False)
        residual = self.alpha - (max(0.0, dot) / energy if energy > 0 else 0.0)
        free = multiplier + self.eta_lambda * residual
        if not math.isfinite(free):
            free = 0.0
        return min(max(free, self.lambda_min), 0.0), 0.0, residual, free < self.lambda_min


class LocalMultipliers:
    """λ of one forward where all rows are here: the recursion runs in place, and no server is asked (smp.Multipliers).

    Args: energy: ‖H⁰‖². Attributes: values: λ_0 … so far.
    """

    live = any = True

    def __init__(self, rule: MultiplierRule, energy: float) -> None:
        start, self._slack = rule.start()
        self._rule, self._energy, self.values = rule, energy, [start]

    def value(self, layer: int) -> float:
        """λ of a layer."""
        return self.values[layer]

    def post(self, layer: int, dot: float) -> None:
        """⟨Δ, G⟩ of a layer gives λ of the next one."""
        multiplier, self._slack, _, _ = self._rule.advance(self.values[layer], self._slack, dot, self._energy)
        self.values.append(multiplier)


@dataclass
class _Forward:
    """One training forward: the recursion over its layers."""

    epoch: int
    multipliers: list[float]
    slack: float
    residuals: list[float] = field(default_factory=list)
    clamps: int = 0


class _Gathering:
    """Posts of all ranks for one question, and the futures that wait for its answer."""

    def __init__(self, size: int) -> None:
        self.posts: dict[int, Any] = {}
        self.size = size
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def missing(self) -> list[int]:
        return [rank for rank in range(self.size) if rank not in self.posts]


class MultiplierServer:
    """Owner of the multipliers and running ranges; one instance serves all workers of a run.

    Every method that begins with `post_` is awaited by all ranks with the same question and gives all of them the
    same answer, once the last of them has posted; sums run in rank order, so that the answer does not depend on who
    came first. A rank that does not post within `deadline_s` fails the question for the others, by name.

    Args:
        size: number of workers. rule: how λ moves. deadline_s: seconds that a question may stay open.
    """

    def __init__(self, size: int, rule: MultiplierRule, deadline_s: float = 60.0) -> None:
        self.size, self.rule, self.deadline_s = size, rule, deadline_s
        self.ranges: dict[str, Range] = {}
        self._forward: _Forward | None = None
        self._open: dict[tuple[Any, ...], _Gathering] = {}

    async def post_layer(self, epoch: int, layer: int, rank: int, dot: float, energy: float) -> float:
        """A worker's share of ⟨Δ_k, G_k⟩ and ‖H⁰‖² of layer k; the answer is λ_{k+1}."""
        return await self._gather(("layer", epoch, layer), rank, (dot, energy),
                                  lambda posts: self._close_layer(epoch, layer, posts))

    async def post_ranges(self, epoch: int, rank: int, moments: Mapping[str, Sequence[float]]) -> dict[str, Any]:
        """A worker's moments of every stage of a training forward, or of an evaluation (names with that prefix).

        Returns:
            `ranges`: stage → the figures of its Range, updated, for the next epoch; `multipliers`, `residuals`,
            `clamps` of this epoch's forward.
        """
        return await self._gather(("ranges", epoch), rank, dict(moments), lambda posts: self._close_ranges(posts))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain JSON values."""
        return {"ranges": {name: asdict(r) for name, r in self.ranges.items()}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()` of an earlier process."""
        self.ranges = {name: Range(**values) for name, values in state["ranges"].items()}
        self._forward = None

    async def _gather(self, key: tuple[Any, ...], rank: int, post: Any,
                      close: Callable[[list[Any]], _Answer]) -> _Answer:
        if self.size == 1:  # nobody to wait for, and so no event loop needed
            return close([post])
        gathering = self._open.setdefault(key, _Gathering(self.size))
        gathering.posts[rank] = post
        if not gathering.missing():
            del self._open[key]
            gathering.answer.set_result(close([gathering.posts[r] for r in range(self.size)]))
        try:
            answer: _Answer = await asyncio.wait_for(asyncio.shield(gathering.answer), self.deadline_s)
            return answer
        except asyncio.TimeoutError:
            self._open.pop(key, None)
            late = ", ".join(str(r) for r in gathering.missing())
            raise DeadlineError(
                f"multiplier server: rank(s) {late} did not post {' '.join(str(k) for k in key)} within "
                f"{self.deadline_s:g} s; look at those workers, or raise timeouts.server_s",
                rank=rank, layer=key[2] if key[0] == "layer" else None) from None

    def _close_layer(self, epoch: int, layer: int, posts: list[tuple[float, float]]) -> float:
        if self._forward is None or self._forward.epoch != epoch or layer == 0:
            start, slack = self.rule.start()
            self._forward = _Forward(epoch, [start], slack)
        now = self._forward
        dot, energy = sum(p[0] for p in posts), sum(p[1] for p in posts)
        multiplier, now.slack, residual, clamped = self.rule.advance(now.multipliers[-1], now.slack, dot, energy)
        now.multipliers.append(multiplier)
        now.residuals.append(residual)
        now.clamps += clamped
        return multiplier

    def _close_ranges(self, posts: list[dict[str, Sequence[float]]]) -> dict[str, Any]:
        for name in sorted({name for post in posts for name in post}):
            momentum = EVALUATION_MOMENTUM if name.startswith(EVALUATION) else MOMENTUM
            running = follow(self.ranges.get(name), combine_moments([p[name] for p in posts if name in p]), momentum)
            if running is not None:
                self.ranges[name] = running
        now = self._forward or _Forward(-1, [], 0.0)
        return {"ranges": {name: list(astuple(r)) for name, r in self.ranges.items()},
                "multipliers": list(now.multipliers), "residuals": list(now.residuals), "clamps": now.clamps}


class _Reply:
    """Handle of an answer that is still on its way."""

    def __init__(self, future: Future[Any], rank: int, what: str) -> None:
        self._future, self._rank, self._what = future, rank, what

    def result(self, timeout_s: float) -> Any:
        """Wait for the answer.

        Raises:
            DeadlineError: the server says which ranks did not post within `timeout_s` seconds, or nothing at all.
        """
        try:
            return self._future.result(timeout_s + ANSWER_S)
        except (FutureTimeoutError, TimeoutError):
            raise DeadlineError(f"no answer of the multiplier server to {self._what} within {timeout_s:g} s; "
                                "raise timeouts.server_s if the host is busy", rank=self._rank) from None


def _answered(coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
    """The answer of a coroutine that waits for nothing."""
    future: Future[Any] = Future()
    try:
        coroutine.send(None)
    except StopIteration as done:
        future.set_result(done.value)
    except Exception as error:
        future.set_exception(error)
    else:
        raise RuntimeError("a server of one worker waits")
    return future


class InProcessServer:
    """Runs a MultiplierServer on an event loop of its own thread, for workers in this process.

    That of one worker answers where it is asked: waking a thread for each layer takes a tenth of a small graph's epoch.
    """

    def __init__(self, server: MultiplierServer) -> None:
        self.server = server
        self._loop: asyncio.AbstractEventLoop | None = None
        if server.size > 1:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="qgnn-multiplier-server", daemon=True)
            self._thread.start()

    def client(self, rank: int) -> InProcessClient:
        """The handle that one rank posts by."""
        return InProcessClient(self, rank)

    def submit(self, method: str, *args: Any, rank: int) -> _Reply:
        """Start an async method of the server."""
        coroutine = getattr(self.server, method)(*args)
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop) if self._loop else _answered(coroutine)
        return _Reply(future, rank, method)

    def call(self, method: str, *args: Any) -> Any:
        """Call a plain method (`state`, `load_state`) and wait."""
        return getattr(self.server, method)(*args)

    def close(self) -> None:
        """End the thread, where there is one."""
        if self._loop is None:
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)
        if not self._thread.is_alive():
            self._loop.close()


class InProcessClient:
    """One rank's way to a server in the same process."""

    def __init__(self, server: InProcessServer, rank: int) -> None:
        self._server, self._rank = server, rank

    def post_layer(self, epoch: int, layer: int, dot: float, energy: float) -> _Reply:
        """See MultiplierServer.post_layer; does not wait."""
        return self._server.submit("post_layer", epoch, layer, self._rank, dot, energy, rank=self._rank)

    def post_ranges(self, epoch: int, moments: Mapping[str, Sequence[float]]) -> _Reply:
        """See MultiplierServer.post_ranges; does not wait."""
        return self._server.submit("post_ranges", epoch, self._rank, dict(moments), rank=self._rank)
