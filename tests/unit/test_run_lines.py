# SPDX-License-Identifier: Apache-2.0
"""Lines of a run that goes on while somebody looks: RunFolder's and the report's readers."""
from __future__ import annotations

import os
from pathlib import Path

import pytest

from qgnn_dist.errors import InputError
from qgnn_dist.files.read import read_lines
from qgnn_dist.training.run_folder import RunFolder


def _run(folder: Path, epochs: int) -> RunFolder:
    run = RunFolder(folder)
    for epoch in range(1, epochs + 1):
        run.append_metrics({"epoch": epoch})
    return run


def test_a_line_that_is_being_written_is_left_for_the_next_look(tmp_path: Path) -> None:
    run = _run(tmp_path, 2)
    with open(run.metrics_path, "ab") as out:
        out.write(b'{"epoch": 3')
    assert run.read_metrics() == [{"epoch": 1}, {"epoch": 2}]
    assert read_lines(run.metrics_path, 100) == ([b'{"epoch": 1}', b'{"epoch": 2}'], True)
    with open(run.metrics_path, "ab") as out:
        out.write(b"}\n")
    assert run.epochs_done() == 3
    assert read_lines(run.metrics_path, 100)[1] is False


def test_lines_that_come_while_others_are_read_are_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, looked, calls = _run(tmp_path, 2), os.fstat, []

    def grows(handle: int) -> os.stat_result:
        found = looked(handle)
        calls.append(found.st_size)
        if len(calls) == 2:  # the first is whether it is a file
            with open(run.metrics_path, "ab") as out:
                out.write(b'{"epoch": 9}\n')
        return found

    monkeypatch.setattr("qgnn_dist.files.read.os.fstat", grows)
    assert [record["epoch"] for record in run.read_metrics()] == [1, 2]
    assert len(calls) == 2
    assert run.epochs_done() == 3
    calls.clear()
    assert read_lines(run.metrics_path, 100)[1] is False, "what came is no half line"


def test_damaged_and_huge_lines_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run(tmp_path, 2)
    with open(run.metrics_path, "ab") as out:
        out.write(b"{half\n")
    with pytest.raises(InputError, match=r"metrics.jsonl: damaged: .*\(line 3\)"):
        run.read_metrics()
    assert run.start_metrics(2) == [{"epoch": 1}, {"epoch": 2}], "what a checkpoint stands for is whole"
    monkeypatch.setattr("qgnn_dist.training.run_folder.LARGEST_LINES", 5)
    with pytest.raises(InputError, match="is 26 bytes, expected at most 5"):
        run.read_metrics()
