# SPDX-License-Identifier: Apache-2.0
"""A plugin that keeps the result of every case once it is there, so that a run of hours that was stopped goes on.

`pytest -p tests.results --keep-results=FILE.jsonl …` leaves out what FILE says has passed with this code.
"""
from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

__all__ = ["code", "kept"]

ROOT = Path(__file__).parents[1]


def code() -> str:
    """The checkout's commit, and a digest of what was changed in the program and its tests since."""
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False).stdout

    changed = git("diff", "HEAD", "--", "qgnn_dist", "tests")
    commit = git("rev-parse", "HEAD").strip()
    return f"{commit}+{hashlib.sha256(changed.encode()).hexdigest()[:8]}" if changed else commit


def kept(file: Path) -> list[dict[str, Any]]:
    """Name, outcome, seconds, properties (pairs), why and code of every case, in the order of their ends."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def pytest_addoption(parser: pytest.Parser) -> None:
    """Pytest's hook."""
    parser.addoption("--keep-results", type=Path, metavar="FILE", help="where results are kept")


def pytest_configure(config: pytest.Config) -> None:
    """Pytest's hook."""
    if config.getoption("--keep-results") is not None:
        config.pluginmanager.register(_Results(config.getoption("--keep-results").absolute()))


class _Results:
    def __init__(self, file: Path) -> None:
        self._file, self._code = file, code()
        self._phases: dict[str, list[pytest.TestReport]] = {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Those that have passed are left out."""
        passed = {one["name"] for one in kept(self._file)
                  if one["outcome"] == "passed" and one["code"] == self._code}
        done = [item for item in items if item.nodeid in passed]
        if done:
            config.hook.pytest_deselected(items=done)
            items[:] = [item for item in items if item.nodeid not in passed]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A case is over with its teardown; one that was interrupted has none."""
        phases = self._phases.setdefault(report.nodeid, [])
        phases.append(report)
        if report.when != "teardown":
            return
        del self._phases[report.nodeid]
        bad = next((one for one in phases if one.outcome != "passed"), None)
        line = {"name": report.nodeid, "outcome": bad.outcome if bad is not None else "passed",
                "seconds": round(sum(one.duration for one in phases), 3), "properties": report.user_properties,
                "why": _why(bad) if bad is not None else "", "code": self._code}
        with open(self._file, "a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")


def _why(report: pytest.TestReport) -> str:
    """First line of what failed, or why a case was skipped."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash is not None else str(report.longrepr)).partition("\n")[0]
