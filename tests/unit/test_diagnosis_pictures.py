# SPDX-License-Identifier: Apache-2.0
"""Pictures: not empty, all axes there and filled, the same bytes for the same figures; refused before anything runs."""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qgnn_dist.diagnosis import pictures
from qgnn_dist.diagnosis.report import diagnose
from qgnn_dist.errors import InputError
from tests.helpers import make_store, small_graph, untrained_model

pytest.importorskip("matplotlib", reason="an extra: pip install qgnn-dist[report]")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Diagnoses of an INT2, an INT8 and a float model."""
    store = make_store(small_graph(nodes=150), tmp_path_factory.mktemp("p") / "s", 1)
    models = {"2": untrained_model(store), "8": untrained_model(store, bits=8, kind="appnp"),
              "32": untrained_model(store, bits=32, kind="none")}
    return {name: diagnose(store, model, "m", exchange_s=60) for name, model in models.items()}


def _records(epochs: int = 6) -> list[dict[str, Any]]:
    return [{"epoch": e, "multipliers": [0.0, -0.1 * e, -0.05], "residuals": [-0.1 * e, 0.02]}
            for e in range(1, epochs + 1)]


@pytest.mark.parametrize("name", ["2", "8", "32"])
def test_layer_axes_show_the_figures(found: dict[str, dict[str, Any]], name: str) -> None:
    axes = pictures.layer_figure(found[name]).axes
    assert len(axes) == 6
    for ax, key in zip(axes, ("multiplier", "constraint", "change", "dirichlet", "mad", "error")):
        want = [e[key] for e in found[name]["layers"] if e[key] is not None]
        drawn = [list(line.get_ydata()) for line in ax.lines]
        assert drawn == ([want] if want else []), key
        assert ax.get_title()


def test_stage_axes_show_the_figures(found: dict[str, dict[str, Any]]) -> None:
    figure = pictures.stage_figure(found["2"])
    assert len(figure.axes) == 9, "eight, and the map's colour bar"
    hidden = found["2"]["stages"]["hidden"]["histogram"]
    heights = np.array([bar.get_height() for bar in figure.axes[3].patches])
    np.testing.assert_allclose(heights, 100 * np.array(hidden) / sum(hidden), rtol=1e-12)
    shares = figure.axes[5].images[0].get_array()
    assert shares.shape == (4, len(found["2"]["messages"]))
    np.testing.assert_allclose(shares.sum(0), 100, rtol=1e-12)
    snr = [m["snr_db"] for m in found["2"]["messages"]]
    assert list(figure.axes[6].lines[0].get_ydata()) == snr
    wide = pictures.stage_figure(found["8"])
    assert wide.axes[5].images[0].get_array().shape[0] == 256
    assert len(wide.axes[4].patches) == 256
    bare = pictures.stage_figure(found["32"])
    assert [t.get_text() for ax in bare.axes for t in ax.texts] == ["float"] * 6 + ["none"] * 2


def test_multiplier_axes_show_the_best_epoch() -> None:
    records = _records()
    figure = pictures.multiplier_figure(records, 4)
    assert len(figure.axes) == 4
    assert list(figure.axes[0].lines[0].get_ydata()) == records[3]["multipliers"]
    assert list(figure.axes[2].lines[0].get_ydata()) == records[3]["residuals"]
    np.testing.assert_array_equal(figure.axes[1].images[0].get_array(), np.array([r["multipliers"] for r in records]).T)
    assert list(figure.axes[1].lines[0].get_xdata()) == [4, 4]


def test_files_are_there_and_equal_figures_give_equal_bytes(found: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    files = pictures.draw_diagnosis(found["2"], tmp_path) + pictures.draw_run(_records(), 2, tmp_path)
    assert [Path(f).name for f in files] == [f"{n}.{e}" for n in ("layers", "stages", "multipliers")
                                             for e in ("svg", "png")]
    assert sorted(str(p) for p in tmp_path.iterdir()) == sorted(files)
    for file in map(Path, files):
        data = file.read_bytes()
        assert len(data) > 10_000
        assert data.startswith(b"\x89PNG" if file.suffix == ".png" else b"<?xml")
    before = [Path(f).read_bytes() for f in files[4:]]
    assert pictures.draw_run(_records(), 2, tmp_path) == files[4:]
    assert before == [Path(f).read_bytes() for f in files[4:]]


def test_what_cannot_be_drawn_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "layers.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"layers\.png: output exists; add --overwrite"):
        pictures.check_pictures(tmp_path, pictures.MODEL_PICTURES, False)
    pictures.check_pictures(tmp_path, pictures.MODEL_PICTURES, True)
    pictures.check_pictures(tmp_path, pictures.RUN_PICTURES, False)
    with pytest.raises(InputError, match="not a folder"):
        pictures.check_pictures(tmp_path / "layers.png", pictures.RUN_PICTURES, True)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install qgnn-dist\[report\]"):
        pictures.check_pictures(tmp_path / "new", pictures.RUN_PICTURES, False)
