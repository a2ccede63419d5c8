# SPDX-License-Identifier: Apache-2.0
"""From runs to one HTML file: sections in their order, the plotted values as JSON, style and script inside.

The page names no other file, and its policy (Content-Security-Policy) would let the browser load none: of scripts it
runs the one whose digest it states. Jinja escapes every text; charts escape theirs.
"""
from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from .. import __version__
from .answers import answers_section
from .blocks import Block, Section, Words
from .curves import MOST_EPOCHS, Chart, Heat, curve_charts
from .draw import plot_of
from .headline import cards, comparison, doubts, headline, state
from .measure import Looks
from .quantisers import quantiser_section, smoothness_section
from .runs import RunData
from .settings import differences, settings_section
from .workers import events_section, time_section, traffic_section

__all__ = ["make_page"]

HERE = Path(__file__).parent


def make_page(runs: Sequence[RunData], looks: Sequence[Looks]) -> str:
    """The page's HTML. Args: looks: of each run, see measure.look."""
    heads = [headline(run, one) for run, one in zip(runs, looks)]
    curves = curve_charts(runs)
    answers, answer_charts = answers_section(runs, looks)
    quantisers, round_charts = quantiser_section(runs, heads, looks)
    smoothness, layer_charts, heats = smoothness_section(runs, looks)
    sections = [_curves_section(runs, curves), answers, quantisers, smoothness, traffic_section(runs, looks),
                time_section(runs), events_section(runs), settings_section(runs)]
    charts = [*curves, *answer_charts, *round_charts, *layer_charts]
    script = (HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _template().render(
        title=" · ".join(map(_place, runs)), runs=runs, names=_names(runs), version=__version__,
        lead=_lead(runs), doubts=doubts(runs, looks), states=[state(run) for run in runs],
        cards=cards(runs[0], heads[0]) if len(runs) == 1 else [],
        tables=[comparison(runs, heads), differences(runs)] if len(runs) > 1 else [],
        sections=[one for one in sections if one is not None], data=_data(runs, charts, heats),
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")), script=Markup(script), digest=digest)


def _place(run: RunData) -> str:
    """A run's path, its last two words at most: runs of several folders are often called the same."""
    return "/".join(word for word in Path(run.path).parts[-2:] if word != "/")


def _names(runs: Sequence[RunData]) -> list[str]:
    """As the page's head has them; of several runs those of the legends, which tell them apart."""
    return [run.name for run in runs] if len(runs) > 1 else [_place(runs[0])]


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.get_template("page.html")


def _curves_section(runs: Sequence[RunData], charts: Sequence[Chart]) -> Section:
    blocks: list[Block] = [plot_of(chart, len(runs) > 1) for chart in charts]
    one_best = len(runs) == 1 and runs[0].best_epoch
    lead = "The dashed line is the best epoch by the validation metric." if one_best else ""
    if all(run.workers == 1 for run in runs):
        blocks.append(Words("One part: nothing is sent, so that bytes have no curve."))
    if not any("accuracy" in record for run in runs for record in run.records):
        blocks.append(Words("No epoch was evaluated yet, so that there is no accuracy."))
    return Section("training", "Training", lead, blocks)


def _lead(runs: Sequence[RunData]) -> str:
    """What was trained on what, in a line."""
    words = []
    for run in runs:
        graph = (run.summary or {}).get("graph") or (run.model.info.graph if run.model else "")
        line = f"{graph + ', ' if graph else ''}{run.workers} worker{'s' * (run.workers > 1)}"
        words.append(line)
    return "; ".join(dict.fromkeys(words))


def _data(runs: Sequence[RunData], charts: Sequence[Chart], heats: Sequence[Heat]) -> Markup:
    """What is plotted, for the script and for tests: JSON in which no `<` can end the element that holds it."""
    told: dict[str, Any] = {
        "runs": [{"name": run.name, "path": run.path} for run in runs], "most_epochs": MOST_EPOCHS,
        "charts": [chart.to_json() for chart in charts], "heats": [heat.to_json() for heat in heats]}
    text = json.dumps(told, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
