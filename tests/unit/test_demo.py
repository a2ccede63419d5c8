# SPDX-License-Identifier: Apache-2.0
"""jobs/demo.py's last words: rows of the predictions, what their accuracy is held against, and where to go on."""
from __future__ import annotations

import importlib.util
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import qgnn_dist as qgnn
from qgnn_dist.cli import app
from qgnn_dist.data.graph import SPLITS
from tests.helpers import make_store, settings, small_graph

ROOT = Path(__file__).parents[2]


def _demo() -> Any:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "jobs" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_last_words_are_of_the_run_and_can_be_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph, run, out = small_graph(), tmp_path / "run", tmp_path / "out"
    store = make_store(graph, tmp_path / "s", 1)
    qgnn.train(store.path, out=run, config=settings("train.epochs=3"))
    qgnn.export(run, out=tmp_path / "m")
    qgnn.predict(store.path, model=tmp_path / "m", out=out)
    capsys.readouterr()
    _demo().goodbye(str(run), str(out))
    told = capsys.readouterr().out
    lines = told.splitlines()
    first = lines.index("   node_id  class  confidence") + 1
    assert all(len(line.split()) == 3 for line in lines[first:first + 5])
    assert graph.labels is not None
    assert graph.split is not None
    labels = graph.labels[(graph.split == SPLITS["test"]) & (graph.labels >= 0)]
    accuracy = json.loads((out / "summary.json").read_text())["accuracy"]["test"]
    assert f"{100 * accuracy:.1f} % are right" in told
    assert f"would make {100 * np.bincount(labels).max() / len(labels):.1f} %." in told
    (report,) = [shlex.split(line.partition(": ")[2]) for line in lines if " report " in line]
    assert CliRunner().invoke(app, report[1:]).exit_code == 0
    assert "## Your graph" in (ROOT / "README.md").read_text(encoding="utf-8")
