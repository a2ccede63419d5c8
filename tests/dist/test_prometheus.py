# SPDX-License-Identifier: Apache-2.0
"""A real run on a local Ray, scraped at its Prometheus endpoint: exactly what the run's own files have."""
from __future__ import annotations

import json
import os
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

import qgnn_dist as qgnn
from qgnn_dist import logs
from qgnn_dist.cluster.metrics import METRICS
from tests.helpers import make_store, settings, small_graph
from tests.rayhead import free_port

SEEN_S = 30.0
"""Ray's report interval is lowered to its least, 1 s; a loaded machine may take longer."""
Sample = tuple[str, dict[str, str], float]


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a local Ray's metrics."""
    port = free_port()
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=200_000_000,
             logging_level="ERROR", log_to_driver=False, _metrics_export_port=port)
    try:
        yield f"http://{ray.nodes()[0]['NodeManagerAddress']}:{port}/metrics"
    finally:
        ray.shutdown()
        logs.stop()


def scrape(address: str) -> list[Sample]:
    """Our samples: name, labels, value."""
    text = urllib.request.urlopen(address, timeout=10).read().decode()
    found = []
    for line in text.splitlines():
        if line.startswith("ray_qgnn_"):
            name, labels, value = re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line).groups()  # type: ignore[union-attr]
            found.append((name, dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value)))
    return found


def total(samples: list[Sample], name: str, **labels: str) -> float:
    return sum(value for found, theirs, value in samples
               if found == METRICS[name].exported and labels.items() <= theirs.items())


def test_a_scrape_is_what_the_runs_files_say(tmp_path: Path, endpoint: str, capfd: pytest.CaptureFixture[str],
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_TOKEN", "hunter2-hunter2")
    store = make_store(small_graph(), tmp_path / "s", 2)
    config = settings("log.metrics=on", "log.format=json", "train.epochs=6", "cluster.cpus_per_worker=0.5")
    run, kept = tmp_path / "run", list[Sample]()

    def hold(record: dict[str, Any]) -> None:
        """At the last epoch: until the endpoint has it of everybody, while the workers live."""
        if record["epoch"] < 6:
            return
        until = time.monotonic() + SEEN_S
        while time.monotonic() < until:
            kept[:] = scrape(endpoint)
            if total(kept, "qgnn_worker_epoch") == 12 and total(kept, "qgnn_epochs") == 6:
                return
            time.sleep(0.3)

    summary = qgnn.train(store.path, out=run, config=config, on_epoch=hold)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last, status = records[-1], json.loads((run / "status.json").read_text())
    label = os.path.abspath(run)

    assert total(kept, "qgnn_epoch") == total(kept, "qgnn_epochs") == summary["epochs"] == last["epoch"] == 6
    assert total(kept, "qgnn_epochs_planned") == 6
    assert total(kept, "qgnn_workers") == 2
    assert total(kept, "qgnn_loss") == last["loss"]
    assert total(kept, "qgnn_valid_loss") == last["valid_loss"]
    assert total(kept, "qgnn_epoch_seconds") == last["epoch_s"]
    for split, share in last["accuracy"].items():
        assert total(kept, "qgnn_accuracy", split=split) == share
    for direction, mean in summary["wire_bytes_per_epoch"].items():
        sent = sum(record["wire_bytes"][direction] for record in records)
        assert total(kept, "qgnn_wire_bytes", direction=direction) == sent == status["wire_bytes"][direction]
        assert sent == pytest.approx(6 * mean)
        assert sent > 0
    for layer, value in enumerate(summary["multipliers"]["last"]):
        assert total(kept, "qgnn_multiplier", layer=str(layer)) == value
    assert total(kept, "qgnn_multiplier_clamps") == summary["multipliers"]["clamped"]
    for rank in range(2):
        computed = sum(record["compute_s"][rank] for record in records)
        assert total(kept, "qgnn_compute_seconds", rank=str(rank)) == pytest.approx(computed, abs=1e-4)
        assert total(kept, "qgnn_wait_seconds", rank=str(rank)) > 0
        for name in ("anon_bytes", "rss_bytes", "available_bytes"):
            there = total(kept, f"qgnn_memory_{name}", rank=str(rank))
            assert there == status["workers"][rank]["memory"][name] > 1 << 20
    by_name = {metric.exported: metric for metric in METRICS.values()}
    for name, labels, _ in kept:
        assert set(by_name[name].labels) <= labels.keys()
        assert labels["run"] == label
    seen = {name for name, _, _ in kept}
    apart = {METRICS[name].exported for name in ("qgnn_restarts", "qgnn_stalls", "qgnn_stops", "qgnn_multiplier_clamps")}
    assert by_name.keys() - apart <= seen <= by_name.keys()
    _ends(endpoint)
    _log(capfd.readouterr().err, label)


def _ends(endpoint: str) -> None:
    """The end's counter comes; gauges of a run that is over go after two report intervals."""
    until = time.monotonic() + SEEN_S
    while time.monotonic() < until:
        samples = scrape(endpoint)
        gone = not any(name == "ray_qgnn_epoch" for name, _, _ in samples)
        if gone and total(samples, "qgnn_stops", reason="finished") == 1:
            return
        time.sleep(0.3)
    raise AssertionError(sorted(name for name, _, _ in samples))


def _log(said: str, run: str) -> None:
    """Every line of stderr is a record; workers' are among them, with their rank."""
    records = [json.loads(line) for line in said.splitlines()]
    assert {tuple(record) for record in records} == {logs.KEYS}
    assert {record["run"] for record in records} == {run}
    opened = [record for record in records if "opened part" in record["message"]]
    assert sorted(record["rank"] for record in opened) == [0, 1]
    assert [r["epoch"] for r in records if r["message"].startswith("loss")] == [1, 2, 3, 4, 5, 6]
    assert "hunter2" not in said
