# SPDX-License-Identifier: Apache-2.0
"""`qgnn report`: what is plotted is what the run has, nothing from outside is taken for HTML, and what is refused."""
from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import qgnn_dist as qgnn
from qgnn_dist.cli import app
from qgnn_dist.errors import InputError
from qgnn_dist.report.api import make_report
from qgnn_dist.report.curves import MOST_EPOCHS
from qgnn_dist.report.runs import read_runs
from tests.helpers import make_store, settings, small_graph
from tests.pages import Page, train_here

EVIL = "</script><img src=x onerror=alert(1)><b>&\"'"
WORDS = ("model.feature_norm=l2", "propagation.alpha=0.001", "train.epochs=6", "train.eval_every=2", "train.lr=0.02")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two parts, `s`, and runs on it: INT2 and float."""
    folder = tmp_path_factory.mktemp("report")
    store = make_store(small_graph(), folder / "s", 2)
    train_here(store, settings(*WORDS), folder / "int2")
    train_here(store, settings(*WORDS, "quant.bits=32", "train.epochs=4"), folder / "float")
    return folder


@pytest.fixture(scope="module")
def one(place: Path) -> Page:
    """The report of one run, with its store."""
    make_report([place / "int2"], stores=[place / "s"])
    return Page(place / "int2" / "report.html")


@pytest.fixture(scope="module")
def two(place: Path) -> Page:
    """Two runs, without a store."""
    make_report([place / "int2", place / "float"], out=place / "two.html")
    return Page(place / "two.html")


def _lines(run: Path) -> dict[int, dict[str, Any]]:
    return {line["epoch"]: line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}


def _value(line: Any, key: list[Any]) -> Any:
    for step in key:
        line = line[step]
    return line


def _is_of_metrics(page: Page, runs: list[Path]) -> set[str]:
    """Compare every series and map over epochs with the run's lines; the fields that were plotted."""
    seen = set()
    for chart in page.data["charts"]:
        for series in chart["series"]:
            if series["source"] != "metrics.jsonl":
                continue
            lines = _lines(runs[series["run"]])
            if series["epoch"] is not None:
                assert series["y"] == _value(lines[series["epoch"]], series["key"])
                assert series["x"] == list(range(len(series["y"])))
            else:
                has = [e for e, line in lines.items() if "accuracy" in line or series["key"][0] not in (
                    "accuracy", "valid_loss", "evaluation_s")]
                assert series["x"] == has, series["key"]
                assert series["y"] == [_value(lines[epoch], series["key"]) for epoch in has]
            seen.add("/".join(map(str, series["key"])))
    for heat in page.data["heats"]:
        lines = _lines(runs[heat["run"]])
        assert heat["columns"] == list(lines)
        assert heat["values"] == np.array([lines[epoch]["multipliers"] for epoch in heat["columns"]]).T.tolist()
        seen.add("map of multipliers")
    return seen


def test_every_plotted_series_is_that_of_metrics_jsonl(place: Path, one: Page, two: Page) -> None:
    kinds = {f"wire_bytes/{kind}" for kind in ("forward", "backward", "evaluation", "control")}
    assert _is_of_metrics(one, [place / "int2"]) == kinds | {
        "loss", "valid_loss", "accuracy/train", "accuracy/valid", "accuracy/test", "epoch_s", "train_s", "evaluation_s",
        "multipliers", "residuals", "map of multipliers"}
    assert _is_of_metrics(two, [place / "int2", place / "float"]) == {
        "loss", "valid_loss", "accuracy/valid", "accuracy/test", "epoch_s", "wire_bytes/forward", "wire_bytes/backward",
        "multipliers", "residuals", "map of multipliers"}


def test_what_is_drawn_is_what_the_json_has(one: Page, two: Page) -> None:
    """A line's points lie where one scale of the chart puts all values of it, to a tenth of a pixel."""
    for page in (one, two):
        for svg in page.root.all("svg", class_="plot"):
            if "data-chart" not in svg.attributes:
                continue
            chart = page.chart(svg.attributes["data-chart"])
            lines = svg.all("path", class_="line")
            assert len(lines) == len(chart["series"]) > 0
            drawn, values = [], []
            for line, series in zip(lines, chart["series"]):
                points = [tuple(map(float, p.split())) for p in re.findall(r"[ML]([^ML]+)", line.attributes["d"])]
                assert len(points) == len(series["y"])
                drawn += points
                values += list(zip(series["x"], np.log(series["y"]) if chart["log"] else series["y"]))
            for axis in (0, 1):
                at, of = np.array(drawn)[:, axis], np.array(values, float)[:, axis]
                if of.min() < of.max():
                    slope = (at[of.argmax()] - at[of.argmin()]) / (of.max() - of.min())
                    assert slope > 0 if axis == 0 else slope < 0
                    np.testing.assert_allclose(at, at[of.argmin()] + slope * (of - of.min()), atol=0.21)
                else:
                    assert len(set(at)) == 1


def test_training_leaves_what_its_best_model_says(place: Path) -> None:
    final, store = json.loads((place / "int2" / "final.json").read_text()), qgnn.inspect(place / "s")
    summary = json.loads((place / "int2" / "summary.json").read_text())
    assert final["epoch"] == summary["best_epoch"]
    for name, split in final["splits"].items():
        assert split["right"] / split["nodes"] == summary["accuracy"][name], "the model of that epoch, the same nodes"
        table = np.array(split["confusion"])
        assert table.sum() == split["nodes"]
        assert np.trace(table) == split["right"] == sum(split["by_degree"]["right"])
        assert table.sum(1).tolist() == split["by_class"]["nodes"]
    assert np.sum(final["sent_rows"], 1).tolist() == [part["sends"] for part in store["parts"]]
    assert np.sum(final["sent_rows"], 0).tolist() == [part["halo"] for part in store["parts"]]
    assert [one["rows"] for one in final["workers"]] == [part["rows"] for part in store["parts"]]
    evaluations = [line["wire_bytes"]["evaluation"] for line in _lines(place / "int2").values()]
    sent = summary["wire_bytes_final"]
    assert (sent["forward"], sent["backward"], sent["evaluation"]) == (0, 0, max(evaluations)), "one more evaluation"
    kinds = {event.get("cat") for event in json.loads((place / "int2" / "trace.json").read_text())["traceEvents"]}
    assert kinds >= {"compute", "wire", "wait"}


def test_waits_and_computing_are_all_of_training(place: Path) -> None:
    for line in _lines(place / "int2").values():
        for rank in range(2):
            whole = line["compute_s"][rank] + sum(waits[rank] for waits in line["wait_s"].values())
            assert 0 < whole <= line["train_s"] + 1e-5


def _bars(page: Page, title: str) -> dict[str, list[str]]:
    """Label → texts of the rows under a title."""
    (figure,) = [f for f in page.root.all("figure") if any(c.text == title for c in f.all("figcaption"))]
    return {row.all("span", class_="label")[0].text: [b.text for b in row.all("b")] for row in figure.all("div")}


def _seconds(value: float) -> str:
    """As a busy machine may need it, too."""
    return f"{1000 * value:.3g}\xa0ms" if value < 1 else f"{value:.3g}\xa0s"


def test_bars_tables_and_headline_are_the_runs_figures(place: Path, one: Page, two: Page) -> None:
    runs = [json.loads((place / run / "final.json").read_text())["splits"]["test"] for run in ("int2", "float")]
    degrees = runs[0]["by_degree"]
    wanted = {str(low) if low == high else f"{low}–{high}": f"{100 * share:.1f}\xa0%"
              for low, high, share in zip(degrees["from"], degrees["to"], degrees["accuracy"])}
    assert {label: texts[0] for label, texts in _bars(one, "Accuracy by degree of the node").items()} == wanted
    recalls = [f"{100 * share:.1f}\xa0%" for share in runs[1]["by_class"]["recall"]]
    assert [texts[1] for texts in _bars(two, "Share of each class that is found").values()] == recalls
    cells = one.section("answers").all("text", class_="count")
    assert [int(cell.text) for cell in cells] == [count for row in runs[0]["confusion"] for count in row if count]
    summary = json.loads((place / "int2" / "summary.json").read_text())
    cards = {card.all("h2")[0].text: card.all("p", class_="value")[0].text
             for card in one.root.all("section", class_="cards")[0].all("div")}
    assert cards["Test accuracy"] == f"{100 * summary['accuracy']['test']:.1f}\xa0%"
    assert cards["An epoch"] == _seconds(summary["epoch_s"]["median"])
    assert (cards["Width"], cards["Epochs"]) == ("INT2", "6")
    waits = [[line["wait_s"]["exchange"][rank] for line in _lines(place / "int2").values()] for rank in range(2)]
    for told, values in zip(_bars(one, "Training of an epoch, by worker").values(), waits):
        assert told[0].split(" + ")[1] == _seconds(float(np.median(values)))
    sent = one.section("traffic").all("text", class_="count")
    assert [int(cell.text) for cell in sent] == [
        count for row in json.loads((place / "int2" / "final.json").read_text())["sent_rows"] for count in row if count]


def test_messages_against_float_are_the_formulas(place: Path, two: Page) -> None:
    """What the page says of float messages is what the float run sent."""
    table = next(t for t in two.root.all("table") if "messages in float32" in t.words())
    told = next(row for row in table.all("tr") if "messages in float32" in row.words()).all("td")
    lines = list(_lines(place / "float").values())
    sent = np.mean([sum(line["wire_bytes"][kind] for kind in ("forward", "backward", "evaluation")) for line in lines])
    assert told[1].text == f"{sent / 1024:.1f}\xa0KiB"


def test_what_is_sent_and_what_messages_are_of_it_stand_together(place: Path, one: Page, two: Page) -> None:
    lines = list(_lines(place / "int2").values())
    whole, messages = (f"{np.mean([sum(line['wire_bytes'][kind] for kind in kinds) for line in lines]) / 1024:.1f}"
                       "\xa0KiB" for kinds in (lines[0]["wire_bytes"], ("forward", "backward", "evaluation")))
    assert whole != messages
    (card,) = [c for c in one.root.all("div", class_="card") if c.all("h2") and c.all("h2")[0].text == "Sent an epoch"]
    assert card.all("p", class_="value")[0].text == whole
    note = card.all("p", class_="note")[0].text
    assert note.startswith(f"messages {messages} of it, ")
    assert "times smaller than" in note
    rows = {row.all("th")[0].text: row.all("td") for row in two.root.all("tr") if row.all("td")}
    assert (rows["sent an epoch"][0].text, rows["messages of it"][0].text) == (whole, messages)


def test_an_open_decay_reads_as_open_and_as_what_it_came_to(place: Path, one: Page, tmp_path: Path) -> None:
    def decay(page: Page) -> list[str]:
        (row,) = [row for row in page.section("settings").all("tr") if row.all("th")[0].text == "train.weight_decay"]
        return [cell.text for cell in row.all("td")]

    assert decay(one) == ["open: 0.001", "open"]
    assert "None" not in one.section("settings").words()
    run = tmp_path / "run"
    shutil.copytree(place / "int2", run, ignore=shutil.ignore_patterns("report.html"))
    summary = json.loads((run / "summary.json").read_text())
    for value in (None, "<b>"):
        (run / "summary.json").write_text(json.dumps({**summary, "weight_decay": value}))
        with pytest.raises(InputError, match="is no number"):
            make_report([run])
    del summary["weight_decay"]
    (run / "summary.json").write_text(json.dumps(summary))
    make_report([run])
    assert decay(Page(run / "report.html")) == ["open", "open"], "of an earlier program"


def test_a_run_at_chance_is_told_at_the_top_and_by_training(place: Path, tmp_path: Path) -> None:
    """A column of incomes in float: the loss is enormous, and no answer better than the most frequent class."""
    graph = small_graph(signed=True)
    assert isinstance(graph.features, np.ndarray)
    features = graph.features.copy()
    features[:, 0] = np.abs(features[:, 0]) * 1e6
    store = make_store(replace(graph, features=features), tmp_path / "s", 1)
    words = ("quant.bits=32", "train.epochs=4", "model.feature_norm=none")
    summary = train_here(store, settings(*words), tmp_path / "run")
    (text,) = [text for text in summary["warnings"] if "of very different scales?" in text]
    assert text.startswith("the loss was ")
    make_report([tmp_path / "run"])
    header, = Page(tmp_path / "run" / "report.html").root.all("header")
    (told,), (before, command, after) = header.all("p", class_="doubt"), text.split("`")
    assert told.text == before[0].upper() + before[1:] + after
    assert [code.text for code in told.all("code")] == [command]
    (tmp_path / "run" / "summary.json").unlink()
    make_report([tmp_path / "run", place / "int2"], out=tmp_path / "r.html")
    assert f"run: {before}" in Page(tmp_path / "r.html").root.all("header")[0].words(), "of a run that still trains"


def test_a_title_has_the_folder_above_the_run(place: Path, one: Page, two: Page, tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    assert one.root.all("title")[0].text == f"{place.name}/int2 – qgnn report"
    assert [h.text for h in one.root.all("h1")[0].all("span")] == [f"{place.name}/int2"]
    assert two.root.all("title")[0].text == f"{place.name}/int2 · {place.name}/float – qgnn report"
    monkeypatch.chdir(place)
    make_report(["./int2"], out=tmp_path / "r.html")
    assert Page(tmp_path / "r.html").root.all("title")[0].text == "int2 – qgnn report"


def test_a_model_is_measured_on_its_store(place: Path, one: Page, tmp_path: Path) -> None:
    qgnn.export(place / "int2", out=tmp_path / "m.st")
    found = qgnn.inspect(tmp_path / "m.st", store=place / "s")["diagnosis"]
    for id, table, key, at in (("dirichlet", "layers", "dirichlet", "layer"), ("error", "layers", "error", "layer"),
                               ("clipped", "messages", "clipped", "round"), ("noise", "messages", "snr_db", "round")):
        (series,) = one.chart(id)["series"]
        assert series["x"] == [entry[at] for entry in found[table]]
        assert series["y"] == [entry[key] for entry in found[table]]
    smalls = one.root.all("div", class_="smalls")[0]
    assert [h.text for h in smalls.all("h4")] == [name for name, stage in found["stages"].items() if stage["histogram"]]
    assert found["examined"]["splits"] == json.loads((place / "int2" / "final.json").read_text())["splits"]
    other = make_store(small_graph(seed=1), tmp_path / "other", 1)
    with pytest.raises(InputError, match="another graph than the runs"):
        make_report([place / "int2"], out=tmp_path / "r.html", stores=[other.path])
    assert not (tmp_path / "r.html").exists()


def test_the_page_needs_nothing_else(one: Page, two: Page, place: Path) -> None:
    for page in (one, two):
        for element in [e for name in ("link", "img", "iframe", "object", "use", "image") for e in page.root.all(name)]:
            assert element.attributes.get("href") == "data:,"
        assert all("src" not in script.attributes for script in page.root.all("script"))
    text = (place / "two.html").read_text()
    assert not re.search(r"url\(|@import|https?://", text)
    assert "default-src 'none'" in text
    assert len(text) < 5e6


def test_what_differs_and_where_files_go(place: Path, two: Page, tmp_path: Path) -> None:
    (table,) = [t for t in two.root.all("table") if "train.epochs" in t.words() and "default" not in t.words()]
    keys = [row.all("th")[0].text for row in table.all("tbody")[0].all("tr")]
    assert keys == ["quant.bits", "quant.weights", "quant.features", "quant.hidden", "quant.messages", "quant.residual",
                    "quant.gradients", "train.epochs"]
    assert [h.text for h in two.root.all("h1")[0].all("span")] == ["int2", "float"]
    with pytest.raises(InputError, match="output exists; add --overwrite"):
        make_report([place / "int2", place / "float"], out=place / "two.html")
    with pytest.raises(InputError, match="no such folder"):
        make_report([place / "int2"], out=tmp_path / "nowhere" / "r.html")
    told = CliRunner().invoke(app, ["report", str(place / "int2"), "--out", str(tmp_path / "r.html"), "--json"])
    assert told.exit_code == 0, told.stderr
    result = json.loads(told.stdout)
    assert (result["path"], result["bytes"]) == (str(tmp_path / "r.html"), (tmp_path / "r.html").stat().st_size)
    said = CliRunner().invoke(app, ["report", str(place / "int2"), "--out", str(tmp_path / "r.html"), "--overwrite"])
    assert "int2: 6 epochs" in said.stdout


def test_names_from_outside_are_text(place: Path, tmp_path: Path) -> None:
    """Of runs, graphs, classes, hosts, errors, stages of a trace, and settings of a run's own file."""
    evil = tmp_path / EVIL.replace("/", "%")
    graph = replace(small_graph(), name=EVIL, class_names=[f"{EVIL}{n}" for n in range(5)])
    train_here(make_store(graph, tmp_path / "s", 2), settings(*WORDS), evil)
    for name in ("final.json", "trace.json", "summary.json", "status.json"):
        file = evil / name
        if file.exists():
            values = json.loads(file.read_text())
            for worker in values.get("workers", []):
                worker["host"] = EVIL
            for event in values.get("traceEvents", []):
                event["name"] = EVIL
            values |= {"warnings": [EVIL], "versions": {EVIL: EVIL}} if name == "summary.json" else {}
            file.write_text(json.dumps(values))
    (evil / "restarts.jsonl").write_text(json.dumps({"time": 1.0, "epoch": 1, "error": EVIL}) + "\n")
    shutil.copytree(place / "float", tmp_path / "plain")
    for runs, name in (([evil], "one"), ([evil, tmp_path / "plain"], "two")):
        make_report(runs, out=tmp_path / f"{name}.html", stores=[tmp_path / "s"])
        page = Page(tmp_path / f"{name}.html")
        assert len(page.root.all("script")) == 2
        assert not [e for tag in ("img", "b") for e in page.root.all(tag) if "onerror" in str(e.attributes)
                    or e.attributes.get("src")]
        assert evil.name in page.root.all("h1")[0].words()
        assert page.root.words().count("onerror=alert(1)") >= 10
        assert "<img" not in (tmp_path / f"{name}.html").read_text()


def test_a_run_that_is_not_finished(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "int2", run, ignore=shutil.ignore_patterns("summary.json", "final.json", "trace.json",
                                                                       "status.json", "report.html"))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:40])
    told = make_report([run])
    assert told["runs"] == [{"name": "run", "epochs": 3, "best_epoch": 2, "complete": False, "measured": False}]
    page = Page(run / "report.html")
    assert page.root.all("span", class_="state")[0].text == "not finished"
    assert page.chart("loss")["series"][0]["x"] == [1, 2, 3]
    words = page.root.words()
    for text in ("last line of metrics.jsonl is not finished", "this run has none", "No trace in this run",
                 "qgnn report RUN --store STORE", "Peaks are written when training ends"):
        assert text in words
    assert all(figure.all("svg") or figure.all("div") for figure in page.root.all("figure")), "no empty plot"
    make_report([run], stores=[place / "s"], overwrite=True)
    measured = Page(run / "report.html")
    assert measured.section("traffic").all("svg"), "rows between parts are the store's"
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").write_text(lines[0])
    make_report([run], overwrite=True)
    early = Page(run / "report.html")
    assert "No epoch was evaluated yet" in early.root.words()
    assert "no checkpoint holds an evaluated model yet" in early.root.words()


def test_best_epochs_are_those_of_training(place: Path) -> None:
    for run in read_runs([place / "int2", place / "float"]):
        assert run.summary is not None
        assert run.best_epoch == run.summary["best_epoch"]
        assert run.best.best_metric["test"] == run.summary["metric"]["test"]


def test_a_long_run_is_thinned_and_says_so(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "long"
    shutil.copytree(place / "int2", run, ignore=shutil.ignore_patterns("report.html"))
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[1])
    line["multipliers"], rng = [-0.1] * 64, np.random.default_rng(0)
    with open(run / "metrics.jsonl", "w") as out:
        for epoch, loss in enumerate(rng.random(2345).tolist(), 1):
            line |= {"epoch": epoch, "loss": loss, "valid_loss": 1e30 if epoch == 10 else loss,
                     "accuracy": {**line["accuracy"], "valid": 0.5 + 0.25 * (epoch == 777)}}
            out.write(json.dumps(line) + "\n")
    told = make_report([run], out=tmp_path / "r.html")
    page, lines = Page(tmp_path / "r.html"), _lines(run)
    loss, valid = page.chart("loss")["series"]
    assert {1, 777, 2345} <= set(loss["x"])
    assert MOST_EPOCHS / 2 < len(loss["x"]) <= MOST_EPOCHS + 2
    assert loss["y"] == [lines[epoch]["loss"] for epoch in loss["x"]]
    assert valid["y"][valid["x"].index(10)] is None, "a loss that was no number"
    assert "one epoch in 3" in page.chart("loss")["note"]
    assert told["bytes"] < 1.5e6


@pytest.mark.parametrize(("name", "change", "message"), [
    ("metrics.jsonl", lambda text: text.replace('"loss"', '"lass"', 1), "'loss' is missing (line 1)"),
    ("metrics.jsonl", lambda text: text.splitlines(keepends=True)[0] + "{half\n" + text, "(line 2)"),
    ("metrics.jsonl", lambda text: text + text, "epoch 1 of 2 workers follows epoch 6 of 2 (line 7)"),
    ("metrics.jsonl", lambda text: text.replace('"loss": ', '"loss": "<b>", "x": ', 1), "<b> is no number (line 1)"),
    ("metrics.jsonl", lambda text: "", "no epoch is finished yet"),
    ("final.json", lambda text: text.replace('"nodes": ', '"nodes": -1', 1), "is no count"),
    ("final.json", lambda text: text.replace('"schema": 1', '"schema": 2'), "is of version 2, this program reads 1"),
    ("trace.json", lambda text: text.replace('"cat": "wire"', '"cat": "<b>"'), "has the event"),
    ("summary.json", lambda text: text[:-9], "damaged summary"),
    ("config.toml", lambda text: text.replace("layers", "lairs"), "layers"),
])
def test_damaged_files_are_named(place: Path, tmp_path: Path, name: str, change: Any, message: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "int2", run, ignore=shutil.ignore_patterns("report.html"))
    text = (run / name).read_text()
    assert change(text) != text
    (run / name).write_text(change(text))
    got = CliRunner().invoke(app, ["report", str(run)])
    assert got.exit_code == 2, got.stderr
    assert message in got.stderr.replace("\n", " ")
    assert str(run) in got.stderr.replace("\n", "")
    assert not (run / "report.html").exists()


def test_what_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(place / "int2")
    for runs, message in (([place / "s"], "not a run's folder (no config.toml)"), ([tmp_path / "no"], "no such folder"),
                          ([place / "int2", place / "float", tmp_path / "link"], "the run is given twice"),
                          ([], "0 runs; a report takes 1 to 8"), ([tmp_path] * 9, "9 runs")):
        with pytest.raises(InputError, match=re.escape(message)):
            make_report(runs, out=tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_other_settings_have_pages_too(tmp_path: Path) -> None:
    """One part, no constraint, an area under the curve, two classes, no labels' names: nothing is empty."""
    store = make_store(small_graph(classes=2), tmp_path / "s", 1)
    train_here(store, settings(*WORDS, "propagation.kind=appnp", "train.metric=roc_auc", "quant.bits=8"),
               tmp_path / "run")
    make_report([tmp_path / "run"], stores=[store.path])
    page = Page(tmp_path / "run" / "report.html")
    words = page.root.words()
    for text in ("One part: no messages between parts", "One part: nothing is sent", "Test ROC-AUC",
                 "Only propagation.kind=smp has multipliers; here it is appnp"):
        assert text in words
    train_here(store, settings(*WORDS, "train.eval_every=5", "train.patience=2"), tmp_path / "none")
    assert not (tmp_path / "none" / "final.json").exists()
    make_report([tmp_path / "none"])
    assert "No epoch was evaluated yet" in Page(tmp_path / "none" / "report.html").root.words()
    assert [chart["id"] for chart in page.data["charts"]][:4] == ["loss", "accuracy", "roc_auc", "seconds"]
    assert all(series["y"] for chart in page.data["charts"] for series in chart["series"])
