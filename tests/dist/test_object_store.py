# SPDX-License-Identifier: Apache-2.0
"""From graph to predictions on an object store, with Ray's workers: the same as on a shared disk."""
from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import qgnn_dist as qgnn
from qgnn_dist.cli import app
from qgnn_dist.cluster.session import RaySession
from qgnn_dist.comm.pool import LocalPool
from qgnn_dist.config import StorageConfig, TimeoutsConfig, load_config
from qgnn_dist.data.load import load_graph
from qgnn_dist.inference.batch import run_prediction
from qgnn_dist.inference.worker import PredictWorker
from qgnn_dist.model.packed import PackedModel
from qgnn_dist.partitioning.api import partition_graph
from qgnn_dist.storage.place import Place
from qgnn_dist.store.reader import Store
from qgnn_dist.training import remote_run
from tests.helpers import npz_graph, settings
from tests.recovering import records, undisturbed
from tests.s3 import BUCKET, S3, SECRET, Door

NODES, ROOT = 120, Path(__file__).parents[2]
WORDS = ["--set", "train.epochs=6", "--set", "train.checkpoint_every=2", "--set", "model.hidden=8", "--set",
         "propagation.layers=3", "--set", "cluster.cpus_per_worker=0.5", "--set", "storage.retry_s=5"]


def _run(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def _done(*words: str | Path) -> dict[str, Any]:
    result = _run(*words, "--json")
    assert result.exit_code == 0, result.stderr
    return dict(json.loads(result.stdout))


def _refused(code: int, text: str, *words: str | Path) -> None:
    result = _run(*words)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert text in line
    assert result.exit_code == code
    assert SECRET not in result.stderr + result.stdout


def _on_disk(graph: Path, folder: Path) -> None:
    """The same path in this process, on its disk."""
    partition_graph(load_graph(graph), parts=2, out=folder / "store", method="random")
    store, config = Store.open(folder / "store"), load_config(overrides=WORDS[1::2])
    undisturbed(store, folder / "run", config)
    qgnn.export(folder / "run", out=folder / "model.safetensors")
    model = PackedModel.load(folder / "model.safetensors")
    pool = LocalPool(PredictWorker, {"store": str(store.path), "exchange_s": 20.0}, 2, timeout_s=20)
    try:
        run_prediction(pool, store, model, folder / "out", scores=True, timeouts=TimeoutsConfig())
    finally:
        pool.close()


def _objects(prefix: str) -> dict[str, int]:
    return Place(f"s3://{BUCKET}/{prefix}", StorageConfig()).names()


def _bytes(name: str) -> bytes:
    data = Place(f"s3://{BUCKET}/{name}", StorageConfig()).read(1 << 30)
    assert data is not None
    return data


def test_the_whole_path(s3: S3, tmp_path: Path) -> None:
    """Stores and predictions have the same bytes as on disk, and the run the same lines."""
    there, here = f"s3://{BUCKET}/all", tmp_path / "here"
    graph = npz_graph(tmp_path / "graph.npz", NODES)
    Place(f"{there}/graph.npz", StorageConfig()).put(graph)
    with RaySession(num_cpus=2):  # one for all of them
        _done("partition", f"{there}/graph.npz", "--parts", 2, "--method", "random", "--out", f"{there}/store")
        _done("train", f"{there}/store", "--out", f"{there}/run", *WORDS)
        _done("export", f"{there}/run", "--out", f"{there}/model.safetensors")
        predict = ["predict", f"{there}/store", "--model", f"{there}/model.safetensors", "--out", f"{there}/out",
                   *WORDS[-4:]]
        _done(*predict)
        plain = _bytes("all/out/part-00000.parquet")
        _done(*predict, "--scores", "--overwrite")
    assert len(_bytes("all/out/part-00000.parquet")) > len(plain)
    _on_disk(graph, here)
    for folder in ("store/part-00000", "store/part-00001", "out"):
        files = {f.name: f.read_bytes() for f in (here / folder).iterdir() if f.suffix != ".json"}
        assert files
        assert {name for name in _objects(f"all/{folder}") if not name.endswith(".json")} == set(files)
        for name, data in files.items():
            assert _bytes(f"all/{folder}/{name}") == data, name
    assert _bytes("all/model.safetensors") == (here / "model.safetensors").read_bytes()
    assert set(_objects("all/out")) == {"part-00000.parquet", "part-00001.parquet", "summary.json"}
    assert set(_objects("all/run")) == {
        "config.toml", "metrics.jsonl", "status.json", "final.json", "trace.json", "summary.json", "checkpoints/newest.json",
        *(f"checkpoints/epoch-00000{n}.safetensors" for n in (2, 4, 6))}
    run = tmp_path / "copy"
    run.mkdir()
    (run / "metrics.jsonl").write_bytes(_bytes("all/run/metrics.jsonl"))
    assert records(run) == records(here / "run")
    assert len(records(run)) == 6

    for kind, name, more in (("store", "store", ["--verify"]), ("run", "run", []), ("model", "model.safetensors", [])):
        found = _done("inspect", f"{there}/{name}", *more)
        local = _done("inspect", here / name, *more)
        assert found["kind"] == kind
        assert found.keys() == local.keys()
    assert "diagnosis" in _done("inspect", f"{there}/model.safetensors", "--store", f"{there}/store")
    page = _done("report", f"{there}/run", "--store", f"{there}/store", "--out", f"{there}/pages/run.html")
    assert page["runs"] == [{"name": "run", "epochs": 6, "best_epoch": page["runs"][0]["best_epoch"], "complete": True,
                             "measured": True}]
    assert len(_bytes("all/pages/run.html")) == page["bytes"]
    plan = ["--hosts", 2, "--host-ram-gb", 4, "--host-cores", 2, "--link-gbps", 1]
    assert _done("plan", f"{there}/store", *plan).keys() == _done("plan", here / "store", *plan).keys()

    before = {name: _bytes(f"all/run/{name}") for name in _objects("all/run")}
    assert _done("train", f"{there}/store", "--out", f"{there}/run", *WORDS, "--resume")["epochs"] == 6
    for name in ("store", "run", "model.safetensors", "out"):
        assert not (tmp_path / "s3:").exists()
        words = {"store": ["partition", graph, "--parts", 2], "run": ["train", f"{there}/store"],
                 "model.safetensors": ["export", f"{there}/run"],
                 "out": ["predict", f"{there}/store", "--model", f"{there}/model.safetensors"]}[name]
        _refused(2, f"{there}/{name}: output exists", *words, "--out", f"{there}/{name}")
    _refused(2, f"{there}/run: cannot resume: the run was started with other settings", "train", f"{there}/store",
             "--out", f"{there}/run", "--resume", "--set", "quant.bits=4")
    assert {name: _bytes(f"all/run/{name}") for name in _objects("all/run")} == before


def test_faults_of_a_store_are_one_line(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = npz_graph(tmp_path / "graph.npz", NODES)
    partition = ["partition", graph, "--parts", 1, "--out"]
    _refused(2, "s3://nobody/store: there is no bucket nobody", *partition, "s3://nobody/store")
    _refused(2, "s3://nobody/run: there is no bucket", "export", "s3://nobody/run", "--out", tmp_path / "m")
    _refused(2, "s3://graphs/none: not a store", "train", "s3://graphs/none", "--out", tmp_path / "run")
    _refused(2, "s3://graphs/none: not a run", "export", "s3://graphs/none", "--out", tmp_path / "m")
    _refused(2, "s3://graphs/none: there is no such object", "inspect", "s3://graphs/none")
    _refused(2, "credentials and options come from the environment", *partition, f"s3://k:{SECRET}@graphs/store")
    _done(*partition, "s3://graphs/store")
    _refused(2, "s3://graphs/none: there is no such object", "predict", "s3://graphs/store", "--model",
             "s3://graphs/none", "--out", "s3://graphs/out")
    with s3.credentials_are_looked_at():
        _refused(2, "credentials are missing, denied or expired", "inspect", "s3://graphs/store")
        _refused(2, "credentials are missing, denied or expired", *partition, "s3://graphs/other")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    _refused(1, "s3://graphs/store/manifest.json: the object store fails, or cannot be reached at http://127.0.0.1:9",
             "train", "s3://graphs/store", "--out", tmp_path / "run", "--set", "storage.retry_s=0.5")
    assert not (tmp_path / "run").exists()


def test_the_pipeline_goes_on_there(s3: S3, tmp_path: Path) -> None:
    file, out = npz_graph(tmp_path / "graph.npz", NODES), f"s3://{BUCKET}/all"
    words = [sys.executable, str(ROOT / "jobs" / "pipeline.py"), str(file), "--parts", "1", "--out", out, *WORDS]

    def done() -> str:
        result = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=ROOT)
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert "done before" not in done()
    for name in _objects("all/predictions"):
        Place(f"{out}/predictions/{name}", StorageConfig()).remove()
    told = done()
    assert ("partition: done before" in told, "export: done before" in told, "epoch 1:" in told) == (True, True, False)
    assert set(_objects("all/predictions")) == {"part-00000.parquet", "summary.json"}
    assert set(_objects("all")) >= {"pipeline.json", "store/manifest.json", "run/summary.json", "model.safetensors"}
    other = subprocess.run([*words, "--set", "seed=1"], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert other.returncode == 2
    assert f"error: {out}: was begun with another config" in other.stderr


def test_an_overwritten_run_leaves_nothing_behind(s3: S3, tmp_path: Path) -> None:
    qgnn.partition(str(npz_graph(tmp_path / "graph.npz", NODES)), parts=1, out=tmp_path / "store")
    uri, stray = f"s3://{BUCKET}/run", Place(f"s3://{BUCKET}/run/notes.txt", StorageConfig())
    for epochs, overwrite in ((9, False), (4, True)):
        qgnn.train(tmp_path / "store", out=uri, config=settings(f"train.epochs={epochs}", "train.checkpoint_every=3"),
                   overwrite=overwrite)
        stray.write(b"mine")
    assert set(_objects("run")) == {
        "config.toml", "metrics.jsonl", "status.json", "final.json", "trace.json", "summary.json", "notes.txt",
        "checkpoints/newest.json",
        "checkpoints/epoch-000003.safetensors", "checkpoints/epoch-000004.safetensors"}
    assert len(_bytes("run/metrics.jsonl").splitlines()) == 4
    Place(f"{uri}/config.toml", StorageConfig()).remove()
    for words in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(qgnn.InputError, match=r"s3://graphs/run: output exists and is not a run's folder"):
            qgnn.train(tmp_path / "store", out=uri, config=settings(), **words)
    assert stray.read(10) == b"mine"


def test_a_run_there_is_watched(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one on disk: while it is trained and once it has ended, by the same reader, and anew after a resume."""
    monkeypatch.setattr(remote_run, "LINES_EVERY_S", 0.1)
    monkeypatch.setattr(remote_run, "LOOK_AGAIN_S", 0.1)
    qgnn.partition(str(npz_graph(tmp_path / "graph.npz", NODES)), parts=1, out=tmp_path / "store")
    uri, config = f"s3://{BUCKET}/run", settings("train.epochs=6", "train.checkpoint_every=2")
    _refused(2, f"{uri}: not a run", "top", uri, "--once")
    seen = list[tuple[int, str]]()
    with ExitStack() as block:
        looks = list[Callable[[], dict[str, Any]]]()

        def until(epoch: int, state: str) -> dict[str, Any]:
            end = time.monotonic() + 20
            while True:
                if not looks and _objects("run").get("status.json"):
                    looks.append(block.enter_context(remote_run.watched_run(uri, StorageConfig())))
                found = looks[0]() if looks else {"epoch": 0, "state": ""}
                if (found["epoch"], found["state"]) == (epoch, state):
                    seen.append((epoch, state))
                    return found
                assert time.monotonic() < end, found
                time.sleep(0.05)

        def look(record: dict[str, Any]) -> None:
            assert until(record["epoch"], "training")["loss"] == record["loss"]
            if len(seen) == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            qgnn.train(tmp_path / "store", out=uri, config=config, on_epoch=look)
        until(3, "stopped")
        summary = qgnn.train(tmp_path / "store", out=uri, config=config, on_epoch=look, resume=True)
        found = until(6, "finished")
    assert [epoch for epoch, _ in seen] == [1, 2, 3, 3, 3, 4, 5, 6, 6]
    assert found["best"] == {"epoch": summary["best_epoch"], "accuracy": summary["accuracy"]}
    assert found["run"] == uri
    assert _done("top", uri, "--once") == {**found, "age_s": pytest.approx(found["age_s"], abs=20)}
    assert len(found["history"]["loss"]) == 6


def test_a_run_outlives_the_object_store(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is away the run goes on; what is missing is put there once it is back, or kept here where it is not."""
    qgnn.partition(str(npz_graph(tmp_path / "graph.npz", NODES)), parts=1, out=tmp_path / "store")
    config, epochs = settings("train.epochs=20", "train.checkpoint_every=5", "storage.retry_s=0.4"), list[int]()
    qgnn.train(tmp_path / "store", out=tmp_path / "run", config=config)
    with Door(s3) as door:
        s3.use(monkeypatch, door.url)

        def back(record: dict[str, Any]) -> None:
            epochs.append(record["epoch"])
            if record["epoch"] == 2:
                door.shut()
            if record["epoch"] == 18:
                door.open()

        qgnn.train(tmp_path / "store", out=f"s3://{BUCKET}/run", config=config, on_epoch=back)
        assert epochs == list(range(1, 21))
        assert [one["name"] for one in json.loads(_bytes("run/checkpoints/newest.json"))["checkpoints"]] == [
            f"epoch-0000{n}.safetensors" for n in (20, 15, 10)]
        assert len(_objects("run/checkpoints")) == 4
        run = tmp_path / "copy"
        run.mkdir()
        (run / "metrics.jsonl").write_bytes(_bytes("run/metrics.jsonl"))
        assert records(run) == records(tmp_path / "run")

        def gone(record: dict[str, Any]) -> None:
            if record["epoch"] == 2:
                door.shut()

        with pytest.raises(qgnn.QgnnError, match=r"s3://graphs/lost: the end of the run could not be put there") as one:
            qgnn.train(tmp_path / "store", out=f"s3://{BUCKET}/lost", config=config, on_epoch=gone)
        (kept,) = (tmp_path / "cache" / "kept").iterdir()
        assert f"--out {kept} --resume" in str(one.value)
        assert records(kept) == records(tmp_path / "run")
        assert (kept / "summary.json").exists()
