# SPDX-License-Identifier: Apache-2.0
"""`make test` runs every test, each once: its two lanes are lists of folders and files."""
from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _lane(target: str) -> set[str]:
    """Test files of a lane, relative to the project."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    told = subprocess.run(["make", "-n", target], cwd=ROOT, env=environment, capture_output=True, text=True,
                          check=True).stdout
    words = told.replace("\\\n", " ").split()
    ignored = {word.removeprefix("--ignore=") for word in words if word.startswith("--ignore=")}
    files = set[str]()
    for word in (word for word in words if re.match(r"tests/", word)):
        place = ROOT / word
        files |= {str(file.relative_to(ROOT)) for file in (place.rglob("test_*.py") if place.is_dir() else [place])}
    return files - ignored


@pytest.mark.skipif(not (ROOT / "Makefile").exists(), reason="an installed package has no Makefile")
def test_the_lanes_have_every_test_once() -> None:
    first, second = _lane("test-processes"), _lane("test-one-process")
    there = {str(file.relative_to(ROOT)) for file in (ROOT / "tests").rglob("test_*.py")}
    assert first | second == there
    assert first & second == set()
    assert len(first) > 10 < len(second)
