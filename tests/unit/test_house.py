# SPDX-License-Identifier: Apache-2.0
"""The tree as a stranger finds it: short functions, documented names, examples that run."""
from __future__ import annotations

import ast
import doctest
import functools
import importlib
from pathlib import Path

import pytest

import qgnn_dist

PACKAGE = Path(qgnn_dist.__file__).parent
ROOT = Path(__file__).parents[2]
MOST_LINES = 80
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


@functools.cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def test_no_function_is_long() -> None:
    """Of 80 lines at most, tests and jobs too."""
    files = [*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "jobs").glob("*.py")]
    long = [f"{file}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
            for file in files for node in ast.walk(tree(file))
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            and node.end_lineno is not None and node.end_lineno - node.lineno >= MOST_LINES]
    assert long == []


def public(module: ast.Module) -> set[str]:
    """The names of a module's `__all__`."""
    return {word for node in module.body if isinstance(node, ast.Assign)
            and any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets)
            for word in ast.literal_eval(node.value)}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_public_names_have_docstrings(file: Path) -> None:
    """Rooms, modules, functions, classes and their methods; a class that follows another may leave methods to it."""
    module, lacking = tree(file), list[str]()
    names = public(module)
    if not ast.get_docstring(module):
        lacking.append("the module")
    for node in module.body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name not in names:
            continue
        if not ast.get_docstring(node):
            lacking.append(node.name)
        if isinstance(node, ast.ClassDef) and not node.bases:
            lacking += [f"{node.name}.{method.name}" for method in node.body
                        if isinstance(method, (ast.FunctionDef, ast.AsyncFunctionDef))
                        and not method.name.startswith("_") and not ast.get_docstring(method)]
    assert lacking == []


EXAMPLES = [file for file in FILES if ">>>" in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("file", EXAMPLES, ids=name_of)
def test_examples_of_docstrings_run(file: Path) -> None:
    module = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0
    assert result.failed == 0
