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


def parent(pid: int) -> int:
    """Of a process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def children(*pids: int) -> list[int]:
    """Processes that these have started and not lost."""
    found = []
    for place in Path("/proc").iterdir():
        try:
            if place.name.isdigit() and parent(int(place.name)) in pids:
                found.append(int(place.name))
        except OSError:
            continue
    return found


def descendants(*pids: int) -> list[int]:
    """Their children, and those of them, and so on."""
    found, newest = list[int](), list(pids)
    while newest:
        newest = children(*newest)
        found += newest
    return found


def command(pid: int) -> str:
    """Its command line, `ray::` and the class for Ray's actors; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def anonymous_bytes(pid: int) -> int:
    """Memory of its own that is resident; 0 where it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def shared_memory(pids: list[int]) -> set[str]:
    """Files of /dev/shm that these processes have mapped or open, without those that have no name any more."""
    found = set[str]()
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            lines += [str(file.readlink()) for file in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue
        found |= {line[line.index("/dev/shm/"):] for line in lines if "/dev/shm/" in line}
    return {name for name in found if not name.endswith("(deleted)")}
