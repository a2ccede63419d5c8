# SPDX-License-Identifier: Apache-2.0
"""A run's folder as a report reads it: settings, epochs, and what training left at its end; with distrust.

A report may be made while a run is trained: what is not there yet is None or empty, and a last line that is not
finished is left out.
"""
from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..comm.trace import COMPUTE, PACK, WAIT, WIRE, Span
from ..config import RunConfig, StorageConfig, load_config
from ..errors import InputError
from ..files.read import parse_json, read_json, read_lines, reason, shown
from ..model.packed import PackedModel
from ..storage.place import uri_of
from ..training.checkpoint import Progress
from ..training.follow import LARGEST_STATUS
from ..training.remote_run import fetched_run
from ..training.run_folder import LARGEST_LINES, RunFolder

__all__ = ["MOST_RUNS", "RunData", "read_runs"]

MOST_RUNS = 8
"""As many colours are told apart."""
LARGEST_FINAL = 64 << 20
KINDS = (COMPUTE, PACK, WAIT, WIRE)
DIVERGED = 1e30
"""training.metrics.LARGEST_LOSS and above: no figure, but a loss that was none."""


@dataclass(frozen=True)
class RunData:
    """One run.

    Attributes:
        name: tells it from the others of the report. records: lines of metrics.jsonl, at least one, by rising epoch.
        cut: whether a last line was being written. best: of the epochs so far, as training chooses it; 0 before the
            first evaluation. summary, final: of a finished run. status: RUN/status.json, or empty. spans: of the last
            forward, by rank. model: the newest checkpoint's best one, of epoch `model_epoch`; None where there is none.
        notes: what could not be read, in words.
    """

    name: str
    path: str
    config: RunConfig
    records: list[dict[str, Any]]
    cut: bool
    best: Progress
    summary: dict[str, Any] | None
    final: dict[str, Any] | None
    status: dict[str, Any]
    restarts: list[dict[str, Any]]
    spans: list[list[Span]]
    model: PackedModel | None
    model_epoch: int
    model_bytes: int
    identity: dict[str, Any] | None
    notes: list[str]

    @property
    def best_epoch(self) -> int:
        """Of the validation metric; 0 where nothing was evaluated yet."""
        return self.best.best_epoch

    @property
    def best_record(self) -> dict[str, Any] | None:
        """The best epoch's line."""
        return next((one for one in self.records if one["epoch"] == self.best_epoch), None)

    @property
    def workers(self) -> int:
        """One a part."""
        return len(self.records[-1]["compute_s"])

    @property
    def hosts(self) -> list[str]:
        """Of each rank, or nothing where it is not told."""
        places = self.final["workers"] if self.final else self.status.get("workers", [])
        names = [str(one.get("host", "")) for one in places if isinstance(one, dict)]
        return names if len(names) == self.workers else [""] * self.workers

    @property
    def width(self) -> str:
        """INT2, or float."""
        bits = self.config.quant.bits
        return "float" if bits == 32 else f"INT{bits}"


def read_runs(paths: Sequence[str | Path], storage: StorageConfig | None = None) -> list[RunData]:
    """Read runs; local folders, or URIs.

    Raises: InputError: none or too many, one is given twice, is no run's folder, has no epoch yet, or is damaged; it
        names the file and, of metrics.jsonl, the line.
    """
    if not 1 <= len(paths) <= MOST_RUNS:
        raise InputError(f"{len(paths)} runs; a report takes 1 to {MOST_RUNS}")
    seen: dict[str, str | Path] = {}
    for path in paths:
        place = uri_of(path) or os.path.realpath(path)
        if place.rstrip("/") in seen:
            raise InputError(f"the run is given twice ({seen[place.rstrip('/')]} and {path}); name each once",
                             file=str(path))
        seen[place.rstrip("/")] = path
    found = []
    for path, name in zip(paths, _names(list(seen))):
        with fetched_run(path, storage or StorageConfig()) as folder:
            found.append(_read_run(folder, name, str(path)))
    return found


def _names(places: list[str]) -> list[str]:
    """The last words of each path that tell it from the others.

    >>> _names(["/a/x/run", "/a/y/run", "/b/other"])
    ['x/run', 'y/run', 'b/other']
    """
    pieces = [place.split("/") for place in places]
    for count in range(1, max(map(len, pieces)) + 1):
        names = ["/".join(words[-count:]) for words in pieces]
        if len(set(names)) == len(names):
            return names
    return places


def _read_run(folder: Path, name: str, path: str) -> RunData:
    run, notes = RunFolder(folder), list[str]()
    if not (folder / "config.toml").exists():
        what = "no config.toml" if folder.exists() else "no such folder"
        raise InputError(f"not a run's folder ({what}); give the --out of `qgnn train`", file=path)
    config = load_config(folder / "config.toml")
    records, cut = _read_records(run.metrics_path, config)
    if not records:
        raise InputError("no epoch is finished yet: nothing to report; come back after the first one", file=path)
    summary = run.read_summary() if run.summary_path.exists() else None
    if summary is not None:
        _guarded(run.summary_path, functools.partial(_check_summary, summary))
    workers, identity = len(records[-1]["compute_s"]), (summary or {}).get("identity")
    final = _optional(run.final_path, LARGEST_FINAL, lambda values: _check_final(values, workers))
    status = _optional(run.status_path, LARGEST_STATUS, _check_status) or {}
    spans = _optional(run.trace_path, LARGEST_FINAL, lambda values: _spans(values, workers)) or []
    model, model_epoch, size = None, 0, 0
    try:
        checkpoint = run.load_checkpoint()
        if checkpoint is not None:
            identity = identity or checkpoint.identity
        if checkpoint is not None and "best" in checkpoint.tensors:
            data = checkpoint.tensors["best"].tobytes()
            model, size = PackedModel.from_bytes(data, str(run.checkpoints)), len(data)
            model_epoch = checkpoint.progress.best_epoch
    except InputError as error:
        notes.append(f"no checkpoint can be read: {error}")
    return RunData(name, path, config, records, cut, _best(records, config), summary, final, status,
                   run.read_restarts(), spans, model, model_epoch, size, identity, notes)


def _read_records(file: Path, config: RunConfig) -> tuple[list[dict[str, Any]], bool]:
    """The finished lines, and whether one follows that is not."""
    records: list[dict[str, Any]] = []
    try:
        lines, half = read_lines(file, LARGEST_LINES) if file.exists() else ([], False)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read: {reason(error)}", file=str(file)) from None
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line)
            _check_record(record, config)
            if records and (record["epoch"] <= records[-1]["epoch"]
                            or len(record["compute_s"]) != len(records[-1]["compute_s"])):
                raise ValueError(f"epoch {record['epoch']} of {len(record['compute_s'])} workers follows epoch "
                                 f"{records[-1]['epoch']} of {len(records[-1]['compute_s'])}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else reason(error)
            raise InputError(f"damaged: {what} (line {number}); train again, or --resume a run that is not finished",
                             file=str(file)) from None
        records.append(record)
    return records, half


def _check_record(record: dict[str, Any], config: RunConfig) -> None:
    """An epoch's line has what is plotted, of the right types. Raises: ValueError and what other shapes lead to."""
    if not isinstance(record, dict):
        raise ValueError("no object")
    _whole(record["epoch"], record["clamps"], *record["wire_bytes"].values())
    _numbers(record["loss"], record["train_s"], record["evaluation_s"], record["epoch_s"], *record["compute_s"],
             *record["multipliers"], *record["residuals"])
    for kind in ("forward", "backward", "evaluation", "control"):
        _whole(record["wire_bytes"][kind])
    for waits in record.get("wait_s", {}).values():
        _numbers(*waits)
        if len(waits) != len(record["compute_s"]):
            raise ValueError(f"wait_s is of {len(waits)} workers, compute_s of {len(record['compute_s'])}")
    if not record["compute_s"]:
        raise ValueError("it has no worker")
    if "accuracy" in record:
        _numbers(record["valid_loss"])
        for key in {"accuracy", config.train.metric}:
            _numbers(*(record[key][split] for split in ("train", "valid", "test")
                       if split != "test" or record[key][split] is not None))


def _best(records: Iterable[dict[str, Any]], config: RunConfig) -> Progress:
    """The best epoch by training's own rule."""
    progress = Progress()
    for record in records:
        progress.epoch = record["epoch"]
        if "accuracy" in record:
            progress.offer(record["epoch"], record["accuracy"], record[config.train.metric], record["valid_loss"])
    return progress


def _optional(file: Path, limit: int, check: Callable[[Any], Any]) -> Any:
    """What `check` makes of a JSON file; None where there is none. Raises: InputError: damaged."""
    if not file.exists():
        return None
    return _guarded(file, lambda: check(read_json(file, limit)))


def _guarded(file: Path, check: Callable[[], Any]) -> Any:
    try:
        return check()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else reason(error)
        raise InputError(f"damaged: {what}; remove it, or train again", file=str(file)) from None


def _check_summary(summary: dict[str, Any]) -> None:
    _numbers(summary["seconds"], *summary["epoch_s"].values(), summary.get("weight_decay", 0.0))
    _whole(summary["epochs"], summary["best_epoch"], *summary["peak_anon_bytes"], *summary["peak_rss_bytes"])
    for words in (*summary["warnings"], summary["graph"], *summary["versions"].values()):
        str.encode(words)
    for restart in summary["restarts"]:
        dict.keys(restart)


def _check_status(status: Any) -> dict[str, Any]:
    if not isinstance(status, dict) or not isinstance(status.get("workers", []), list):
        raise ValueError("no object with workers")
    for worker in status.get("workers", []):
        _whole(*worker.get("memory", {}).values())
    return status


def _check_final(final: Any, workers: int) -> dict[str, Any]:
    """What inference.examine.together told, of as many parts."""
    if final["schema"] != 1:
        raise ValueError(f"is of version {shown(final['schema'])}, this program reads 1")
    sent = final["sent_rows"]
    if len(sent) != workers or len(final["workers"]) != workers or any(len(row) != workers for row in sent):
        raise ValueError(f"is not of {workers} workers")
    for row in sent:
        _whole(*row)
    for one in final["workers"]:
        _whole(one["rows"], one["edges"])
    names = final["class_names"]
    for split in final["splits"].values():
        _check_split(split)
        if names is not None and len(names) < len(split["by_class"]["nodes"]):
            raise ValueError(f"has {len(names)} names of {len(split['by_class']['nodes'])} classes")
    return dict(final)


def _check_split(split: dict[str, Any]) -> None:
    degrees, classes, bins = split["by_degree"], split["by_class"], split["reliability"]
    for table, keys, shares in ((degrees, ("from", "to", "nodes", "right"), ("accuracy",)),
                                (classes, ("nodes", "right", "predicted"), ("recall",)),
                                (bins, ("nodes", "right"), ("accuracy", "confidence"))):
        if len({len(table[key]) for key in (*keys, *shares)}) != 1:
            raise ValueError("has lists of several lengths")
        for key in keys:
            _whole(*table[key])
        for key in shares:  # a share of nothing is null, and no other
            _numbers(*(value for value, nodes in zip(table[key], table["nodes"]) if value is not None or nodes))
    count = len(classes["nodes"])
    if split["confusion"] is not None:
        if len(split["confusion"]) != count or any(len(row) != count for row in split["confusion"]):
            raise ValueError(f"has a confusion matrix that is not of {count} classes")
        for row in split["confusion"]:
            _whole(*row)
    _whole(split["nodes"], split["right"])


def _spans(trace: Any, workers: int) -> list[list[Span]]:
    """By rank, from Chrome's trace format."""
    found: list[list[Span]] = [[] for _ in range(workers)]
    for event in trace["traceEvents"]:
        if event["ph"] != "X":
            continue
        _numbers(event["ts"], event["dur"])
        _whole(event["pid"])
        if event["cat"] not in KINDS or event["pid"] >= workers or event["dur"] < 0:
            raise ValueError(f"has the event {shown(event)}")
        layer = event["args"]["layer"]
        if type(layer) is not int:
            raise ValueError(f"has the layer {shown(layer)}")
        start = event["ts"] / 1e6
        found[event["pid"]].append(Span(event["cat"], str(event["name"]), start, start + event["dur"] / 1e6, layer))
    return found if any(found) else []


def _numbers(*values: Any) -> None:
    """Raises: ValueError: not all are finite numbers (parse_json lets no others through, but booleans and words)."""
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e300:
            raise ValueError(f"{shown(value)} is no number")


def _whole(*values: Any) -> None:
    for value in values:
        if type(value) is not int or not 0 <= value < 2**62:
            raise ValueError(f"{shown(value)} is no count")
