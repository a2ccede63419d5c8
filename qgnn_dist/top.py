# SPDX-License-Identifier: Apache-2.0
"""`qgnn top`: a run as it stands, drawn anew each second until it ends."""
from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .config import StorageConfig
from .memory import byte_size
from .render import percent, plain
from .training.follow import ENDED
from .training.remote_run import watched_run

__all__ = ["frame", "shown", "watch"]

EVERY_S = 1.0
BAR, LEAST_BAR = 24, 8
"""Characters of the longest worker's bar; what a narrow terminal leaves of it."""
COLUMNS = 68
"""Of the other columns of workers, with a host's name of SHORT characters."""
SHORT, WIDE = 14, 100
"""Terminals narrower than WIDE show so much of a host's name, without its domain."""
COLOURS = {"starting": "cyan", "training": "green", "recovering": "yellow", "stalled": "red", "finished": "bold green",
           "stopped": "yellow", "failed": "bold red", "lost": "bold red"}
PIECES = (("compute", "█", "green"), ("wire", "▒", "yellow"), ("wait", "░", "red"))
LEVELS = "▁▂▃▄▅▆▇█"
TICKS, LEAST_TICKS = 30, 8
MULTIPLIERS = 6
MEMORY = " anonymous: memory of the process's own; left: what its host still has"
SAID = {"stalled": "no worker comes further; stacks are in RUN/stalls",
        "lost": "the command that wrote it is gone; `qgnn train … --resume` goes on"}


def watch(run: str | Path, *, once: bool) -> dict[str, Any]:
    """Draw on stderr until the run ends, or Ctrl-C; returns the run as it stood last.

    Args: once: draw nothing and return at once.
    Raises: InputError: no run lies there, or it is damaged.
    """
    with watched_run(run, StorageConfig()) as look:
        found = look()
        if once:
            return found
        console = Console(stderr=True)
        try:
            with Live(frame(found, console.width), console=console, auto_refresh=False, transient=True) as live:
                while found["state"] not in ENDED:
                    time.sleep(EVERY_S)
                    found = look()
                    live.update(frame(found, console.width), refresh=True)
        except KeyboardInterrupt:
            return found
    return {**found, "exit_code": 0 if found["state"] == "finished" else 1}


def shown(result: dict[str, Any], console: Console) -> None:
    """One frame, the last one."""
    console.print(frame(result, console.width), highlight=False)


def frame(found: dict[str, Any], width: int = WIDE) -> Group:
    """What people see on a terminal of so many columns: the run, its workers, and what was said last."""
    state = found["state"]
    bits = f"INT{found['bits']}" if found["bits"] < 32 else "float"
    title = Text.assemble((f" {state} ", f"reverse {COLOURS.get(state, 'white')}"), "  ",
                          (plain(found["run"]).plain, "bold"),
                          f"   epoch {found['epoch']} of {found['epochs']}   {bits}")
    said = [Text(SAID[state], style="dim")] if state in SAID else []
    parts: list[Any] = [title, *said, _figures(found, min(TICKS, max(LEAST_TICKS, width - COLUMNS)))]
    if found["workers"]:
        parts += [_workers(found["workers"], width), _legend(), Text(MEMORY, style="dim")]
    for message in found["messages"]:
        when = time.strftime("%H:%M:%S", time.localtime(message["time"]))
        parts.append(Text.assemble((f"{when} ", "dim"), plain(message["text"])))
    return Group(*parts)


def _figures(found: dict[str, Any], ticks: int) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    if found["loss"] is not None:
        valid = f", validation {found['valid_loss']:.4f}" if found["valid_loss"] is not None else ""
        table.add_row("loss", f"{found['loss']:.4f}{valid}  {sparks(found['history']['loss'][-ticks:])}")
    if found["accuracy"]:
        told = ", ".join(f"{name} {percent(found['accuracy'][name])}" for name in ("train", "valid", "test")
                         if name in found["accuracy"])
        table.add_row("accuracy", f"{told}  {sparks(found['history']['valid'][-ticks:])}")
    if found["best"]:
        best = found["best"]["accuracy"]
        table.add_row("best epoch", f"{found['best']['epoch']}: valid {percent(best['valid'])}, "
                                    f"test {percent(best['test'])}")
    if found["epoch_s"] is not None:
        table.add_row("epoch", f"{found['epoch_s']:.3g} s")
    if found["wire_bytes"]:
        total = found["wire_bytes_total"]
        told = ", ".join(f"{kind} {byte_size(count)} ({byte_size(total[kind])})"
                         for kind, count in found["wire_bytes"].items() if total[kind])
        table.add_row("sent (in all)", told or "nothing")
    if found["multipliers"]:
        values = found["multipliers"]
        told = " ".join(f"{value:.3g}" for value in values[:MULTIPLIERS])
        more = f" … {values[-1]:.3g} ({len(values)} layers)" if len(values) > MULTIPLIERS else ""
        table.add_row("λ", told + more)
    if found["clipped"]:
        table.add_row("clipped", ", ".join(f"{stage} {100 * share:.2g} %" for stage, share in found["clipped"].items()))
    if found["restarts"]:
        table.add_row("restarts", str(found["restarts"]))
    if found["age_s"] is not None and found["state"] not in ENDED:
        table.add_row("told", f"{found['age_s']:.0f} s ago")
    return table


def _workers(workers: Sequence[dict[str, Any]], width: int) -> Table:
    bar = min(BAR, max(LEAST_BAR, width - COLUMNS))
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("rank", no_wrap=True)
    table.add_column("host", no_wrap=True)
    table.add_column("compute, wire, wait" if bar == BAR else "time", min_width=bar, no_wrap=True)
    for name in ("s", "rows", "sent", "anonymous", "left"):
        table.add_column(name, justify="right", no_wrap=True)
    times = [seconds(worker) for worker in workers]
    longest = max((sum(one.values()) for one in times), default=0.0)
    for worker, one in zip(workers, times):
        memory = worker.get("memory", {})
        sizes = [byte_size(memory[key]) if key in memory else "-" for key in ("anon_bytes", "available_bytes")]
        sent = byte_size(sum(worker["wire_bytes"].values())) if "wire_bytes" in worker else "-"
        host = str(worker.get("host", "-"))
        host = host if width >= WIDE else host.partition(".")[0][:SHORT]
        table.add_row(str(worker["rank"]), plain(host), _bar(one, longest, bar),
                      f"{sum(one.values()):.3g}" if one else "-",
                      f"{worker['rows']:,}" if "rows" in worker else "-", sent, *sizes)
    return table


def seconds(worker: dict[str, Any]) -> dict[str, float]:
    """Of a worker's last epoch of training: computing, waiting for messages, waiting for sums and the server.

    >>> seconds({"train_s": 1.0, "wait_s": {"exchange": 0.25, "reduce": 0.125, "server": 0.125}})
    {'compute': 0.5, 'wire': 0.25, 'wait': 0.25}
    """
    if "train_s" not in worker:
        return {"compute": worker["compute_s"]} if "compute_s" in worker else {}
    waits = worker["wait_s"]
    wire = float(waits.get("exchange", 0.0))
    wait = float(sum(waits.values())) - wire
    return {"compute": worker["train_s"] - wire - wait, "wire": wire, "wait": wait}


def _bar(times: dict[str, float], longest: float, width: int) -> Text:
    bar, drawn, so_far = Text(), 0, 0.0
    for name, sign, colour in PIECES:
        so_far += times.get(name, 0.0)
        upto = round(width * so_far / longest) if longest > 0 else 0
        bar.append(sign * max(0, upto - drawn), style=colour)
        drawn = max(drawn, upto)
    return bar


def _legend() -> Text:
    words = {"compute": "computing", "wire": "waiting for messages", "wait": "for sums and the server"}
    return Text.assemble(*(piece for name, sign, colour in PIECES
                           for piece in ((f" {sign} ", colour), (f"{words[name]} ", "dim"))))


def sparks(values: Sequence[float]) -> str:
    """Values as a line of blocks, the least lowest.

    >>> sparks([0.0, 1.0, 0.5])
    '▁█▅'
    """
    values = list(values)
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    reach = (high - low) or 1.0
    return "".join(LEVELS[round((len(LEVELS) - 1) * (value - low) / reach)] for value in values)
