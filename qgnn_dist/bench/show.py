# SPDX-License-Identifier: Apache-2.0
"""What people see of a bench in a terminal: a bar over the cells on stderr, the table on stdout."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .beside import tables
from .partition import table as cut_table
from .table import METRIC_NAMES, failure_lines, headings, is_text, line
from .written import Tables

__all__ = ["CellProgress", "accuracy", "baselines", "beside", "cuts", "exchange", "growth", "order", "search", "steps"]

_QUIET_S = 5.0
"""Where stderr is no terminal: least seconds between two lines."""


class CellProgress:
    """A bar over the cells, or what else is counted, with the time left; plain lines, not too many, where stderr is no
    terminal."""

    def __init__(self, noun: str = "cell") -> None:
        self._noun = noun
        self._console = Console(stderr=True)
        self._live = self._console.is_terminal
        self._bar = Progress(TextColumn(f"{noun}s"), MofNCompleteColumn(), BarColumn(24),
                             TextColumn("{task.fields[text]}"), TimeElapsedColumn(), TextColumn("left"),
                             TimeRemainingColumn(), console=self._console, transient=True)
        self._task = self._bar.add_task(noun, total=None, text="")
        self._total, self._done, self._failed = 0, 0, 0
        self._started = self._told = 0.0
        self._reasons: set[str] = set()

    def __enter__(self) -> CellProgress:
        if self._live:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(self, text: str) -> None:
        """Show what happens before the cells."""
        self._bar.update(self._task, text=text)
        if not self._live:
            self._console.print(text, highlight=False, markup=False)

    def start(self, to_run: int, finished: int, jobs: int) -> None:
        """Tell how many cells there are and how many of them were finished before."""
        self._total, self._started = to_run, time.monotonic()
        self._bar.reset(self._task, total=to_run, text="")
        plural = "" if to_run == 1 else "s"
        self._console.print(f"{to_run} {self._noun}{plural} to run, {finished} finished before; {jobs} at a time",
                            highlight=False)

    def cell(self, name: str, failure: str | None) -> None:
        """Count a cell; why one failed is told when it is news."""
        self._done += 1
        self._failed += failure is not None
        told = escape(name) + (f", {self._failed} failed" if self._failed else "")
        self._bar.update(self._task, completed=self._done, text=told)
        if failure is not None and failure not in self._reasons:
            self._reasons.add(failure)
            self._console.print(f"failed: {name}: {failure}", style="yellow", highlight=False, markup=False)
        now = time.monotonic()
        if not self._live and (now - self._told >= _QUIET_S or self._done == self._total):
            left = (now - self._started) / self._done * (self._total - self._done)
            self._console.print(f"{self._noun} {self._done} of {self._total}: {told}, {left:.0f} s left",
                                highlight=False)
            self._told = now


@contextmanager
def steps() -> Iterator[Callable[[str], None]]:
    """What is being done, on stderr: a line that changes in a terminal, plain lines elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: console.print(text, highlight=False, markup=False)
        return
    with console.status("starting") as status:
        yield lambda text: status.update(escape(text))


def beside(result: dict[str, Any], console: Console) -> None:
    """The tables of ours beside stock."""
    _tables(result, tables(result), console)


def exchange(result: dict[str, Any], console: Console) -> None:
    """A table for each cut and rate."""
    from .exchange_table import tables

    _tables(result, tables(result["rows"]), console)


def growth(result: dict[str, Any], console: Console) -> None:
    """A table for each series, and the slopes."""
    from .growth import tables

    _tables(result, tables(result["rows"], result["fits"]), console)


def baselines(result: dict[str, Any], console: Console) -> None:
    """How good, and how soon."""
    from .baselines import tables

    _tables(result, tables(result["rows"]), console)


def _tables(result: dict[str, Any], found: Tables, console: Console) -> None:
    _widen(console)
    for title, columns, lines in found:
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False)
        for number, column in enumerate(columns):
            table.add_column(column, justify="right" if number else "left")
        for words in lines:
            table.add_row(*(escape(word) for word in words))
        console.print(table, highlight=False)
        console.print()
    console.print(f"Written: {', '.join(result['files'])}", highlight=False, markup=False, soft_wrap=True)


def search(result: dict[str, Any], console: Console) -> None:
    """What each row found, and why one found nothing."""
    from .search import tables

    _tables(result, tables(result["rows"]), console)


def order(result: dict[str, Any], console: Console) -> None:
    """A line for each order: what it costs, and each kernel's milliseconds in it."""
    first = result["rows"][0]
    systems = list(dict.fromkeys(row["system"] for row in result["rows"]))
    table = Table(title=f"{first['shape']}, {first['columns']} columns, {first['threads']} threads: ms (x source)",
                  title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False)
    for column in ("order", "seconds", "log2\ndistance", *(system.replace("-", "\n", 1) for system in systems)):
        table.add_column(column, justify="left" if column == "order" else "right", no_wrap=True)
    for name in dict.fromkeys(row["order"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["order"] == name]
        table.add_row(name, f"{rows[0]['order_s']:.2f}", f"{rows[0]['distance']:.1f}",
                      *(f"{row['ms_median']:.1f} ({row['speedup']:.2f})" for row in rows))
    console.print(table, highlight=False)
    console.print()
    console.print(f"Written: {', '.join(result['files'])}", highlight=False, markup=False, soft_wrap=True)


def cuts(result: dict[str, Any], console: Console) -> None:
    """The table of cuts."""
    _widen(console)
    title, columns, lines = cut_table(result)
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column == "method" else "right")
    for words in lines:
        table.add_row(*(escape(word) for word in words))
    console.print(table, highlight=False)
    console.print()
    console.print(f"Written: {', '.join(result['files'])}", highlight=False, markup=False, soft_wrap=True)


def _widen(console: Console) -> None:
    """A file or pipe has no width of its own, and nothing in it should be cut to 80 columns."""
    if not console.is_terminal:
        console.width = 200


def accuracy(result: dict[str, Any], console: Console) -> None:
    """The table, a part for each dataset."""
    _widen(console)
    for dataset in dict.fromkeys(row["shape"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["shape"] == dataset]
        table = Table(title=f"{dataset}: {METRIC_NAMES[rows[0]['metric']]}", title_justify="left", title_style="bold",
                      box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
        columns = headings(rows)
        for column in columns:  # in a narrow terminal names and long differences may take two lines, figures not
            table.add_column(column.replace(" ", "\n"), justify="left" if is_text(column) else "right",
                             no_wrap=not is_text(column) and column != "difference", overflow="fold",
                             min_width=12 if column == "difference" else None)
        for row in rows:
            table.add_row(*line(row, columns))
        console.print(table, highlight=False)
        console.print()
    for text in failure_lines(result["rows"]):
        console.print(text, style="yellow", highlight=False, markup=False)
    if result["failed"]:
        console.print(f"{result['failed']} cells failed; the same command tries them again", style="yellow",
                      highlight=False)
    console.print(f"Written: {', '.join(result['files'])}", highlight=False, markup=False, soft_wrap=True)
