# SPDX-License-Identifier: Apache-2.0
"""Runs mutants in child processes and adds up what came of them; one that crashes or hangs costs that mutant alone.

`python -m tests.fault.fuzzing.run 10000 [TARGET …]` prints the table of docs/inputs.md.
"""
from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["fuzz", "table"]

HANG_S, START_S = 60.0, 300.0
"""Seconds without a new mutant, and until the first, after which a child is ended; a machine may be busy."""
BATCH = 1000
MOST_LOST = 20
CHILD = "tests.fault.fuzzing.child"


def fuzz(targets: Sequence[str], mutants: int, seed: int = 0, *, child: str = CHILD, hang_s: float = HANG_S,
         batch: int = BATCH) -> dict[str, dict[str, Any]]:
    """Target → tally (child.Tally), with crashes and hangs among its faults."""
    waiting = [[name, seed, first, min(batch, mutants - first)] for name in targets
               for first in range(0, mutants, batch)]
    found: dict[str, dict[str, Any]] = {}
    lost = 0
    while waiting:
        # Small batches of several targets share a process, whose imports cost more than they do.
        jobs = [waiting.pop(0)]
        while waiting and sum(job[3] for job in jobs) + waiting[0][3] <= max(batch, 4000):
            jobs.append(waiting.pop(0))
        tallies, failure = _run_child(child, jobs, hang_s)
        for tally in tallies:
            _add(found, tally)
        if failure is None:
            continue
        where, why = failure
        lost += 1
        name, number = _place(where)
        job = jobs[len(tallies)] if len(tallies) < len(jobs) else jobs[-1]
        if name != job[0] or lost > MOST_LOST:
            raise RuntimeError(f"the child of {jobs} ended ({why}) at {where!r}")
        _add(found, {"target": name, "mutants": 1, "faults": [f"{name} {number}: {why}"]})
        # What it read before is read again, as it died with its tally.
        again = [[name, seed, job[2], number - job[2]], [name, seed, number + 1, job[2] + job[3] - number - 1]]
        waiting = [one for one in again if one[3] > 0] + jobs[len(tallies) + 1:] + waiting
    return found


def _run_child(child: str, jobs: list[list[Any]], hang_s: float) -> tuple[list[dict[str, Any]], tuple[str, str] | None]:
    """The tallies of the jobs that it finished, and where and why it ended before the last."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # nothing here has to survive
    with tempfile.TemporaryDirectory(prefix="qgnn-fuzz-", dir=memory) as scratch:
        status, errors = Path(scratch) / "status", Path(scratch) / "stderr"
        status.touch()
        with open(errors, "wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-m", child, f"{scratch}/samples", str(status),
                 json.dumps(jobs)], stdout=subprocess.PIPE, stderr=log, cwd=Path(__file__).parents[3],
                env={**os.environ, "TMPDIR": scratch, "OMP_NUM_THREADS": "1", "ARROW_IO_THREADS": "1"})
            hangs = _watch(process, status, hang_s)
            out = process.communicate()[0]
        tallies = [json.loads(line) for line in out.splitlines()]
        if process.returncode == 0 and len(tallies) == len(jobs):
            return tallies, None
        words = errors.read_text(errors="replace")[-3000:]
        why = f"no answer within {hang_s:g} s" if hangs else f"ended with {process.returncode}: {words}"
        return tallies, (status.read_text().strip(), why)


def _watch(process: subprocess.Popen[bytes], status: Path, hang_s: float) -> bool:
    """Wait for the process to end; end it where it reads one mutant for too long, and tell."""
    seen, since = "", time.monotonic()
    while process.poll() is None:
        now = status.read_text()
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > (hang_s if seen else START_S):
            process.kill()
            return True
        time.sleep(0.05)
    return False


def _place(where: str) -> tuple[str, int]:
    name, _, number = where.rpartition(" ")
    return name, int(number) if number.isdigit() else -1


def _add(found: dict[str, dict[str, Any]], tally: dict[str, Any]) -> None:
    into = found.setdefault(tally["target"], {
        "mutants": 0, "same": 0, "refused": 0, "accepted": 0, "slowest_s": 0.0, "peak_bytes": 0, "faults": []})
    for key, value in tally.items():
        if key in ("slowest_s", "peak_bytes"):
            into[key] = max(into[key], value)
        elif key != "target":
            into[key] += value


def table(found: dict[str, dict[str, Any]]) -> str:
    """As Markdown."""
    lines = ["| reader | mutants | refused | accepted | faults | slowest, CPU s | peak memory, MiB |",
             "|---|---|---|---|---|---|---|"]
    lines += [f"| {name} | {t['mutants']:,} | {t['refused']:,} | {t['accepted']:,} | {len(t['faults'])} | "
              f"{t['slowest_s']:.2f} | {t['peak_bytes'] / 2**20:.0f} |" for name, t in found.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    from tests.fault.fuzzing.targets import TARGETS

    results: dict[str, dict[str, Any]] = {}
    for reader in sys.argv[2:] or list(TARGETS):
        results |= fuzz([reader], int(sys.argv[1]))
        print(table({reader: results[reader]}).splitlines()[-1], *results[reader]["faults"], sep="\n", file=sys.stderr)
    print(table(results))
