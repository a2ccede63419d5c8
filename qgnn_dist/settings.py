# SPDX-License-Identifier: Apache-2.0
"""The reference of all settings, from config.py itself: what `qgnn settings` prints and docs/configuration.md holds."""
from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .config import FREE_KEYS, FREE_SECTIONS, PUBLISHED_DEFAULTS, known_keys

__all__ = ["MENDING", "Setting", "page", "settings", "show", "show_page"]

MENDING = "qgnn settings --markdown > docs/configuration.md"
"""Writes the page."""
_TYPES = {"int": "whole number", "float": "number", "str": "word"}
_SECTIONS = {
    "": "",
    "model": "The perceptron in front of the propagation.",
    "propagation": "The layers: what each computes, and the smoothness constraint ([method.md](method.md)). "
                   "`constraint = published` has defaults of its own: {published}. smp and appnp diverge on every "
                   "graph from eta = 2/(1 + 2·mu) on, which is refused.",
    "messages": "What a round sends between workers. A stride above 1 needs innovation-coded messages of the recipe, "
                "and merged rounds.",
    "quant": "Widths in bits. An open width follows `bits`; what a run resolved is in RUN/config.toml.",
    "train": "The optimiser, and when a run ends.",
    "cluster": "Where workers run. No result depends on it ([cluster.md](cluster.md), [recovery.md](recovery.md)).",
    "timeouts": "Every wait has a deadline, and its error names the setting. No result depends on them.",
    "storage": "Object stores ([storage.md](storage.md)).",
    "log": "What a run says of itself ([observability.md](observability.md)).",
}
_HEAD = """# Settings

*Written by `{mending}` from qgnn_dist/config.py; a test holds it to the code.*

`qgnn train`, `predict` and `plan` take them from a TOML file (`--config FILE.toml`) and from `--set section.key=value`,
again for more; the option goes before the file, the file before the default. A wrong key or value is refused with the
near one and what is expected, all faults at once. `qgnn settings [WORD]` shows this page in a terminal. In Python:
`qgnn.train(…, overrides=["quant.bits=4"])`.

```toml
seed = 1

[quant]
bits = 4

[train]
epochs = 400
```

*Resume*: a run that goes on with `--resume` may change it. A default that is *open* follows other settings."""


@dataclass(frozen=True)
class Setting:
    """One setting: dotted key; type, default and allowed values in words; unit, empty for none; meaning.

    `resumable`: whether a resumed run may change it, since no result depends on it.
    """

    key: str
    type: str
    default: str
    allowed: str
    unit: str
    meaning: str
    resumable: bool

    @property
    def section(self) -> str:
        """Before the dot; empty at the top."""
        return self.key.rpartition(".")[0]


def settings(word: str = "") -> list[Setting]:
    """All settings whose key or meaning has the word in it, in config.py's order."""
    found = []
    for key, spec in known_keys().items():
        section, _, name = key.rpartition(".")
        kind = str(spec.type).replace(" | None", "")
        found.append(Setting(
            key, _TYPES[kind], _default(spec.default), _allowed(spec.metadata), spec.metadata["unit"],
            spec.metadata["doc"], section in FREE_SECTIONS or (section == "train" and name in FREE_KEYS)))
    return [one for one in found if word.lower() in f"{one.key} {one.meaning}".lower()]


def page() -> str:
    """docs/configuration.md."""
    parts = [_HEAD.format(mending=MENDING)]
    published = ", ".join(f"{key} = {value:g}" for key, value in PUBLISHED_DEFAULTS.items())
    for section, about in _SECTIONS.items():
        rows = [one for one in settings() if one.section == section]
        said = [textwrap.fill(about.format(published=published), 120, break_on_hyphens=False), ""] if about else []
        lines = [f"## [{section}]" if section else "## At the top", "", *said,
                 "| key | type | default | allowed | unit | meaning | resume |", "|---|---|---|---|---|---|---|"]
        for one in rows:
            meaning = re.sub(r"([|<*])", r"\\\1", one.meaning)
            lines.append(f"| `{one.key}` | {one.type} | {one.default} | {one.allowed} | {one.unit} | {meaning} | "
                         f"{'yes' if one.resumable else ''} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def show_page(result: dict[str, Any], console: Console) -> None:
    """The page as it is, whatever the terminal's width."""
    print(result["markdown"], end="", file=console.file)


def show(result: dict[str, Any], console: Console) -> None:
    """The settings of a result {"settings": [one as plain values]}, a table a section; no word of it is broken."""
    rows = [Setting(**values) for values in result["settings"]]
    defaults = {one.key: one.default + (f" {one.unit}" if one.unit and one.default != "open" else "") for one in rows}
    widths = (_widest(one.key.rpartition(".")[2] for one in rows), _widest(defaults.values()),
              _widest(one.allowed for one in rows))
    if not rows:
        console.print("no such setting; `qgnn settings` shows all")
    for section in dict.fromkeys(one.section for one in rows):
        title = escape(f"[{section}]") if section else "at the top"
        table = Table(title=title, title_justify="left", title_style="bold", expand=True)
        for name, width in zip(("key", "default", "allowed"), widths):
            table.add_column(name, overflow="fold", width=max(width, len(name)))
        table.add_column("meaning", overflow="fold", ratio=1)
        for one in (one for one in rows if one.section == section):
            table.add_row(escape(one.key.rpartition(".")[2]), defaults[one.key], one.allowed, escape(one.meaning))
        console.print(table, highlight=False)
    if "open" in defaults.values():
        console.print("open: follows other settings, as its meaning says; the widths and the decay that a run took "
                      "are in RUN/summary.json", highlight=False)


def _widest(texts: Iterable[str]) -> int:
    """Columns of the longest word."""
    return max((len(word) for text in texts for word in text.split()), default=0)


def _default(value: Any) -> str:
    if value is None:
        return "open"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _allowed(limits: Any) -> str:
    if limits["choices"]:
        return ", ".join(str(choice) for choice in limits["choices"])
    low, high, above = limits["low"], limits["high"], limits["above"]
    ends = [f"above {above:g}"] if above is not None else [f"at least {low:g}"] if low is not None else []
    if high is not None:
        most = "2^63 − 1" if high >= 2**63 - 1 else f"{high:g}" if not math.isinf(high) else ""
        ends.append(f"at most {most}")
    return ", ".join(ends) or "any"
