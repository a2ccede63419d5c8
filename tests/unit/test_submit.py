# SPDX-License-Identifier: Apache-2.0
"""`qgnn submit` against a stand-in for Ray's job client: what is asked of it, and what becomes of its answers.

tests/dist/test_jobs.py has real jobs.
"""
from __future__ import annotations

import json
import runpy
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.job_submission
import typer
from ray.exceptions import AuthenticationError
from typer.testing import CliRunner

from qgnn_dist.cli import app
from qgnn_dist.cluster import jobs
from qgnn_dist.errors import InputError, QgnnError


class FakeClient:
    """Ray's JobSubmissionClient, as far as we use it."""

    def __init__(self, address: str) -> None:
        self.address, self.asked = address, dict[str, Any]()
        self._server_ray_version, self.ends = ray.__version__, ("SUCCEEDED", 0, "")
        self.stopped, self.log, self.breaks = False, ["one\n", "two\n"], False
        self.states = iter(["RUNNING"])

    def submit_job(self, **asked: Any) -> str:
        self.asked = asked
        if asked["submission_id"] == "taken":
            raise RuntimeError("Request failed with status code 400: Traceback (most recent call last):\n  File x\n"
                               "ValueError: Job with submission_id taken already exists\n.")
        return asked["submission_id"] or "raysubmit_1"

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for piece in self.log:
            yield piece
        if self.breaks:
            raise RuntimeError("WebSocket connection closed unexpectedly")

    def get_job_status(self, job: str) -> Any:
        return SimpleNamespace(value=next(self.states, "STOPPED" if self.stopped else self.ends[0]))

    def get_job_info(self, job: str) -> Any:
        status = "STOPPED" if self.stopped else self.ends[0]
        return SimpleNamespace(status=SimpleNamespace(value=status), driver_exit_code=self.ends[1],
                               message=self.ends[2])

    def stop_job(self, job: str) -> bool:
        self.stopped = True
        return True


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    made = FakeClient("http://head:8265")
    monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", lambda address: made)
    monkeypatch.setattr(jobs, "_POLL_S", 0.001)
    monkeypatch.setattr(jobs, "_knock", lambda address: None)
    return made


def _submit(*words: str, **more: Any) -> dict[str, Any]:
    return jobs.submit(words, address="http://head:8265", **more)


def test_a_job_runs_the_command_line_and_its_log_comes_here(client: FakeClient) -> None:
    said, started = [], []
    result = _submit("train", "/data/a store", "--set", "quant.bits=2", on_log=said.append, on_start=started.append)
    assert client.asked["entrypoint"] == "python -m qgnn_dist.cli train '/data/a store' --set quant.bits=2"
    assert client.asked["runtime_env"] == {}
    assert (said, started) == (["one\n", "two\n"], ["raysubmit_1"])
    assert result == {"job": "raysubmit_1", "status": "SUCCEEDED", "exit_code": 0, "message": ""}


@pytest.mark.parametrize(("ends", "code", "message"), [
    (("FAILED", 2, "Job entrypoint command failed with exit code 2, last available logs (truncated):\nlast lines"), 2,
     "Job entrypoint command failed with exit code 2"),
    (("FAILED", None, "the head is gone"), 1, "the head is gone"),
    (("FAILED", -9, ""), 1, "the job failed"),
    (("STOPPED", None, "x"), 1, "the job was stopped"),
])
def test_the_exit_code_is_the_jobs(client: FakeClient, ends: Any, code: int, message: str) -> None:
    client.ends = ends
    result = _submit("train", "s")
    assert (result["exit_code"], result["message"]) == (code, message)


def test_a_log_that_breaks_off_is_not_the_end(client: FakeClient) -> None:
    client.breaks, client.states = True, iter(["RUNNING"] * 5)
    assert _submit("train", "s")["status"] == "SUCCEEDED"
    assert next(client.states, None) is None, "its end was waited for"


@pytest.mark.parametrize("word", [jobs.STOP, jobs.DETACH, None])
def test_ctrl_c_stops_or_detaches(client: FakeClient, word: str | None) -> None:
    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    asked = None if word is None else lambda: word
    result = _submit("train", "s", on_log=interrupt, on_interrupt=asked, name="mine")
    assert client.stopped == (word == jobs.STOP)
    assert result["status"] == ("STOPPED" if word == jobs.STOP else "DETACHED")
    assert result["exit_code"] == (1 if word == jobs.STOP else 0)
    if word != jobs.STOP:
        assert "ray job stop mine --address http://head:8265" in result["message"]


def test_what_goes_with_a_job(client: FakeClient, tmp_path: Path) -> None:
    wheel = tmp_path / "qgnn_dist-0.1.0-cp311-none-any.whl"
    wheel.touch()
    _submit("train", "s", working_dir=tmp_path, wheel=wheel, environment=["A=1", "B=x=y"], follow=False)
    runtime = client.asked["runtime_env"]
    assert runtime["working_dir"] == str(tmp_path)
    assert "/qgnn_dist/" in runtime["excludes"], "a source folder would shadow the installed package"
    assert runtime["py_modules"] == [str(wheel)]
    assert runtime["env_vars"] == {"A": "1", "B": "x=y"}


def test_all_commands_but_views_can_be_jobs() -> None:
    assert set(typer.main.get_command(app).commands) == {  # type: ignore[attr-defined]
        *jobs.JOB_COMMANDS, "settings", "submit", "top"}


def test_what_is_refused_before_a_cluster_is_asked(tmp_path: Path) -> None:
    for words, more, text in (((), {}, "submit: expected one of partition, train"),
                              (("rm", "-rf"), {}, "submit rm: expected one of partition"),
                              (("train",), {"working_dir": tmp_path / "no"}, "--working-dir is no folder"),
                              (("train",), {"wheel": tmp_path / "x.zip"}, "--wheel is no wheel"),
                              (("train",), {"environment": ["A"]}, "--env A: expected NAME=VALUE"),
                              (("train",), {"environment": ["=1"]}, "--env =: expected NAME=VALUE")):
        with pytest.raises(InputError) as caught:
            _submit(*words, **more)
        assert text in str(caught.value)


def test_a_script_goes_with_its_folder(client: FakeClient, tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "pipeline.py").touch()
    _submit("jobs/pipeline.py", "graph.npz", "--out", "a b", working_dir=tmp_path)
    assert client.asked["entrypoint"] == "python jobs/pipeline.py graph.npz --out 'a b'"
    for more in ({}, {"working_dir": tmp_path / "jobs"}):
        with pytest.raises(InputError, match=r"submit jobs/pipeline\.py: no such script in --working-dir"):
            _submit("jobs/pipeline.py", **more)
    with pytest.raises(InputError, match="no such script"):
        _submit(str(tmp_path / "jobs" / "pipeline.py"), working_dir=tmp_path)


def test_no_cluster_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens, and somebody who takes the connection and says nothing."""
    monkeypatch.setattr(jobs, "PROBE_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(InputError, match=rf"no Ray cluster answers at {address} \(.*timed out\)"):
            jobs.submit(["train"], address=address)
    with pytest.raises(InputError, match=r"no Ray cluster answers at http://127\.0\.0\.1:9 .*http://HEAD:8265"):
        jobs.submit(["train"], address="http://127.0.0.1:9")


def test_a_name_that_is_taken_a_token_and_another_version(client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="there has been a job named taken on this cluster; choose another --name"):
        _submit("train", name="taken")
    client._server_ray_version, warned = "2.9.1", list[str]()
    _submit("train", on_warning=warned.append)
    assert len(warned) == 1
    assert "runs Ray 2.9.1, this client is of" in warned[0]

    for error in (RuntimeError("Request failed with status code 401: Unauthorized."),
                  AuthenticationError("Unauthorized: Missing authentication token")):
        def refuse(_: str, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", refuse)
        with pytest.raises(InputError, match=r"asks for a token, .*RAY_AUTH_TOKEN_PATH"):
            _submit("train")

    def fail(_: str) -> None:
        raise RuntimeError("Request failed with status code 500: out of cheese.")

    monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", fail)
    with pytest.raises(QgnnError, match="out of cheese"):
        _submit("train")


def test_the_command_passes_options_on_and_ends_with_the_jobs_code(client: FakeClient) -> None:
    client.ends = ("FAILED", 2, "bad input")
    result = CliRunner().invoke(app, ["submit", "train", "store", "--out", "run", "--set", "quant.bits=2", "--resume",
                                      "--address", "http://head:8265", "--name", "nightly", "--json"])
    assert client.asked["entrypoint"] == "python -m qgnn_dist.cli train store --out run --set quant.bits=2 --resume"
    assert client.asked["submission_id"] == "nightly"
    assert result.exit_code == 2
    assert json.loads(result.stdout) == {"job": "nightly", "status": "FAILED", "exit_code": 2, "message": "bad input"}
    assert "one\ntwo\n" in result.stderr
    assert CliRunner().invoke(app, ["submit", "train"], env={"RAY_API_SERVER_ADDRESS": ""}).exit_code == 2


def test_a_pipelines_folder_is_of_one_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = runpy.run_path(str(Path(__file__).parents[2] / "jobs" / "pipeline.py"))
    words = ["pipeline.py", "synthetic:sbm?nodes=200&edges=800&features=4&classes=2", "--parts", "1", "--out",
             str(tmp_path / "all"), "--set", "train.epochs=2"]
    for more, code, said in (([], 0, "epoch 2"), ([], 0, "predict: done before"),
                             (["--set", "quant.bits=4"], 2, "was begun with another config; use the same")):
        monkeypatch.setattr("sys.argv", words + more)
        assert pipeline["main"]() == code
        assert said in "".join(capsys.readouterr())
    (tmp_path / "all" / "model.safetensors").unlink()
    monkeypatch.setattr("sys.argv", words)
    assert pipeline["main"]() == 0
    assert "export\npredict: done before" in capsys.readouterr().out


def test_what_a_checkout_uploads_is_small_and_shadows_nothing() -> None:
    """`ray job submit --working-dir .`, by Ray's own rules."""
    from ray._private.runtime_env.packaging import _dir_travel

    root = Path(__file__).parents[2]
    uploaded = list[Path]()
    _dir_travel(root, [], uploaded.append, include_gitignore=True)
    files = [f.relative_to(root) for f in uploaded if f.is_file()]
    assert Path("jobs/train.py") in files
    assert not [f for f in files if f.parts[0] in ("qgnn_dist", ".git", ".venv")]
    assert sum((root / f).stat().st_size for f in files) < 1 << 20
