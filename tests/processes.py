# SPDX-License-Identifier: Apache-2.0
"""Watching processes that a test started."""
from __future__ import annotations

import time
from pathlib import Path


def gone(pid: int) -> bool:
    """No such process, or a zombie that waits for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def until_gone(pids: list[int], seconds: float) -> list[int]:
    """Those of `pids` that are still there after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not all(map(gone, pids)):
        time.sleep(0.05)
    return [pid for pid in pids if not gone(pid)]
