# SPDX-License-Identifier: Apache-2.0
"""What commands print for people: figures say what they are of, and nothing sounds wrong that is not."""
from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import qgnn_dist as qgnn
from qgnn_dist import render
from tests.helpers import make_store, settings, small_graph


def _said(show: Any, result: dict[str, Any]) -> str:
    """What a console of ordinary width gets, in one line."""
    console = Console(width=100, file=io.StringIO(), record=True)
    show(result, console)
    return " ".join(console.export_text().replace("│", " ").split())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of one part, a run and a model of it, and predictions."""
    folder = tmp_path_factory.mktemp("render")
    make_store(small_graph(), folder / "s", 1)
    qgnn.train(folder / "s", out=folder / "run", config=settings("train.epochs=3"))
    qgnn.export(folder / "run", out=folder / "m")
    qgnn.predict(folder / "s", model=folder / "m", out=folder / "p")
    return folder


def test_edges_of_one_direction_are_no_fault_and_small_parts_get_a_hint(place: Path) -> None:
    store = qgnn.inspect(place / "s")
    store["cleaned"]["one_way"] = 13_821
    assert "13,821 given in one direction (both are used)" in _said(render.partition, store)
    for parts, nodes, hinted in ((1, 300, False), (2, 19_999, True), (2, 20_000, False)):
        said = _said(render.partition, {**store, "num_parts": parts, "num_nodes": nodes})
        assert ("--parts 1 trains faster and needs no Ray" in said) is hinted


def test_a_predictions_seconds_say_what_they_leave_out_and_its_note_what_was_shifted(place: Path) -> None:
    found = json.loads((place / "p" / "summary.json").read_text())
    total = f"total {found['seconds']['total']:.2f}; without imports"
    assert f"{total} model" in _said(render.prediction, found)
    assert f"{total} and the start of Ray" in _said(render.prediction, {**found, "parts": 2})
    assert "another graph" not in _said(render.prediction, found)
    for gains, told in (((0, 0), "another graph"), ((-1, 0), "another graph; ranges were shifted by 2^-1"),
                        ((0, 3), "another graph; features were divided by 2^3")):
        other = {**found, "same_graph": False, "range_gain": gains[0], "feature_gain": gains[1]}
        assert f"the model was trained on {told}" in _said(render.prediction, other)
        assert ("2^0" in _said(render.prediction, other)) is False
        assert ("shifted" in _said(render.prediction, other)) is bool(gains[0])


def test_memory_says_its_kind(place: Path) -> None:
    summary = json.loads((place / "run" / "summary.json").read_text())
    summary |= {"peak_anon_bytes": [1 << 30, 2 << 30], "peak_rss_bytes": [3 << 30, 4 << 30]}
    assert "anonymous 1.0 GiB, 2.0 GiB; resident 3.0 GiB, 4.0 GiB; each worker's" in _said(render.training, summary)


def test_progress_off_a_terminal_says_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """The time left by the epochs so far, of a resumed run by those since."""
    with render.TrainingProgress(200) as progress:
        for epoch in range(100, 121):
            progress.epoch({"epoch": epoch, "loss": 1.0, "wire_bytes": {"forward": 0}, "epoch_s": 2.0})
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"epoch {epoch} of 200" for epoch in (100, 110, 120)]
    assert lines[0].endswith("left 3 min at most")
    with render.TrainingProgress(10) as progress:
        progress.epoch({"epoch": 10, "loss": 1.0, "wire_bytes": {"forward": 0}, "epoch_s": 2.0})
    assert "left" not in capsys.readouterr().err, "at the end"
