# SPDX-License-Identifier: Apache-2.0
"""Sections about what quantising does: widths and sizes, codes and what they clip; and how smooth layers become."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .answers import MAKE
from .blocks import Group, Piece, Plot, Section, Smalls, Table, Words
from .curves import Chart, Heat, Series, constraint_charts, lambda_heat
from .draw import figure, heat_map, histogram, plot_of
from .headline import Headline
from .measure import Looks
from .runs import RunData

__all__ = ["quantiser_section", "smoothness_section"]

DIAGNOSIS = "diagnosis"
MOST_CODES = 16
"""Of messages, whose codes are drawn by round."""
SAYS = {"weights": "both layers' weights", "features": "rows that go in", "hidden": "activations",
        "messages": "rows between parts, each round", "residual": "the local term H⁰, which never travels",
        "gradients": "rows of the backward pass"}


def quantiser_section(runs: Sequence[RunData], heads: Sequence[Headline],
                      looks: Sequence[Looks]) -> tuple[Section, list[Chart]]:
    """Widths of the stages and sizes; of models that were measured, histograms of codes, clipped shares and noise."""
    section = Section("quantisers", "Bits, codes and clipping",
                      "How many bits each stage has, and what its grid does to the values of the best model.")
    stages = [run.config.quant.stages() for run in runs]
    names = list(dict.fromkeys(name for found in stages for name in found))
    section.blocks.append(Table("Bits of each stage", ["stage", *_run_names(runs, "bits"), "what"], [
        [name, *("float" if found.get(name) == 32 else str(found.get(name, "–")) for found in stages),
         SAYS.get(name, "")] for name in names], left=(len(runs) + 1,)))
    section.blocks.append(_sizes(runs, heads))
    charts = _round_charts(runs, looks)
    section.blocks += [plot_of(chart, len(runs) > 1) for chart in charts]
    for run, one in zip(runs, looks):
        rounds = (one.diagnosis or {}).get("messages")
        if rounds and len(rounds[0]["histogram"]) <= MOST_CODES:
            heat = _message_codes(rounds)
            title = f"{run.name}: {heat.title}" if len(runs) > 1 else heat.title
            section.blocks.append(Plot(title, heat_map(heat), heat.note))
    for at, (run, one) in enumerate(zip(runs, looks)):
        blocks = _codes(one)
        section.blocks.extend([Group(run.name, at, blocks)] if len(runs) > 1 else blocks)
    return section, charts


def _run_names(runs: Sequence[RunData], alone: str) -> list[str]:
    return [run.name for run in runs] if len(runs) > 1 else [alone]


def _sizes(runs: Sequence[RunData], heads: Sequence[Headline]) -> Table:
    kinds = ("forward", "backward", "evaluation", "control")

    def sent(run: RunData, kind: str) -> str:
        return size(sum(record["wire_bytes"][kind] for record in run.records) / len(run.records))

    def size(count: float | None) -> str:
        return figure(count, "bytes")

    rows = [["model, packed", *(size(head.model_bytes) for head in heads)],
            ["weights in float32", *(size(head.float_bytes) for head in heads)],
            *([f"{kind}, an epoch", *(sent(run, kind) for run in runs)] for kind in kinds),
            ["messages in float32", *(size(head.float_wire) for head in heads)]]
    return Table("Sizes", ["", *_run_names(runs, "size")], rows,
                 "control: sums of the gradients, in float; means over all epochs and workers")


def _codes(looks: Looks) -> list[Piece]:
    """What one model's grids do."""
    found = looks.diagnosis
    if found is None:
        return [Words(f"Histograms of codes and clipped shares are measured on the graph: {looks.why_not}.", MAKE)]
    rows = []
    rounds = [(f"round {one['round']}", one) for one in found["messages"]]
    for name, stage in [*found["stages"].items(), *rounds]:
        rows.append([name, "float" if stage["bits"] == 32 else str(stage["bits"]), stage["grid"] or "–",
                     _number(stage["step"]), figure(stage["clipped"], "share"), _number(stage["snr_db"], ".1f")])
    plots = []
    for name, stage in found["stages"].items():
        if stage["histogram"] is not None:
            clipped = "" if stage["clipped"] is None else f"{figure(stage['clipped'], 'share')} clipped"
            plots.append((name, histogram(f"codes of {name}", stage["histogram"]), clipped))
    blocks: list[Piece] = [Smalls("Codes of each stage", plots)] if plots else [
        Words("All stages are float: there are no codes.")]
    if any(stage["bits"] < 32 for stage in found["stages"].values()) or rounds:
        head = ["stage", "bits", "grid", "step", "clipped", "SNR, dB"]
        note = ("SNR: signal over noise; of weights the packed model keeps codes alone, so that nothing is known of "
                "what was clipped")
        blocks.append(Table("What grids do", head, rows, note, folded=True, left=(2,), span=4))
    return blocks


def _message_codes(rounds: Sequence[dict[str, Any]]) -> Heat:
    """Shares of the codes, a column a round."""
    shares = [[count / (sum(one["histogram"]) or 1) for count in one["histogram"]] for one in rounds]
    codes = range(len(shares[0]))
    return Heat("message-codes", "Codes of messages by round", "round", "code", "share", [str(code) for code in codes],
                [one["round"] for one in rounds], [[column[code] for column in shares] for code in codes], 0, DIAGNOSIS,
                ("messages", "histogram"), "the strongest cell is the most frequent code")


def _number(value: float | None, form: str = ".4g") -> str:
    return "–" if value is None else format(value, form)


def _round_charts(runs: Sequence[RunData], looks: Sequence[Looks]) -> list[Chart]:
    """Over the rounds of messages: clipped share, signal over noise, error of what neighbours believe."""
    charts = []
    for id, title, key, unit, note in (
            ("clipped", "Clipped values of messages", "clipped", "share", ""),
            ("noise", "Signal over noise", "snr_db", "number", "of messages, dB"),
            ("believed", "Error of what is believed", "believed_error", "share",
             "‖y − Ŷ‖/‖y‖: how far what neighbours believe is from what is")):
        series = _measured(runs, looks, "messages", "round", key)
        if series:
            charts.append(Chart(id, title, "round", unit, series, note, dots=True))
    return charts


def _measured(runs: Sequence[RunData], looks: Sequence[Looks], table: str, place: str, key: str) -> list[Series]:
    """A figure of the diagnosis, of each run that has it, over its rounds or layers."""
    series = []
    for at, (run, one) in enumerate(zip(runs, looks)):
        entries = [entry for entry in (one.diagnosis or {}).get(table, []) if entry[key] is not None]
        if entries:
            series.append(Series(run.name if len(runs) > 1 else title_of(key), at, DIAGNOSIS, (table, key),
                                 [entry[place] for entry in entries], [entry[key] for entry in entries], None, at))
    return series


def title_of(key: str) -> str:
    """A series' name, where it is alone."""
    return key.replace("_db", "")


def smoothness_section(runs: Sequence[RunData],
                       looks: Sequence[Looks]) -> tuple[Section, list[Chart], list[Heat]]:
    """λ and the constraint by layer and epoch; where it was measured, how smooth states are and how wrong."""
    section = Section("smoothness", "Smoothness by layer", "The multiplier λ holds the change of each layer under the "
                                                           "smoothness constraint.")
    charts, heats = constraint_charts(runs), list[Heat]()
    for at, run in enumerate(runs):
        heat = lambda_heat(run, at)
        if heat is not None:
            heats.append(heat)
    if all(run.config.propagation.kind != "smp" for run in runs):
        kinds = ", ".join(sorted({run.config.propagation.kind for run in runs}))
        section.blocks.append(Words(f"Only propagation.kind=smp has multipliers; here it is {kinds}."))
    elif not heats:
        section.blocks.append(Words("λ is 0 in every layer and epoch: no layer changed more than propagation.alpha "
                                    "allows."))
    measured = []
    for id, title, key, note in (
            ("dirichlet", "Dirichlet energy", "dirichlet",
             "tr(HᵀLH)/‖H‖², L the normalised Laplacian; falls as neighbours become alike"),
            ("mad", "Mean average distance", "mad", "of neighbours, by cosine; 0 is oversmoothed"),
            ("change", "Change of a layer", "change", "‖Δ‖/‖H⁰‖"),
            ("error", "Error against float messages", "error", "‖H − H_float‖/‖H_float‖ at each layer")):
        series = _measured(runs, looks, "layers", "layer", key)
        if series:
            log = key in ("dirichlet", "change") and all(y is not None and y > 0 for one in series for y in one.y)
            measured.append(Chart(id, title, "layer k", "number", series, note, log=log, dots=True))
    section.blocks += [plot_of(chart, len(runs) > 1) for chart in (*charts, *measured)]
    for heat in heats:
        title = f"{runs[heat.run].name}: {heat.title}" if len(runs) > 1 else heat.title
        section.blocks.append(Plot(title, heat_map(heat), heat.note))
    if not measured:
        section.blocks.append(Words("Dirichlet energy, mean average distance, change and error of each layer are "
                                    f"measured on the graph: {looks[0].why_not}.", MAKE))
    return section, [*charts, *measured], heats
