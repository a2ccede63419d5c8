# SPDX-License-Identifier: Apache-2.0
"""A Ray cluster as an administrator starts it: by `ray start`, in processes of its own that the test alone ends."""
from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

__all__ = ["free_port", "ray_head", "ray_node"]

START_S = 60.0


def free_port() -> int:
    """One that nobody has on this machine just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def ray_head(environment: Mapping[str, str], *, address: str, num_cpus: int = 2,
             dashboard: int | None = None) -> Iterator[str]:
    """`HOST:PORT` of a head on `address`, which answers.

    Args: environment: on top of this process's, without its own RAY_AUTH_… dashboard: port of one, whose jobs server
        may come up a moment later; default: none.
    """
    port, client = free_port(), free_port()
    with _started(["--head", f"--port={port}", f"--node-ip-address={address}", f"--ray-client-server-port={client}",
                   f"--include-dashboard={str(dashboard is not None).lower()}",
                   *([f"--dashboard-port={dashboard}"] if dashboard is not None else [])], num_cpus, environment):
        yield f"{address}:{port}"


@contextmanager
def ray_node(head: str, environment: Mapping[str, str], *, num_cpus: int = 1) -> Iterator[int]:
    """The process of one more host of the head at `HOST:PORT`, on the same machine and address."""
    with _started([f"--address={head}", f"--node-ip-address={head.rpartition(':')[0]}", "--min-worker-port=0",
                   "--max-worker-port=0"], num_cpus, environment) as process:
        yield process


@contextmanager
def _started(words: list[str], num_cpus: int, environment: Mapping[str, str]) -> Iterator[int]:
    """The process of a `ray start --block` that has begun; ended, with all that it started, after the block."""
    place = Path(tempfile.mkdtemp(prefix="qgnn-ray-", dir="/tmp"))  # Ray's sockets need a short path
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    with open(place / "log", "wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *words,
             f"--dashboard-agent-listen-port={free_port()}", f"--num-cpus={num_cpus}", f"--temp-dir={place}",
             "--object-store-memory=200000000", "--disable-usage-stats"],
            stdout=out, stderr=subprocess.STDOUT, env={**env, **environment}, start_new_session=True)
    try:
        until = time.monotonic() + START_S
        while "Ray runtime started" not in (place / "log").read_text():
            assert process.poll() is None, (place / "log").read_text()
            assert time.monotonic() < until, f"no Ray within {START_S:g} s:\n{(place / 'log').read_text()}"
            time.sleep(0.1)
        yield process.pid
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(place, ignore_errors=True)
