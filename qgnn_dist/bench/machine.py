# SPDX-License-Identifier: Apache-2.0
"""What a recorded figure needs beside it: the machine, the commit, the versions."""
from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import __version__, kernels

__all__ = ["commit", "envelope"]

_PACKAGE = Path(__file__).resolve().parent.parent
_LIBRARIES = ("torch", "ray", "pyarrow", "numpy", "safetensors")


def envelope(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows of a bench with DESIGN.md's `machine`, `commit` (null outside a checkout of ours) and `versions`."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "machine": {"cpu": _cpu_model(), "cores": os.cpu_count(), "memory_gib": round(memory / 2**30, 1)},
        "commit": commit(),
        "versions": {"qgnn-dist": __version__, "python": platform.python_version(), "kernels": kernels.isa(),
                     **{name: metadata.version(name) for name in _LIBRARIES}},
        "rows": rows,
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The checkout's commit, `-dirty` where a tracked file was changed since.

    An installed package may lie in somebody else's repository: then git does not know our files, and there is none.
    """
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    head = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return f"{head}-dirty" if head and changed else head


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(_PACKAGE), *words], capture_output=True, text=True, timeout=10,
                              check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
