# SPDX-License-Identifier: Apache-2.0
"""What was set, and what differs between runs; versions, graph and where figures come from."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..config import RunConfig, load_config
from .blocks import Section, Table
from .runs import RunData

__all__ = ["differences", "settings_section"]


def _flat(config: RunConfig) -> dict[str, Any]:
    """Dotted key → value; `open` where that follows other settings."""
    found: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        if isinstance(value, dict):
            found |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            found[name] = value
    return {key: "open" if value is None else value for key, value in found.items()}


def _set(run: RunData) -> dict[str, Any]:
    """A run's settings, and what an open weight decay came to, where its summary says so."""
    found = _flat(run.config)
    decay = (run.summary or {}).get("weight_decay")
    if found["train.weight_decay"] == "open" and decay is not None:
        found["train.weight_decay"] = f"open: {decay:g}"
    return found


def _graph(run: RunData) -> dict[str, str]:
    """What the run was trained on, as far as it is known."""
    identity = run.identity or {}
    name = (run.summary or {}).get("graph") or (run.model.info.graph if run.model else "–")
    partitioner = identity.get("partitioner")
    cut = f"{partitioner.get('method')}, seed {partitioner.get('seed')}" if isinstance(partitioner, dict) else "–"
    return {"graph": str(name), "fingerprint": str(identity.get("fingerprint", "–"))[:16], "parts": str(run.workers),
            "partitioner": cut, "order of rows": str(identity.get("order", "–"))}


def differences(runs: Sequence[RunData]) -> Table:
    """Settings and graphs that are not the same in all runs."""
    tables = [{**_graph(run), **_set(run)} for run in runs]
    rows = [[key, *(str(table.get(key, "–")) for table in tables)] for key in tables[0]
            if len({str(table.get(key, "–")) for table in tables}) > 1]
    note = "" if rows else "graph and settings are the same in all of them"
    return Table("What differs", ["", *(run.name for run in runs)], rows, note, span=2)


def settings_section(runs: Sequence[RunData]) -> Section:
    """All of it, folded."""
    section = Section("settings", "Settings and versions", "", folded=True)
    default = _flat(load_config())
    head = [run.name for run in runs] if len(runs) > 1 else ["value"]
    tables = [_set(run) for run in runs]
    keys = list(dict.fromkeys(key for table in tables for key in table))
    section.blocks.append(Table("Graph", ["", *head], [
        [key, *(_graph(run)[key] for run in runs)] for key in _graph(runs[0])], left=range(1, 9)))
    versions = [(run.summary or {}).get("versions", {}) for run in runs]
    names = list(dict.fromkeys(name for one in versions for name in one))
    if names:
        section.blocks.append(Table("Versions", ["", *head], [
            [name, *(str(one.get(name, "–")) for one in versions)] for name in names], left=range(1, 9)))
    section.blocks.append(Table("Settings", ["key", *head, "default"], [
        [key, *(str(table.get(key, "–")) for table in tables), str(default.get(key, "–"))] for key in keys],
        left=range(1, 10), span=4))
    section.blocks.append(Table("Where figures come from", ["file", "what"], [
        ["metrics.jsonl", "curves, λ, seconds, bytes: the values that stand there, as they are"],
        ["final.json", "answers by degree and class, confusion, rows between parts: the best model, once, at the end"],
        ["trace.json", "timeline of that forward"], ["summary.json", "peaks of memory, warnings, versions"],
        ["checkpoints/", "the packed model: its size, and what --store measures of it"],
        ["config.toml", "settings"], ["status.json, restarts.jsonl", "hosts, what happened"]], left=(1,), span=4))
    return section
