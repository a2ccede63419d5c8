# SPDX-License-Identifier: Apache-2.0
"""Cells in processes: finished ones stay, failing ones are told, a process that dies takes no other cell with it."""
from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qgnn_dist.bench.cells import SCHEMA, Cell, cells_of, read_cell, run_cells
from qgnn_dist.bench.grid import Row
from qgnn_dist.config import load_config
from qgnn_dist.errors import QgnnError


def _cells(out: Path, *widths: int, seeds: int = 2) -> list[Cell]:
    rows = [Row(dataset="d", method="m", width=f"int{bits}", layers=10, seeds=seeds,
                config=load_config(overrides=[f"quant.bits={bits}"])) for bits in widths]
    return list(cells_of(rows, {"d": "f"}, out).values())


def _note(cell: Cell, scratch: Path) -> dict[str, Any]:
    """Stands in for a training: says that it was called, and what its process is like."""
    assert scratch.is_dir()
    calls = cell.store.parent.parent / "calls"
    calls.mkdir(exist_ok=True)
    (calls / f"{cell.names['width']}-{cell.seed}-{time.monotonic_ns()}").touch()
    return {"schema": SCHEMA, "digest": cell.digest, "pid": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"],
            "ignored": signal.getsignal(signal.SIGINT) is signal.SIG_IGN}


def _fail_at_two(cell: Cell, scratch: Path) -> dict[str, Any]:
    if cell.config.quant.bits == 2:
        raise QgnnError("the loss is nan") if cell.seed == 0 else ValueError("odd")
    return _note(cell, scratch)


def _die_at_two(cell: Cell, scratch: Path) -> dict[str, Any]:
    if cell.config.quant.bits == 2:
        os._exit(9)
    return _note(cell, scratch)


def _wait(cell: Cell, scratch: Path) -> dict[str, Any]:
    if cell.seed == 0:
        return _note(cell, scratch)
    Path(os.environ["QGNN_TEST_PIDS"], str(os.getpid())).touch()
    time.sleep(120)
    return {}


def test_the_module_of_the_processes_loads_nothing_heavy() -> None:
    """What NumPy and torch read of the environment is set after it was imported."""
    code = "import sys, qgnn_dist.bench.cells; sys.exit(' '.join({'numpy', 'torch'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"loaded {done.stderr.strip()}"


def _calls(out: Path) -> int:
    return len(list((out / "calls").iterdir())) if (out / "calls").exists() else 0


def test_cells_run_once_in_processes_of_one_thread(tmp_path: Path) -> None:
    cells = _cells(tmp_path, 2, 4)
    ended: list[tuple[int, str | None]] = []
    assert run_cells(cells, 2, work=_note, on_end=lambda cell, why: ended.append((cell.seed, why))) == {}
    assert len(ended) == 4
    assert {why for _, why in ended} == {None}
    results = [read_cell(cell) for cell in cells]
    assert all(r is not None and r["pid"] != os.getpid() and r["threads"] == "1" and r["ignored"] for r in results)
    before = {cell.file: (cell.file.stat().st_mtime_ns, cell.file.read_bytes()) for cell in cells}
    # Another width joins: only its cells run.
    run_cells(_cells(tmp_path, 2, 4, 8), 2, work=_note)
    assert _calls(tmp_path) == 6
    assert before == {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in before}


def test_shared_and_damaged_cells(tmp_path: Path) -> None:
    first, second = _cells(tmp_path, 2)
    run_cells([first, second, first], 1, work=_note)
    assert _calls(tmp_path) == 2
    first.file.write_text(first.file.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    second.file.write_text(json.dumps({"schema": SCHEMA, "digest": "another"}), encoding="utf-8")
    run_cells([first, second], 1, work=_note)
    assert _calls(tmp_path) == 4


def test_failing_cells_are_told_and_not_written(tmp_path: Path) -> None:
    cells = _cells(tmp_path, 2, 4)
    failures = run_cells(cells, 1, work=_fail_at_two)
    assert failures == {cells[0].digest: "the loss is nan", cells[2].digest: "ValueError: odd"}
    assert [cell.file.exists() for cell in cells] == [False, True, False, True]
    assert run_cells(cells, 1, work=_note) == {}
    assert _calls(tmp_path) == 4


def test_a_dying_process_fails_its_own_cell_alone(tmp_path: Path) -> None:
    cells = _cells(tmp_path, 4, 2, 8, seeds=1)
    failures = run_cells(cells, 1, work=_die_at_two)
    assert list(failures) == [cells[1].digest]
    assert "its process died" in failures[cells[1].digest]
    assert [read_cell(cell) is not None for cell in cells] == [True, False, True]


_INTERRUPTED = """
import signal, sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
from test_bench_cells import _cells, _wait
from qgnn_dist.bench.cells import run_cells
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and hands that on
    try:
        run_cells(_cells(Path({out!r}), 2, 4), 2, work=_wait)
    except KeyboardInterrupt:
        sys.exit(7)
"""


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "killed"])
def test_an_end_from_outside_ends_the_processes_and_keeps_what_is_finished(tmp_path: Path, how: signal.Signals) -> None:
    script, pids = tmp_path / "script.py", tmp_path / "pids"
    pids.mkdir()
    script.write_text(_INTERRUPTED.format(tests=str(Path(__file__).parent), out=str(tmp_path)), encoding="utf-8")
    root = str(Path(__file__).parents[2])
    child = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "QGNN_TEST_PIDS": str(pids),
                                                                 "PYTHONPATH": root, "TMPDIR": str(tmp_path)})
    try:
        deadline = time.monotonic() + 60
        while len(list(pids.iterdir())) < 2:
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        child.send_signal(how)
        assert child.wait(20) == (7 if how is signal.SIGINT else -signal.SIGKILL)
        workers = [int(f.name) for f in pids.iterdir()]
        deadline = time.monotonic() + 10
        while any(_alive(pid) for pid in workers):
            assert time.monotonic() < deadline, "a worker outlived its parent"
            time.sleep(0.05)
    finally:
        child.kill()
    finished = [cell for cell in _cells(tmp_path, 2, 4) if read_cell(cell) is not None]
    assert [cell.seed for cell in finished] == [0, 0]
    assert not multiprocessing.active_children()
