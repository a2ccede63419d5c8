# SPDX-License-Identifier: Apache-2.0
"""Commands inside configuration files, read by the parsers of those who run them: Ray, our jobs, `qgnn`."""
from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import click
import typer
from ray.scripts.scripts import start as ray_start

import qgnn_dist.cli
from qgnn_dist.config import RunConfig, load_config
from qgnn_dist.errors import QgnnError

from .project import ROOT

__all__ = ["JOBS", "parse_job", "parse_ray_start", "parse_shown", "start_of"]

_REFUSED = (click.ClickException, typer.BadParameter.__mro__[2])
"""Ray's command line is of click, ours of typer, whose newer versions have a click of their own."""
JOBS = ("export.py", "partition.py", "pipeline.py", "predict.py", "train.py")


def parse_ray_start(words: list[str]) -> tuple[dict[str, Any], str]:
    """Ray's options of `ray start WORDS`, and what its parser has against them."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return ray_start.make_context("start", list(words)).params, ""
    except _REFUSED as error:
        return {}, error.format_message()


def start_of(command: str) -> tuple[dict[str, str], list[str] | None]:
    """The variables that a shell command sets, and the words after its `ray start`; None where it has none."""
    words = shlex.split(command.replace(";", " "))
    at = next((i for i, word in enumerate(words) if word.endswith("ray") and words[i + 1:i + 2] == ["start"]), None)
    before = words if at is None else words[:at]
    variables = dict(word.split("=", 1) for word in before if re.match(r"[A-Za-z_]\w*=", word))
    return variables, None if at is None else words[at + 2:]


def parse_job(entrypoint: str, folder: str) -> tuple[dict[str, Any], RunConfig | None, str]:
    """The parameters of `python FOLDER/JOB.py …` by that job's own parser, its settings, and what is wrong."""
    words = shlex.split(entrypoint)
    script = Path(words[1]) if len(words) > 1 else Path()
    if not words or words[0] != "python" or str(script.parent) != folder or script.name not in JOBS:
        return {}, None, f"python {folder}/JOB … with one of {', '.join(JOBS)}"
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            parameters = _pipeline(words[2:]) if script.name == "pipeline.py" else _wrapped(script.name, words[2:])
        return parameters, load_config(None, list(parameters.get("settings") or [])), ""
    except _REFUSED as error:
        return {}, None, f"words that {script.name} takes ({error.format_message()})"
    except SystemExit:
        return {}, None, f"words that {script.name} takes ({said.getvalue().strip().splitlines()[-1]})"
    except QgnnError as error:
        return {}, None, f"settings that exist ({error})"


def parse_shown(text: str) -> list[str]:
    """Faults of the `qgnn submit` commands that a file's comments show."""
    joined = re.sub(r"\n#     (?=--)", " ", text)
    faults = []
    for shown in re.findall(r"^#.*?(qgnn submit .*?)(?:  |$)", joined, re.M):
        try:
            words = _parse(shlex.split(shown)[1:]).params["words"]
            _parse(list(words))
        except _REFUSED as error:
            faults.append(f"comment `{shown}`: {error.format_message()}, expected words that qgnn takes")
    return faults


def _pipeline(words: list[str]) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("pipeline", ROOT / "jobs" / "pipeline.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with mock.patch.object(module, "run") as run, mock.patch.object(sys, "argv", ["pipeline.py", *words]):
        module.main()
    return dict(zip(("source", "parts", "out", "config", "settings"), run.call_args.args))


def _wrapped(name: str, words: list[str]) -> dict[str, Any]:
    """What a thin job hands to the command line."""
    with mock.patch.object(sys, "argv", [name, *words]), mock.patch.object(qgnn_dist.cli, "main"):
        runpy.run_path(str(ROOT / "jobs" / name), run_name="__main__")
        return dict(_parse(sys.argv[1:]).params)


def _parse(words: list[str]) -> Any:
    commands = _commands()
    if not words or words[0] not in commands:
        raise click.UsageError(f"no command {' '.join(words[:1])}")
    return commands[words[0]].make_context(words[0], list(words[1:]))


@functools.cache
def _commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(qgnn_dist.cli.app)
    return dict(group.commands)
