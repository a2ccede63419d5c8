# SPDX-License-Identifier: Apache-2.0
"""From cells to a table: mean ± deviation over seeds, and differences paired by seed. Nothing is chosen by a test
figure: a cell's epoch is the best on validation, and rows stay in the order of the grid file.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .cells import Cell
from .grid import Row
from .groups import group_tables, row_groups
from .spread import deviation, error, mean, paired, points, quantile
from .systems import OWN

__all__ = ["METRIC_NAMES", "cell_commits", "failure_lines", "headings", "is_text", "line", "markdown", "table_rows"]

METRIC_NAMES = {"accuracy": "accuracy, %", "roc_auc": "ROC AUC, points", "macro_f1": "macro F1, points"}
STATES = {"dirichlet": "Dirichlet energy", "mad": "MAD", "error": "error of the messages, %"}
"""Key of a row's `states` → how a table heads it."""
_SHOWN_FAILURES = 3
"""Of one kind."""


def table_rows(rows: Sequence[Row], shown: Sequence[Row], cells: Mapping[tuple[str, int], Cell],
               results: Mapping[str, dict[str, Any]], failures: Mapping[str, str],
               reference: str) -> list[dict[str, Any]]:
    """One dict for each shown row, as in table.json.

    Args:
        rows: all rows of the grid: a shown row's difference may be to one that is not shown.
        cells: (row's name, seed) → cell. results, failures: by the cells' digests.
        reference: width of the differences.
    Returns: figures as shares (0-1), `_sd` the sample's standard deviation (null for one seed), `difference`
        {against, mean, se, pairs} or null where the row is its own reference or there is none; milliseconds are
        those of whole trainings. `states`: dirichlet, mad, error of H^K → {mean, sd}. `shifts`: each shifted graph →
        {mean, se, beyond}: accuracy there minus that on the row's own graph, and, as {mean, se}, that difference minus
        the reference row's. What `groups.row_groups` adds.
    """
    by_seed = {row.name: {seed: results[cells[row.name, seed].digest] for seed in range(row.seeds)
                          if (row.name, seed) in cells and cells[row.name, seed].digest in results} for row in rows}
    return [_row(row, by_seed, _reference_of(row, rows, reference),
                 {seed: failures[cells[row.name, seed].digest] for seed in range(row.seeds)
                  if (row.name, seed) in cells and cells[row.name, seed].digest in failures}) for row in shown]


def cell_commits(results: Iterable[dict[str, Any]]) -> list[str]:
    """What the cells were trained by, sorted; `unknown` of an installed package. Cells outlive changes of the code."""
    return sorted({result.get("commit") or "unknown" for result in results})


def _reference_of(row: Row, rows: Sequence[Row], reference: str) -> str | None:
    """The row that `row` is compared with: its own method's, else the first method's that has one at this depth.

    A reference is compared with our first method, at its own depth where that has it, and nothing is with a reference.
    """
    there = [r for r in rows if (r.dataset, r.width, r.system) == (row.dataset, reference, OWN)]
    if row.system != OWN:
        there = sorted(there, key=lambda r: r.layers != row.layers)
        return there[0].name if there else None
    there = [r for r in there if r.layers == row.layers]
    own = [r for r in there if r.method == row.method]
    return (own or there)[0].name if own or there else None


def _row(row: Row, by_seed: Mapping[str, Mapping[int, dict[str, Any]]], reference: str | None,
         failures: Mapping[int, str]) -> dict[str, Any]:
    config, done, own = row.config, by_seed[row.name], row.system == OWN
    other = by_seed.get(reference or "", {}) if reference != row.name else {}
    figures = {split: [r["metric"][split] for r in done.values()] for split in ("valid", "test")}
    times = [1000 * r["seconds"] for r in done.values()]
    return {
        "system": f"{OWN}-{row.method}" if own else row.system, "shape": row.dataset, "name": row.name,
        "method": row.method, "width": row.width, "layers": row.layers, "tuned": row.tuned,
        "kind": config.propagation.kind if own else None, "rounds": config.propagation.rounds if own else None,
        "coding": config.messages.coding if own else None, "bits": config.quant.bits,
        "stages": config.quant.stages(), "threads": 1, "scope": "training", "metric": config.train.metric,
        "seeds": row.seeds, "repeats": len(done), "failed": len(failures),
        "failures": [{"seed": seed, "why": why} for seed, why in failures.items()],
        **{f"{split}_{name}": value for split, values in figures.items() for name, value in
           (("mean", mean(values)), ("sd", deviation(values)))},
        "accuracy_test_mean": mean([r["accuracy"]["test"] for r in done.values()]),
        "difference": _difference(done, reference, by_seed) if reference not in (None, row.name) else None,
        "reference": reference == row.name,
        "best_epoch_median": quantile([r["best_epoch"] for r in done.values()], 0.5),
        "epochs_median": quantile([r["epochs"] for r in done.values()], 0.5),
        "ms_median": quantile(times, 0.5), "ms_p10": quantile(times, 0.1), "ms_p90": quantile(times, 0.9),
        "states": {key: {"mean": mean(values), "sd": deviation(values)} for key in STATES
                   for values in [[r["states"][key] for r in done.values() if r["states"][key] is not None]]},
        "shifts": _shifts(done, other), **row_groups(done, other),
        "message_bytes_per_row": next((r["message_bytes_per_row"] for r in done.values()), None),
        "by_seed": [{"seed": seed, "valid": r["metric"]["valid"], "test": r["metric"]["test"],
                     "best_epoch": r["best_epoch"]} for seed, r in done.items()],
        "warnings": list(dict.fromkeys(text for r in done.values() for text in r["warnings"])),
    }


def _difference(done: Mapping[int, dict[str, Any]], reference: str | None,
                by_seed: Mapping[str, Mapping[int, dict[str, Any]]]) -> dict[str, Any]:
    """Mean of (this − reference) over the seeds that both have, and the mean's standard error."""
    own, other = ({seed: r["metric"]["test"] for seed, r in some.items()}
                  for some in (done, by_seed.get(reference or "", {})))
    return {"against": reference, **paired(own, other)}


def _shifts(done: Mapping[int, dict[str, Any]], other: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """See `table_rows`."""
    def change(cell: dict[str, Any], name: str) -> float:
        return float(cell["shifts"][name] - cell["accuracy"]["test"])

    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for cell in done.values() for name in cell["shifts"]):
        own = [change(cell, name) for cell in done.values()]
        beyond = [change(done[s], name) - change(other[s], name) for s in done if s in other and other[s]["shifts"]]
        found[name] = {"mean": mean(own), "se": error(own), "beyond": {"mean": mean(beyond), "se": error(beyond)}}
    return found


def headings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The columns over one dataset's rows; failures have one where there are any."""
    failed = ["failed"] if any(row["failed"] for row in rows) else []
    return ["method", "width", "K", "n", *failed, "valid", "test", "difference", "best epoch", "time, s"]


def is_text(heading: str) -> bool:
    """A column of words, set to the left."""
    return heading in ("method", "width")


def line(row: dict[str, Any], columns: Sequence[str]) -> list[str]:
    """A row as text under the headings `columns`; a dash where there is no figure yet."""
    seconds, epoch = row["ms_median"], row["best_epoch_median"]
    texts = {
        "method": row["method"], "width": row["width"], "K": str(row["layers"]), "failed": str(row["failed"] or "–"),
        "n": str(row["repeats"]) if row["repeats"] == row["seeds"] else f"{row['repeats']}/{row['seeds']}",
        "valid": points(row["valid_mean"]), "test": points(row["test_mean"], row["test_sd"]),
        "difference": _difference_text(row), "best epoch": "–" if epoch is None else f"{epoch:g}",
        "time, s": "–" if seconds is None else f"{seconds / 1000:.1f}",
    }
    return [texts[column] for column in columns]


def failure_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Why cells failed, equal reasons together with some of the cells that they hit."""
    hit: dict[str, list[str]] = {}
    for row in rows:
        for failure in row["failures"]:
            hit.setdefault(failure["why"], []).append(f"{row['name']} seed {failure['seed']}")
    return [f"failed: {', '.join(cells[:_SHOWN_FAILURES])}"
            f"{f' and {len(cells) - _SHOWN_FAILURES} more' if len(cells) > _SHOWN_FAILURES else ''}: {why}"
            for why, cells in hit.items()]


def _difference_text(row: dict[str, Any]) -> str:
    found = row["difference"]
    if row["reference"] and row["repeats"]:
        return "reference"
    if found is None or found["mean"] is None:
        return "–"
    text = points(found["mean"], found["se"], sign="+")
    _, method, width, depth = found["against"].split("/")
    if method != row["method"]:
        text += f" to {method}/{width}" + (f"/{depth}" if depth != f"K{row['layers']}" else "")
    return text if found["pairs"] == row["repeats"] else f"{text} ({found['pairs']} pairs)"


def markdown(result: dict[str, Any]) -> str:
    """table.md: one table a dataset, and beneath it what failed."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    out = ["# Accuracy", "",
           "Mean ± standard deviation over seeds at the epoch that was best on validation (on ties by its loss). "
           "Difference: test figure minus that of the reference width of the same method and depth, paired by seed, "
           "± standard error of its mean. Best epoch and seconds of a training: medians, one thread. ECE: expected "
           "calibration error over 15 bins, ± standard deviation. Beyond: the difference of the half named first minus "
           "that of the other; below 0 where the first half pays more.", "",
           f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']:g} GiB; commit "
           f"{result['commit'] or 'unknown'}; {versions}."]
    if result["cell_commits"] not in ([], [result["commit"] or "unknown"]):
        out += ["", f"Trained by commit{'s' * (len(result['cell_commits']) > 1)} {', '.join(result['cell_commits'])}."]
    for dataset in dict.fromkeys(row["shape"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["shape"] == dataset]
        columns = headings(rows)
        out += ["", f"## {dataset}: {METRIC_NAMES[rows[0]['metric']]}", "",
                *_table(columns, [line(row, columns) for row in rows])]
        tuned = [f"{row['method']}/{row['width']}" for row in rows if row["tuned"]]
        if tuned:
            some = "all rows" if len(tuned) == len(rows) else ", ".join(dict.fromkeys(tuned))
            out += ["", f"Settings found by `qgnn bench search`: {some}."]
        failed = failure_lines(rows)
        out += ["", *(f"- {text}" for text in failed)] if failed else []
        out += _more_tables(dataset, [row for row in rows if row["repeats"]])
        for title, columns, lines in group_tables(rows):
            out += ["", f"### {dataset}: {title}", "", *_table(columns, lines)]
    return "\n".join(out) + "\n"


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    rule = [":---" if is_text(c) else "---:" for c in columns]
    return [f"| {' | '.join(words)} |" for words in (columns, rule, *lines)]


def _more_tables(dataset: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the layers end in, and how models stand shifted graphs."""
    out: list[str] = []
    keys = ("method", "width", "layers")
    known = [row for row in rows if row["states"]["mad"]["mean"] is not None]
    if known:
        columns = ["method", "width", "K", "bytes a row", *STATES.values()]
        out += ["", f"### {dataset}: the state after K layers", "",
                *_table(columns, [[*(str(row[key]) for key in keys), str(row["message_bytes_per_row"]),
                                   *(_figure(key, row["states"][key]) for key in STATES)] for row in known])]
    rows = [row for row in rows if row["shifts"]]
    if rows:
        names = list(rows[0]["shifts"])
        out += ["", f"### {dataset}: change of accuracy on shifted graphs, points (beyond the reference's)", "",
                *_table(["method", "width", "K", *names], [[*(str(row[key]) for key in keys),
                        *(_shift_text(row["shifts"][name]) for name in names)] for row in rows])]
    return out


def _figure(key: str, figures: dict[str, Any]) -> str:
    if figures["mean"] is None:
        return "–"
    scale = 100 if key == "error" else 1
    return " ± ".join(f"{scale * figures[name]:.3g}" for name in ("mean", "sd") if figures[name] is not None)


def _shift_text(shift: dict[str, Any]) -> str:
    text, beyond = points(shift["mean"], shift["se"], sign="+"), shift["beyond"]
    return text if beyond["mean"] is None else f"{text} ({points(beyond['mean'], beyond['se'], sign='+')})"
