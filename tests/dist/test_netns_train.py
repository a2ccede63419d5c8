# SPDX-License-Identifier: Apache-2.0
"""`qgnn train` on a Ray cluster of two hosts with interfaces of their own: the bytes that it reports are right."""
from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import qgnn_dist as qgnn
from tests.netns import NetnsCluster

BIN = Path(sys.executable).parent
EPOCHS = 4


def _start(hosts: NetnsCluster, i: int, *words: str, log: Path) -> subprocess.Popen[str]:
    with open(log, "w") as out:
        return hosts.exec(i, [str(BIN / "ray"), "start", "--block", f"--node-ip-address={hosts.address(i)}",
                              "--num-cpus=1", "--object-store-memory=200000000", "--disable-usage-stats", *words],
                          stdout=out, stderr=subprocess.STDOUT)


@pytest.mark.timeout(280)
def test_training_reports_what_the_interfaces_sent(tmp_path: Path) -> None:
    store = tmp_path / "store"
    qgnn.partition("synthetic:sbm?nodes=20000&edges=150000&features=16&classes=40&seed=0", parts=2, out=store,
                   method="random")
    with NetnsCluster(2) as hosts:
        address = f"{hosts.address(0)}:6379"
        head = _start(hosts, 0, "--head", "--port=6379", "--include-dashboard=false", log=tmp_path / "head.log")
        ready = [str(BIN / "ray"), "health-check", "--address", address]
        _until(lambda: hosts.exec(0, ready, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).wait(60) == 0, head)
        second = _start(hosts, 1, f"--address={address}", log=tmp_path / "second.log")
        count = [sys.executable, "-c", "import ray, sys; ray.init(address=sys.argv[1], logging_level='ERROR'); "
                                       "sys.exit(len([n for n in ray.nodes() if n['Alive']]) != 2)", address]
        _until(lambda: hosts.exec(0, count, stderr=subprocess.DEVNULL).wait(60) == 0, second)
        idle, idle_s = _sent(hosts), 3.0
        time.sleep(idle_s)
        idle_rate = (_sent(hosts) - idle) / idle_s
        before, start = _sent(hosts), time.monotonic()
        run = hosts.exec(0, [str(BIN / "qgnn"), "train", str(store), "--out", str(tmp_path / "run"), "--ray-address",
                             address, "--json", "--set", f"train.epochs={EPOCHS}", "--set", "model.hidden=16", "--set", "quant.gradients=32"],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, err = run.communicate(timeout=150)
        assert run.returncode == 0, err
        moved = _sent(hosts) - before - idle_rate * (time.monotonic() - start)
    summary = json.loads(out)
    reported = EPOCHS * sum(summary["wire_bytes_per_epoch"].values()) + sum(
        sum(summary[f"wire_bytes_{when}"].values()) for when in ("calibration", "final"))
    print(f"law 5 in namespaces, qgnn train: interfaces {moved / 1e6:.1f} MB, reported {reported / 1e6:.1f} MB, "
          f"ratio {moved / reported:.3f}")
    assert reported >= 100e6
    assert abs(moved / reported - 1) <= 0.05


def _sent(hosts: NetnsCluster) -> int:
    return hosts.sent_bytes(0) + hosts.sent_bytes(1)


def _until(done, process: subprocess.Popen[str], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert process.poll() is None, "Ray ended early"
        assert time.monotonic() < end, f"Ray was not up within {seconds:g} s"
        time.sleep(0.5)
