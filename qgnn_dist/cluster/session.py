# SPDX-License-Identifier: Apache-2.0
"""Which Ray a command runs on: the one that this process already uses, a cluster to join, or one of its own."""
from __future__ import annotations

import math
import os
import socket
from types import TracebackType
from typing import Any

from ..errors import InputError

__all__ = ["RaySession"]

OBJECT_STORE_BYTES = 200_000_000
"""Of a local Ray. Tensors go by gloo and files; only results and models pass through the object store."""
PROBE_S = 10.0


class RaySession:
    """Context manager: Ray is connected inside it.

    A process that is connected already keeps its connection, before and after. Otherwise `address`, or RAY_ADDRESS
    (which Ray sets inside a job), is joined, and left at the end; without both, a local Ray is started and ended.

    Args:
        address: `HOST:PORT`, `auto` or `ray://…`; None for RAY_ADDRESS or a local Ray.
        num_cpus: CPUs that a local Ray declares, at least; so many workers can be placed, however many cores there are.
    Raises:
        InputError: no cluster answers at the address, or one of another Ray or Python version.
    """

    def __init__(self, address: str | None = None, *, num_cpus: float = 1.0) -> None:
        self._address = address or os.environ.get("RAY_ADDRESS") or "local"
        self._num_cpus = max(1, math.ceil(num_cpus))
        self._ours = False

    def __enter__(self) -> RaySession:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        local = self._address == "local"
        if local:
            # Left open, a local Ray writes a token file under the home folder, after which `ray start` on this machine
            # silently asks for tokens and joins fail. A cluster's own choice is in the environment of its members.
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        import ray

        if ray.is_initialized():
            return self
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if local:
            ray.init(address="local", num_cpus=self._num_cpus, include_dashboard=False,
                     object_store_memory=OBJECT_STORE_BYTES, **quiet)
        else:
            self._probe()
            try:
                ray.init(address=self._address, **quiet)
            except (ConnectionError, RuntimeError, ValueError, OSError) as error:
                raise self._refused(str(error).strip().splitlines()[0]) from None
        self._ours = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._ours:
            import ray

            self._ours = False
            ray.shutdown()

    def _probe(self) -> None:
        """Fail in seconds, not minutes, where nobody listens at HOST:PORT."""
        host, _, port = self._address.removeprefix("ray://").rpartition(":")
        if not host or not port.isdigit():
            return
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_S).close()
        except OSError as error:
            raise self._refused(str(error)) from None

    def _refused(self, why: str) -> InputError:
        return InputError(f"--ray-address {self._address}: no Ray cluster could be joined there ({why}); see `ray "
                          "status` on its head, or leave out the address and RAY_ADDRESS to run on this machine alone")
