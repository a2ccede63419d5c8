# SPDX-License-Identifier: Apache-2.0
"""Records as JSON: all keys, places, worker's lines, and no secrets; text is as Python has it."""
from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import qgnn_dist as qgnn
from qgnn_dist import logs
from qgnn_dist.cli import app
from qgnn_dist.cluster.telemetry import Telemetry, WorkerTelemetry
from qgnn_dist.config import load_config
from tests.helpers import make_store, settings, small_graph

LOG = logging.getLogger("qgnn_dist.somewhere")


@pytest.fixture(autouse=True)
def _text_afterwards() -> Iterator[None]:
    yield
    logs.stop()
    logs.place(run=None, rank=None, epoch=None)


def test_a_record_has_all_keys_and_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    logs.start("text")
    LOG.info("not shown")
    logs.start("json")
    logs.place(run="/shared/run", host="h", rank=3, epoch=7)
    LOG.warning("λ %d\nof two lines", 5)
    try:
        raise ValueError("password=hunter2")
    except ValueError:
        LOG.exception("it broke")
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert tuple(first) == logs.KEYS
    assert first["time"].endswith("Z")
    assert {key: first[key] for key in logs.KEYS[1:]} == {
        "level": "warning", "run": "/shared/run", "host": "h", "rank": 3, "epoch": 7, "logger": LOG.name,
        "message": "λ 5\nof two lines"}
    assert "ValueError: password=***" in second["trace"]
    with pytest.raises(TypeError, match="no part"):
        logs.place(part=1)


@pytest.mark.parametrize("text", [
    "s3://user:{0}@host/x", "Authorization: Bearer {0}", "token={0}", "my password: {0}, then", "it is {0}"])
def test_secrets_are_hidden(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abc123/xyz.789")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/shared/token")
    found = logs.hidden(text.format("abc123/xyz.789"))
    assert "xyz" not in found
    assert "***" in found
    assert logs.hidden("/shared/token, 12 tokens: s3://host/x") == "/shared/token, 12 tokens: s3://host/x"


def test_a_workers_records_come_with_its_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    worker = WorkerTelemetry(Telemetry("/run", load_config(overrides=["log.format=json"]).log), "h", 1)
    LOG.info("opened")
    assert worker.after("load", (), {"rows": 1}) == {"rows": 1}
    worker.before("train_epoch", (4, True))
    LOG.info("in it")
    lines = [json.loads(line) for line in worker.after("train_epoch", (4, True), {"loss": 1.0})["log"]]
    assert [(line["message"], line["rank"], line["epoch"]) for line in lines] == [("opened", 1, None), ("in it", 1, 4)]
    assert worker.after("train_epoch", (5, True), {})["log"] == []
    own = capsys.readouterr().err
    logs.pass_on(json.dumps(line) for line in lines)
    assert capsys.readouterr().err == own, "a worker's own log has them too"
    logs.stop()
    assert WorkerTelemetry(None, "h", 1).after("train_epoch", (1, True), {"loss": 1.0}) == {"loss": 1.0}


def test_a_commands_stderr_is_records_alone(tmp_path: Path) -> None:
    store = make_store(small_graph(), tmp_path / "s", 1)
    ran = CliRunner().invoke(app, ["train", str(store.path), "--out", str(tmp_path / "run"), "--json", "--log-format",
                                   "json", "--set", "train.epochs=2", "--set", "propagation.layers=2"])
    assert ran.exit_code == 0
    assert json.loads(ran.stdout)["epochs"] == 2
    records = [json.loads(line) for line in ran.stderr.splitlines()]
    assert [record["epoch"] for record in records if record["message"].startswith("loss")] == [1, 2]
    assert {record["run"] for record in records if record["rank"] is None} == {str(tmp_path / "run")}
    again = CliRunner().invoke(app, ["train", str(store.path), "--out", str(tmp_path / "run"), "--log-format", "json"])
    assert again.exit_code == 2
    (error,) = (json.loads(line) for line in again.stderr.splitlines())
    assert (error["level"], "output exists" in error["message"]) == ("error", True)
    wrong = CliRunner().invoke(app, ["train", str(store.path), "--out", "x", "--log-format", "xml"])
    assert "log.format" in wrong.stderr
    assert wrong.exit_code == 2


def test_no_result_depends_on_what_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, told = settings(), settings("log.format=json", "log.metrics=on", "log.tensorboard=on")
    assert plain.digest() == told.digest()
    store = make_store(small_graph(), tmp_path / "s", 1)
    words = ["log.metrics=on", "train.epochs=1"]
    qgnn.train(store.path, out=tmp_path / "run", config=settings(*words))
    assert "no Ray is started for one part" in caplog.text
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_without_json_warnings_are_printed_once(tmp_path: Path) -> None:
    """As Python prints them where nobody has set up logging: the status file's own handler changes nothing."""
    import subprocess

    code = ("import logging, sys; from pathlib import Path; from qgnn_dist.training.status import RunStatus; "
            "from qgnn_dist.training.run_folder import RunFolder\n"
            "with RunStatus(RunFolder(Path(sys.argv[1]))): logging.getLogger('qgnn_dist.x').warning('mind this')")
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path / "none")], capture_output=True, text=True,
                         check=True)
    assert ran.stderr == "mind this\n"
