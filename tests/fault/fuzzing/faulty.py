# SPDX-License-Identifier: Apache-2.0
"""A reader with all the faults that the harness is there for; `python -m` of this is a child of it."""
from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np

from qgnn_dist.errors import InputError
from tests.fault.fuzzing import child
from tests.fault.fuzzing.target import Target

__all__ = ["FAULTY", "make_faulty", "read_faulty"]


def read_faulty(folder: Path) -> str:
    """Each fault at a byte of its own."""
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


def make_faulty(folder: Path) -> None:
    (folder / "file").write_bytes(b"o")


FAULTY = {letter: Target(make_faulty, read_faulty, {"file": None},
                         lambda folder, file, letter=letter: file.write_bytes(letter.encode()))
          for letter in "chmaklro"}
"""Every sealed mutant becomes that letter."""


if __name__ == "__main__":
    child.main(*sys.argv[1:], targets=FAULTY)
