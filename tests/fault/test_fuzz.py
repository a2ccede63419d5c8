# SPDX-License-Identifier: Apache-2.0
"""Mutants of valid files in child processes: no crash, no hang, no exception but ours, no memory beyond a limit."""
from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import pytest

from qgnn_dist.errors import InputError
from tests.fault.fuzzing import child
from tests.fault.fuzzing.run import fuzz, table
from tests.fault.fuzzing.targets import TARGETS, Target

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
    tally = fuzz([name], MANY, seed=1)[name]
    print(table({name: tally}))
    assert tally["faults"] == []
    assert tally["mutants"] == tally["refused"] + tally["accepted"] == MANY


def _faulty(folder: Any) -> str:
    """A reader with all the faults that the harness is there for, each at a byte of its own."""
    data = (folder / "file").read_bytes()
    if data[:1] == b"c":
        os.abort()
    if data[:1] == b"h":
        time.sleep(60)
    if data[:1] == b"m":
        np.ones(200 << 20, np.uint8)
    if data[:1] == b"a":
        np.empty(100 << 30, np.uint8)
    if data[:1] == b"k":
        raise KeyError("not one of ours")
    if data[:1] == b"l":
        raise InputError("one\ntwo")
    if data[:1] == b"r":
        raise InputError("refused")
    return "same" if data[:1] == b"o" else data[:1].decode("latin-1")


def _make_faulty(folder: Any) -> None:
    (folder / "file").write_bytes(b"o")


FAULTY = {letter: Target(_make_faulty, _faulty, {"file": None},
                         lambda folder, file, letter=letter: file.write_bytes(letter.encode()), tells=letter == "x")
          for letter in "chmaklro"}
"""Every sealed mutant becomes that letter."""


def test_the_harness_finds_what_it_looks_for() -> None:
    found = fuzz(list(FAULTY), 12, child="tests.fault.test_fuzz", hang_s=3)
    for letter, text in (("c", "ended with -6"), ("h", "no answer within 3 s"), ("m", "MiB of memory"),
                         ("a", "MemoryError"), ("k", "KeyError: 'not one of ours'"), ("l", "the message is no short")):
        faults = found[letter]["faults"]
        assert faults, letter
        assert text in faults[0], faults[0]
        assert found[letter]["mutants"] == 12
    assert found["r"]["faults"] == found["o"]["faults"] == []
    assert found["r"]["refused"] > 0 < found["o"]["accepted"]


def test_silent_acceptance_is_a_fault(tmp_path: Any) -> None:
    sample = child.Sample(Target(_make_faulty, _faulty, {"file": None}, tells=True), tmp_path / "sample")
    (tmp_path / "sample" / "file").write_bytes(b"z")
    assert child._read(sample, sealed=False, same=False) == (
        "fault", "accepted with other content, though its checksum is not right")
    assert child._read(sample, sealed=True, same=False) == ("accepted", "")
    sample.restore()
    assert child._read(sample, sealed=False, same=True) == ("accepted", "")


if __name__ == "__main__":
    import sys

    child.main(*sys.argv[1:], targets=FAULTY)
