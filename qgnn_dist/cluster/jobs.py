# SPDX-License-Identifier: Apache-2.0
"""`qgnn submit`: a command of ours as a Ray job on a cluster that is there, its log here, its exit code ours.

The job is `python -m qgnn_dist.cli COMMAND …` on the cluster's head, where Ray has set RAY_ADDRESS, so that it joins
the cluster it runs on; or `python SCRIPT.py …`, a script of the working directory, as jobs/pipeline.py. Which
`qgnn_dist` that is: the one installed there, or the wheel that goes with the job; never a source folder, whose kernels
are not compiled, so `qgnn_dist/` of the working directory is not uploaded.
"""
from __future__ import annotations

import asyncio
import http.client
import shlex
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import InputError, QgnnError

__all__ = ["DETACH", "JOB_COMMANDS", "STOP", "submit"]

JOB_COMMANDS = ("partition", "train", "export", "predict", "inspect", "report", "plan", "bench")
DETACH, STOP = "detach", "stop"
_EXCLUDED = ["/qgnn_dist/", "/tests/", "/build/", "/.venv/", "/.git/"]
_SUCCEEDED, _STOPPED, _ENDED = "SUCCEEDED", "STOPPED", ("SUCCEEDED", "FAILED", "STOPPED")
_POLL_S = 1.0
PROBE_S = 10.0


def submit(words: Sequence[str], *, address: str, name: str | None = None, working_dir: str | Path | None = None,
           wheel: str | Path | None = None, environment: Sequence[str] = (), follow: bool = True,
           on_start: Callable[[str], None] | None = None, on_log: Callable[[str], None] | None = None,
           on_interrupt: Callable[[], str] | None = None, on_warning: Callable[[str], None] | None = None,
           ) -> dict[str, Any]:
    """Run a command on a cluster and wait for its end.

    Args:
        words: the command and its arguments, or a script of `working_dir` and its; other paths are those of the
            cluster's hosts. address: of the cluster's dashboard, as http://head:8265. name: of the job; Ray makes one
            up.
        working_dir: a local folder that goes with the job, for configuration files; paths in `words` are relative to
            it. wheel: a wheel of this package that goes with the job, where the cluster has none installed.
        environment: NAME=VALUE for the job and its workers. follow: False returns once it is submitted.
        on_start: called with the job's id; on_log: with pieces of its log; on_warning: with words of warning.
        on_interrupt: asked at Ctrl-C; DETACH lets the job go on, STOP ends it. None detaches.
    Returns: {job, status, exit_code, message}: status SUBMITTED where nobody waits, DETACHED, or Ray's last word.
    Raises: InputError: a command or file of no use, no such cluster, or the name is taken.
    """
    entrypoint = _entrypoint(words, working_dir)
    runtime = _runtime(working_dir, wheel, environment)
    client = _client(address)
    _compare_versions(client, on_warning)
    with _ray_errors(address, name):
        job = client.submit_job(entrypoint=shlex.join(entrypoint), submission_id=name, runtime_env=runtime)
    if on_start is not None:
        on_start(job)
    if not follow:
        return {"job": job, "status": "SUBMITTED", "exit_code": 0, "message": ""}
    try:
        _follow(client, job, on_log)
    except KeyboardInterrupt:
        if on_interrupt is None or on_interrupt() != STOP:
            return {"job": job, "status": "DETACHED", "exit_code": 0, "message": _afterwards(job, address)}
        with _ray_errors(address, name):
            client.stop_job(job)
            asyncio.run(_ended(client, job))
    return _outcome(client, job)


def _entrypoint(words: Sequence[str], working_dir: str | Path | None) -> list[str]:
    """What the job runs. Raises: InputError: neither a command nor a script that goes with the job."""
    if words and words[0].endswith(".py"):
        if working_dir is None or Path(words[0]).is_absolute() or not (Path(working_dir) / words[0]).is_file():
            raise InputError(f"submit {words[0]}: no such script in --working-dir {working_dir or ''}".rstrip() +
                             "; give the folder that it lies in, as --working-dir ., and its path there")
        return ["python", *words]
    if not words or words[0] not in JOB_COMMANDS:
        raise InputError(f"{' '.join(['submit', *words[:1]])}: expected one of {', '.join(JOB_COMMANDS)}, or a script "
                         "of --working-dir")
    return ["python", "-m", "qgnn_dist.cli", *words]


def _runtime(working_dir: str | Path | None, wheel: str | Path | None, environment: Sequence[str]) -> dict[str, Any]:
    """Ray's runtime environment of the job."""
    runtime: dict[str, Any] = {}
    if working_dir is not None:
        if not Path(working_dir).is_dir():
            raise InputError("--working-dir is no folder", file=str(working_dir))
        runtime |= {"working_dir": str(working_dir), "excludes": _EXCLUDED}
    if wheel is not None:
        if not Path(wheel).is_file() or Path(wheel).suffix != ".whl":
            raise InputError("--wheel is no wheel; `pip wheel --no-deps .` in a checkout makes one", file=str(wheel))
        runtime["py_modules"] = [str(wheel)]
    pairs = [word.partition("=") for word in environment]
    odd = [name + sep for name, sep, _ in pairs if not sep or not name.isidentifier()]
    if odd:
        raise InputError(f"--env {odd[0]}: expected NAME=VALUE")
    if pairs:
        runtime["env_vars"] = {name: value for name, _, value in pairs}
    return runtime


def _client(address: str) -> Any:
    """Ray's client of a jobs server that answers; the client itself would wait for ever for one that does not."""
    try:
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise InputError(f"jobs need Ray's job client ({error}); pip install 'ray[default]'") from None
    with _ray_errors(address, None):
        if address.startswith(("http://", "https://")):
            _knock(address)
        return JobSubmissionClient(address)


def _knock(address: str) -> None:
    """See that somebody answers in time. Raises: ConnectionError."""
    try:
        urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=PROBE_S).close()
    except urllib.error.HTTPError:
        pass  # it does answer; the client says what is wrong
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(getattr(error, "reason", None) or error) from None


def _compare_versions(client: Any, on_warning: Callable[[str], None] | None) -> None:
    """Warn of a cluster of another Ray; `get_version` has that of the interface, and no public word Ray's own."""
    import ray

    there = getattr(client, "_server_ray_version", None)
    if there and there.split(".")[:2] != ray.__version__.split(".")[:2] and on_warning is not None:
        on_warning(f"the cluster runs Ray {there}, this client is of {ray.__version__}: the job may be refused; "
                   "install the cluster's version here")


@contextmanager
def _ray_errors(address: str, name: str | None) -> Iterator[None]:
    """What Ray's client says, in one line that tells what to do."""
    from ray.exceptions import RayError

    try:
        yield
    except (ConnectionError, ValueError) as error:
        raise InputError(f"no Ray cluster answers at {address} ({_first_line(error)}); give its dashboard's address, "
                         "as http://HEAD:8265, and see that the port is open") from None
    except (RuntimeError, RayError, OSError) as error:
        text = _first_line(error)
        if "already exists" in text:
            raise InputError(f"there has been a job named {name} on this cluster; choose another --name") from None
        if "401" in text or "403" in text or "oken" in text:
            raise InputError(f"the cluster at {address} asks for a token, and this command has none or another one; "
                             "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH as on its hosts (docs/security.md)"
                             ) from None
        raise QgnnError(f"Ray's job server at {address}: {text}") from None


def _first_line(error: BaseException) -> str:
    """Without the server's stack trace; its last line says what happened."""
    lines = [line for line in str(error).replace("\\n", "\n").strip().splitlines() if line.strip(" '\"}.")]
    picked = next((line for line in lines if "already exists" in line), lines[0] if lines else type(error).__name__)
    return picked.strip()[:300]


def _follow(client: Any, job: str, on_log: Callable[[str], None] | None) -> None:
    """Hand over the log as it is written, until the job has ended; a log that breaks off is not the job's end."""
    async def tail() -> None:
        try:
            async for piece in client.tail_job_logs(job):
                if on_log is not None:
                    on_log(piece)
        except RuntimeError:
            pass  # the connection, not the job: what the job does is asked below
        await _ended(client, job)

    asyncio.run(tail())


async def _ended(client: Any, job: str) -> None:
    while str(client.get_job_status(job).value) not in _ENDED:
        await asyncio.sleep(_POLL_S)


def _outcome(client: Any, job: str) -> dict[str, Any]:
    info = client.get_job_info(job)
    status, code = str(info.status.value), info.driver_exit_code
    if status == _SUCCEEDED:
        return {"job": job, "status": status, "exit_code": 0, "message": ""}
    said = "the job was stopped" if status == _STOPPED else (str(info.message or "").strip() or "the job failed")
    return {"job": job, "status": status, "exit_code": code if isinstance(code, int) and code > 0 else 1,
            "message": said.splitlines()[0].partition(", last available logs")[0][:300]}


def _afterwards(job: str, address: str) -> str:
    return (f"the job goes on; ray job logs --follow {job} --address {address} shows it, ray job stop {job} --address "
            f"{address} ends it")
