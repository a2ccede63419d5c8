# SPDX-License-Identifier: Apache-2.0
"""`qgnn train` as a process of its own, which tests start, watch and kill."""
from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from qgnn_dist.store.reader import Store
from tests.processes import command, descendants

__all__ = ["Driver", "actors", "not_agents"]

RAY_AGENTS = ("ray::DashboardAgent", "dashboard/agent.py", "ray::RuntimeEnvAgent", "runtime_env/agent/main.py")
"""Ray's own two helpers of a host, by title and before they have one: they tell a Ray that is gone of its end for a
minute before they end too.
"""
WORKERS, SERVER = "ray::WorkerActor", "ray::ServerActor"


class Driver:
    """One command; a context manager that ends it.

    Args:
        address: of a Ray cluster to join; None for a Ray of its own, whose files then lie in `ray_folder`.
        words: more of the command line.
    """

    def __init__(self, store: Store, run: Path, config: Path, address: str | None, words: Sequence[str] = ()) -> None:
        self.ray_folder = Path(tempfile.mkdtemp(prefix="q"))  # a socket's path has room for 107 bytes
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        joined = ["--ray-address", address] if address else []
        self.log = self.ray_folder / "stderr"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "qgnn_dist.cli", "train", str(store.path), "--out", str(run), "--config",
                 str(config), *joined, *words], stdout=subprocess.DEVNULL, stderr=log,
                env={**environment, "RAY_TMPDIR": str(self.ray_folder)})

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        subprocess.run(["rm", "-r", str(self.ray_folder)], check=True)

    @property
    def running(self) -> bool:
        """It has not ended."""
        return self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL, as an end without notice."""
        self.process.kill()
        self.process.wait(10)


def not_agents(pids: Iterable[int]) -> list[int]:
    """All of these processes but Ray's own helpers."""
    return [pid for pid in pids if not any(name in command(pid) for name in RAY_AGENTS)]


def actors(*roots: int) -> dict[int, str]:
    """Workers and multiplier servers among the descendants of processes: pid → `worker` or `server`."""
    found = {pid: command(pid) for pid in descendants(*roots)}
    kinds = {WORKERS: "worker", SERVER: "server"}
    return {pid: kind for pid, words in found.items() for name, kind in kinds.items() if words.startswith(name)}
