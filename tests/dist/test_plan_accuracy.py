# SPDX-License-Identifier: Apache-2.0
"""A plan against runs, on shapes that no rate was measured on: bytes exact, memory within 20 %, seconds within 35 %."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qgnn_dist.config import load_config
from qgnn_dist.data.load import load_graph
from qgnn_dist.partitioning.api import partition_graph

SHAPES = {"sparse": "synthetic:sbm?nodes=300000&edges=3000000&features=64&classes=16&seed=1",
          "dense": "synthetic:sbm?nodes=120000&edges=4000000&features=200&classes=40&seed=1"}


def _command(*words: str | Path) -> dict[str, Any]:
    out = subprocess.run([sys.executable, "-m", "qgnn_dist.cli", *map(str, words), "--json"], capture_output=True,
                         text=True, check=True, timeout=600)
    found: dict[str, Any] = json.loads(out.stdout)
    return found


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_plan_is_near_what_a_run_takes(tmp_path: Path, shape: str, parts: int) -> None:
    """On a machine with nothing else to do; rates are measured right before. Both workers share this host."""
    method = "stream" if parts > 1 else "auto"
    partition_graph(load_graph(SHAPES[shape]), parts=parts, out=tmp_path / "s", method=method)
    plan = _command("plan", tmp_path / "s", "--host-ram-gb", 24, "--host-cores", 2, "--link-gbps", 100, "--calibrate",
                    "--calibration", tmp_path / "rates.json")
    run = _command("train", tmp_path / "s", "--out", tmp_path / "r", "--set", "train.epochs=5")
    usual = load_config().quant
    bits = usual.messages, usual.gradients
    own = next(row for row in plan["widths"] if (row["messages"], row["gradients"]) == bits)
    memory = plan["memory"]["training"]["anonymous"] / max(run["peak_anon_bytes"])
    seconds = plan["seconds"]["epoch"] / run["epoch_s"]["median"]
    print(f"{shape}, {parts} part(s): plan over run: memory {memory:.2f}, seconds {seconds:.2f}")
    assert {name: own[name] for name in run["wire_bytes_per_epoch"]} == run["wire_bytes_per_epoch"]
    assert 0.8 <= memory <= 1.2
    assert 0.65 <= seconds <= 1.35
