# SPDX-License-Identifier: Apache-2.0
"""The examples of docs/python.md and of the README run, and what they train is what `qgnn train` trains."""
from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qgnn_dist as qgnn
from qgnn_dist.data.load import load_graph
from tests.helpers import as_pyg, small_graph

README = Path(__file__).parents[2] / "README.md"
PAGE = Path(__file__).parents[2] / "docs" / "python.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
SCRIPT = BLOCKS[0]
MOST_LINES = 15
SEEDS = 5


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Graphs are small here: waking threads would take longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(block: str, data: Any) -> dict[str, Any]:
    """A block's names after it ran, with `data` given."""
    names: dict[str, Any] = {"data": data}
    exec(compile(block, str(PAGE), "exec"), names)
    return names


def test_script_is_short() -> None:
    assert "pack()" in SCRIPT
    assert len([line for line in SCRIPT.splitlines() if line.strip()]) <= MOST_LINES


@pytest.mark.usefixtures("one_thread")
def test_every_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = as_pyg(small_graph())
    data.train_mask &= data.y >= 0
    names = run(SCRIPT.replace("range(200)", "range(30)"), data)
    found = names["model"].predict(data)
    assert names["best"] > 0.5  # 5 classes, of which the features alone tell much
    assert names["model"].info.bits == {"weights": 2, "features": 2, "hidden": 2, "messages": 2, "residual": 8}
    for block in BLOCKS[1:]:
        with contextlib.redirect_stdout(io.StringIO()):
            names = run(block, data)
        if "found" in names:
            np.testing.assert_array_equal(names["found"].scores, found.scores)


def test_own_graph_of_the_readme_is_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's blocks one after the other, as a newcomer copies them."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 2
    with contextlib.redirect_stdout(io.StringIO()) as said:
        run(blocks[0], None)
        names = run(blocks[1].replace("quant.bits=2", "train.epochs=40"), None)
    assert names["summary"]["accuracy"]["test"] > 0.75  # of four classes, of which the features alone tell little
    assert said.getvalue().startswith("1\r2\r")
    assert sorted(path.name for path in (tmp_path / "mypredictions").glob("*.parquet")) == ["part-00000.parquet"]


def accuracy(data: Any, classes: np.ndarray) -> float:
    """Of the test nodes, in %."""
    return 100 * float((torch.from_numpy(classes) == data.y)[data.test_mask].float().mean())


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("one_thread")
def test_script_is_as_good_as_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_dir: Path,
                                               record_property: Any) -> None:
    """Cora at INT2, five seeds each: test accuracy at the best validation epoch, mean ± deviation."""
    monkeypatch.chdir(tmp_path)
    data = as_pyg(load_graph(data_dir / "cora.npz"))
    qgnn.partition(data, parts=1, out="store")
    modules, commands = [], []
    for seed in range(SEEDS):
        model = run(SCRIPT.replace("seed=0", f"seed={seed}"), data)["model"]
        modules.append(accuracy(data, model.predict(data).classes))
        commands.append(100 * qgnn.train("store", out=f"run{seed}", overrides=[f"seed={seed}"])["accuracy"]["test"])
    text = "; ".join(f"{name} {np.mean(values):.1f} ± {np.std(values, ddof=1):.1f} {np.round(values, 1).tolist()}"
                     for name, values in (("script", modules), ("qgnn train", commands)))
    print(text)
    record_property("figures", text)
    error = np.sqrt((np.var(modules, ddof=1) + np.var(commands, ddof=1)) / SEEDS)
    assert abs(np.mean(modules) - np.mean(commands)) < 3 * error
    assert np.mean(modules) > 81
