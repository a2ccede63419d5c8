# SPDX-License-Identifier: Apache-2.0
"""The command line: bad input is one line and exit code 2, nothing written; good input goes from graph to Parquet."""
from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

import qgnn_dist as qgnn
from qgnn_dist.cli import app
from qgnn_dist.command import Debug, Outcome, command
from qgnn_dist.errors import QgnnWarning
from tests.helpers import make_store, settings, small_graph


def _npz(path: Path, **changes: Any) -> Path:
    """A small valid file, with some arrays changed or (None) left out."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "edge_index": rng.integers(0, 40, (2, 160)), "x": rng.random((40, 6)).astype(np.float32),
        "y": rng.integers(0, 3, 40), "train_idx": np.arange(10), "valid_idx": np.arange(10, 20),
        "test_idx": np.arange(20, 40)}
    arrays.update(changes)
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


def _run(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [str(w) for w in words])


def _refused(result: Any, *texts: str) -> None:
    """Exit code 2 and exactly one line on stderr, with these words in it."""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.exit_code == 2, result.stderr
    assert len([line for line in lines if line.startswith("error: ")]) == 1, lines
    assert lines[-1].startswith("error: ")
    for text in texts:
        assert text in lines[-1], lines
    assert result.stdout == ""


def _bad_x(value: float) -> np.ndarray:
    x = np.ones((40, 6), np.float32)
    x[[7, 9], 1] = value
    return x


@pytest.mark.parametrize(("changes", "texts"), [
    ({"edge_index": None}, ["edge_index"]),
    ({"edge_index": np.zeros((3, 4), np.int64)}, ["edge_index", "(3, 4)"]),
    ({"edge_index": np.zeros((2, 4), np.float32)}, ["edge_index", "float32"]),
    ({"edge_index": np.array([[0, 40], [1, 2]])}, ["edge_index", "40"]),
    ({"edge_index": np.array([[0, -1], [1, 2]])}, ["edge_index", "-1"]),
    ({"x": _bad_x(np.nan)}, ["2", "7", "9"]),
    ({"x": _bad_x(np.inf)}, ["2", "7", "9"]),
    ({"y": np.full(40, -2)}, ["-2"]),
    ({"train_idx": np.arange(11)}, ["train", "valid", "10"]),
    ({"valid_idx": np.empty(0, np.int64)}, ["valid", "empty"]),
    ({"test_idx": np.array([40])}, ["test", "40"]),
    ({"y": np.zeros((40, 2), np.int64)}, ["one label a node"]),
])
def test_bad_graphs(tmp_path: Path, changes: dict[str, Any], texts: list[str]) -> None:
    file = _npz(tmp_path / "g.npz", **changes)
    _refused(_run("partition", file, "--parts", 1, "--out", tmp_path / "store"), "g.npz", *texts)
    assert [p.name for p in tmp_path.iterdir()] == ["g.npz"]


def test_bad_partition_options(tmp_path: Path) -> None:
    file, store = _npz(tmp_path / "g.npz"), tmp_path / "store"
    _refused(_run("partition", tmp_path / "no.npz", "--parts", 1, "--out", store), "no.npz")
    _refused(_run("partition", file, "--parts", 41, "--out", store), "--parts 41: expected 1 to 40")
    _refused(_run("partition", file, "--parts", 0, "--out", store), "--parts 0")
    _refused(_run("partition", file, "--parts", 1, "--out", store, "--method", "metiss"), "did you mean metis?")
    _refused(_run("partition", file, "--parts", 1, "--out", store, "--order", "rmc"), "--order rmc", "did you mean rcm?")
    _refused(_run("partition", "ogbn-arxiv", "--root", tmp_path, "--parts", 1, "--out", store), "ogbn-arxiv", "--yes")
    _refused(_run("partition", "ogbn-arxivv", "--root", tmp_path, "--parts", 1, "--out", store), "ogbn-arxiv")
    _refused(_run("partition", "synthetic:arxif", "--parts", 1, "--out", store), "arxiv")
    unknown = _run("partition", file, "--partz", 2, "--parts", 1, "--out", store)
    assert unknown.exit_code == 2
    assert "--parts" in unknown.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["g.npz"]
    assert _run("partition", file, "--parts", 1, "--out", store).exit_code == 0
    before = (store / "manifest.json").read_bytes()
    _refused(_run("partition", file, "--parts", 2, "--out", store), "store", "--overwrite")
    assert (store / "manifest.json").read_bytes() == before
    assert _run("partition", file, "--parts", 1, "--method", "random", "--out", store, "--overwrite").exit_code == 0


def test_bad_training(tmp_path: Path) -> None:
    store, run = tmp_path / "store", tmp_path / "run"
    assert _run("partition", _npz(tmp_path / "g.npz"), "--parts", 1, "--out", store).exit_code == 0
    for words, text in ((["--set", "quant.bits=3"], "expected one of 1, 2, 4, 8, 32"),
                        (["--set", "quant.bitz=2"], "did you mean quant.bits?"),
                        (["--config", str(tmp_path / "no.toml")], "not found"),
                        (["--set", "train.metric=roc_auc"], "expected 2 classes")):
        _refused(_run("train", store, "--out", run, *words), text)
    _refused(_run("train", tmp_path / "none", "--out", run), "not a store")
    bare = tmp_path / "bare"
    file = _npz(tmp_path / "bare.npz", y=None, train_idx=None, valid_idx=None, test_idx=None)
    assert _run("partition", file, "--parts", 1, "--out", bare).exit_code == 0
    _refused(_run("train", bare, "--out", run), "no labels and no splits", "a column label (npz, PyG: y) and a column split",
             "partition it again")
    manifest = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    _refused(_run("train", store, "--out", run), "store format 99, this program reads 1")
    (store / "manifest.json").write_text(json.dumps(manifest))
    damaged = store / "part-00000" / "neighbours.arrow"
    data = bytearray(damaged.read_bytes())
    damaged.write_bytes(data[:-1])
    _refused(_run("train", store, "--out", run), "neighbours.arrow", f"is {len(data) - 1} bytes")
    data[len(data) // 2] ^= 255
    damaged.write_bytes(data)
    _refused(_run("inspect", store, "--verify"), "neighbours.arrow", "checksum")
    assert not run.exists()


def test_from_graph_to_parquet_and_back_as_json(tmp_path: Path) -> None:
    store, run, model, out = (tmp_path / n for n in ("store", "run", "m.safetensors", "out"))
    make_store(small_graph(), store, 1)
    words = [w for key in ("train.epochs=4", "model.hidden=8", "model.feature_norm=l2") for w in ("--set", key)]
    trained = _run("train", store, "--out", run, *words, "--json")
    assert trained.exit_code == 0
    summary = json.loads(trained.stdout)
    assert summary == json.loads((run / "summary.json").read_text())
    assert set(summary) >= {"accuracy", "epochs", "epoch_s", "wire_bytes_per_epoch", "peak_anon_bytes",
                            "peak_rss_bytes", "bits", "config", "versions", "fingerprint", "schema"}
    assert set(summary["accuracy"]) == {"train", "valid", "test"}
    assert "epoch 1" in trained.stderr
    _refused(_run("train", store, "--out", run, *words), "--resume to go on or --overwrite")
    _refused(_run("export", run, "--out", model, "--bits", 4), "--bits 4", "quant.bits=2")
    _refused(_run("export", store, "--out", model), "not a run's folder")
    exported = _run("export", run, "--out", model, "--bits", 2, "--json")
    assert json.loads(exported.stdout)["model_bytes"] == model.stat().st_size
    _refused(_run("export", run, "--out", model), "--overwrite")
    predicted = _run("predict", store, "--model", model, "--out", out, "--scores", "--json")
    assert predicted.exit_code == 0, predicted.stderr
    result = json.loads(predicted.stdout)
    assert set(result["seconds"]) >= {"load", "mlp", "propagate", "exchange", "write"}
    assert result["accuracy"] == summary["accuracy"], "the packed model is the one that training evaluated"
    shown = _run("predict", store, "--model", model, "--out", out, "--scores", "--overwrite")
    nodes, right = (result["accuracy_by_degree"]["test"][key][0] for key in ("nodes", "right"))
    assert f"0: {100 * right / nodes:.2f} % of {nodes}" in shown.stdout, "isolated nodes"
    assert f"test {100 * result['ece']['test']:.2f} %" in shown.stdout
    table = pq.read_table(out / "part-00000.parquet")
    assert table.num_rows == result["rows"] == 300
    assert [str(table.schema.field(n).type) for n in ("node_id", "class", "confidence")] == ["int64", "int32", "float"]
    assert str(table.schema.field("scores").type) == "fixed_size_list<element: float>[5]"
    assert table["confidence"].to_numpy().min() >= 1 / 5 - 1e-6
    _refused(_run("predict", store, "--model", model, "--out", out), "--overwrite")
    _refused(_run("predict", store, "--model", store / "manifest.json", "--out", tmp_path / "o"), "not a packed model")
    for path, kind in ((store, "store"), (run, "run"), (model, "model")):
        described = _run("inspect", path, "--json")
        assert json.loads(described.stdout)["kind"] == kind
        assert _run("inspect", path).exit_code == 0
    _refused(_run("inspect", tmp_path / "nothing"), "no such path")


def _next(result: Any) -> list[list[str]]:
    """The words of the commands that an output ends with."""
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("next: "))
    return [shlex.split(line[len("next: "):]) for line in lines[first:]]


def test_each_command_ends_with_what_goes_on_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From folder to folder as they were given, to a look at the predictions; the words are typed as they stand."""
    monkeypatch.chdir(tmp_path)
    _npz(tmp_path / "g.npz")
    (train,) = _next(_run("partition", "g.npz", "--parts", 1, "--out", "my graphs/store"))
    assert train == ["qgnn", "train", "my graphs/store", "--out", "my graphs/run"]
    export, report = _next(_run(*train[1:], "--set", "train.epochs=2", "--set", "model.hidden=8"))
    assert report == ["qgnn", "report", "my graphs/run"]
    assert _next(_run(*report[1:])) == [["open", "my", "graphs/run/report.html", "in", "a", "browser"]]
    (predict,) = _next(_run(*export[1:]))
    assert predict[1:3] == ["predict", "STORE"]
    (look,) = _next(_run("predict", "my graphs/store", *predict[3:]))
    assert look[:2] == ["python", "-c"]
    shown = subprocess.run([sys.executable, *look[1:]], capture_output=True, text=True, check=True, timeout=60)
    assert "confidence" in shown.stdout


def test_what_is_given_in_place_of_a_run_or_a_model_is_named(tmp_path: Path) -> None:
    """A run, a checkpoint or nothing for --model; predictions or a graph for `inspect`; a model for `report`."""
    store, run, out = tmp_path / "store", tmp_path / "run", tmp_path / "out"
    file = _npz(tmp_path / "g.npz")
    assert _run("partition", file, "--parts", 1, "--out", store).exit_code == 0
    assert _run("train", store, "--out", run, "--set", "train.epochs=2", "--set", "model.hidden=8").exit_code == 0
    made = "`qgnn export RUN --out model.safetensors` makes one of a run"
    checkpoint = next((run / "checkpoints").iterdir())
    for model, what in ((run, "a run's folder, not a packed model"), (store, "a folder, not a packed model"),
                        (tmp_path / "no.st", "model file not found"), (checkpoint, "a checkpoint of a run, not a packed")):
        _refused(_run("predict", store, "--model", model, "--out", out), f"{model}: {what}", made)
    _refused(_run("inspect", checkpoint), "a checkpoint of a run", made)
    assert _run("export", run, "--out", tmp_path / "m").exit_code == 0
    assert _run("predict", store, "--model", tmp_path / "m", "--out", out).exit_code == 0
    _refused(_run("inspect", out), "predictions; read them with pyarrow.dataset")
    (tmp_path / "tables" / "edges").mkdir(parents=True)
    _refused(_run("inspect", tmp_path / "tables"), f"`qgnn partition parquet:{tmp_path}/tables --parts 1 --out store`")
    _refused(_run("inspect", file), f"a graph, not yet a store; make one with `qgnn partition {file} --parts 1")
    for command in ("report", "top"):
        _refused(_run(command, tmp_path / "m"), f"{tmp_path}/m: not a run's folder (no config.toml)")
        _refused(_run(command, tmp_path / "missing"), f"{tmp_path}/missing: not a run's folder (no such folder)")


def test_a_graph_without_test_nodes(tmp_path: Path) -> None:
    """Trained, resumed, shown, exported and predicted; where a test accuracy would stand is a dash, null in JSON."""
    store, run, model = tmp_path / "store", tmp_path / "run", tmp_path / "m.safetensors"
    assert _run("partition", _npz(tmp_path / "g.npz", test_idx=None), "--parts", 1, "--out", store).exit_code == 0
    words = [w for key in ("train.epochs=3", "train.checkpoint_every=1") for w in ("--set", key)]
    trained = _run("train", store, "--out", run, *words)
    assert trained.exit_code == 0, trained.stderr
    assert "test –" in trained.stdout
    assert "test –" in trained.stderr  # an epoch's line
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["accuracy"]["test"], summary["metric"]["test"]) == (None, None)
    (run / "summary.json").unlink()  # as if it had been killed: the checkpoint is read
    assert _run("train", store, "--out", run, *words, "--resume").exit_code == 0
    for command in (("inspect", run), ("top", run, "--once")):
        shown = _run(*command)
        assert shown.exit_code == 0, shown.stderr
        assert "test –" in shown.stdout, command
    reported = _run("report", run, "--out", tmp_path / "page.html")
    assert reported.exit_code == 0, reported.stderr
    assert _run("export", run, "--out", model).exit_code == 0
    predicted = json.loads(_run("predict", store, "--model", model, "--out", tmp_path / "out", "--json").stdout)
    assert predicted["rows"] == 40
    assert set(predicted["accuracy"]) == {"train", "valid"}


def test_failures_while_running_are_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(small_graph(), tmp_path / "store", 1)
    monkeypatch.setattr("qgnn_dist.cluster.api.run_training", lambda *_, **__: 1 / 0)
    result = _run("train", tmp_path / "store", "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert result.stderr.strip().splitlines()[-1] == (
        "error: internal error: ZeroDivisionError: division by zero (--debug shows where)")
    assert "Traceback" in _run("train", tmp_path / "store", "--out", tmp_path / "run", "--debug").stderr


def test_warnings_of_the_package_are_lines(recwarn: pytest.WarningsRecorder) -> None:
    """Without the place in its code, which `--debug` shows; other libraries' stay as they are, the future aside."""
    group = typer.Typer()

    @command("x", group)
    def slow(debug: Debug = False) -> Outcome:
        warnings.warn_explicit("it is [slow] here", QgnnWarning, "kernels.py", 7)
        warnings.warn_explicit("odd", RuntimeWarning, str(Path(qgnn.__file__).parent / "worker.py"), 7)
        warnings.warn_explicit("later", FutureWarning, "torch.py", 8)
        return {}, lambda result, console: None

    warnings.simplefilter("always")
    plain = CliRunner().invoke(group)
    assert plain.exit_code == 0
    assert plain.stderr == "warning: it is [slow] here\n"
    assert [str(one.message) for one in recwarn.list] == ["odd"]
    recwarn.clear()
    CliRunner().invoke(group, ["--debug"])
    assert [str(one.message) for one in recwarn.list] == ["it is [slow] here", "odd", "later"]


def test_public_functions_do_the_same(tmp_path: Path) -> None:
    stored = qgnn.partition(str(_npz(tmp_path / "g.npz")), parts=1, out=tmp_path / "s")
    assert stored["num_nodes"] == 40
    summary = qgnn.train(tmp_path / "s", out=tmp_path / "r", config=settings("train.epochs=3"))
    exported = qgnn.export(tmp_path / "r", out=tmp_path / "m")
    assert qgnn.PackedModel.load(tmp_path / "m").info.fingerprint == stored["fingerprint"] == exported["fingerprint"]
    result = qgnn.predict(tmp_path / "s", model=tmp_path / "m", out=tmp_path / "p")
    assert result["accuracy"] == summary["accuracy"]
    with pytest.raises(qgnn.InputError, match=r"add --overwrite to replace it \(in Python overwrite=True\)"):
        qgnn.export(tmp_path / "r", out=tmp_path / "m")
    with pytest.raises(qgnn.InputError, match=r"--resume to go on .* \(in Python resume=True, overwrite=True\)"):
        qgnn.train(tmp_path / "s", out=tmp_path / "r")


def test_installed_command_works_from_another_folder(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("qgnn")
    out = subprocess.run([command, "--version"], capture_output=True, text=True, check=True, cwd=tmp_path, timeout=60,
                         env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    assert out.stdout.strip() == qgnn.__version__
    level = subprocess.run([sys.executable, "-c", "import qgnn_dist.kernels as k; print(k.isa())"], capture_output=True,
                           text=True, check=True, cwd=tmp_path, timeout=60)
    assert level.stdout.strip() in ("avx2", "scalar")
