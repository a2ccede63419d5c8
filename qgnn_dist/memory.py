# SPDX-License-Identifier: Apache-2.0
"""Memory of this process and of its machine: peaks, what may still be taken, and byte counts as people read them."""
from __future__ import annotations

import os
import threading
import time
from pathlib import Path

__all__ = ["MemoryWatch", "available_bytes", "byte_size", "status_bytes"]


def byte_size(count: float) -> str:
    """A byte count as people read it.

    >>> byte_size(1536), byte_size(12), byte_size(3.2e9)
    ('1.5 KiB', '12 B', '3.0 GiB')
    """
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    size, unit = float(count), 0
    while size >= 1024 and unit < len(units) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.0f} B" if unit == 0 else f"{size:.1f} {units[unit]}"


def available_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """What this process may still take: the system's own estimate, or what its control group leaves, if that is less.

    Where the system tells neither, all memory of the machine.
    """
    found = _control_group_room(proc, cgroups)
    system = _kilobytes(proc / "meminfo", "MemAvailable")
    if system:
        found.append(system)
    return min(found, default=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _control_group_room(proc: Path, cgroups: Path) -> list[int]:
    """What every group above this process has left (version 2 or 1); page cache that can be dropped counts as left."""
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found: list[int | None] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = cgroups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = cgroups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inside = root / path.strip("/")
        folders = [inside, *inside.parents]
        found += [_room(folder, *names) for folder in folders[:folders.index(root) + 1]]
    return [room for room in found if room is not None]


def _room(folder: Path, limit_file: str, used_file: str, cache_field: str) -> int | None:
    """What one group has left; None where it has no limit."""
    try:
        limit, used = (int((folder / name).read_text()) for name in (limit_file, used_file))
        cache = next((int(line.split()[1]) for line in (folder / "memory.stat").read_text().splitlines()
                      if line.startswith(cache_field + " ")), 0)
    except (OSError, ValueError):  # no such file, or "max"
        return None
    return max(limit - max(used - cache, 0), 0)


def status_bytes(field: str) -> int:
    """A figure of /proc/self/status (VmRSS, VmHWM, RssAnon) in bytes; 0 where there is none."""
    return _kilobytes(Path("/proc/self/status"), field)


def _kilobytes(file: Path, field: str) -> int:
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
    """Samples this process's memory from a thread of its own until `close`; bytes, 0 where there is no /proc.

    Reads /proc/self/statm, a fifteenth of the time of /proc/self/status: workers share their cores with it.
    """

    def __init__(self, every_s: float = 0.02) -> None:
        self._peak_anon = self._lap_anon = 0
        self._page_bytes = os.sysconf("SC_PAGE_SIZE")
        try:
            self._file = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._file = -1
        self._every_s = every_s
        self._available, self._look_again = 0, 0.0
        self._end = threading.Event()
        self._sample()
        self._thread = threading.Thread(target=self._watch, name="qgnn-memory", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._end.wait(self._every_s):
            self._sample()

    def _sample(self) -> None:
        if self._file >= 0:
            _, resident, mapped, *_ = os.pread(self._file, 256, 0).split()  # pages; of files and shared the latter
            now = (int(resident) - int(mapped)) * self._page_bytes
            self._peak_anon, self._lap_anon = max(self._peak_anon, now), max(self._lap_anon, now)

    def now(self) -> dict[str, int]:
        """`anon_bytes` and `rss_bytes` of this process, and `available_bytes`, which is looked at once a second."""
        if time.monotonic() >= self._look_again:
            self._available, self._look_again = available_bytes(), time.monotonic() + 1.0
        if self._file < 0:
            return {"anon_bytes": 0, "rss_bytes": 0, "available_bytes": self._available}
        _, resident, mapped, *_ = (int(pages) for pages in os.pread(self._file, 256, 0).split())
        return {"anon_bytes": (resident - mapped) * self._page_bytes, "rss_bytes": resident * self._page_bytes,
                "available_bytes": self._available}

    def lap(self) -> int:
        """The anonymous memory's peak since the last call or the begin, in bytes."""
        self._sample()
        found, self._lap_anon = self._lap_anon, 0
        return found

    def peaks(self) -> dict[str, int]:
        """`peak_anon_bytes`, sampled since this watch began, and `peak_rss_bytes`, the system's mark of the process.

        Sampling can miss a peak of a few milliseconds; the mark cannot.
        """
        if not self._end.is_set():
            self._sample()
        return {"peak_anon_bytes": self._peak_anon, "peak_rss_bytes": status_bytes("VmHWM")}

    def close(self) -> None:
        """End the thread; may be called twice."""
        self._end.set()
        self._thread.join()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
