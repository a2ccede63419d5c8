# SPDX-License-Identifier: Apache-2.0
"""A small reading of the Dockerfile: pinned bases, our versions, what it copies, who it runs as."""
from __future__ import annotations

import re
import shlex

from .faults import differ
from .project import RAY, ROOT, VERSION

__all__ = ["check_dockerfile", "jobs_folder", "user"]

_KNOWN = ("FROM", "ARG", "RUN", "WORKDIR", "COPY", "USER", "ENV", "CMD", "LABEL", "EXPOSE")
_PROGRAMS = {"wget": "KubeRay's probes", "procps": "pkill and pgrep of preStop"}
_BASE = re.compile(r"python:3\.(\d+)\.\d+-slim-\w+")
_HOST = re.compile(r"https?://\S+|\b[\w-]+\.(?:com|io|org|net|dev)\b")


def instructions(text: str) -> list[tuple[int, str, str]]:
    """Line number, instruction and the rest, continued lines joined, comments left out."""
    found: list[tuple[int, str, str]] = []
    open_line = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("#") or not line.strip():
            continue
        body = line.rstrip("\\").strip()
        if open_line:
            at, name, rest = found.pop()
            found.append((at, name, f"{rest} {body}"))
        else:
            name, _, rest = body.partition(" ")
            found.append((number, name, rest.strip()))
        open_line = line.endswith("\\")
    return found


def check_dockerfile(text: str) -> list[str]:
    """Faults, each `line N: got X, expected Y`."""
    lines = instructions(text)
    faults = [f"line {n}: got {name}, expected one of {', '.join(_KNOWN)}" for n, name, _ in lines
              if name not in _KNOWN]
    bases = [(n, rest) for n, name, rest in lines if name == "FROM"]
    for n, rest in bases:
        base = _BASE.fullmatch(rest.split(" AS ")[0])
        if base is None or int(base[1]) < 11:  # the versions of constraints.txt are for Python 3.11 and above
            faults.append(f"line {n}: got FROM {rest}, expected python:3.MINOR.PATCH-slim-RELEASE, 3.11 or above")
    if len({rest.split(" AS ")[0] for _, rest in bases}) != 1 or len(bases) != 2:
        faults.append(f"FROM: got {[rest for _, rest in bases]}, expected two stages of one base")
    for n, name, rest in lines:
        faults += [f"line {n}: got {host}, expected no host name" for host in _HOST.findall(rest)]
        if re.search(r"-m(arch|tune|cpu)\b", rest):
            faults.append(f"line {n}: got {rest}, expected no compiler flag for one processor")
        if name == "COPY":
            faults += [f"line {n}: got {source}, expected a file or folder of the checkout"
                       for source in _copied(rest) if not (ROOT / source).exists()]
        if name == "RUN" and re.search(r"pip (install|wheel)", rest):
            if not re.search(r"-c \S*constraints\.txt", rest):
                faults.append(f"line {n}: got {rest}, expected -c constraints.txt")
            for package, pattern, version in (("ray", r"ray\[default\]==([\w.]+)", RAY),
                                              ("qgnn_dist", r"qgnn_dist-([\w.]+)-", VERSION)):
                for got in re.findall(pattern, rest):
                    faults += differ(f"line {n} {package}", got, version)
    needed = {"constraints.txt", "pyproject.toml", "CMakeLists.txt", "README.md", "qgnn_dist", "jobs"}
    missing = needed - {source for _, name, rest in lines if name == "COPY" for source in _copied(rest)}
    faults += [f"COPY: got no {name}, expected it in the image or its build" for name in sorted(missing)]
    last = max((i for i, (_, name, _) in enumerate(lines) if name == "FROM"), default=0)
    installed = set(" ".join(rest for _, name, rest in lines[last:] if name == "RUN" and "apt-get" in rest).split())
    faults += [f"RUN apt-get of the last stage: got no {name}, expected it for {why}" for name, why in _PROGRAMS.items()
               if name not in installed]
    if not re.fullmatch(r"[1-9]\d*", user(text)):
        faults.append(f"USER: got {user(text)!r}, expected a number other than 0, last in the file")
    return faults


def user(text: str) -> str:
    """Who the image runs as, as it is written."""
    last = max((i for i, (_, name, _) in enumerate(instructions(text)) if name == "FROM"), default=0)
    return next((rest for _, name, rest in reversed(instructions(text)[last:]) if name == "USER"), "")


def jobs_folder(text: str) -> str:
    """Where the image has jobs/."""
    copies = [rest.split() for _, name, rest in instructions(text) if name == "COPY"]
    return next((words[-1] for words in copies if words[0] == "jobs"), "")


def _copied(rest: str) -> list[str]:
    words = shlex.split(rest)
    return [] if words[0].startswith("--from") else words[:-1]
