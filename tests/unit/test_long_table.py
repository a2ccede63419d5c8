# SPDX-License-Identifier: Apache-2.0
"""The page of the long tests: what ran, what did not, and what was recorded, from the XML that pytest itself writes."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.long_table import collected, main, markdown, read_results
from tests.recovery_table import README, faults_of, rows
from tests.recovery_table import main as recovery_main
from tests.results import kept

TESTS = '''
import pytest

@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_takes_long(n, record_property):
    record_property("detected_s", n / 2)
    record_property("restarted_s", [5, 9, 7, 6][n - 1])
    record_property("fault", "kill")
    if n == 4:
        pytest.skip("no net here")
    assert n != 3, "three is wrong"

def test_fails_before_it_begins(nothing_of_that_name):
    pass

def test_passes():
    pass
'''
ROOT = Path(__file__).parents[2]
MADE = {"machine": {"cpu": "Abacus", "cores": 2, "memory_gib": 23.5}, "commit": "abc", "versions": {"ray": "2.0"}}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    (folder / "tests").mkdir()
    (folder / "tests" / "test_a.py").write_text(TESTS)
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), "tests"]
    subprocess.run([*words, "--junit-xml=first.xml"], cwd=folder, capture_output=True, check=False)
    told = subprocess.run([*words, "--collect-only"], cwd=folder, capture_output=True, text=True, check=False).stdout
    never = "".join(f"tests/test_b.py::test_never_run[{name}]\n" for name in "xy")
    (folder / "collected.txt").write_text(f"{told}\n{never}")
    return folder


def test_a_page_of_all_that_ran_and_did_not(results: Path) -> None:
    names = collected((results / "collected.txt").read_text())
    assert len(names) == 8
    page = markdown(read_results([results / "first.xml"]), names, MADE, "2030-01-02")
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
            for line in page.splitlines() if line.startswith("| ")}
    assert rows["test_a: takes long"][:5] == ["4", "2", "1", "1", "0"]
    assert rows["test_a: takes long"][6] == "`detected_s` 1.25 (2), `restarted_s` 6.5 (9)"
    assert rows["test_a: fails before it begins"][:5] == ["1", "0", "1", "0", "0"]
    assert rows["test_a: passes"][:5] == ["1", "1", "0", "0", "0"]
    assert rows["test_b: never run"][:5] == ["2", "0", "0", "0", "2"]
    assert rows["**all**"][:5] == ["8", "3", "2", "1", "2"]
    assert "Abacus, 2 cores, 23.5 GiB; commit abc; ray 2.0; 2030-01-02." in page
    assert "- tests/test_a.py::test_takes_long[3]: AssertionError: three is wrong" in page
    assert "- tests/test_a.py::test_takes_long[4]: no net here" in page


def test_of_several_results_the_last_counts(results: Path) -> None:
    again = results / "again.xml"
    again.write_text('<testsuites><testsuite><testcase classname="tests.test_a" name="test_takes_long[3]" time="2"/>'
                     '<testcase classname="" name="" time="0"/></testsuite></testsuites>')
    cases = {case.name: case for case in read_results([results / "first.xml", again])}
    assert len(cases) == 6
    assert cases["tests/test_a.py::test_takes_long[3]"].outcome == "passed"
    assert cases["tests/test_a.py::test_takes_long[3]"].seconds == 2


def test_the_command(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--collected", str(results / "collected.txt"), "--out", str(tmp_path / "page.md")]
    assert main([str(results / "first.xml"), *words]) == 0
    assert (tmp_path / "page.md").read_text().startswith("# Long tests\n")
    assert main([str(tmp_path / "none.xml"), *words]) == 1
    assert "no results to render" in capsys.readouterr().err


def test_a_stopped_run_goes_on_with_what_has_not_passed(tmp_path: Path) -> None:
    """What failed runs again, and counts with its last result; results of other code do not count."""
    (tmp_path / "cases").mkdir()
    (tmp_path / "cases" / "test_a.py").write_text(TESTS)
    file = tmp_path / "results.jsonl"
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.results",
             f"--keep-results={file}", "--rootdir", str(tmp_path), str(tmp_path / "cases")]
    for count, passed in ((6, 3), (3, 0)):
        before = len(kept(file))
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        new = kept(file)[before:]
        assert len(new) == count, done.stdout + done.stderr
        assert sum(one["outcome"] == "passed" for one in new) == passed
    cases = {case.name: case for case in read_results([file])}
    assert len(cases) == 6
    third = cases["cases/test_a.py::test_takes_long[3]"]
    assert (third.outcome, third.why, third.group) == (
        "failed", "AssertionError: three is wrong", "cases/test_a.py::test_takes_long")
    assert third.properties == {"detected_s": 1.5, "restarted_s": 7.0}
    assert cases["cases/test_a.py::test_takes_long[4]"].why == "no net here"
    other = tmp_path / "other.jsonl"
    other.write_text(file.read_text().replace('"code": "', '"code": "0'))
    assert read_results([other]) == []


def test_rows_of_the_recovery_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = [("fault", "host 0"), ("detected_after_s", 1.1), ("restarted_after_s", 2.0), ("fault", "host frozen"),
                ("detected_after_s", 2.94), ("restarted_after_s", 2.0), ("fault", "host with SIGTERM"),
                ("detected_after_s", 9.0), ("restarted_after_s", 9.0)]
    told = rows(README, faults_of(recorded))
    assert told[1] == "| a worker freezes | not measured | not measured |"
    assert told[2].endswith(" | 1.1-2.9 | 2.0 |")
    assert told[3].endswith(" | 9.0 | 9.0 |")
    assert recovery_main([str(tmp_path / "none.jsonl")]) == 1
    assert "make recovery-table" in capsys.readouterr().err
