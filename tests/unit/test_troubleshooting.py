# SPDX-License-Identifier: Apache-2.0
"""Every message that docs/troubleshooting.md quotes is one that the code still has."""
from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

import qgnn_dist

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
PACKAGE = Path(qgnn_dist.__file__).parent
LEAST_LETTERS = 12
"""What a string of the code must have, apart from what it fills in, to count: shorter ones are in any message."""


@functools.cache
def strings() -> set[tuple[str, ...]]:
    """All strings of the package as their fixed pieces, an empty one for what is filled in."""
    found = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                fixed = tuple(str(part.value) if isinstance(part, ast.Constant) else "" for part in parts)
                if sum(map(len, fixed)) >= LEAST_LETTERS:
                    found.add(fixed)
    return found


def quoted() -> list[str]:
    """The messages of the page: indented blocks, their lines joined."""
    blocks = re.findall(r"(?:^    .*\n)+", PAGE.read_text(encoding="utf-8"), re.M)
    joined = [" ".join(line.strip() for line in block.splitlines()) for block in blocks]
    return [text for text in joined if not text.startswith("qgnn ")]


def share(message: str) -> float:
    """Of the message's letters, how many lie in strings of the code."""
    covered = [False] * len(message)
    for fixed in strings():
        if not all(piece in message for piece in fixed):
            continue
        for match in re.finditer("".join(re.escape(piece) or ".+?" for piece in fixed), message):
            covered[match.start():match.end()] = [True] * (match.end() - match.start())
    return sum(covered) / len(message)


def test_the_page_has_the_errors_that_people_meet() -> None:
    assert len(quoted()) >= 15
    assert share("a sentence that no part of the program says to anybody") == 0


@pytest.mark.parametrize("message", quoted(), ids=lambda text: text[:50])
def test_a_quoted_message_is_one_of_the_code(message: str) -> None:
    assert share(message) > 0.5
