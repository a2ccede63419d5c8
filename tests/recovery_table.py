# SPDX-License-Identifier: Apache-2.0
"""Prints the rows of docs/recovery.md's and README.md's tables from what `make recovery-table` measured.

`python -m tests.recovery_table RESULTS.jsonl`
"""
from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from qgnn_dist.bench.machine import envelope

from .results import kept

__all__ = ["faults_of", "rows"]

DOCS = {
    "a worker killed, forward or backward, in the first epoch or a later one": ("kill",),
    "a worker whose allocation fails": ("memory",),
    "a worker frozen (`timeouts.exchange_s=4`), and named in the log before as giving no answer": ("stop",),
    "the multiplier server killed": ("multiplier server",),
    "a host with a worker killed, with a spare host, and without": ("host 0", "host 1"),
    "a host with a worker frozen (`timeouts.exchange_s=30`)": ("host frozen",),
    "a host with a worker cut off the network": ("host cut off",),
    "SIGTERM to a worker, its epoch finished first": ("term",),
    "SIGTERM to a worker and to its host's Ray": ("host with SIGTERM",),
}
"""Row of docs/recovery.md → how the names of its faults begin (tests.recovering.tell)."""
README = {
    "a worker's process is killed, or runs out of memory": ("kill", "memory"),
    "a worker freezes": ("stop",),
    "a host is killed, frozen, or cut off the network (with the health checks of that page)": (
        "host 0", "host 1", "host frozen", "host cut off"),
    "SIGTERM to a worker or its host, as on spot hosts": ("term", "host with SIGTERM"),
}


def rows(words: Mapping[str, Sequence[str]], measured: Sequence[Mapping[str, object]]) -> list[str]:
    """Markdown rows: what happens, and the least and largest seconds until it was known, and until workers had met.

    Args: measured: `fault`, `detected_after_s`, `restarted_after_s` of each case.
    """
    lines = []
    for what, faults in words.items():
        own = [one for one in measured if any(_is(str(one["fault"]), fault) for fault in faults)]
        cells = [_span([float(str(one[key])) for one in own]) for key in ("detected_after_s", "restarted_after_s")]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return lines


def faults_of(properties: Sequence[tuple[str, object]]) -> list[dict[str, object]]:
    """A case's faults one by one, of what it recorded: each begins with its name."""
    found: list[dict[str, object]] = []
    for name, value in properties:
        if name == "fault":
            found.append({})
        if found:
            found[-1][name] = value
    return found


def _is(name: str, fault: str) -> bool:
    return name == fault or name.startswith(f"{fault} ")


def _span(seconds: Sequence[float]) -> str:
    if not seconds:
        return "not measured"
    low, high = f"{min(seconds):.1f}", f"{max(seconds):.1f}"
    return low if low == high else f"{low}-{high}"


def main(words: Sequence[str]) -> int:
    """See the module; exit code 1 where nothing was measured."""
    measured = [found for one in (kept(Path(words[0])) if words else []) for found in faults_of(one["properties"])]
    if not measured:
        print("nothing was measured; `make recovery-table` does", file=sys.stderr)
        return 1
    made = envelope([])
    print(f"{made['machine']['cpu']}, {made['machine']['cores']} cores, a load of {os.getloadavg()[0]:.1f} at the end; "
          f"commit {made['commit']}")
    for title, table in (("docs/recovery.md", DOCS), ("README.md", README)):
        print(f"\n{title}: what happens | known after, s | new workers met after, s")
        print("\n".join(rows(table, measured)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
