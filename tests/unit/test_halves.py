# SPDX-License-Identifier: Apache-2.0
"""Halves of a file that killed processes left: the next one that writes it removes them, and nobody else's."""
from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

from qgnn_dist.files.write import remove_abandoned, write_atomically
from qgnn_dist.store.reader import Store
from tests.helpers import make_store, small_graph, untrained_model

KILLED = """
import os, signal, sys
from pathlib import Path
from qgnn_dist.files.write import write_atomically
os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
write_atomically(Path(sys.argv[1]), b"half")
"""


def test_what_a_killed_export_left_goes_with_the_next(tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    done = subprocess.run([sys.executable, "-c", KILLED, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    (half,) = tmp_path.iterdir()
    assert half.name.startswith(".model.safetensors.")
    store: Store = make_store(small_graph(), tmp_path / "s", 1)
    untrained_model(store).save(target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "s"]


def test_a_file_that_is_being_written_and_those_of_other_names_stay(tmp_path: Path) -> None:
    target = tmp_path / "a"
    others = [tmp_path / name for name in (".a.b.7.tmp", ".a.tmp", ".a.word.tmp", ".b.7.tmp")]
    for other in others:
        other.touch()
    busy, left = tmp_path / ".a.8.tmp", tmp_path / ".a.9.tmp"
    left.touch()
    with open(busy, "wb") as out:
        fcntl.flock(out, fcntl.LOCK_EX)
        remove_abandoned(target)
        assert sorted(tmp_path.iterdir()) == sorted([*others, busy])
    remove_abandoned(target)
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_a_write_holds_its_half(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    target, sync = tmp_path / "a", os.fsync

    def look(handle: int) -> None:
        remove_abandoned(target)
        sync(handle)

    monkeypatch.setattr(os, "fsync", look)
    write_atomically(target, b"whole")
    assert target.read_bytes() == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
