# SPDX-License-Identifier: Apache-2.0
"""Peak memory of this process: resident, and the anonymous share that memory-mapped stores do not count towards."""
from __future__ import annotations

import os
import threading

__all__ = ["MemoryWatch", "status_bytes"]


def status_bytes(field: str) -> int:
    """A figure of /proc/self/status (VmRSS, VmHWM, RssAnon) in bytes; 0 where there is none."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
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
        self._peak_anon = 0
        self._page_bytes = os.sysconf("SC_PAGE_SIZE")
        try:
            self._file = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._file = -1
        self._every_s = every_s
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
            self._peak_anon = max(self._peak_anon, (int(resident) - int(mapped)) * self._page_bytes)

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
