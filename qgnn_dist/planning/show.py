# SPDX-License-Identifier: Apache-2.0
"""A plan in a terminal."""
from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..memory import byte_size

__all__ = ["duration", "show_plan"]


def duration(seconds: float) -> str:
    """Seconds as people read them.

    >>> duration(0.0123), duration(4.56), duration(600.0)
    ('12 ms', '4.6 s', '10.0 min')
    """
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 300 else f"{seconds / 60:.1f} min"


def show_plan(plan: dict[str, Any], console: Console) -> None:
    """All of a plan; modelled figures are said to be so."""
    _head(plan, console)
    _memory(plan, console)
    _widths(plan, console)
    _hosts(plan, console)
    _alternatives(plan, console)
    for number, line in enumerate(plan["advice"]):
        console.print(escape(line if number == 0 else f"• {line}"), style="red" if number == 0 else "", highlight=False)
    console.print("Modelled, under these assumptions:", style="bold")
    for line in plan["assumptions"]:
        console.print(f"[dim]• {escape(line)}[/dim]", highlight=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    return table


def _head(plan: dict[str, Any], console: Console) -> None:
    graph, hosts, cut, settings = plan["graph"], plan["hosts"], plan["cut"], plan["settings"]
    memory, seconds, suffice = plan["memory"], plan["seconds"], plan["suffice"]
    verdict = "[green]fits[/green]" if plan["fits"] else "[red]does not fit[/red]"
    own = next(row for row in plan["widths"] if row["messages"] == settings["bits"]["messages"]
               and row["gradients"] == settings["bits"]["gradients"])
    table = Table(title=f"Plan{' of ' + escape(graph['name']) if graph['name'] else ''}", show_header=False,
                  title_justify="left", title_style="bold")
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    least = suffice["least_hosts"]
    rows = [
        ("graph", f"{graph['nodes']:,} nodes, {graph['edges']:,} edges, {graph['features']} features, "
                  f"{graph['classes']} classes"),
        ("hosts", f"{hosts['count']} of {hosts['cores']} cores, {byte_size(hosts['ram_bytes'])}, "
                  f"{hosts['link_gbps']:g} Gbit/s; {plan['workers']} workers of {hosts['threads']} threads"),
        ("settings", f"hidden {settings['hidden']}, {settings['layers']} layers of {settings['propagation']}, "
                     + ", ".join(f"{stage} {bits}" for stage, bits in settings["bits"].items())),
        ("memory", f"{verdict}: {byte_size(memory['host_bytes'])} a host, "
                   f"{byte_size(memory['usable_bytes'])} are usable"),
        ("cut", f"{100 * cut['fraction']:.1f} % of the edges, {cut['halo_rows']:,} rows sent a round"),
        ("epoch", f"{duration(seconds['epoch'])}, {byte_size(own['epoch_bytes'])} sent by all; of it "
                  f"{duration(seconds['exposed'])} waiting for the wire"),
        ("predict", f"{duration(seconds['predict'])}, {byte_size(own['predict'])} sent by all"),
        ("hosts that suffice", "none" if least is None else
         f"{least}; the shortest epoch with {suffice['fastest_hosts']}"),
    ]
    for name, value in rows:
        table.add_row(name, value)
    console.print(table, highlight=False)


def _memory(plan: dict[str, Any], console: Console) -> None:
    training, prediction = plan["memory"]["training"], plan["memory"]["prediction"]
    table = _table("Memory of the largest worker", "item", "training", "prediction")
    names = list(dict.fromkeys([*training["items"], *prediction["items"]]))
    for name in sorted(names, key=lambda n: -training["items"].get(n, 0)):
        table.add_row(name, *(byte_size(need["items"][name]) if name in need["items"] else "-"
                              for need in (training, prediction)))
    table.add_section()
    table.add_row("anonymous", *(byte_size(need["anonymous"]) for need in (training, prediction)))
    table.add_row("graph, mapped", *(byte_size(need["mapped"]) for need in (training, prediction)))
    table.add_row("features on disk, read once", *(byte_size(need["at_rest"]) for need in (training, prediction)))
    table.add_row("at its peak in", training["phase"], prediction["phase"])
    console.print(table, highlight=False)


def _widths(plan: dict[str, Any], console: Console) -> None:
    table = _table("By bits of messages and gradients", "bits", "forward", "backward", "evaluation", "an epoch",
                   "epoch", "predict", "worker")
    for row in plan["widths"]:
        bits = " / ".join("float" if b == 32 else str(b) for b in (row["messages"], row["gradients"]))
        table.add_row(bits, *(byte_size(row[name]) for name in ("forward", "backward", "evaluation", "epoch_bytes")),
                      duration(row["epoch_s"]), duration(row["predict_s"]), byte_size(row["worker_bytes"]))
    console.print(table, highlight=False)


def _hosts(plan: dict[str, Any], console: Console) -> None:
    """A few numbers of hosts: powers of two, and those that the plan names."""
    suffice = plan["suffice"]
    named = {plan["hosts"]["count"], suffice["least_hosts"], suffice["fastest_hosts"]}
    table = _table("By number of hosts", "hosts", "memory of one", "fits", "epoch", "predict")
    for row in suffice["rows"]:
        if row["hosts"] in named or (row["hosts"] & (row["hosts"] - 1) == 0 and row["hosts"] <= 64):
            table.add_row(str(row["hosts"]), byte_size(row["host_bytes"]), "yes" if row["fits"] else "no",
                          duration(row["epoch_s"]), duration(row["predict_s"]))
    console.print(table, highlight=False)


def _alternatives(plan: dict[str, Any], console: Console) -> None:
    table = _table("Other ways on the same hosts", "way", "a worker", "sent once", "an epoch")
    for way in plan["alternatives"]:
        times = [duration(way[key]) for key in ("epoch_s", "epoch_link_s") if way.get(key)]
        table.add_row(way["name"], byte_size(way["worker_bytes"]),
                      byte_size(way["once_bytes"]) + (f", {duration(way['once_s'])}" if way["once_s"] else ""),
                      ", ".join([byte_size(way["epoch_bytes"]), *times]))
    console.print(table, highlight=False)
    for way in plan["alternatives"]:
        console.print(f"[dim]• {way['name']}: {escape(way['says'])}[/dim]", highlight=False)
