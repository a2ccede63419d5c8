# SPDX-License-Identifier: Apache-2.0
"""`qgnn inspect` with --store and --pictures: what it prints, writes and refuses."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import qgnn_dist as qgnn
from qgnn_dist.cli import app
from tests.helpers import make_store, settings, small_graph, untrained_model

pytest.importorskip("matplotlib", reason="an extra: pip install qgnn-dist[report]")


def _run(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["inspect", *map(str, words)])


def _refused(result: Any, text: str) -> None:
    """Exit code 2, nothing on stdout, and one line on stderr that ends in an error with this text."""
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.exit_code == 2, result.stderr
    assert len(errors) == 1
    assert text in errors[0]
    assert result.stdout == ""


def _strict(text: str) -> Any:
    """JSON without the infinities and NaNs that Python's reader would let pass."""
    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} in the JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_models_diagnosis(tmp_path: Path) -> None:
    store, file, folder = tmp_path / "s", tmp_path / "m.st", tmp_path / "pictures"
    model = untrained_model(make_store(small_graph(), store, 2))
    model.save(file)
    without = _run(file, "--json")
    assert "diagnosis" not in _strict(without.stdout)
    got = _run(file, "--store", store, "--pictures", folder, "--json")
    assert got.exit_code == 0, got.stderr
    result = _strict(got.stdout)
    assert {k: v for k, v in result.items() if k not in ("diagnosis", "pictures")} == _strict(without.stdout)
    assert [e["multiplier"] for e in result["diagnosis"]["layers"]] == [*model.info.multipliers, None]
    assert sorted(result["pictures"]) == sorted(str(p) for p in folder.iterdir())
    assert len(result["pictures"]) == 4
    _refused(_run(file, "--store", store, "--pictures", folder), "output exists; add --overwrite")
    seen = _run(file, "--store", store, "--pictures", folder, "--overwrite")
    assert seen.exit_code == 0, seen.stderr
    assert all(word in seen.stdout for word in ("Quantisation", "Layers", "Packed against float", "layers.svg"))


def test_a_diverged_models_figures_are_null(tmp_path: Path) -> None:
    store = make_store(small_graph(), tmp_path / "s", 1)
    model = untrained_model(store, bits=32)
    model.weight2[:] = np.float32(3e38)
    model.save(tmp_path / "m.st")
    got = _run(tmp_path / "m.st", "--store", tmp_path / "s", "--json")
    assert got.exit_code == 0, got.stderr
    layers = _strict(got.stdout)["diagnosis"]["layers"]
    assert [layers[-1][key] for key in ("dirichlet", "mad", "error")] == [None] * 3


def test_a_runs_multipliers(tmp_path: Path) -> None:
    store = make_store(small_graph(), tmp_path / "s", 1)
    for kind in ("smp", "appnp"):
        qgnn.train(store.path, out=tmp_path / kind, config=settings(
            "model.feature_norm=l2", "train.epochs=3", f"propagation.kind={kind}"))
    got = _run(tmp_path / "smp", "--pictures", tmp_path / "p", "--json")
    assert got.exit_code == 0, got.stderr
    assert [Path(f).name for f in _strict(got.stdout)["pictures"]] == ["multipliers.svg", "multipliers.png"]
    _refused(_run(tmp_path / "appnp", "--pictures", tmp_path / "q"), "only propagation.kind=smp has any")
    assert not (tmp_path / "q").exists()
    (tmp_path / "smp" / "metrics.jsonl").unlink()
    _refused(_run(tmp_path / "smp", "--pictures", tmp_path / "q"), "nothing to draw yet")
    _refused(_run(tmp_path / "smp", "--store", store.path), "--store goes with a packed model, this is a run")


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    store = make_store(small_graph(), tmp_path / "s", 1)
    model, wide = tmp_path / "m.st", make_store(small_graph(features=25), tmp_path / "wide", 1)
    untrained_model(store).save(model)
    negative = make_store(small_graph(signed=True), tmp_path / "negative", 1)
    _refused(_run(store.path, "--store", store.path), "--store goes with a packed model, this is a store")
    _refused(_run(store.path, "--pictures", tmp_path / "p"), "this is a store")
    _refused(_run(model, "--pictures", tmp_path / "p"), "add --store")
    _refused(_run(model, "--store", tmp_path / "none"), "none")
    _refused(_run(model, "--store", wide.path), "takes 24 features")
    _refused(_run(model, "--store", negative.path), "negative feature values")
    _refused(_run(tmp_path / "nothing", "--store", store.path), "no such path")
    assert not (tmp_path / "p").exists()
