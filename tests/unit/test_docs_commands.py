# SPDX-License-Identifier: Apache-2.0
"""What README.md, CONTRIBUTING.md, docs/ and the helps tell people to type is read by what it is typed to: commands,
options, settings, targets of make, jobs, modules, extras, Python, TOML, links.

Blocks are parsed whole; commands inside a sentence leave words out, so that only their names and options are held.
"""
from __future__ import annotations

import functools
import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from typer.testing import CliRunner

import qgnn_dist.cli
from qgnn_dist.config import known_keys, load_config
from qgnn_dist.errors import ConfigError
from qgnn_dist.files.read import parse_toml, read_toml
from tests.deployment.commands import parse_job

ROOT = Path(__file__).parents[2]
PAGES = [page for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
         if page.exists()]
OURS = ("qgnn", "make", "python", "pip", "ray")
SYSTEMS = ("cp", "mkdir", "export", "kubectl", "for", "do", "done", "cd", "git", "source")
"""Programs of the blocks: those whose words are held, and those that are the system's."""
REFUSED = (click.ClickException, typer.BadParameter.__mro__[2])
FILES = {"model.safetensors", "train.py", "storage.md", "model.onnx"}
"""Names that look like settings."""


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.S | re.M)


def shell_lines(page: Path) -> list[str]:
    """Lines of shell of a page: of indented and fenced blocks, each with what a backslash joins to it."""
    text = re.sub(r"^```(?!sh|bash|console)\w+\n.*?^```", "", text_of(page), flags=re.S | re.M)
    text = re.sub(r"\\\n\s*", " ", text)
    lines = []
    for line in re.findall(r"^(?: {4,}|\$ ?)(\S.*)$", text, re.M) + "\n".join(blocks(page, "(?:sh|bash)")).splitlines():
        first = line.split()[0] if line.split() else ""
        if first in OURS + SYSTEMS:
            lines.append(line)
    return lines


def commands(line: str) -> list[list[str]]:
    """The commands of a line as words: comments, variables, loops, redirections and pipes apart."""
    reader = shlex.shlex(line, posix=True, punctuation_chars=True)
    reader.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in reader:
        if re.fullmatch(r"[;&|<>()]+", word):
            found.append([])
        else:
            found[-1].append(word)
    cut = [words[1:] if words[:1] == ["do"] else words for words in found]
    return [words for words in cut if words and words[0] in OURS]


@functools.cache
def command_line() -> Any:
    return typer.main.get_command(qgnn_dist.cli.app)


def resolved(words: list[str]) -> tuple[Any, list[str]]:
    """The innermost command that the words name, and the words after it."""
    command = command_line()
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    return command, words


def check_qgnn(words: list[str]) -> None:
    """Words after `qgnn` that its parser takes, with settings that exist."""
    command, rest = resolved([re.sub(r"\$\w+", "1", word) for word in words])
    assert not hasattr(command, "commands"), f"no command {' '.join(words[:2])}"
    parameters = command.make_context(command.name, list(rest)).params
    load_config(None, list(parameters.get("settings") or []))
    if command.name == "submit":
        job = list(parameters["words"])
        check(["python", *job] if job[0].endswith(".py") else ["qgnn", *job])
    for name in ("grid", "config"):
        if str(parameters.get(name) or "").startswith("jobs/"):
            read_toml(ROOT / parameters[name])


def check(words: list[str]) -> None:
    """One command of a block."""
    program, rest = words[0], words[1:]
    if program == "qgnn":
        check_qgnn(rest)
    elif program == "make":
        targets = set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.M))
        assert {word for word in rest if "=" not in word and not word.startswith("-")} <= targets
    elif program == "pip":
        extras = set(read_toml(ROOT / "pyproject.toml")["project"]["optional-dependencies"])
        for named in re.findall(r"qgnn-dist\[(.*?)\]|\.\[(.*?)\]", " ".join(rest)):
            assert set("".join(named).split(",")) <= extras
    elif program == "ray" and "--" in rest:
        check(rest[rest.index("--") + 1:])
    elif program == "python" and rest[0] == "-m":
        assert rest[1] in ("pip", "timeit", "http.server") or importlib.util.find_spec(rest[1]), rest[1]
    elif program == "python" and rest[0].startswith("jobs/"):
        if rest[0] == "jobs/demo.py":
            assert (ROOT / rest[0]).exists()
        else:
            assert parse_job(shlex.join(words), "jobs")[2] == ""


LINES = [(page, line) for page in PAGES for line in shell_lines(page)]


def test_there_are_commands_to_hold() -> None:
    assert len(LINES) > 50
    assert {"qgnn", "make", "pip", "python"} <= {words[0] for _, line in LINES for words in commands(line)}
    assert commands("for a in 1; do qgnn plan s > f # x; qgnn no\ndone") == [["qgnn", "plan", "s"]]


@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{page.name}: {line[:60]}" for page, line in LINES])
def test_commands_of_a_page_are_taken(page: Path, line: str) -> None:
    for words in commands(line):
        try:
            check(words)
        except REFUSED as error:
            pytest.fail(f"{page.name}: `{line}`: {error.format_message()}")
        except ConfigError as error:
            pytest.fail(f"{page.name}: `{line}`: {error}")


def every_command(command: Any) -> list[Any]:
    """A group's commands and its groups' commands."""
    inner = getattr(command, "commands", None)
    return [command] if inner is None else [one for part in inner.values() for one in every_command(part)]


@pytest.mark.parametrize("command", every_command(command_line()), ids=lambda command: str(command.name))
def test_every_help_has_an_example_that_its_command_takes(command: Any) -> None:
    program, *words = shlex.split(command.epilog.removeprefix("Example: "))
    assert program == "qgnn"
    assert resolved(words)[0] is command
    check_qgnn(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_inside_sentences_exist(page: Path) -> None:
    """`qgnn COMMAND --option`, `--set key=value`, `make TARGET` and `section.key` between backticks."""
    prose = re.sub(r"^```.*?^```", "", text_of(page), flags=re.S | re.M)
    sections = {key.partition(".")[0] for key in known_keys() if "." in key}
    for code in re.findall(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)", prose):
        words = code.replace("\n", " ").split()
        if words[0] == "qgnn":
            command, rest = resolved(words[1:])
            known = {name for one in command.params for name in one.opts} | {"--help", "--install-completion"}
            if command.name == "submit":
                known |= {word for word in rest if word.startswith("--")}
            inside = hasattr(command, "commands") and rest and re.fullmatch(r"[a-z]+", rest[0])
            assert not inside, f"{page.name}: `{code}`: no command {rest[0]}"
            unknown = {word.partition("=")[0] for word in rest if word.startswith("--") and word != "--"} - known
            assert not unknown, f"{page.name}: `{code}`: no option {unknown}"
        if words[0] == "make" and len(words) > 1:
            check(words[:2])
        if words[0] == "pip":
            check(words)
        for section, name in re.findall(r"(?<![\w./-])([a-z]+)\.([a-z_0-9]+)(?![\w./(])", code):
            if section in sections and f"{section}.{name}" not in FILES:
                assert f"{section}.{name}" in known_keys(), f"{page.name}: `{code}`: no setting {section}.{name}"
        for pair in re.findall(r"--set (\w+\.\w+=[\w.]+)", code):
            if pair != "section.key=value":
                load_config(None, [pair])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_and_toml_of_a_page_are_such(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")
    for block in blocks(page, "toml"):
        load_config(values=parse_toml(block))


@functools.cache
def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text_of(page), flags=re.S | re.M), re.M)
    plain = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", head).lower() for head in heads]
    return {re.sub(r"[^\w\- ]", "", head).replace(" ", "-") for head in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(place), f"{page.name}: {target}: no heading {anchor}"


def test_the_index_has_every_page() -> None:
    index = ROOT / "docs" / "README.md"
    rows = re.findall(r"\]\((\w[\w-]*\.md)\)", re.sub(r"^Start with.*?^##", "", text_of(index), flags=re.S | re.M))
    there = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md", "concepts.md"}
    assert set(rows) == there


def test_qgnn_alone_shows_the_path_in_six_lines() -> None:
    told = CliRunner().invoke(qgnn_dist.cli.app, [])
    assert told.exit_code == 2
    assert told.stdout == ""
    assert max(map(len, told.stderr.splitlines())) <= 80
    shown = [shlex.split(line)[1:] for line in told.stderr.splitlines() if line.startswith("  qgnn ")]
    assert [words[0] for words in shown] == ["partition", "train", "report", "export", "predict", "inspect"]
    for words in shown:
        check_qgnn(words)


@pytest.mark.parametrize(("typed", "offered"), [
    ("qgnn pa", ["partition"]),
    ("qgnn train store --set quant.me", ["quant.method=", "quant.messages="]),
    ("qgnn train store --set messages.coding=", ["messages.coding=innovation", "messages.coding=direct"]),
    ("qgnn partition g.npz --method m", ["metis", "mtkahypar"]),
])
def test_a_shell_completes_commands_settings_and_values(typed: str, offered: list[str]) -> None:
    environment = {"_QGNN_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    told = CliRunner().invoke(qgnn_dist.cli.app, [], env=environment, prog_name="qgnn")
    assert told.stdout.split() == offered
