# SPDX-License-Identifier: Apache-2.0
"""RUN/status.json, what reads it, and `qgnn top`: of a run that trains, ended, was lost, or is no run."""
from __future__ import annotations

import io
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import qgnn_dist as qgnn
from qgnn_dist.cli import app
from qgnn_dist.errors import DivergedError, InputError
from qgnn_dist.store.reader import Store
from qgnn_dist.top import frame
from qgnn_dist.training import follow as following
from qgnn_dist.training.follow import Follow
from qgnn_dist.training.run_folder import RunFolder
from qgnn_dist.training.status import RunStatus
from tests.helpers import make_store, settings, small_graph

ELSEWHERE = "another-host"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(small_graph(), tmp_path_factory.mktemp("top") / "s", 1)


def drawn(found: dict[str, Any], width: int = 110) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(frame(found, width))
    return console.export_text()


def test_a_narrow_terminal_has_every_figure(store: Store, tmp_path: Path) -> None:
    """Of 80 columns: a worker's row is one line, and no figure is cut off."""
    qgnn.train(store.path, out=tmp_path / "run", config=settings("train.epochs=2"))
    found = Follow(tmp_path / "run").look()
    worker = {**found["workers"][0], "host": "ip-10-0-3-117.eu-central-1.compute.internal", "rows": 9_999_999,
              "train_s": 12.25, "wait_s": {"exchange": 1.0, "reduce": 0.5, "server": 0.5},
              "wire_bytes": {"forward": 1023 << 20}, "memory": {"anon_bytes": 1023 << 20,
                                                              "available_bytes": 1023 << 30}}
    text = drawn({**found, "workers": [worker], "history": {"loss": [1.0, 2.0] * 30, "valid": [1.0, 2.0] * 30}}, 80)
    (row,) = [line for line in text.splitlines() if "ip-10-0-3-117" in line]
    assert row.split()[-8:] == ["12.2", "9,999,999", "1023.0", "MiB", "1023.0", "MiB", "1023.0", "GiB"]
    assert "eu-central" not in text
    assert "anonymous: memory of the process's own" in text
    assert "▁█▁█" in next(line for line in text.splitlines() if line.startswith("loss"))
    assert max(map(len, text.splitlines())) <= 80


def test_a_run_that_trains_and_one_that_is_finished(store: Store, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    follow: list[Follow] = []

    def look(record: dict[str, Any]) -> None:
        follow[:] = follow or [Follow(tmp_path / "run")]
        seen.append(follow[0].look())
        assert (seen[-1]["epoch"], seen[-1]["loss"]) == (record["epoch"], record["loss"])

    summary = qgnn.train(store.path, out=tmp_path / "run", config=settings(), on_epoch=look)
    assert [one["state"] for one in seen] == ["training"] * 5
    found = Follow(tmp_path / "run").look()
    assert found == {**follow[0].look(), "age_s": found["age_s"]}, "new lines alone, or all at once"
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (found["state"], status["state"], status["epoch"]) == ("finished", "finished", 5)
    assert found["best"] == {"epoch": summary["best_epoch"], "accuracy": summary["accuracy"]}
    (worker,) = found["workers"]
    assert worker["rows"] == 300
    assert worker["memory"]["rss_bytes"] >= worker["memory"]["anon_bytes"] > 1 << 20
    text = drawn(found)
    for word in ("finished", "epoch 5 of 5", "INT2", f"valid {100 * summary['accuracy']['valid']:.2f} %", "λ", "█"):
        assert word in text
    assert not list((tmp_path / "run").glob(".status*"))


def test_top_draws_once_tells_json_and_refuses_what_is_no_run(store: Store, tmp_path: Path) -> None:
    qgnn.train(store.path, out=tmp_path / "run", config=settings("train.epochs=2"))
    once = CliRunner().invoke(app, ["top", str(tmp_path / "run"), "--once"])
    assert (once.exit_code, "epoch 2 of 2" in once.stdout) == (0, True)
    told = CliRunner().invoke(app, ["top", str(tmp_path / "run"), "--json"])
    assert json.loads(told.stdout)["wire_bytes_total"] == {"forward": 0, "backward": 0, "evaluation": 0, "control": 0}
    live = CliRunner().invoke(app, ["top", str(tmp_path / "run")])
    assert live.exit_code == 0, "a finished run ends it"
    for path in (store.path, tmp_path / "nothing"):
        refused = CliRunner().invoke(app, ["top", str(path)])
        assert refused.exit_code == 2
        assert "give the --out of `qgnn train`" in " ".join(refused.output.split())


def stopped_midway(store: Store, run: Path, error: BaseException) -> None:
    def stop(record: dict[str, Any]) -> None:
        if record["epoch"] == 3:
            raise error

    with pytest.raises(type(error)):
        qgnn.train(store.path, out=run, config=settings(), on_epoch=stop)


@pytest.mark.parametrize(("error", "state", "reason"), [
    (KeyboardInterrupt(), "stopped", "stopped"), (DivergedError("the loss is nan"), "failed", "diverged"),
    (RuntimeError("broken"), "failed", "RuntimeError")])
def test_how_it_ended(store: Store, tmp_path: Path, error: BaseException, state: str, reason: str) -> None:
    stopped_midway(store, tmp_path / "run", error)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["reason"], status["epoch"]) == (state, reason, 3)
    found = Follow(tmp_path / "run").look()
    assert (found["state"], found["best"]) == (state, None)
    assert str(error) in drawn(found)
    live = CliRunner().invoke(app, ["top", str(tmp_path / "run")])
    assert live.exit_code == 1


def change(run: Path, **values: Any) -> None:
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, **values}))


def test_a_command_that_is_gone(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its process on this host; on another one by its silence."""
    run = tmp_path / "run"
    stopped_midway(store, run, RuntimeError("x"))
    follow = Follow(run)
    change(run, state="training", pid=os.getpid())
    assert follow.look()["state"] == "training"
    change(run, state="recovering", pid=2**22 + 1)
    assert follow.look()["state"] == "lost"
    change(run, state="stalled", host=ELSEWHERE, time=time.time() - 30)
    assert (follow.look()["state"], follow.look()["age_s"]) == ("stalled", pytest.approx(30, abs=5))
    assert "stacks are in" in drawn(follow.look())
    change(run, time=time.time() - following.SILENT_S - 5)
    assert follow.look()["state"] == "lost"
    (run / "status.json").unlink()
    found = follow.look()
    assert (found["state"], found["epoch"]) == ("lost", 3)
    assert found["workers"][0].keys() == {"rank", "compute_s"}, "of a program before the status file"
    drawn(found)


def test_metrics_are_read_as_they_grow(store: Store, tmp_path: Path) -> None:
    """A half line waits, a file that was written anew is read anew, a damaged line is refused."""
    run = tmp_path / "run"
    qgnn.train(store.path, out=run, config=settings())
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(lines[0] + lines[1][:20])
    follow = Follow(run)
    assert follow.look()["epoch"] == 1
    with open(run / "metrics.jsonl", "ab") as out:
        out.write(lines[1][20:] + lines[2])
    assert follow.look()["epoch"] == 3
    assert len(follow.look()["history"]["loss"]) == 3
    RunFolder(run).start_metrics(2)
    assert follow.look()["epoch"] == 2
    assert len(follow.look()["history"]["loss"]) == 2
    with open(run / "metrics.jsonl", "ab") as out:
        out.write(b'{"epoch": 3}\n')
    with pytest.raises(InputError, match="damaged"):
        follow.look()


def test_the_status_has_stalls_restarts_and_the_last_words(tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    import logging

    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef")
    run = RunFolder(tmp_path / "run")

    def read() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(run.status_path.read_text())
        return found

    with RunStatus(run) as status:
        status.stall(0)
        assert not run.path.exists(), "what is refused at its start leaves nothing"
        run.begin(settings().to_toml())
        status.workers([{"host": "a", "rows": 3, "edges": 4, "statistics": None}], [], 7)
        assert (read()["state"], read()["epochs"], read()["pid"]) == ("training", 7, os.getpid())
        assert read()["host"] == socket.gethostname()
        status.stall(1)
        assert read()["state"] == "stalled"
        for number in range(20):
            logging.getLogger("qgnn_dist.cluster.watch").warning("token 0123456789abcdef, %d", number)
        status.restart({})
        assert (read()["state"], read()["restarts"]) == ("recovering", 1)
        assert [one["text"] for one in read()["messages"]] == [f"token ***, {n}" for n in range(12, 20)]
        for worker in Follow(run.path).look()["workers"]:
            assert worker == {"rank": 0, "host": "a", "rows": 3, "edges": 4}
        run.status_path.unlink()
        before = time.monotonic()
        status.epoch({"epoch": 1, "wire_bytes": {"forward": 5}}, [{"train_s": 1.0}])
        assert not run.status_path.exists(), "an epoch waits for no disk"
        while not run.status_path.exists():
            assert time.monotonic() < before + 10
            time.sleep(0.05)
        assert (read()["epoch"], read()["wire_bytes"]) == (1, {"forward": 5})
    assert read()["state"] == "finished"
