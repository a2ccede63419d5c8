# SPDX-License-Identifier: Apache-2.0
"""Pictures of a table: the right panels, one error bar a line, files that are pictures."""
from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from qgnn_dist.bench.pictures import check_pictures, draw, write_pictures
from qgnn_dist.errors import InputError


def _rows(datasets: tuple[str, ...], methods: tuple[str, ...], widths: tuple[str, ...],
          depths: tuple[int, ...]) -> list[dict[str, Any]]:
    return [{"shape": d, "method": m, "width": w, "layers": k, "metric": "accuracy", "repeats": 3,
             "test_mean": 0.8 - 0.01 * j, "test_sd": 0.01} for d in datasets for m in methods
            for j, w in enumerate(widths) for k in depths]


def test_a_panel_a_dataset_and_an_error_bar_a_line() -> None:
    rows = _rows(("a", "b"), ("recipe", "lsq"), ("float", "int4", "int2"), (4, 10)) + _rows(("c",), ("x",), ("int2",),
                                                                                            (4, 10))
    figure = draw(rows, "width", "layers")
    assert figure is not None
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in panels] == ["a  (3 seeds)", "b  (3 seeds)"]  # c has one width
    assert [len(axes.containers) for axes in panels] == [4, 4]  # methods x depths
    assert [tick.get_text() for tick in panels[0].get_xticklabels()] == ["float", "int4", "int2"]
    bars = panels[0].containers[0]
    assert list(bars.lines[0].get_ydata()) == pytest.approx([80.0, 79.0, 78.0])
    low, high = bars.lines[2][0].get_segments()[0][:, 1]
    assert (low, high) == (pytest.approx(79.0), pytest.approx(81.0))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["recipe, K = 4", "recipe, K = 10", "lsq, K = 4",
                                                                "lsq, K = 10"]


def test_lines_of_a_category_are_set_apart_and_inside_it() -> None:
    figure = draw(_rows(("a",), ("x", "y", "z"), ("float", "int2"), (4,)), "width", "layers")
    assert figure is not None
    places = [c.lines[0].get_xdata()[0] for c in figure.axes[0].containers]
    assert len(set(places)) == 3
    assert all(-0.5 < place < 0.5 for place in places)
    assert len({c.lines[0].get_color() for c in figure.axes[0].containers}) == 3


def test_rows_without_figures_are_left_out_and_no_panel_means_no_picture() -> None:
    rows = _rows(("a",), ("recipe",), ("float", "int2"), (10,))
    assert draw(rows, "layers", "width") is None
    rows[1]["test_mean"] = None
    assert draw(rows, "width", "layers") is None


def test_files_are_pictures_and_stale_ones_go(tmp_path: Path) -> None:
    files = write_pictures(_rows(("a",), ("recipe",), ("float", "int2"), (4, 10)), tmp_path)
    assert sorted(f.name for f in files) == ["accuracy_by_bits.png", "accuracy_by_bits.svg", "accuracy_by_depth.png",
                                             "accuracy_by_depth.svg"]
    for file in files:
        data = file.read_bytes()
        assert data.startswith(b"\x89PNG" if file.suffix == ".png" else b"<?xml")
        assert len(data) > 5000
    again = write_pictures(_rows(("a",), ("recipe",), ("float", "int2"), (4,)), tmp_path)
    assert {f.name for f in again} == {f.name for f in tmp_path.iterdir()} == {"accuracy_by_bits.png",
                                                                             "accuracy_by_bits.svg"}


def test_without_matplotlib_the_hint_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'qgnn-dist\[report\]'.*--no-pictures"):
        check_pictures()
