# SPDX-License-Identifier: Apache-2.0
"""Mutants of valid files in child processes: no crash, no hang, no exception but ours, no memory beyond a limit."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.fault.fuzzing import child
from tests.fault.fuzzing.faulty import FAULTY, make_faulty, read_faulty
from tests.fault.fuzzing.run import fuzz, table
from tests.fault.fuzzing.target import Sample, Target
from tests.fault.fuzzing.targets import TARGETS

FEW, MANY = 200, 10_000


@pytest.fixture(scope="module")
def few() -> dict[str, dict[str, Any]]:
    return fuzz(list(TARGETS), FEW)


@pytest.mark.parametrize("name", list(TARGETS))
def test_a_reader_stands_mutants(few: dict[str, dict[str, Any]], name: str) -> None:
    tally = few[name]
    assert tally["faults"] == []
    assert tally["mutants"] == tally["refused"] + tally["accepted"] == FEW
    assert tally["refused"] > FEW // 4, "mutants that are hardly ever refused are no mutants"


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", list(TARGETS))
def test_a_reader_stands_many_mutants(name: str) -> None:
    tally = fuzz([name], MANY)[name]
    print(table({name: tally}))
    assert tally["faults"] == []
    assert tally["mutants"] == tally["refused"] + tally["accepted"] == MANY


def test_the_harness_finds_what_it_looks_for() -> None:
    found = fuzz(list(FAULTY), 4, child="tests.fault.fuzzing.faulty", hang_s=2)
    for letter, text in (("c", "ended with -6"), ("h", "no answer within 2 s"), ("m", "MiB of memory"),
                         ("a", "MemoryError"), ("k", "KeyError: 'not one of ours'"), ("l", "the message is no short")):
        faults = found[letter]["faults"]
        assert faults, letter
        assert text in faults[0], faults[0]
        assert found[letter]["mutants"] == 4
    assert found["r"]["faults"] == found["o"]["faults"] == []
    assert found["r"]["refused"] > 0 < found["o"]["accepted"]


def test_silent_acceptance_is_a_fault(tmp_path: Path) -> None:
    sample = Sample(Target(make_faulty, read_faulty, {"file": None}, tells=True), tmp_path / "sample")
    (tmp_path / "sample" / "file").write_bytes(b"z")
    assert child._read(sample, sealed=False, same=False) == (
        "fault", "accepted with other content, though its checksum is not right")
    assert child._read(sample, sealed=True, same=False) == ("accepted", "")
    sample.restore()
    assert child._read(sample, sealed=False, same=True) == ("accepted", "")

