# SPDX-License-Identifier: Apache-2.0
"""What every command of `qgnn` shares: one line for an error, exit codes (1 failed, 2 wrong use or input), options."""
from __future__ import annotations

import contextlib
import functools
import json
import logging
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console

from . import logs
from .config import RunConfig, known_keys, load_config
from .errors import QgnnError, QgnnWarning

__all__ = ["Debug", "Json", "LogFormat", "Outcome", "Overwrite", "RayAddress", "Settings", "beside", "command",
           "logged", "one_of", "then"]

Outcome = tuple[dict[str, Any], Callable[[dict[str, Any], Console], None]]
"""What a command found, and how people see it."""

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the stack trace of an error.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
LogFormat = Annotated[str | None, typer.Option(
    "--log-format", help="Of what is said on stderr: text, or json, one record a line.")]
RayAddress = Annotated[str | None, typer.Option(
    "--ray-address", help="Join this Ray cluster; default: RAY_ADDRESS, else a local Ray for this command.")]


def one_of(*words: str) -> Callable[[str], list[str]]:
    """What a shell completes an option's value to."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


def _known_settings(incomplete: str) -> list[str]:
    """What a shell completes `--set` to: keys, and after `=` the values that a key may take."""
    key, equals, value = incomplete.partition("=")
    if not equals:
        return [f"{name}=" for name in known_keys() if name.startswith(key)]
    choices = known_keys()[key].metadata["choices"] if key in known_keys() else ()
    return [f"{key}={choice}" for choice in choices if str(choice).startswith(value)]


Settings = Annotated[list[str] | None, typer.Option(
    "--set", metavar="KEY=VALUE", autocompletion=_known_settings,
    help="One setting, as quant.bits=2; again for more. `qgnn settings` lists all.")]


def then(show: Callable[[dict[str, Any], Console], None], *steps: str) -> Callable[[dict[str, Any], Console], None]:
    """What shows a result, and the commands that go on from it, a line each."""
    def shown(result: dict[str, Any], console: Console) -> None:
        show(result, console)
        for at, words in enumerate(steps):
            lead = "      " if at else "next: "
            console.print(lead + words, style="dim", markup=False, highlight=False, soft_wrap=True)
    return shown


def beside(path: str, name: str) -> str:
    """A path of this name in the same folder, or under the same prefix, quoted for a shell.

    >>> [beside(path, "run") for path in ("store", "/my data/store/", "s3://bucket/store", "s3://bucket")]
    ['run', "'/my data/run'", 's3://bucket/run', 'run']
    """
    head, slash, _ = path.rstrip("/").rpartition("/")
    return shlex.quote(name if head.endswith(":/") else f"{head}{slash}{name}")


def logged(form: str | None, config: Path | None, settings: Sequence[str]) -> RunConfig:
    """The settings of a run, and the log's format as the option says, or they do; from then on records have it.

    Raises: ConfigError.
    """
    if form is not None:
        settings = [*settings, f"log.format={form}"]
        logs.start(form)
    resolved = load_config(config, list(settings))
    logs.start(resolved.log.format)
    return resolved


def command(epilog: str, group: typer.Typer, name: str | None = None, *, panel: str | None = None,
            passes_on: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a command whose errors are one line on stderr and whose example stands under its help.

    Args:
        panel: title of the commands that it stands among in the group's help.
        passes_on: options that it does not know are words for another command.
    """
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> None:
            debug = bool(kwargs.get("debug"))
            try:
                # Ray and its workers print as they like; stdout is for the result alone.
                with contextlib.redirect_stdout(sys.stderr), _plain_warnings(debug):
                    result, show = function(*args, **kwargs)
            except QgnnError as error:
                _fail(str(error), error.exit_code, debug, getattr(error, "remote_traceback", None))
            except KeyboardInterrupt:
                _fail(f"interrupted{_AFTER_INTERRUPT.get(function.__name__, '')}", 1, debug)
            except OSError as error:
                _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1, debug)
            except MemoryError:
                _fail("out of memory; use more parts on more hosts, or fewer bits", 1, debug)
            except Exception as error:
                first = str(error).strip().splitlines()
                _fail(f"internal error: {type(error).__name__}: {first[0] if first else ''} "
                      "(--debug shows where)", 1, debug)
            if kwargs.get("as_json"):
                print(json.dumps(result, default=str))
            else:
                with _plain_warnings(debug):
                    show(result, Console())
            # A table of which some rows could not be measured, or what another command ended with.
            code = result.get("exit_code", 1 if result.get("failed") else 0)
            if code:
                raise typer.Exit(code)
        return group.command(name, epilog=f"Example: {epilog}", rich_help_panel=panel,
                             context_settings={"ignore_unknown_options": True} if passes_on else None)(guarded)
    return register


_AFTER_INTERRUPT = {"train": "; --resume goes on from the last checkpoint",
                    "predict": "; finished parts are kept, the same command goes on",
                    "accuracy": "; finished cells are kept, the same command goes on",
                    "search": "; finished trials are kept, the same command goes on"}


@contextlib.contextmanager
def _plain_warnings(debug: bool) -> Iterator[None]:
    """Inside, this package's warnings are one line each, as its errors are, and nobody's FutureWarning is shown.

    Other processes, as workers on Ray, have Python's form of them in their logs.
    """
    if debug:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], filename: str, lineno: int,
                 file: TextIO | None = None, line: str | None = None) -> None:
            if issubclass(category, QgnnWarning):
                _say("warning", str(message), "yellow")
            else:
                usual(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


def _fail(message: str, code: int, debug: bool, remote: str | None = None) -> None:
    if debug:
        traceback.print_exc()
        if remote:
            print(remote, file=sys.stderr)
    _say("error", message, "red")
    raise typer.Exit(code)


def _say(kind: str, message: str, style: str) -> None:
    """An error or a warning, as a line or a record on stderr."""
    if logs.is_json():
        logging.getLogger(__name__).log(logging.ERROR if kind == "error" else logging.WARNING, "%s", message)
        return
    words = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in message)
    Console(stderr=True, soft_wrap=True).print(f"{kind}: {words}", style=style, markup=False, highlight=False)
