# SPDX-License-Identifier: Apache-2.0
"""The public surface, what importing does, and which way imports run."""
from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qgnn_dist

PACKAGE = Path(qgnn_dist.__file__).parent
LEVELS = [
    {"errors", "logs", "memory"}, {"files"}, {"config"}, {"settings", "storage"}, {"data", "quant"}, {"kernels"},
    {"store"}, {"partitioning", "comm"}, {"propagation"}, {"model"}, {"device", "planning"},
    {"inference"}, {"training", "diagnosis"}, {"nn", "report"}, {"cluster"}, {"render"}, {"top"}, {"bench"},
    {"command"}, {"cli_bench"}, {"cli"},
]
"""Imports run from a later set to an earlier one, or inside one room."""


def _imports(file: Path) -> set[str]:
    """Absolute dotted names of all modules that a file imports at run time."""
    here = ("qgnn_dist", *file.relative_to(PACKAGE).parts[:-1])
    found = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[:len(here) - node.level + 1]) if node.level else ""
            stem = ".".join(p for p in (base, node.module or "") if p)
            found.update(f"{stem}.{alias.name}" for alias in node.names)
    return found


FILES = [f for f in PACKAGE.rglob("*.py") if f.name != "__init__.py" or f.parent != PACKAGE]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_run_one_way(file: Path) -> None:
    own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    level = next(i for i, rooms in enumerate(LEVELS) if own in rooms)
    below = set().union(*LEVELS[:level], {own})
    for name in _imports(file):
        if name.startswith("qgnn_dist.") and name != "qgnn_dist.__version__":
            assert name.split(".")[1] in below, f"{file} imports {name}"
        if name.split(".")[0] == "ray":
            assert own == "cluster", f"{file} imports ray"
        if name.startswith("torch.distributed"):
            assert own == "comm", f"{file} imports torch.distributed"


MODULES = {"SMPConv": ["forward", "reset_parameters"], "SMPNet": ["forward", "pack", "parameter_groups"],
           "PackedModel": ["load", "save", "predict"]}
"""Public classes and the methods that their users call."""


def test_public_names() -> None:
    assert len(qgnn_dist.__all__) <= 12
    assert set(qgnn_dist.__all__) == set(qgnn_dist._HOMES)
    for name in qgnn_dist.__all__:
        assert getattr(qgnn_dist, name) is not None
    assert (PACKAGE / "py.typed").exists()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        qgnn_dist.nothing  # noqa: B018


@pytest.mark.parametrize("name", qgnn_dist.__all__)
def test_public_names_say_what_they_take_and_give(name: str) -> None:
    """Every argument of a function is in its docstring, and its errors; what computes tells shapes and dtypes."""
    public = getattr(qgnn_dist, name)
    text = inspect.getdoc(public) or ""
    assert len(text) > 40
    assert text.splitlines()[0].endswith((".", ":"))
    if inspect.isfunction(public):
        lacking = [word for word in inspect.signature(public).parameters if not re.search(rf"\b{word}\b", text)]
        assert lacking == []
        assert "Raises:" in text
    for method in MODULES.get(name, []):
        about = inspect.getdoc(getattr(public, method)) or ""
        assert about, f"{name}.{method}"
        if method in ("forward", "predict"):
            assert re.search(r"\(N, [FC]\)", about), f"{name}.{method} tells no shape"
            assert re.search(r"float32|x's dtype", about), f"{name}.{method} tells no dtype"
            assert "Raises:" in about


def test_layers_need_neither_ray_nor_stores() -> None:
    code = ("import sys, qgnn_dist; qgnn_dist.SMPConv, qgnn_dist.SMPNet, qgnn_dist.PackedModel; "
            "print([m for m in ('ray', 'torch_geometric', 'ogb', 'scipy', 'pymetis') if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert out.stdout.strip() == "[]"


def test_importing_starts_and_loads_nothing() -> None:
    code = ("import sys, threading, qgnn_dist; "
            "print(threading.active_count(), [m for m in ('torch', 'ray', 'pyarrow', 'numpy') if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert out.stdout.strip() == "1 []"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_nothing_from_outside_is_unpickled(file: Path) -> None:
    """Law 7: no pickle, no `allow_pickle=True`, and torch files as weights alone."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {"cloudpickle", "dill", "joblib", "shelve"} & {n.split(".")[0] for n in names}
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
            assert node.attr == "UnpicklingError", "pickle's error may be caught, its readers may not be used"
        if isinstance(node, ast.Call):
            words = {k.arg: k.value for k in node.keywords}
            name = ast.unparse(node.func)
            if name == "torch.load":
                assert ast.unparse(words["weights_only"]) == "True"
            if name in ("np.load", "numpy.load", "np.lib.format.open_memmap"):
                allowed = words.get("allow_pickle")
                assert allowed is None or ast.unparse(allowed) == "False"
