# SPDX-License-Identifier: Apache-2.0
"""Timing systems beside each other: in turns, so that what else the machine does meets all of them alike."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["spread", "stream_copy", "take_turns"]

_STREAM_BYTES = 256 << 20


def take_turns(systems: Mapping[str, Callable[[], Any]], repeats: int,
               say: Callable[[str], None]) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Run every system once a turn.

    Returns: system → its times in ms, `repeats` of them, the warm-up of one turn left out; system → its last result.
    """
    times: dict[str, list[float]] = {name: [] for name in systems}
    results = {}
    for turn in range(repeats + 1):
        say(f"turn {turn} of {repeats}")
        for name, run in systems.items():
            start = time.perf_counter()
            results[name] = run()
            if turn:
                times[name].append(1000 * (time.perf_counter() - start))
    return times, results


def spread(times: Sequence[float]) -> dict[str, Any]:
    """Median and 10 % and 90 % quantiles, under the names of a row."""
    p10, p90 = (float(np.quantile(times, q)) for q in (0.1, 0.9))
    return {"ms_median": statistics.median(times), "ms_p10": p10, "ms_p90": p90, "repeats": len(times)}


def stream_copy(repeats: int = 7) -> float:
    """Bytes a second that copying memory moves, read and written both counted, at torch's number of threads; median.

    The arrays are larger than any cache. What the write fetches first is not counted, as in McCalpin's STREAM.
    """
    import torch

    source = torch.ones(_STREAM_BYTES // 4)
    target = torch.zeros_like(source)
    times, _ = take_turns({"copy": lambda: target.copy_(source)}, repeats, lambda _: None)
    return 2 * _STREAM_BYTES / (statistics.median(times["copy"]) / 1000)
