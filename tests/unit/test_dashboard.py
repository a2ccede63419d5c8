# SPDX-License-Identifier: Apache-2.0
"""Dashboard, alerts and docs name only metrics and labels that exist, and every metric is shown."""
from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from qgnn_dist.cluster.metrics import METRICS, MOST_LAYERS, RunMetrics, spread
from tests.deployment.project import METRICS_PORT, ROOT

FOLDER = ROOT / "cluster_configs" / "observability"
EXPORTED = {metric.exported: metric for metric in METRICS.values()}
SELECTOR = re.compile(r"(\bray_qgnn_\w+)(?:\{([^}]*)\})?")
GROUPED = re.compile(r"\b(?:by|on|without|ignoring)\s*\(([^)]*)\)")
SHOWN = re.compile(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}")


def faults(expression: str, legend: str = "") -> list[str]:
    """What an expression names that does not exist; labels that it groups by or shows must be of all its metrics."""
    found: list[str] = []
    used = SELECTOR.findall(expression)
    if not used:
        return [f"{expression}: names no metric"]
    shared: set[str] | None = None
    for name, matchers in used:
        if name not in EXPORTED:
            found.append(f"{name}: no such metric")
            continue
        labels = set(EXPORTED[name].labels)
        shared = labels if shared is None else shared & labels
        matched = re.findall(r"(\w+)\s*[=!]~?", matchers)
        found += [f"{name}: no label {label}" for label in matched if label not in labels]
        if (EXPORTED[name].kind == "counter") != name.endswith("_total"):
            found.append(f"{name}: not as its kind is exported")
    names = [name.strip() for group in GROUPED.findall(expression) for name in group.split(",")]
    found += [f"{expression}: no label {name}" for name in [*names, *SHOWN.findall(legend)]
              if name and name not in (shared or set())]
    if expression.count("(") != expression.count(")"):
        found.append(f"{expression}: parentheses")
    return found


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text())
    return found


def targets() -> Iterator[tuple[str, str]]:
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            yield target["expr"], target["legendFormat"]


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((FOLDER / "rules.yaml").read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def test_the_dashboard_shows_every_metric_and_nothing_else() -> None:
    assert [fault for expression, legend in targets() for fault in faults(expression, legend)] == []
    used = {name for expression, _ in targets() for name, _ in SELECTOR.findall(expression)}
    assert used == EXPORTED.keys()
    found = dashboard()
    assert len({panel["id"] for panel in found["panels"]}) == len(found["panels"])
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in found["panels"]]
    assert len(set(places)) == len(places)
    assert all(p["gridPos"]["x"] + p["gridPos"]["w"] <= 24 for p in found["panels"])
    variables = {variable["name"]: variable["query"] for variable in found["templating"]["list"]}
    assert variables.keys() == {"datasource", "run"}
    assert variables["run"] == f"label_values({METRICS['qgnn_epoch'].exported}, run)"
    assert set(re.findall(r"\$(\w+)", " ".join(e for e, _ in targets()))) <= variables.keys() | {"__rate_interval"}


def test_alerts_name_what_exists() -> None:
    found = rules()
    assert len({rule["alert"] for rule in found}) == len(found) >= 8
    for rule in found:
        told = " ".join(rule["annotations"].values())
        grouped = {name.strip() for group in re.findall(r"by \(([^)]*)\)", rule["expr"]) for name in group.split(",")}
        assert faults(rule["expr"]) == []
        assert set(re.findall(r"\$labels\.(\w+)", told)) <= grouped, rule["alert"]
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert rule["annotations"].keys() == {"summary", "action"}


@pytest.mark.parametrize(("expression", "legend", "fault"), [
    ("ray_qgnn_epochs", "", "no such metric"), ("ray_qgnn_lost", "", "no such metric"),
    ('ray_qgnn_loss{rank="0"}', "", "ray_qgnn_loss: no label rank"),
    ("max by (part) (ray_qgnn_loss)", "", "no label part"),
    ("ray_qgnn_loss", "{{layer}}", "no label layer"), ("up", "", "names no metric"),
    ("max(ray_qgnn_loss", "", "parenthes")])
def test_what_does_not_exist_is_found(expression: str, legend: str, fault: str) -> None:
    assert any(fault in one for one in faults(expression, legend))


def test_scrapes_are_of_the_port_that_ray_has() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    hosts = config["scrape_configs"][0]["static_configs"][0]["targets"]
    assert {host.rpartition(":")[2] for host in hosts} == {str(METRICS_PORT)}
    assert [(FOLDER / name).exists() for name in config["rule_files"]] == [True]
    monitor = yaml.safe_load((FOLDER / "podmonitor.yaml").read_text())["spec"]
    cluster = yaml.safe_load((ROOT / "cluster_configs" / "raycluster.yaml").read_text())["spec"]
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    named = [{p["name"] for p in pod["template"]["spec"]["containers"][0]["ports"]} for pod in pods]
    assert all(monitor["podMetricsEndpoints"][0]["port"] in names for names in named)
    fence = list(yaml.safe_load_all((ROOT / "cluster_configs" / "kubernetes.yaml").read_text()))[-1]["spec"]
    assert monitor["selector"] == fence["podSelector"]
    assert METRICS_PORT in [port["port"] for rule in fence["ingress"] for port in rule.get("ports", [])]


def test_promtool_takes_the_rules() -> None:
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is not installed")
    for words in (["rules", "rules.yaml"], ["config", "prometheus.yaml"]):
        ran = subprocess.run([tool, "check", *words], cwd=FOLDER, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_docs_have_every_metric_with_its_labels() -> None:
    page = (ROOT / "docs" / "observability.md").read_text()
    for metric in METRICS.values():
        labels = ", ".join(metric.labels)
        assert f"| `{metric.exported}` | {labels} | {metric.unit} | {metric.doc} |" in page
        assert metric.doc.isascii(), "Ray takes no other"
        assert metric.kind in ("gauge", "counter")


def test_layers_of_a_deep_network_are_spread() -> None:
    deep = spread(1000, MOST_LAYERS)
    assert (len(deep), deep[0], deep[-1]) == (MOST_LAYERS, 0, 999)
    assert sorted(set(deep)) == deep


def test_a_split_without_labels_has_no_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gauges(dict[str, Any]):
        def set(self, name: str, value: float, **labels: str) -> None:
            self[" ".join([name, *labels.values()])] = float(value)  # as Ray's gauges take them

        def add(self, name: str, value: float, **labels: str) -> None:
            self.set(name, value, **labels)

    run, gauges = RunMetrics("run", "host"), Gauges()
    monkeypatch.setattr(run, "_out", gauges)
    run.epoch({"epoch": 1, "loss": 0.5, "valid_loss": 0.6, "accuracy": {"train": 0.9, "valid": 0.8, "test": None},
               "multipliers": [0.0], "epoch_s": 0.1, "clamps": 0}, ())
    assert [name for name in gauges if "accuracy" in name] == ["qgnn_accuracy train", "qgnn_accuracy valid"]
