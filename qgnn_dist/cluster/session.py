# SPDX-License-Identifier: Apache-2.0
"""Which Ray a command runs on: the one that this process already uses, a cluster to join, or one of its own."""
from __future__ import annotations

import math
import os
import re
import socket
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from ..errors import InputError, QgnnError
from .local import for_this_machine_alone

__all__ = ["RaySession"]

OBJECT_STORE_BYTES = 200_000_000
"""Of a local Ray. Tensors go by gloo and files; only results and models pass through the object store."""
PROBE_S = 10.0
LONGEST_WORDS = 300
_VERSIONS = re.compile(r"Version mismatch.*?Ray: (\S+) Python: (\S+).*?Ray: (\S+) Python: (\S+)")


class RaySession:
    """Context manager: Ray is connected inside it.

    A process that is connected already keeps its connection, before and after. Otherwise `address`, or RAY_ADDRESS
    (which Ray sets inside a job), is joined, and left at the end; without both, a local Ray is started and ended, which
    nobody but this command and its workers can reach (cluster/local.py).

    Args:
        address: `HOST:PORT`, `auto` or `ray://…`; None for RAY_ADDRESS or a local Ray.
        num_cpus: CPUs that a local Ray declares, at least; so many workers can be placed, however many cores there are.
    Raises:
        InputError: no cluster answers at the address, or one of another Ray or Python version, or it asks for another
            token.
    """

    def __init__(self, address: str | None = None, *, num_cpus: float = 1.0) -> None:
        self._address = address or os.environ.get("RAY_ADDRESS") or "local"
        self._num_cpus = max(1, math.ceil(num_cpus))
        self._undo = ExitStack()

    def __enter__(self) -> RaySession:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        if ray.is_initialized():
            return self
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        with ExitStack() as undo:
            if self._address == "local":
                undo.enter_context(for_this_machine_alone())
                undo.callback(ray.shutdown)
                try:
                    ray.init(address="local", num_cpus=self._num_cpus, include_dashboard=False,
                             object_store_memory=OBJECT_STORE_BYTES, **quiet)
                except Exception as error:  # Ray has no kind of its own for a start that takes too long
                    raise QgnnError(f"no Ray could be started on this machine ({_first_line(error)}); is it "
                                    "overloaded, or /tmp or /dev/shm full? Try again; one part needs no Ray") from None
            else:
                asks_for_a_token = self._probe()
                if asks_for_a_token and os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
                    raise self._refused("RAY_AUTH_MODE is not token", asks_for_a_token)
                undo.callback(ray.shutdown)
                try:
                    ray.init(address=self._address, **quiet)
                except FileNotFoundError as error:  # of a job: another Ray on its host has cleared away its folder
                    raise QgnnError(f"--ray-address {self._address}: a folder was gone while the cluster was joined "
                                    f"({error}), this command's working folder perhaps; begin it again") from None
                except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
                    asks_for_a_token |= isinstance(error, getattr(ray.exceptions, "AuthenticationError", ()))
                    raise self._refused(" ".join(str(error).split()), asks_for_a_token) from None
            self._undo = undo.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._undo.close()

    def _probe(self) -> bool:
        """Fail in seconds, not minutes, where nobody listens at HOST:PORT; whether who does asks for a token."""
        host, _, port = self._address.removeprefix("ray://").rpartition(":")
        if not host or not port.isdigit():
            return False
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_S).close()
        except OSError as error:
            raise self._refused(str(error), False) from None
        return _asks_for_a_token(self._address.removeprefix("ray://"))

    def _refused(self, why: str, asks_for_a_token: bool) -> InputError:
        where, versions, why = f"--ray-address {self._address}", _VERSIONS.search(why), why[:LONGEST_WORDS]
        if asks_for_a_token:
            return InputError(
                f"{where}: the Ray cluster there asks for a token, and this command has none or another one ({why}); "
                "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's token (`ray "
                "get-auth-token` on its head prints it)")
        if versions is not None:
            return InputError(f"{where}: the cluster is of Ray {versions[1]} and Python {versions[2]}, this command of "
                              f"Ray {versions[3]} and Python {versions[4]}; use the same here as on all its hosts, "
                              "those of constraints.txt, or submit the command as a job (`qgnn submit`)")
        return InputError(f"{where}: no Ray cluster could be joined there ({why}); see `ray status` on its head, or "
                          "leave out the address and RAY_ADDRESS to run on this machine alone")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _asks_for_a_token(address: str) -> bool:
    """Whether a head turns away a call without a token. Ray itself only says, after 20 s, that it cannot connect."""
    try:
        import grpc
    except ImportError:  # Ray's dashboard, which brings it, is not installed
        return False
    with grpc.insecure_channel(address) as channel:
        for method in ("NodeInfoGcsService/CheckAlive", "RayletDriver/ClusterInfo"):  # of a head, and behind ray://
            try:
                channel.unary_unary(f"/ray.rpc.{method}")(b"", timeout=PROBE_S)
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                    return True
    return False
