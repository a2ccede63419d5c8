# SPDX-License-Identifier: Apache-2.0
"""Law 5 by the kernel's own count: between two hosts, the interfaces send what the counters say, within 5 %."""
from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.netns import NetnsCluster

RANK = """
import json, sys, time
from types import SimpleNamespace
import numpy as np
import torch
from qgnn_dist.comm.exchange import Exchange
from qgnn_dist.comm.formation import Formation
from qgnn_dist.comm.group import Group
from qgnn_dist.quant.packed import row_bytes

torch.set_num_threads(1)
rank, address, peer, meeting, rows, rounds, bits, columns = json.loads(sys.argv[1])

def told(name):
    while not (path := meeting + "/" + name).rpartition("/")[2] in __import__("os").listdir(meeting):
        time.sleep(0.01)
    return open(path).read()

def tell(name, text):
    with open(meeting + "/." + name, "w") as file:
        file.write(text)
    __import__("os").rename(meeting + "/." + name, meeting + "/" + name)

store = None
if rank == 0:
    store, port = Group.host_store(address)
    tell("port", str(port))
start = time.perf_counter()
group = Group.open(rank, 2, address if rank == 0 else peer, int(told("port")), address, 60.0, store,
                   formation=Formation(9, 0, bytes(32)))
opened = time.perf_counter() - start
plan = SimpleNamespace(peer=1 - rank, send_rows=np.arange(rows, dtype=np.int32), recv_begin=0, recv_count=rows)
exchange = Exchange([plan], rows, rows, group, 9, 60.0)
buffer = np.random.default_rng(rank).integers(0, 256, (2 * rows, row_bytes(columns, bits)), dtype=np.uint8)
tell(f"ready-{rank}", "")
told("go")
start = time.perf_counter()
for r in range(rounds):
    exchange.begin(buffer, bits, columns, "forward", 0, r)
    exchange.finish()
seconds = time.perf_counter() - start
gradients = np.ones(500_000, np.float32)
for _ in range(5):
    group.all_reduce_sum(gradients)
tell(f"done-{rank}", json.dumps({"forward": group.counters.forward, "control": group.counters.control,
                                 "formula": rounds * exchange.expected_bytes(bits, columns), "seconds": seconds,
                                 "opened": opened}))
told("end")
"""


def wait_for(folder: Path, names: list[str], processes: list[subprocess.Popen[str]], seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not all((folder / name).exists() for name in names):
        assert time.monotonic() < end, f"no {names} within {seconds:g} s"
        assert all(p.poll() is None for p in processes), "a rank ended early"
        time.sleep(0.02)


@pytest.mark.parametrize(("rows", "rounds", "bits", "columns"), [(200_000, 60, 2, 40), (100_000, 8, 32, 40)])
def test_interfaces_agree_with_the_counters(tmp_path: Path, rows: int, rounds: int, bits: int, columns: int) -> None:
    with NetnsCluster(2) as hosts:
        ranks = [hosts.exec(i, [sys.executable, "-c", RANK, json.dumps(
            [i, hosts.address(i), hosts.address(1 - i), str(tmp_path), rows, rounds, bits, columns])]) for i in (0, 1)]
        wait_for(tmp_path, ["ready-0", "ready-1"], ranks)
        idle_start, idle_from = [hosts.sent_bytes(i) for i in (0, 1)], time.monotonic()
        time.sleep(1.0)
        before, started = [hosts.sent_bytes(i) for i in (0, 1)], time.monotonic()
        idle_rate = [(b - a) / (started - idle_from) for a, b in zip(idle_start, before)]
        (tmp_path / "go").touch()
        wait_for(tmp_path, ["done-0", "done-1"], ranks)
        after, ended = [hosts.sent_bytes(i) for i in (0, 1)], time.monotonic()
        (tmp_path / "end").touch()
        assert [rank.wait(20) for rank in ranks] == [0, 0]
    for i in (0, 1):
        told = json.loads((tmp_path / f"done-{i}").read_text())
        counted = told["forward"] + told["control"]
        interface = after[i] - before[i] - idle_rate[i] * (ended - started)
        print(f"rank {i}, {bits} bits: counters {counted:,} B, interface {interface:,.0f} B "
              f"({100 * (interface / counted - 1):+.2f} %), {told['seconds'] / rounds * 1e3:.1f} ms a round, "
              f"met in {told['opened']:.2f} s")
        assert told["forward"] == told["formula"]
        assert counted >= 100_000_000
        assert counted < interface < 1.05 * counted
