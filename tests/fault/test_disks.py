# SPDX-License-Identifier: Apache-2.0
"""Disks that are full or read-only, for every command that writes: exit code 1, one line that names the file and what
was needed, earlier outputs as they were, and nothing half-built that the next run cannot use."""
from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from qgnn_dist.cli import app
from qgnn_dist.cluster import api
from qgnn_dist.data import arrays
from qgnn_dist.errors import OutputError
from qgnn_dist.files.write import write_atomically
from qgnn_dist.partitioning import api as partitioning
from qgnn_dist.store.reader import Store
from tests.disks import fill, read_only, tiny_disk
from tests.helpers import make_store, small_graph

WORDS = ["train.epochs=4", "train.checkpoint_every=1", "model.hidden=64", "propagation.layers=2"]
SETTINGS = [part for word in WORDS for part in ("--set", word)]
FULL, READ_ONLY = "No space left on device", "Read-only file system"


@pytest.fixture
def disk() -> Iterator[Path]:
    with tiny_disk("4m") as folder:
        yield folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph, its store, a run and a model, on a disk with room."""
    folder = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(0)
    np.savez(folder / "graph.npz", edge_index=rng.integers(0, 3000, (2, 9000)), x=rng.random((3000, 32)))
    make_store(small_graph(nodes=6000, features=48), folder / "store", 1)
    api.train(folder / "store", out=folder / "run", overrides=WORDS)
    api.export(folder / "run", out=folder / "model")
    return folder


def fails(*words: Any) -> str:
    """The one line of a command that ends with 1."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 1, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert result.stdout == ""
    return errors[0]


def works(*words: Any) -> None:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.stderr


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_partition(disk: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(small_graph(), disk / "old", 1)
    filler = fill(disk, 100_000)
    before = snapshot(disk)
    words = ("partition", made / "graph.npz", "--parts", 1, "--out")
    for out in ("new", "old"):
        text = fails(*words, disk / out, "--overwrite")
        assert f"{disk / out}: writing the store takes about 1." in text
        assert "MB are free; free some, or choose an --out on a larger disk" in text
    monkeypatch.setattr(partitioning, "check_room", lambda *_: None)  # somebody else takes the room meanwhile
    for out in ("new", "old"):
        text = fails(*words, disk / out, "--overwrite")
        assert f"{disk / out}: cannot write the store: {FULL} (" in text
        assert "MB are free, writing the store takes about 1." in text
    assert snapshot(disk) == before
    with read_only(disk):
        for out in (disk / "new", disk / "deep" / "new", disk / "old"):
            assert f"{out}: cannot write the store: {READ_ONLY}; choose an --out" in fails(*words, out, "--overwrite")
    assert snapshot(disk) == before
    assert sorted(path.name for path in disk.iterdir()) == ["filler", "old"]
    filler.unlink()
    works(*words, disk / "old", "--overwrite")
    assert Store.open(disk / "old").num_nodes == 3000


def test_training_that_cannot_begin(disk: Path, made: Path) -> None:
    words = ("train", made / "store", *SETTINGS, "--out")
    filler = fill(disk, 0)
    text = fails(*words, disk / "run")
    assert f"{disk / 'run'}" in text
    assert FULL in text
    assert "0.00 MB are free" in text
    assert [path.name for path in disk.iterdir()] == ["filler"]
    with read_only(disk):
        assert f"{disk / 'run'}: cannot write the run: {READ_ONLY}; choose an --out" in fails(*words, disk / "run")
    filler.unlink()
    works(*words, disk / "run")


def test_training_whose_first_checkpoint_has_no_room(disk: Path, made: Path) -> None:
    words = ("train", made / "store", *SETTINGS, "--out", disk / "run")
    filler = fill(disk, 6 * 4096)
    text = fails(*words)
    assert f"{disk / 'run'}/" in text
    assert "checkpoint" in text
    assert f"cannot write the file: {FULL} (" in text
    assert "MB are free, writing the file takes about 0." in text
    assert not list(disk.rglob("*.tmp"))
    filler.unlink()
    works(*words, "--resume")
    assert api.inspect(disk / "run")["complete"]


def test_training_whose_disk_fills_up_keeps_its_checkpoint(disk: Path, made: Path) -> None:
    def take_the_room(record: dict[str, Any]) -> None:
        if record["epoch"] == 2:
            while not (disk / "run" / "checkpoints" / "epoch-000002.safetensors").exists():  # written behind the epochs
                time.sleep(0.01)
            fill(disk, 4096)

    with pytest.raises(OutputError) as caught:
        api.train(made / "store", out=disk / "run", overrides=WORDS, on_epoch=take_the_room)
    assert caught.value.exit_code == 1
    assert str(disk / "run") in str(caught.value)
    assert FULL in str(caught.value)
    assert api.inspect(disk / "run")["epoch"] == 2
    (disk / "filler").unlink()
    resumed = api.train(made / "store", out=disk / "run", overrides=WORDS, resume=True)
    assert resumed["epochs"] == 4
    api.export(disk / "run", out=disk / "model")
    assert (disk / "model").read_bytes() == (made / "model").read_bytes()


def test_export(disk: Path, made: Path) -> None:
    words = ("export", made / "run", "--out")
    (disk / "old").write_text("precious")
    fill(disk, 0)
    for out in ("new", "old"):
        text = fails(*words, disk / out, "--overwrite")
        assert f"{disk / out}: cannot write the file: {FULL} (0.00 MB are free, writing the file takes about" in text
    with read_only(disk):
        for out in (disk / "new", disk / "deep" / "new", disk / "old"):
            assert f"{READ_ONLY}; choose an --out that this user may write to" in fails(*words, out, "--overwrite")
    assert (disk / "old").read_text() == "precious"
    assert sorted(path.name for path in disk.iterdir()) == ["filler", "old"]


def test_predict(disk: Path, made: Path) -> None:
    words = ("predict", made / "store", "--model", made / "model", "--out")
    works(*words, disk / "old")
    fill(disk, 8 * 4096)
    before = snapshot(disk)
    for out in ("new", "old"):
        text = fails(*words, disk / out, "--scores", "--overwrite")
        assert "part-00000.parquet: cannot write the predictions: " + FULL in text
        assert "MB are free, writing the predictions takes about 0.2" in text
    with read_only(disk):
        for out in ("new", "old"):
            assert f"cannot write the predictions: {READ_ONLY}" in fails(*words, disk / out, "--overwrite")
    assert snapshot(disk) == before
    assert sorted(path.name for path in disk.iterdir()) == ["filler", "old"]
    assert pq.read_table(disk / "old" / "part-00000.parquet").num_rows == 6000


def test_arrays_that_the_temporary_folder_has_no_room_for(disk: Path, made: Path, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "IN_MEMORY_BYTES", 100_000)
    monkeypatch.setattr("tempfile.tempdir", str(disk))
    fill(disk, 4096)
    text = fails("partition", made / "graph.npz", "--parts", 1, "--out", tmp_path / "s")
    assert f"{disk}: no room for 0.0 GiB of a graph's array ({FULL}); set TMPDIR" in text
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_the_old_one_or_the_new_one(disk: Path) -> None:
    path = disk / "file"
    write_atomically(path, b"old")
    fill(disk, 4096)
    with pytest.raises(OutputError, match=r"file: cannot write the file: No space .* \(0.00 MB are free, writing the "
                                          r"file takes about 0.10 MB\); free some"):
        write_atomically(path, bytes(100_000))
    assert path.read_bytes() == b"old"
    assert sorted(p.name for p in disk.iterdir()) == ["file", "filler"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to folders that allow nobody to")
def test_a_folder_without_permission(made: Path, tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        for words in (("partition", made / "graph.npz", "--parts", 1), ("train", made / "store", *SETTINGS),
                      ("export", made / "run"), ("predict", made / "store", "--model", made / "model")):
            assert "Permission denied; choose an --out" in fails(*words, "--out", tmp_path / "new")
    finally:
        tmp_path.chmod(stat.S_IRWXU)
    assert list(tmp_path.iterdir()) == []
