# SPDX-License-Identifier: Apache-2.0
"""Commands on an object store that are killed, and go on on a host that has nothing of them."""
from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qgnn_dist as qgnn
from qgnn_dist.comm import faults
from qgnn_dist.comm.pool import LocalPool
from qgnn_dist.config import StorageConfig, TimeoutsConfig
from qgnn_dist.errors import OutputError, StorageError
from qgnn_dist.inference.batch import run_prediction
from qgnn_dist.inference.worker import PredictWorker
from qgnn_dist.storage.place import Place
from qgnn_dist.store.reader import Store
from qgnn_dist.training.remote_run import fetched_run
from tests.helpers import make_store, settings, small_graph, untrained_model
from tests.recovering import Hosts, config, outside, same_end, undisturbed
from tests.s3 import BUCKET, S3

QUICK = StorageConfig(retry_s=5)
EPOCHS = 200
"""So many that none of them is the last one before the command is killed."""
CONFIG = settings(f"train.epochs={EPOCHS}", "train.patience=0", "train.checkpoint_every=3", "model.feature_norm=l2",
                  "storage.retry_s=5")
NEWEST = "checkpoints/newest.json"


def _up(store: Store, name: str) -> str:
    """Put a store's files on the object store."""
    for file in sorted(Path(store.path).rglob("*.*")):
        Place(f"s3://{BUCKET}/{name}/{file.relative_to(store.path)}", QUICK).put(file)
    return f"s3://{BUCKET}/{name}"


def _same_end(uri: str, whole: Path) -> None:
    with fetched_run(uri, QUICK) as run:
        same_end(run, whole)


def _named(uri: str) -> list[dict[str, Any]]:
    data = Place(f"{uri}/{NEWEST}", QUICK).read(1 << 20)
    return [] if data is None else list(json.loads(data)["checkpoints"])


def _killed_once(words: list[str], when: Callable[[], bool], log: Path) -> None:
    """Run a command and kill it as soon as `when` says so."""
    with open(log, "wb") as out:
        process = subprocess.Popen([sys.executable, "-m", "qgnn_dist.cli", *words], stdout=out, stderr=out)
    until = time.monotonic() + 120
    try:
        while not when():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait(10)


@pytest.mark.parametrize("checkpoints", [0, 2])
def test_a_killed_run_goes_on_elsewhere(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        checkpoints: int) -> None:
    """Killed before its first checkpoint is named, and after more of them; then resumed by a host with other disks."""
    local = make_store(small_graph(), tmp_path / "s", 1)
    whole = undisturbed(local, tmp_path / "whole", CONFIG)
    store, uri = _up(local, "store"), f"s3://{BUCKET}/run"
    (tmp_path / "config.toml").write_text(CONFIG.to_toml())
    _killed_once(["train", store, "--out", uri, "--config", str(tmp_path / "config.toml")],
                 lambda: (Place(f"{uri}/config.toml", QUICK).size() or 0) > 0 and len(_named(uri)) >= checkpoints,
                 tmp_path / "log")
    for one in _named(uri):  # what is named is whole
        assert Place(f"{uri}/checkpoints/{one['name']}", QUICK).checksum() == one["blake2b"]
    before = _named(uri)
    assert Place(f"{uri}/summary.json", QUICK).size() is None
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    epochs = list[int]()
    qgnn.train(store, out=uri, config=CONFIG, resume=True, on_epoch=lambda record: epochs.append(record["epoch"]))
    first = int(before[0]["name"][6:12]) if before else 0
    assert epochs == list(range(first + 1, EPOCHS + 1))
    _same_end(uri, whole)


def test_a_damaged_newest_checkpoint_falls_back(s3: S3, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    local, quick = make_store(small_graph(), tmp_path / "s", 1), settings(
        "train.epochs=12", "train.checkpoint_every=3", "storage.retry_s=0.3")
    whole = undisturbed(local, tmp_path / "whole", quick)
    uri = f"s3://{BUCKET}/run"
    with pytest.raises(KeyboardInterrupt):
        qgnn.train(local.path, out=uri, config=quick, on_epoch=_stop_after(7))
    assert [one["name"][:12] for one in _named(uri)] == ["epoch-000006", "epoch-000003"]
    Place(f"{uri}/checkpoints/{_named(uri)[0]['name']}", QUICK).write(b"damaged")
    epochs = list[int]()
    qgnn.train(local.path, out=uri, config=quick, resume=True, on_epoch=lambda record: epochs.append(record["epoch"]))
    assert epochs == list(range(4, 13))
    assert "going back to epoch-000003.safetensors" in caplog.text
    _same_end(uri, whole)
    assert len(_named(uri)) == 3


def test_a_checkpoint_is_named_once_it_is_there(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one cannot be put it is not named, and the lines of its epochs are there before it."""
    local, uri, put = make_store(small_graph(), tmp_path / "s", 1), f"s3://{BUCKET}/run", Place.put

    def breaks(self: Place, file: Path) -> str:
        if file.name == "epoch-000006.safetensors":
            raise StorageError("the object store fails", file=self.uri)
        return put(self, file)

    monkeypatch.setattr(Place, "put", breaks)
    with pytest.raises(OutputError, match="the end of the run could not be put there"):
        qgnn.train(local.path, out=uri, config=settings("train.epochs=8", "train.checkpoint_every=3"),
                   on_epoch=lambda record: time.sleep(1.0 * (record["epoch"] in (3, 6))))
    assert [one["name"] for one in _named(uri)] == ["epoch-000003.safetensors"]
    assert len((Place(f"{uri}/metrics.jsonl", QUICK).read(1 << 20) or b"").splitlines()) >= 6
    assert Place(f"{uri}/summary.json", QUICK).size() is None


def _stop_after(epoch: int) -> Callable[[dict[str, Any]], None]:
    def stop(record: dict[str, Any]) -> None:
        if record["epoch"] == epoch:
            time.sleep(0.5)
            raise KeyboardInterrupt

    return stop


def test_a_killed_upload_is_done_again(s3: S3, tmp_path: Path) -> None:
    """`qgnn partition` killed while objects go up: there is no store, and the same command makes one."""
    graph, uri = tmp_path / "g.npz", f"s3://{BUCKET}/store"
    rng = np.random.default_rng(0)
    np.savez(graph, edge_index=rng.integers(0, 60_000, (2, 400_000)), x=rng.random((60_000, 200), np.float32))
    words = ["partition", str(graph), "--parts", "1", "--out", uri]
    _killed_once(words, lambda: bool(Place(uri, QUICK).names()), tmp_path / "log")
    there = Place(uri, QUICK).names()
    assert there
    assert "manifest.json" not in there
    done = subprocess.run([sys.executable, "-m", "qgnn_dist.cli", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "what an unfinished upload left is replaced" in done.stderr
    assert Store.open(uri).verify() == len(Store.open(uri).manifest["parts"][0]["files"])
    assert [f.name for f in (tmp_path / "cache").iterdir()] == []


def test_predictions_keep_parts_that_are_there(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that cannot put its part: the other's is kept, and not put again; the end is the same."""
    from qgnn_dist.inference import worker

    local = make_store(small_graph(), tmp_path / "s", 2)
    model, uri, out = untrained_model(local), _up(local, "store"), f"s3://{BUCKET}/out"
    put, written = worker.put_part, list[int]()

    def predict(store: str, out: str | Path) -> dict[str, Any]:
        pool = LocalPool(PredictWorker, {"store": store, "exchange_s": 20.0, "storage": QUICK}, 2, timeout_s=20)
        try:
            return run_prediction(pool, Store.open(store), model, out, scores=True, timeouts=TimeoutsConfig(),
                                  storage=QUICK)
        finally:
            pool.close()

    with monkeypatch.context() as broken:
        broken.setattr(worker, "put_part", _breaks_on(1, put, written))
        with pytest.raises(StorageError):
            predict(uri, out)
    assert written == [0]
    there = Place(out, QUICK).names()
    assert set(there) == {"part-00000.parquet", "unfinished/about.json", "unfinished/part-00000.json"}
    with monkeypatch.context() as watched:
        watched.setattr(worker, "put_part", _breaks_on(None, put, written))
        summary = predict(uri, out)
    assert written == [0, 1]
    wanted = predict(str(local.path), tmp_path / "out")
    assert set(Place(out, QUICK).names()) == {"part-00000.parquet", "part-00001.parquet", "summary.json"}
    for part in range(2):
        name = f"part-0000{part}.parquet"
        assert Place(f"{out}/{name}", QUICK).read(1 << 30) == (tmp_path / "out" / name).read_bytes()
    for key in ("rows", "accuracy", "class_counts", "reliability"):
        assert summary[key] == wanted[key]
    # Another model's, in their place: the old ones are no predictions any more once the first part is replaced.
    model = untrained_model(local, seed=1)
    with monkeypatch.context() as broken:
        broken.setattr(worker, "put_part", _breaks_on(1, put, written))
        with pytest.raises(StorageError):
            predict(uri, out)
    assert "summary.json" not in Place(out, QUICK).names()
    assert predict(uri, out)["class_counts"] != wanted["class_counts"]
    assert b"unfinished" not in s3.ask("GET", f"{BUCKET}?list-type=2")  # nor a mark of an empty folder
    assert set(Place(out, QUICK).names()) == {"part-00000.parquet", "part-00001.parquet", "summary.json"}


def _breaks_on(part: int | None, put: Callable[..., None], written: list[int]) -> Callable[..., None]:
    """put_part that fails for a part, and notes the others."""
    def work(uri: str, settings: StorageConfig, folder: Path, own: int, result: Any) -> None:
        if own == part:
            time.sleep(1)  # so that the other one is there first
            raise StorageError("the object store fails", file=uri)
        put(uri, settings, folder, own, result)
        written.append(own)

    return work


def test_a_lost_worker_comes_back_without_a_shared_disk(store: Store, whole: Path, s3: S3, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """A host is lost with all that it had; the worker on the spare one fetches its part, and the run ends the same."""
    uri, run, mark, cache = f"s3://{BUCKET}/store", f"s3://{BUCKET}/run", tmp_path / "mark", tmp_path / "of-hosts"
    own = config("storage.retry_s=5", f'storage.cache_dir="{cache}"')
    with Hosts() as hosts:  # which have the variables of the object store, as hosts of a cluster must

        def lose(worker: int) -> None:
            assert len(list((cache / "parts").iterdir())) == 2
            shutil.rmtree(cache / "parts")
            hosts.kill(worker)

        # Built by this process: its own host has no CPU for builders, and the others have other disks.
        qgnn.partition(small_graph(), parts=2, method="random", order="source", out=uri)
        assert Store.open(uri).manifest["parts"] == store.manifest["parts"]
        monkeypatch.setenv(faults.ENVIRONMENT, f"call epoch=5 layer=2 rank=1 mark={mark}")
        thread = outside(mark, lose)
        summary = qgnn.train(uri, out=run, config=own)
        thread.join(10)
    assert mark.exists()
    assert len(summary["restarts"]) == 1
    assert len(list((cache / "parts").iterdir())) == 2
    _same_end(run, whole)
