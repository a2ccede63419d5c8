# SPDX-License-Identifier: Apache-2.0
"""Sections about the workers: who sends whom, where time goes, memory, and what happened."""
from __future__ import annotations

import time
from collections.abc import Sequence

from markupsafe import Markup, escape

from ..comm.trace import COMPUTE, PACK, WAIT, WIRE, Span
from ..memory import byte_size
from ..quant.packed import row_bytes
from .blocks import Bar, BarRow, Bars, Block, Group, Lanes, Piece, Plot, Section, Table, Words
from .curves import worker_seconds
from .draw import figure, matrix, ticks
from .measure import Looks
from .runs import RunData

__all__ = ["events_section", "time_section", "traffic_section"]

MOST_LANES, MOST_SMALL, MOST_PARTS = 32, 12, 64
"""Ranks whose timeline is drawn; parts that fit a small matrix; parts whose matrix is drawn."""
COLOURS = {COMPUTE: 0, WIRE: 4, WAIT: 1, PACK: 2}
PIECES = (("computing", 0), ("waiting for messages", 1), ("for sums and the server", 3))
UNITS = 10_000
"""Of a lane's width."""


def _each(runs: Sequence[RunData], found: Sequence[list[Piece]]) -> list[Block]:
    """The blocks of each run under its name; of one run without."""
    if len(runs) == 1:
        return list(found[0])
    return [Group(run.name, at, blocks) for at, (run, blocks) in enumerate(zip(runs, found)) if blocks]


def rank_name(run: RunData, rank: int) -> str:
    """A worker as rows have it."""
    host = run.hosts[rank]
    return f"{rank}\xa0on\xa0{host}" if host else f"rank\xa0{rank}"


def traffic_section(runs: Sequence[RunData], looks: Sequence[Looks]) -> Section:
    """Rows that each part sends each other one in a round; runs of the same cut are told of together."""
    section = Section("traffic", "Messages between parts",
                      "Rows that a part sends another one in each round: its nodes that have neighbours there.")
    cuts: dict[str, list[int]] = {}
    for at, (run, one) in enumerate(zip(runs, looks)):
        cuts.setdefault(repr((one.sent_rows, run.workers, run.hosts)), []).append(at)
    for members in cuts.values():
        of_cut = [runs[at] for at in members]
        blocks = _traffic(of_cut, looks[members[0]].sent_rows)
        names = ", ".join(run.name for run in of_cut)
        section.blocks.extend([Group(names, members[0], blocks)] if len(cuts) > 1 else blocks)
    return section


def _traffic(runs: Sequence[RunData], sent: list[list[int]] | None) -> list[Piece]:
    """Of runs of the same cut on the same hosts."""
    run = runs[0]
    if run.workers == 1:
        return [Words("One part: no messages between parts.")]
    if sent is None:
        return [Words("Which part sends how many rows is written when training ends (final.json), and this run has "
                      "none.", "qgnn report RUN --store STORE")]
    blocks: list[Piece] = []
    if len(sent) <= MOST_PARTS:
        tips = [[f"part {row} to part {column}: {count:,} rows" for column, count in enumerate(counts)]
                for row, counts in enumerate(sent)]
        title = f"{sum(map(sum, sent)):,} rows a round"
        svg = matrix(title, sent, "to part", "from part", tips, by_row=False)
        blocks.append(Plot(title, svg, span=1 if len(sent) <= MOST_SMALL else 2))
    places = run.final["workers"] if run.final else None
    rows = [[rank_name(run, rank), *([f"{places[rank]['rows']:,}", f"{places[rank]['edges']:,}"] if places else []),
             f"{sum(counts):,}", f"{sum(row[rank] for row in sent):,}",
             *(figure(sum(counts) * _row_bytes(one), "bytes") for one in runs)] for rank, counts in enumerate(sent)]
    payloads = [f"payload a round, {one.name}" for one in runs] if len(runs) > 1 else ["payload a round"]
    blocks.append(Table("Parts", ["part", *(["rows", "edges"] if places else []), "rows sent a round", "halo rows read",
                                  *payloads], rows, folded=len(rows) > 16, span=3))
    return blocks


def _row_bytes(run: RunData) -> int:
    """Of a row of messages in the forward; 0 where no model is known."""
    return row_bytes(run.model.info.num_classes, run.config.quant.stages()["messages"]) if run.model else 0


def time_section(runs: Sequence[RunData]) -> Section:
    """Where an epoch's time goes, by worker; memory; and a timeline of one forward."""
    section = Section("time", "Time and memory", "Training computes, waits for messages of other workers, and waits "
                                                 "for the gradients' sums and the multiplier server. Anonymous memory "
                                                 "is a process's own; resident memory counts mapped files, too.")
    section.blocks += _each(runs, [[_seconds(run), _memory(run), _timeline(run)] for run in runs])
    return section


def _seconds(run: RunData) -> Bars:
    found = worker_seconds(run)
    waits = all(one.wire is not None for one in found)
    longest = max(one.compute + (one.wire or 0.0) + (one.wait or 0.0) for one in found) or 1.0
    rows = []
    for one in found:
        pieces = [(one.compute, 0), (one.wire or 0.0, 1), (one.wait or 0.0, 3)]
        told = f"{figure(one.compute, 'seconds')}" + (
            f" + {figure(one.wire, 'seconds')} + {figure(one.wait, 'seconds')}" if waits else "")
        rows.append(BarRow(rank_name(run, one.rank), [Bar([(s / longest, c) for s, c in pieces], told)]))
    return Bars("Training of an epoch, by worker", rows,
                "medians over the epochs" if waits else "medians; this run's program did not keep the waits",
                [(name, colour, 0) for name, colour in PIECES] if waits else [], span=2)


def _timeline(run: RunData) -> Lanes | Words:
    """Two lanes a rank: what its kernels do, and messages under way."""
    if not run.spans:
        return Words("No trace in this run: training leaves one when it ends (trace.json); of a prediction,",
                     "qgnn predict STORE --model MODEL --out OUT --trace")
    end = max(span.end for spans in run.spans for span in spans)
    start = min(span.start for spans in run.spans for span in spans)
    length = (end - start) or 1e-9
    lanes = []
    for rank, spans in enumerate(run.spans[:MOST_LANES]):
        lanes.append((rank_name(run, rank), _lane([s for s in spans if s.kind != WIRE], start, length)))
        if any(span.kind == WIRE for span in spans):
            lanes.append(("messages", _lane([s for s in spans if s.kind == WIRE], start, length)))
    marks = [(at / length, figure(at, "seconds")) for at in ticks(0, length, 4) if at <= 0.82 * length]
    note = "propagation of the best model's last forward, kept in trace.json; hosts' clocks may differ"
    if len(run.spans) > MOST_LANES:
        note += f"; the first {MOST_LANES} of {len(run.spans)} ranks"
    kinds = {span.kind for spans in run.spans for span in spans}
    names = {COMPUTE: "computing", PACK: "packing and sending", WAIT: "waiting", WIRE: "messages under way"}
    return Lanes("Timeline of one forward", lanes, marks, note,
                 [(name, COLOURS[kind], 0) for kind, name in names.items() if kind in kinds])


def _lane(spans: Sequence[Span], start: float, length: float) -> Markup:
    parts = [f'<svg viewBox="0 0 {UNITS} 10" preserveAspectRatio="none" class="lane" aria-hidden="true">']
    for span in spans:
        x, wide = UNITS * (span.start - start) / length, UNITS * span.seconds / length
        layer = f", layer {span.layer}" if span.layer >= 0 else ""
        tip = f"{span.what}{layer}: {figure(span.seconds, 'seconds')}"
        parts.append(f'<rect class="f{COLOURS[span.kind]}" x="{x:.0f}" y="0" width="{max(wide, 8):.0f}" height="10" '
                     f'data-tip="{escape(tip)}"/>')
    return Markup("".join(parts) + "</svg>")


def _memory(run: RunData) -> Bars | Words:
    """Peaks of the workers' processes; of a run that is not finished, what they take now."""
    if run.summary is not None:
        pairs, note = list(zip(run.summary["peak_anon_bytes"], run.summary["peak_rss_bytes"])), "peaks of the whole run"
    else:
        told = [worker.get("memory", {}) for worker in run.status.get("workers", [])]
        pairs = [(one["anon_bytes"], one["rss_bytes"]) for one in told if {"anon_bytes", "rss_bytes"} <= one.keys()]
        note = "of the last epoch that was told; peaks are in the summary of a finished run"
    if not pairs:
        return Words("Peaks are written when training ends (summary.json), and this run has not.")
    largest = max(map(max, pairs)) or 1
    rows = [BarRow(rank_name(run, rank) if rank < run.workers else str(rank), [
        Bar([(anon / largest, 0)], byte_size(anon)), Bar([(rss / largest, 4)], byte_size(rss))])
        for rank, (anon, rss) in enumerate(pairs)]
    return Bars("Memory of each worker", rows, note, [("anonymous", 0, 0), ("resident", 4, 0)], span=2)


def events_section(runs: Sequence[RunData]) -> Section | None:
    """Restarts, warnings, and what could not be read; None where there is nothing to tell."""
    found: list[list[Piece]] = []
    for run in runs:
        blocks: list[Piece] = []
        if run.restarts:
            rows = [[_when(one.get("time")), str(one.get("epoch", "–")), str(one.get("error", "–"))] for one in
                    run.restarts]
            blocks.append(Table("Restarts", ["when (UTC)", "after epoch", "why"], rows, left=(2,), span=4))
        texts = [*(run.summary or {}).get("warnings", []), *run.notes]
        if run.cut:
            texts.append("the last line of metrics.jsonl is not finished and was left out")
        clamps = sum(record["clamps"] for record in run.records)
        if clamps and run.summary is None:
            texts.append(f"multipliers were clamped {clamps} times")
        blocks += [Words(text) for text in texts]
        found.append(blocks)
    if not any(found):
        return None
    section = Section("events", "What happened", "Failures that the run went on after, and what it warned of.")
    section.blocks += _each(runs, found)
    return section


def _when(seconds: object) -> str:
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < 1e11:
        return "–"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
