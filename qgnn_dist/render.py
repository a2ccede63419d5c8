# SPDX-License-Identifier: Apache-2.0
"""What people see in a terminal. Progress goes to stderr, results to stdout."""
from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

__all__ = ["Status", "TrainingProgress", "byte_size", "exported", "inspection", "partition", "prediction", "training"]


def byte_size(count: float) -> str:
    """A byte count as people read it.

    >>> byte_size(1536), byte_size(12), byte_size(3.2e9)
    ('1.5 KiB', '12 B', '3.0 GiB')
    """
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    size, unit = float(count), 0
    while size >= 1024 and unit < len(units) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.0f} B" if unit == 0 else f"{size:.1f} {units[unit]}"


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


class Status:
    """A spinner with the step that is running; plain lines where stderr is no terminal."""

    def __init__(self, text: str) -> None:
        self._console = Console(stderr=True)
        self._status = self._console.status(text)
        self._text = text

    def __enter__(self) -> Status:
        if self._console.is_terminal:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def update(self, text: str) -> None:
        """Show the next step."""
        if self._console.is_terminal:
            self._status.update(text)
        elif text != self._text:
            self._console.print(text, highlight=False)
        self._text = text


class TrainingProgress:
    """A bar over the epochs: loss, accuracies, bytes, time left; plain lines where stderr is no terminal."""

    def __init__(self, epochs: int) -> None:
        self._console = Console(stderr=True)
        self._live = self._console.is_terminal
        self._bar = Progress(
            TextColumn("epoch"), MofNCompleteColumn(), BarColumn(24), TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self._console, transient=True)
        self._task = self._bar.add_task("train", total=epochs, text="starting workers …")

    def __enter__(self) -> TrainingProgress:
        if self._live:
            self._bar.start()
        else:
            self._console.print("starting workers …", highlight=False)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def epoch(self, record: dict[str, Any]) -> None:
        """Show an epoch's record."""
        text = f"loss {record['loss']:.3f}"
        if "accuracy" in record:
            text += f"  valid {_percent(record['accuracy']['valid'])}  test {_percent(record['accuracy']['test'])}"
        sent = sum(record["wire_bytes"].values())
        if sent:
            text += f"  wire {byte_size(sent)}"
        self._bar.update(self._task, completed=record["epoch"], text=text)
        if not self._live and (record["epoch"] % 10 == 0 or record["epoch"] == 1):
            self._console.print(f"epoch {record['epoch']}: {text}", highlight=False)


def _table(title: str, rows: list[tuple[str, str]], console: Console) -> None:
    table = Table(title=title, show_header=False, title_justify="left", title_style="bold")
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    console.print(table, highlight=False)


def partition(result: dict[str, Any], console: Console) -> None:
    """A new store."""
    inspection({"kind": "store", **result}, console)


def training(result: dict[str, Any], console: Console) -> None:
    """The end of a run."""
    wire, accuracy = result["wire_bytes_per_epoch"], result["accuracy"]
    bits = result["bits"]
    rows = [
        ("accuracy", ", ".join(f"{name} {_percent(value)}" for name, value in accuracy.items())),
        ("best epoch", f"{result['best_epoch']} of {result['epochs']}"),
        ("bits", ", ".join(f"{stage} {width}" for stage, width in bits.items())),
        ("epoch", ", ".join(f"{1000 * result['epoch_s'][k]:.0f} ms ({k})" for k in ("median", "p90"))),
        ("bytes an epoch", ", ".join(f"{kind} {byte_size(count)}" for kind, count in wire.items() if count) or "none"),
        ("peak memory", ", ".join(byte_size(b) for b in result["peak_rss_bytes"]) + " a worker"),
    ]
    if result["multipliers"]["clamped"]:
        rows.append(("multiplier", f"[yellow]clamped {result['multipliers']['clamped']} times[/yellow]: lower "
                                   "propagation.eta_lambda, or raise propagation.alpha"))
    _table(f"Trained on {result['graph']} with {result['parts']} worker(s)", rows, console)


def exported(result: dict[str, Any], console: Console) -> None:
    """A packed model."""
    inspection({"kind": "model", **result}, console)


def prediction(result: dict[str, Any], console: Console) -> None:
    """A finished batch."""
    seconds = result["seconds"]
    rows = [("nodes", f"{result['rows']:,}")]
    if result["accuracy"]:
        rows.append(("accuracy", ", ".join(f"{name} {_percent(v)}" for name, v in result["accuracy"].items())))
    rows += [
        ("seconds", ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())),
        ("model", byte_size(result["model_bytes"])),
        ("messages", byte_size(result["message_bytes"])),
    ]
    if not result["same_graph"]:
        rows.append(("note", "the model was trained on another graph; ranges were shifted by "
                             f"2^{result['range_gain']}"))
    _table(f"Predicted {result['graph']} on {result['parts']} worker(s)", rows, console)


def inspection(result: dict[str, Any], console: Console) -> None:
    """Any description: plain values as rows, lists of objects as tables."""
    rows = []
    for key, value in result.items():
        if key == "kind" or (isinstance(value, list) and value and isinstance(value[0], dict)):
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in value.items())
        elif isinstance(value, float):
            value = f"{value:.4g}"
        rows.append((key.replace("_", " "), str(value)))
    _table(f"A {result['kind']}", rows, console)
    for key, value in result.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            columns = [c for c in value[0] if not isinstance(value[0][c], (dict, list))]
            table = Table(*(c.replace("_", " ") for c in columns), title=key, title_justify="left", title_style="bold")
            for item in value:
                table.add_row(*(f"{item[c]:,}" if isinstance(item[c], int) else str(item[c]) for c in columns))
            console.print(table, highlight=False)
