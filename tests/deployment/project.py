# SPDX-License-Identifier: Apache-2.0
"""What the files of cluster_configs/ must agree with: versions, settings of docs/recovery.md, ports."""
from __future__ import annotations

import re
from pathlib import Path

__all__ = ["GUARDED_PORTS", "HEALTH", "METRICS_PORT", "RAY", "ROOT", "VERSION", "pinned", "usage"]

ROOT = Path(__file__).parents[2]
METRICS_PORT = 8080
GUARDED_PORTS = (8265, METRICS_PORT)
"""What may be opened to others than the cluster's own hosts: jobs, and what Prometheus reads."""


def pinned(name: str) -> str:
    """The version of a package in constraints.txt."""
    found = re.search(rf"^{re.escape(name)}==([^\s;]+)", (ROOT / "constraints.txt").read_text(), re.M | re.I)
    assert found, f"constraints.txt has no {name}"
    return found[1]


def usage(text: str) -> list[str]:
    """Faults of a file's first comment, which shows its use in three commands."""
    header: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        header.append(line)
    commands = [line for line in header if re.match(r"#   \S", line)]
    expected = "expected three, each after '#   '"
    return [] if len(commands) >= 3 else [f"first comment: got {len(commands)} commands, {expected}"]


RAY = pinned("ray")
VERSION = re.findall(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[0]
HEALTH = dict(re.findall(r"(RAY_health_check_\w+)=(\d+)", (ROOT / "docs" / "recovery.md").read_text()))
assert len(HEALTH) == 4
