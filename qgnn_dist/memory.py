# SPDX-License-Identifier: Apache-2.0
"""Peak memory of this process: resident, and the anonymous share that memory-mapped stores do not count towards."""
from __future__ import annotations

import threading

__all__ = ["MemoryWatch", "available_bytes", "status_bytes"]


def status_bytes(field: str) -> int:
    """A figure of /proc/self/status (VmRSS, VmHWM, RssAnon) in bytes; 0 where there is none."""
    return _kilobytes("/proc/self/status", field)


def available_bytes() -> int:
    """Memory that processes can take now without swapping, in bytes: of the machine, or of a container that has less.

    0 where the system does not tell.
    """
    found = [_kilobytes("/proc/meminfo", "MemAvailable")]
    for limit, used in (("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
                        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes")):
        try:
            with open(limit, encoding="ascii") as most, open(used, encoding="ascii") as now:
                found.append(max(int(most.read()) - int(now.read()), 1))
        except (OSError, ValueError):  # no such version, or "max"
            continue
    return min(found) if found[0] else 0


def _kilobytes(file: str, field: str) -> int:
    """A figure of a file with lines `field: n kB`, in bytes; 0 where there is none."""
    try:
        with open(file, encoding="ascii") as lines:
            for line in lines:
                if line.startswith(field + ":"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


class MemoryWatch:
    """Samples /proc/self/status from a thread of its own until `close`; bytes, 0 where there is no /proc."""

    def __init__(self, every_s: float = 0.02) -> None:
        self._peak_anon = self._lap_anon = 0
        self._every_s = every_s
        self._end = threading.Event()
        self._sample()
        self._thread = threading.Thread(target=self._watch, name="qgnn-memory", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._end.wait(self._every_s):
            self._sample()

    def _sample(self) -> None:
        now = status_bytes("RssAnon")
        self._peak_anon, self._lap_anon = max(self._peak_anon, now), max(self._lap_anon, now)

    def lap(self) -> int:
        """The anonymous memory's peak since the last call or the begin, in bytes."""
        self._sample()
        found, self._lap_anon = self._lap_anon, 0
        return found

    def peaks(self) -> dict[str, int]:
        """`peak_anon_bytes`, sampled since this watch began, and `peak_rss_bytes`, the system's mark of the process.

        Sampling can miss a peak of a few milliseconds; the mark cannot.
        """
        self._sample()
        return {"peak_anon_bytes": self._peak_anon, "peak_rss_bytes": status_bytes("VmHWM")}

    def close(self) -> None:
        """End the thread."""
        self._end.set()
        self._thread.join(timeout=1)
