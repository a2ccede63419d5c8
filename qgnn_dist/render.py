# SPDX-License-Identifier: Apache-2.0
"""What people see in a terminal. Progress goes to stderr, results to stdout."""
from __future__ import annotations

import statistics
import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.prompt import Prompt
from rich.table import Table
from rich.text import Text

from . import logs
from .memory import byte_size

__all__ = ["JobTalk", "Status", "TrainingProgress", "byte_size", "exported", "inspection", "job", "partition",
           "percent", "plain", "prediction", "report", "training"]

CLEANED = {"one_way": "given in one direction (both are used)"}
"""What counts of a cleaned graph are called where their own name would sound as if something were wrong."""
SMALL_PART = 10_000
"""Nodes of a part below which messages between parts cost more than the work they save."""


def percent(value: float | None) -> str:
    """A share as % with two digits; a dash where there is none, as of a graph without test nodes."""
    return "–" if value is None else f"{100 * value:.2f} %"


class Status:
    """A spinner with the step that is running; plain lines where stderr is no terminal."""

    def __init__(self, text: str) -> None:
        self._console = Console(stderr=True, quiet=logs.is_json())
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
        self._epochs, self._seconds = epochs, list[float]()
        self._console = Console(stderr=True, quiet=logs.is_json())
        self._live = self._console.is_terminal
        self._bar = Progress(
            TextColumn("epoch"), MofNCompleteColumn(), BarColumn(24), TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self._console, transient=True)
        self._task = self._bar.add_task("train", total=epochs, text="starting workers …")

    def __enter__(self) -> TrainingProgress:
        if self._live:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:  # a bar that never began would print an empty line
            self._bar.stop()

    def epoch(self, record: dict[str, Any]) -> None:
        """Show an epoch's record."""
        text = f"loss {record['loss']:.3f}"
        if "accuracy" in record:
            text += f"  valid {percent(record['accuracy']['valid'])}  test {percent(record['accuracy']['test'])}"
        sent = sum(record["wire_bytes"].values())
        if sent:
            text += f"  wire {byte_size(sent)}"
        self._bar.update(self._task, completed=record["epoch"], text=text)
        self._seconds.append(record["epoch_s"])
        if not self._live and (record["epoch"] % 10 == 0 or record["epoch"] == 1):
            epochs = self._epochs - record["epoch"]
            left = f"  left {_duration(statistics.fmean(self._seconds) * epochs)} at most" if epochs else ""
            self._console.print(f"epoch {record['epoch']} of {self._epochs}: {text}{left}", highlight=False,
                                soft_wrap=True)


def _duration(seconds: float) -> str:
    """In the largest unit of which there are two or more.

    >>> _duration(0.4), _duration(119), _duration(200), _duration(9000)
    ('0 s', '119 s', '3 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class JobTalk:
    """What a submitted job says, on stderr, and the question at Ctrl-C."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, soft_wrap=True)

    def started(self, job_id: str) -> None:
        """Show the job's id."""
        self._console.print(f"job {job_id}", highlight=False)

    def log(self, piece: str) -> None:
        """Pass on a piece of the log as it came."""
        self._console.out(piece, end="", highlight=False)

    def warning(self, text: str) -> None:
        """Show a word of warning."""
        self._console.print(f"warning: {text}", style="yellow", markup=False, highlight=False)

    def asked(self) -> str:
        """What to do with the job; it goes on where nobody can be asked, or asks again by another Ctrl-C."""
        from .cluster.jobs import DETACH, STOP

        if not (sys.stdin.isatty() and self._console.is_terminal):
            return DETACH
        try:
            return Prompt.ask("\nthe job runs on the cluster", choices=[DETACH, STOP], default=DETACH,
                              console=self._console)
        except (KeyboardInterrupt, EOFError):
            return DETACH


def job(result: dict[str, Any], console: Console) -> None:
    """One line: what became of a submitted job."""
    message = f": {result['message']}" if result["message"] else ""
    console.print(f"job {result['job']} {result['status'].lower()}{message}", soft_wrap=True, markup=False,
                  highlight=False)


def _table(title: str, rows: list[tuple[str, str]], console: Console) -> None:
    table = Table(title=plain(title), show_header=False, title_justify="left", title_style="bold")
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, plain(value))
    console.print(table, highlight=False)


def plain(value: str) -> Text:
    """Words that may come from outside: no markup of ours, no control characters for the terminal."""
    return Text("".join(c if c.isprintable() else repr(c)[1:-1] for c in value))


def partition(result: dict[str, Any], console: Console) -> None:
    """A new store."""
    _store(result, console)
    if result["num_parts"] > 1 and result["num_nodes"] < SMALL_PART * result["num_parts"]:
        console.print(f"hint: below some {SMALL_PART:,} nodes a part, messages cost more than the work they save; "
                      "--parts 1 trains faster and needs no Ray", highlight=False, soft_wrap=True)


def training(result: dict[str, Any], console: Console) -> None:
    """The end of a run."""
    wire, accuracy = result["wire_bytes_per_epoch"], result["accuracy"]
    bits = result["bits"]
    rows = [
        ("accuracy", _accuracies(accuracy)),
        ("best epoch", f"{result['best_epoch']} of {result['epochs']}"),
        ("bits", ", ".join(f"{stage} {width}" for stage, width in bits.items())),
        ("epoch", ", ".join(f"{1000 * result['epoch_s'][k]:.0f} ms ({k})" for k in ("median", "p90"))),
        ("bytes an epoch", ", ".join(f"{kind} {byte_size(count)}" for kind, count in wire.items() if count) or "none"),
        ("peak memory", "; ".join(f"{kind} {', '.join(map(byte_size, result[key]))}" for kind, key in (
            ("anonymous", "peak_anon_bytes"), ("resident", "peak_rss_bytes"))) + "; each worker's"),
    ]
    rows += [("warning", text) for text in result["warnings"]]
    _table(f"Trained on {result['graph']} with {result['parts']} worker(s)", rows, console)


def exported(result: dict[str, Any], console: Console) -> None:
    """A packed model."""
    _model(result, console)


def prediction(result: dict[str, Any], console: Console) -> None:
    """A finished batch."""
    seconds = result["seconds"]
    rows = [("nodes", f"{result['rows']:,}")]
    if result["accuracy"]:
        rows.append(("accuracy", _accuracies(result["accuracy"])))
        if "test" in result["accuracy"]:
            rows.append(("test by degree", _by_degree(result["accuracy_by_degree"]["test"])))
        rows.append(("calibration", f"ECE {_accuracies(result['ece'])}"))
    rows += [
        ("seconds", ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
         + f"; without imports{' and the start of Ray' * (result['parts'] > 1)}"),
        ("model", byte_size(result["model_bytes"])),
        ("messages", byte_size(result["message_bytes"])),
    ]
    if "overlap" in result:
        rounds = [one for rank in result["overlap"] for one in rank]
        ratios = sorted(one["ratio"] for one in rounds)
        rows.append(("rounds", f"{len(rounds)}, time over the larger of computing and wire: "
                               f"{statistics.median(ratios):.2f} (at most {ratios[-1]:.2f}); see trace.json"))
    if not result["same_graph"]:
        rows.append(("note", _other_graph(result["range_gain"], result["feature_gain"])))
    _table(f"Predicted {result['graph']} on {result['parts']} worker(s)", rows, console)


def _other_graph(range_gain: int, feature_gain: int = 0) -> str:
    """That a model meets another graph than its own, and what it was fitted by, as powers of two; 0 is by nothing."""
    shifted = f"; ranges were shifted by 2^{range_gain}" if range_gain else ""
    divided = f"; features were divided by 2^{feature_gain}" if feature_gain else ""
    return f"the model was trained on another graph{shifted}{divided}"


def _by_degree(found: dict[str, Any]) -> str:
    """Accuracy of the test nodes in every bucket of degree, and how many they are."""
    groups = zip(found["from"], found["to"], found["accuracy"], found["nodes"])
    return ", ".join(f"{low if low == high else f'{low}-{high}'}: {percent(share)} of {nodes:,}"
                     for low, high, share, nodes in groups)


def report(result: dict[str, Any], console: Console) -> None:
    """A page: where it is."""
    for run in result["runs"]:
        done = "" if run["complete"] else ", not finished"
        console.print(plain(f"{run['name']}: {run['epochs']} epochs, the best one {run['best_epoch'] or '-'}{done}"),
                      highlight=False)
    console.print(plain(f"{result['path']}  {byte_size(result['bytes'])}"), highlight=False, soft_wrap=True)


def inspection(result: dict[str, Any], console: Console) -> None:
    """A store, a run or a model."""
    {"store": _store, "run": _run, "model": _model}[result["kind"]](result, console)
    if "diagnosis" in result:
        _diagnosis(result["diagnosis"], console)
    for path in result.get("pictures", []):
        console.print(path, highlight=False, soft_wrap=True)


def _figure(value: float | None, form: str = ".3g") -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else format(value, form)


def _diagnosis(result: dict[str, Any], console: Console) -> None:
    """Stages, rounds and layers of a packed model on a store."""
    stages = Table("stage", "bits", "grid", "step", "rms", "clipped", "SNR dB", "ŷ error", title="Quantisation",
                   title_justify="left", title_style="bold")
    rounds = [(f"round {m['round']}", m) for m in result["messages"]]
    for name, stage in [*result["stages"].items(), *rounds]:
        clipped = percent(stage["clipped"]) if stage["clipped"] is not None else "-"
        stages.add_row(name, str(stage["bits"]), stage["grid"] or "float", _figure(stage["step"], ".4g"),
                       _figure(stage["rms"]), clipped, _figure(stage["snr_db"], ".1f"),
                       _figure(stage.get("believed_error")))
    console.print(stages, highlight=False)
    layers = Table("layer", "λ", "⟨Δ,G⟩/‖H⁰‖²", "‖Δ‖/‖H⁰‖", "Dirichlet", "MAD", "error", title="Layers",
                   title_justify="left", title_style="bold")
    for entry in result["layers"]:
        keys = ("multiplier", "constraint", "change", "dirichlet", "mad", "error")
        layers.add_row(str(entry["layer"]), *(_figure(entry[key]) for key in keys))
    console.print(layers, highlight=False)
    overall = result["overall"]
    rows = [("nodes", f"{overall['nodes']:,} of {result['graph']}, {result['parts']} part(s)"),
            ("same class", f"{percent(overall['agreement'])} as with float messages and residual"),
            ("worst score", f"{_figure(overall['worst_difference'])} away from it")]
    if not result["same_graph"]:
        rows.append(("note", _other_graph(result["range_gain"])))
    _table("Packed against float", rows, console)


def _partition_peak(peak: dict[str, Any]) -> str:
    said = f"{byte_size(peak['peak_anon_bytes'])} anonymous, {byte_size(peak['peak_rss_bytes'])} resident"
    if "memory_gb" not in peak:  # of an earlier program
        return said
    return f"{said}; a builder {byte_size(peak['builder_anon_bytes'])}; --memory {peak['memory_gb']:g}"


def _store(result: dict[str, Any], console: Console) -> None:
    cleaned, balance, how = result["cleaned"], result["balance"], result["partitioner"]
    at_rest = f" codes of {result['feature_bits']} bits" if "feature_bits" in result else ""
    if "standardised" in result:
        at_rest += ", standardised"
    if "hops" in result:
        at_rest += f", own and {result['hops']['count']} hops"
    features = (f"{result['num_features']} ({result['feature_kind']}{at_rest}, {byte_size(result['feature_bytes'])})"
                if result["num_features"] else "none")
    rows = [
        ("nodes, edges", f"{result['num_nodes']:,}, {result['num_edges']:,} undirected"),
        ("features, classes", f"{features}, {result['num_classes'] or 'none'}"),
        ("cleaned", ", ".join(f"{count:,} {CLEANED.get(name, name.replace('_', ' '))}"
                              for name, count in cleaned.items())),
        ("partitioner", f"{how['method']}, seed {how['seed']} ({how['reason']})"),
        ("order", _order(result)),
        ("cut", f"{percent(result['cut_fraction'])} of the edges; {result['halo_rows']:,} halo rows"),
        ("balance", f"largest part {balance['rows']:.3f} of the mean in rows, {balance['edges']:.3f} in edges"),
        ("bytes a round", ", ".join(f"{byte_size(count)} at {b} bits" for b, count in
                                    result["bytes_per_round"].items())),
        ("peak memory", _partition_peak(result["peak"])),
        ("seconds", ", ".join(f"{name} {value:.2f}" for name, value in result.get("seconds", {}).items()) or "-"),
        ("fingerprint", result["fingerprint"][:16]),
    ]
    if "verified_files" in result:
        rows.append(("verified", f"{result['verified_files']} files, every checksum right"))
    _table(f"Store of {result['name']} in {result['num_parts']} part(s)", rows, console)
    columns = {"part": "part", "rows": "rows", "boundary": "boundary", "halo": "halo", "directed_edges": "edges",
               "train": "train", "valid": "valid", "test": "test"}
    shown = [key for key in columns if key in result["parts"][0]]
    table = Table(*(columns[key] for key in shown))
    for entry in result["parts"]:
        table.add_row(*(f"{entry[key]:,}" for key in shown))
    console.print(table, highlight=False)


def _order(result: dict[str, Any]) -> str:
    if "order" not in result:  # stores of earlier programs
        return "source"
    return f"{result['order']['method']} ({result['order']['reason']})"


def _model(result: dict[str, Any], console: Console) -> None:
    ratio = result["float_bytes"] / max(result["model_bytes"], 1)
    rows = [
        ("network", f"{result['num_features']} → {result['hidden']} → {result['num_classes']}, "
                    f"{result['layers']} layers of {_propagation(result)}"),
        ("bits", ", ".join(f"{stage} {width}" for stage, width in result["bits"].items())),
        ("messages", result["coding"] + (", steps " + ", ".join(f"{s:g}" for s in result["message_steps"])
                                         if result["message_steps"] else ", float")),
        ("multipliers", ", ".join(f"{m:.3g}" for m in result["multipliers"]) or "none"),
        ("features", f"norm {result['feature_norm']}, {'signed' if result['feature_signed'] else 'unsigned'} codes"),
        ("size", f"{byte_size(result['model_bytes'])}, {ratio:.1f} times smaller than its float weights"),
        ("trained on", f"{result['graph']} ({result['fingerprint'][:16]})"),
    ]
    if "accuracy" in result:
        rows.append(("accuracy", f"{_accuracies(result['accuracy'])} at epoch {result['epoch']}"))
    _table("Packed model", rows, console)


def _propagation(result: dict[str, Any]) -> str:
    """A model's kind of layers, with what there is to say of it."""
    if "elastic" in result:
        own = result["elastic"]
        return f"elastic ({own['norm']}, λ₁ {own['lambda1']:g}, λ₂ {own['lambda2']:g})"
    return f"{result['propagation']} ({result['rounds']} rounds)"


def _run(result: dict[str, Any], console: Console) -> None:
    rows = [("state", "complete" if result["complete"] else "not complete; `qgnn train … --resume` goes on"),
            ("bits", ", ".join(f"{stage} {width}" for stage, width in result["bits"].items()))]
    if "epoch" in result:
        rows += [("epochs", f"{result['epoch']}, best {result['best_epoch']}"),
                 ("accuracy", _accuracies(result["accuracy"])),
                 ("parts", str(result["parts"])),
                 ("features", f"norm {result['features']['norm']}"),
                 ("trained on", result["fingerprint"][:16])]
    _table("Run", rows, console)


def _accuracies(values: dict[str, float | None]) -> str:
    return ", ".join(f"{name} {percent(values[name])}" for name in ("train", "valid", "test") if name in values)
