# SPDX-License-Identifier: Apache-2.0
"""Every kind of fault at twenty drawn places of a run, each of which ends as if nothing had been."""
from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from qgnn_dist.store.reader import Store
from tests.recovering import AGAIN_S, EPOCHS, SILENCE_S, SOON_S, Hosts, drawn, places, same_end, strike, tell

SEEDS = range(20)
INSIDE = {"kill": "was lost", "memory": "out of memory", "term": "SIGTERM to rank"}
OUTSIDE = ("host killed", "host frozen", "host with SIGTERM", "server")


@pytest.fixture(scope="module")
def rounds(store: Store) -> list[tuple[str, int, int]]:
    found = places(store)
    assert {direction for direction, _, _ in found} == {"forward", "backward", "evaluation"}
    return found


@pytest.mark.long
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", [*INSIDE, "stop", *OUTSIDE])
def test_any_fault_anywhere_changes_nothing(hosts: Hosts, store: Store, whole: Path, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch, rounds: list[tuple[str, int, int]],
                                            record_property: Callable[[str, object], None], kind: str,
                                            seed: int) -> None:
    act = {"host killed": hosts.kill, "host frozen": hosts.freeze, "host with SIGTERM": hosts.terminate,
           "server": hosts.kill_server}.get(kind)
    place = drawn(f"{kind} {seed}", rounds)
    struck = strike(monkeypatch, store, tmp_path, f"{'call' if kind in OUTSIDE else kind} {place}", act=act)
    same_end(struck.run, whole)
    assert struck.epochs == list(range(1, EPOCHS + 1)), "each epoch was finished once"
    if kind == "term" and struck.place["epoch"] == EPOCHS:
        assert struck.summary["restarts"] == [], "the last epoch is finished where it is"
        return
    error, rank = struck.restart["error"], struck.place["rank"]
    assert len(struck.summary["restarts"]) == 1
    if kind in INSIDE:
        assert INSIDE[kind] in error
    elif kind == "server":
        assert "multiplier server" in error
    if kind != "server":
        assert rank in (struck.restart["rank"], *map(int, re.findall(r"peer (\d)", error)))
    silent = kind in ("stop", "host frozen")
    assert struck.detected_s < (SILENCE_S + 2 if silent else SOON_S)
    assert struck.restart["started_s"] < AGAIN_S
    tell(record_property, f"{kind} {place}", struck)
