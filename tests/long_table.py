# SPDX-License-Identifier: Apache-2.0
"""Renders what `make test-long` found as docs/long-tests.md.

`python -m tests.long_table RESULTS.jsonl … --collected IDS.txt --out docs/long-tests.md`

Results are what tests.results keeps, of which that of this code counts, or JUnit XML. Those of several runs are put
together, the last of a case counts. IDS.txt is what `pytest -m long --collect-only -q` prints, so that a case that did
not run is told as such.
"""
from __future__ import annotations

import argparse
import contextlib
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from qgnn_dist.bench.machine import envelope

from .results import code, kept

__all__ = ["Case", "collected", "markdown", "read_results"]


@dataclass(frozen=True)
class Case:
    """One case's result.

    Attributes:
        group: the test's file and function. name: with its parameters. outcome: passed, failed or skipped.
        properties: numbers that the test recorded. why: first line of what failed, or why it was skipped.
    """

    group: str
    name: str
    outcome: str
    seconds: float
    properties: dict[str, float] = field(default_factory=dict)
    why: str = ""


def read_results(files: Iterable[Path]) -> list[Case]:
    """The cases of files that this project's pytest wrote; of one that is in several, the last."""
    found: dict[str, Case] = {}
    for file in files:
        if file.suffix == ".jsonl":
            now = code()
            found |= {one["name"]: Case(one["name"].partition("[")[0], one["name"], one["outcome"], one["seconds"],
                                        _numbers(one["properties"]), one["why"])
                      for one in kept(file) if one["code"] == now}
            continue
        for one in ET.parse(file).getroot().iter("testcase"):
            if one.get("name"):  # none of a case that was interrupted
                case = _case(one)
                found[case.name] = case
    return list(found.values())


def _case(one: ET.Element) -> Case:
    group = f"{one.get('classname', '').replace('.', '/')}.py::{one.get('name', '').partition('[')[0]}"
    name = f"{one.get('classname', '').replace('.', '/')}.py::{one.get('name', '')}"
    outcome, why = "passed", ""
    for kind, word in (("skipped", "skipped"), ("failure", "failed"), ("error", "failed")):
        told = one.find(kind)
        if told is not None:
            outcome, why = word, (told.get("message") or "").partition("\n")[0]
    told = ((each.get("name", ""), each.get("value", "")) for each in one.iter("property"))
    return Case(group, name, outcome, float(one.get("time", 0)), _numbers(told), why)


def _numbers(properties: Iterable[tuple[str, object]]) -> dict[str, float]:
    """Those that are none are words, as the name of a fault."""
    found = {}
    for name, value in properties:
        with contextlib.suppress(ValueError):
            found[name] = float(str(value))
    return found


def collected(text: str) -> list[str]:
    """Names of the cases that pytest's `--collect-only -q` lists."""
    return [line.strip() for line in text.splitlines() if line.startswith("tests/") and "::" in line]


def markdown(cases: Sequence[Case], names: Sequence[str], made: dict[str, Any], day: str) -> str:
    """The page.

    Args: names: all long cases. made: bench.machine.envelope's machine, commit and versions.
    """
    groups = list(dict.fromkeys([name.partition("[")[0] for name in names] + [case.group for case in cases]))
    lines = [
        "# Long tests", "",
        "Made by `make test-long` (tests/long_table.py): one row a test, recorded numbers as median and largest.",
        "", f"{_machine(made)}; {day}.", "",
        "| test | cases | passed | failed | skipped | not run | seconds | recorded, median (largest) |",
        "| :--- | ---: | ---: | ---: | ---: | ---: | ---: | :--- |"]
    total = [0] * 5
    for group in groups:
        own = [case for case in cases if case.group == group]
        wanted = {name for name in names if name.partition("[")[0] == group} | {case.name for case in own}
        counts = [len(wanted), *(sum(case.outcome == kind for case in own) for kind in ("passed", "failed", "skipped")),
                  len(wanted) - len(own)]
        total = [a + b for a, b in zip(total, counts)]
        seconds = sum(case.seconds for case in own)
        lines.append(f"| {_words(group)} | {' | '.join(map(str, counts))} | {seconds:,.0f} | {_recorded(own)} |")
    lines.append(f"| **all** | {' | '.join(map(str, total))} | {sum(case.seconds for case in cases):,.0f} | |")
    for kind in ("failed", "skipped"):
        told = [f"- {case.name}: {case.why}" for case in cases if case.outcome == kind]
        lines += ["", f"{kind.capitalize()}:", "", *told] if told else []
    return "\n".join(lines) + "\n"


def _words(group: str) -> str:
    """`tests/fault/test_soak.py::test_memory_is_flat` as people read it."""
    file, _, function = group.partition("::")
    return f"{file.removeprefix('tests/').removesuffix('.py')}: {function.removeprefix('test_').replace('_', ' ')}"


def _recorded(cases: Sequence[Case]) -> str:
    names = dict.fromkeys(name for case in cases for name in case.properties)
    found = {name: [case.properties[name] for case in cases if name in case.properties] for name in names}
    return ", ".join(f"`{name}` {median(values):g} ({max(values):g})" for name, values in found.items())


def _machine(made: dict[str, Any]) -> str:
    machine, commit = made["machine"], made["commit"]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; commit {commit}; {versions}"


def main(words: Sequence[str]) -> int:
    """See the module; exit code 1 where no result can be read."""
    parser = argparse.ArgumentParser(prog="python -m tests.long_table")
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--collected", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(words)
    try:
        cases = read_results(given.results)
    except (OSError, ET.ParseError) as error:
        print(f"no results to render: {error}", file=sys.stderr)
        return 1
    names = collected(given.collected.read_text())
    given.out.write_text(markdown(cases, names, envelope([]), date.today().isoformat()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
