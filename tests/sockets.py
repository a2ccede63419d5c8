# SPDX-License-Identifier: Apache-2.0
"""Which TCP sockets a process listens on, as the kernel tells it."""
from __future__ import annotations

import ipaddress
import os
import struct
from pathlib import Path

__all__ = ["EVERYWHERE", "Listener", "listeners", "tree"]

LISTEN = "0A"
EVERYWHERE = {"0.0.0.0", "::"}
Listener = tuple[str, int]


def listeners(pid: int) -> set[Listener]:
    """Address and port of every listening TCP socket of a process; none where it has ended."""
    open_sockets = set()
    try:
        for entry in os.scandir(f"/proc/{pid}/fd"):
            target = os.readlink(entry.path)
            if target.startswith("socket:["):
                open_sockets.add(target[8:-1])
    except OSError:
        return set()
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN and fields[9] in open_sockets:
                address, port = fields[1].split(":")
                found.add((_address(address), int(port, 16)))
    return found


def _address(text: str) -> str:
    """The kernel writes an address as 32-bit words of this machine's byte order; IPv4 in IPv6 is shown as IPv4."""
    words = [int(text[i:i + 8], 16) for i in range(0, len(text), 8)]
    address = ipaddress.ip_address(struct.pack(f"={len(words)}I", *words))
    return str(getattr(address, "ipv4_mapped", None) or address)


def tree(pid: int) -> set[int]:
    """A process and all that descend from it."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
    found, before = {pid}, set[int]()
    while found != before:
        before = set(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return found
