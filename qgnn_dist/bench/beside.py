# SPDX-License-Identifier: Apache-2.0
"""What the benches that set ours beside stock have in common: their settings, rows, tables and files."""
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..store.reader import Store
from .folder import table_folder
from .machine import envelope

__all__ = ["KINDS", "SETTINGS", "check_bench", "compare", "finish", "head", "is_ours", "markdown", "tables"]

KINDS = {"appnp": ("propagation.kind=appnp",), "smp-merged": ("propagation.kind=smp", "propagation.rounds=merged"),
         "smp-two": ("propagation.kind=smp", "propagation.rounds=two")}
"""What is propagated, by which settings."""
SETTINGS = ("propagation.alpha=0.01", "model.feature_norm=none")
"""Of every model: a threshold that keeps the multiplier at work, and features as they are, as stock takes them."""
_NAMES = {"inference": "features to classes", "train": "a training epoch"}
_ROW_OF_ITS_OWN = ("torch-compile",)
"""Stock systems that nothing is compared with."""
Tables = list[tuple[str, list[str], list[list[str]]]]


def check_bench(bench: str, out: str | Path, kinds: Sequence[str] | None, *, pictures: bool,
                overwrite: bool) -> tuple[Path, list[str]]:
    """The output's folder and the kinds to run.

    Raises: InputError: an unknown kind; see table_folder.
    """
    chosen = list(KINDS) if kinds is None else list(dict.fromkeys(kinds))
    unknown = [kind for kind in chosen if kind not in KINDS]
    if unknown:
        raise InputError(f"--kind {unknown[0]}: expected {', '.join(KINDS)}")
    return table_folder(out, bench, overwrite=overwrite, pictures=pictures), chosen


def is_ours(system: str) -> bool:
    """Whether a system's name is one of ours."""
    return system.startswith("qgnn-")


def head(store: Store, kind: str, system: str, threads: int) -> dict[str, Any]:
    """How a row begins."""
    return {"system": system, "shape": store.name, "kind": kind,
            "rounds": kind.rpartition("-")[2] if "-" in kind else "merged",
            "coding": "innovation" if is_ours(system) else None, "threads": threads, "nodes": store.num_nodes,
            "edges": store.num_edges}


def compare(rows: Sequence[dict[str, Any]]) -> None:
    """Each measured row against the fastest stock system of its kind, and of the published two rounds."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["ms_median"] is None or is_ours(row["system"]) or row["system"] in _ROW_OF_ITS_OWN:
            continue
        if row["kind"] not in best or row["ms_median"] < best[row["kind"]]["ms_median"]:
            best[row["kind"]] = row
    for row in rows:
        stock = best.get(row["kind"])
        if row["ms_median"] is None or stock is None:
            continue
        row |= {"stock": stock["system"], "speedup": stock["ms_median"] / row["ms_median"]}
        if row["kind"] == "smp-merged" and "smp-two" in best:
            row["speedup_over_two"] = best["smp-two"]["ms_median"] / row["ms_median"]


def finish(bench: str, out: Path, rows: list[dict[str, Any]], *, pictures: bool, **more: Any) -> dict[str, Any]:
    """Write table.json, table.md and the picture; returns the table with the `files` that it wrote.

    Args: more: what stands beside the rows.
    """
    from ..files.write import write_atomically

    result = {"schema": 2, "bench": bench, **more, **envelope(rows)}
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "table.json", (json.dumps(result, indent=2) + "\n").encode())
    write_atomically(out / "table.md", markdown(result).encode())
    files = [out / "table.md", out / "table.json"]
    if pictures:
        from .bars import write_bars

        files += write_bars(rows, out)
    return {**result, "files": [str(file) for file in files]}


def tables(result: dict[str, Any]) -> Tables:
    """Title, columns and lines of each table: times and memory of every kind."""
    found: Tables = []
    for kind in dict.fromkeys(row["kind"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["kind"] == kind]
        first = rows[0]
        title = f"{first['shape']}, {kind}, {first['threads']} threads: {_NAMES[result['bench']]}"
        found.append(_table(title, rows, _TIMES, result))
        if result["bench"] == "inference":
            found.append(_table(f"{first['shape']}, {kind}: bytes", rows, _BYTES, result))
        if "memory" in first:
            found.append(_depths(f"{first['shape']}, {kind}: peak memory above an idle process, MiB", rows))
    return found


_TIMES = {"ms": "ms_median", "10-90 %": "ms_p90", "x stock": "speedup", "x stock, two rounds": "speedup_over_two",
          "compile, s": "compile_s", "GB/s": "bandwidth_bytes_per_s", "of stream copy": "of_stream",
          "agreement, %": "agreement", "test, %": "accuracy"}
_BYTES = {"model": "model_bytes", "without header": "tensor_bytes", "x smaller": "model_ratio",
          "sent a node": "message_bytes_per_node", "state a node": "state_bytes_per_node",
          "inputs, MiB": "input_bytes", "peak, MiB": "peak_bytes", "qgnn predict, MiB": "predict_bytes",
          "estimate, MiB": "estimate_bytes"}


def _table(title: str, rows: Sequence[dict[str, Any]], columns: dict[str, str],
           result: dict[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    rows = [_derived(row, result) for row in rows]
    there = [name for name, key in columns.items() if any(row.get(key) is not None for row in rows)]
    return title, ["system", *there], [[row["system"], *(_text(columns[name], row) for name in there)] for row in rows]


def _derived(row: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    more: dict[str, Any] = {}
    if row.get("bandwidth_bytes_per_s") is not None:
        more["of_stream"] = row["bandwidth_bytes_per_s"] / result["stream_copy_bytes_per_s"]
    if row.get("state_bytes") is not None:
        more["state_bytes_per_node"] = row["state_bytes"] / row["nodes"]
    return {**row, **more}


def _text(key: str, row: dict[str, Any]) -> str:
    value = row.get(key)
    if key == "ms_median" and value is None:
        return str(row.get("why", "–"))
    if value is None:
        return "–"
    if key == "ms_p90":
        return f"{row['ms_p10']:.1f}-{value:.1f}"
    if key in ("input_bytes", "peak_bytes", "predict_bytes", "estimate_bytes"):
        return f"{value / 2**20:.1f}"
    if key == "bandwidth_bytes_per_s":
        return f"{value / 1e9:.1f}"
    if key in ("agreement", "accuracy"):
        return f"{100 * value:.2f}"
    if key in ("ms_median", "compile_s", "state_bytes_per_node"):
        return f"{value:.1f}"
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def _depths(title: str, rows: Sequence[dict[str, Any]]) -> tuple[str, list[str], list[list[str]]]:
    """Memory by depth, and as a share of the fastest stock system's."""
    stock: dict[str, Any] = next((row for row in rows if row["system"] == row.get("stock")), {"memory": {}})
    depths = list(dict.fromkeys(depth for row in rows for depth in row["memory"]))
    columns, lines = ["system"], [[row["system"]] for row in rows]
    for depth in depths:
        columns += [f"K = {depth}: inputs", "peak", "of stock's"]
        for row, line in zip(rows, lines):
            mine, theirs = (r["memory"].get(depth, {}) for r in (row, stock))
            if "peak_bytes" not in mine:
                line += [str(mine.get("why", "–")), "–", "–"]
                continue
            share = f"{mine['peak_bytes'] / theirs['peak_bytes']:.2f}" if "peak_bytes" in theirs else "–"
            line += [f"{mine['input_bytes'] / 2**20:.1f}", f"{mine['peak_bytes'] / 2**20:.1f}", share]
    return title, columns, lines


def markdown(result: dict[str, Any]) -> str:
    """table.md."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    repeats = max((row.get("repeats", 0) for row in result["rows"]), default=0)
    out = [f"# {_NAMES[result['bench']].capitalize()}, ours beside stock", "",
           f"Medians of {repeats} turns in which every system ran once, with the 10 % and 90 % quantiles; x stock: "
           "against the fastest of eager torch CSR, torch_sparse and PyG at the same computation in the same run. "
           "Memory: resident, in a process of its own, above that process with its libraries loaded."]
    if "stream_copy_bytes_per_s" in result:
        out += ["", f"Copying memory moves {result['stream_copy_bytes_per_s'] / 1e9:.1f} GB/s here; GB/s of a row: "
                "what its layers must move, by the time of its propagation."]
    out += ["", f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']:g} GiB; commit "
            f"{result['commit'] or 'unknown'}; {versions}."]
    for title, columns, lines in tables(result):
        rule = [":---", *["---:"] * (len(columns) - 1)]
        out += ["", f"## {title}", "", *(f"| {' | '.join(words)} |" for words in (columns, rule, *lines))]
    return "\n".join(out) + "\n"
