# SPDX-License-Identifier: Apache-2.0
"""One process that reads many mutants: `python -m tests.fault.fuzzing.child FOLDER STATUS JOBS`.

JOBS is JSON: [[target, seed, first, count], …]. STATUS always says which mutant is being read, so that the parent knows
where this process died or hangs. A line of JSON on stdout for every target tells what came of it.
"""
from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qgnn_dist.errors import QgnnError
from tests.fault.fuzzing.target import Sample, Target

__all__ = ["ADDRESS_BYTES", "LIMIT_BYTES"]

LIMIT_BYTES = 64 << 20
"""Resident memory that reading a mutant may take above what the process had, or twice the file, if that is more."""
ADDRESS_BYTES = 4 << 30
"""Of address space, above what the process had: asking for more fails, and is a fault."""
LONGEST_MESSAGE = 4000
"""Characters: some 20 faults of a file of settings."""


@dataclass
class Tally:
    """What came of the mutants of one target. slowest_s: of one, in CPU seconds of this process."""

    target: str
    mutants: int = 0
    same: int = 0
    refused: int = 0
    accepted: int = 0
    slowest_s: float = 0.0
    peak_bytes: int = 0
    faults: list[str] = field(default_factory=list)


def _read(sample: Sample, sealed: bool, same: bool) -> tuple[str, str]:
    """What became of a mutant, `refused`, `accepted` or `fault`, and why."""
    try:
        found = sample.target.read(sample.place)
        if sample.target.verify is not None and not sealed:
            sample.target.verify(sample.place)
    except QgnnError as error:
        words = str(error)
        if same:
            return "fault", f"the sample itself is refused: {words[:200]}"
        if "\n" in words or len(words) > LONGEST_MESSAGE:
            return "fault", f"the message is no short line: {words[:200]!r}, {len(words)} characters"
        return "refused", words
    except BaseException:
        return "fault", traceback.format_exc(limit=-6)
    if sample.target.tells and not sealed and found is not None and found != sample.digests[sample.place]:
        return "fault", "accepted with other content, though its checksum is not right"
    return "accepted", ""


def run_target(sample: Sample, tally: Tally, seed: int, first: int, count: int, status: int) -> None:
    """Read mutants first … first+count−1 of a sample."""
    _reset_peak()
    base = _memory()[0]
    limit_before = 0
    for number in range(first, first + count):
        os.pwrite(status, f"{tally.target} {number}".ljust(64).encode(), 0)
        rng = np.random.default_rng([seed, zlib.crc32(tally.target.encode()), number])
        try:
            size, sealed, same = sample.change(rng)
            start = time.process_time()
            kind, why = _read(sample, sealed, same)
            tally.slowest_s = max(tally.slowest_s, time.process_time() - start)
        finally:
            sample.restore()
        peak = _memory()[1] - base
        if peak > max(LIMIT_BYTES, 2 * size) and peak > limit_before:
            why = f"took {peak / 2**20:.0f} MiB of memory for a file of {size} bytes ({kind} {why[:200]})"
            kind = "fault"
            limit_before = peak
        tally.peak_bytes = max(tally.peak_bytes, peak)
        tally.mutants += 1
        tally.same += same
        if kind == "fault":
            tally.faults.append(f"{tally.target} {number}: {why}")
        elif kind == "refused":
            tally.refused += 1
        else:
            tally.accepted += 1


def _memory() -> tuple[int, int]:
    """Resident bytes now, and at their peak since the last reset."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return tuple(int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))  # type: ignore[return-value]


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _limit_address_space() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + ADDRESS_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


def main(folder: str, status_file: str, jobs: str, targets: dict[str, Target]) -> None:
    """See the module."""
    status = os.open(status_file, os.O_RDWR | os.O_CREAT)
    asked: list[Any] = json.loads(jobs)
    samples = [Sample(targets[name], Path(folder) / str(at)) for at, (name, *_) in enumerate(asked)]
    _limit_address_space()
    for sample, (name, seed, first, count) in zip(samples, asked):
        tally = Tally(name)
        run_target(sample, tally, seed, first, count, status)
        print(json.dumps(vars(tally)), flush=True)


if __name__ == "__main__":
    from tests.fault.fuzzing.targets import TARGETS

    main(*sys.argv[1:], targets=TARGETS)
