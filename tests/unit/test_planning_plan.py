# SPDX-License-Identifier: Apache-2.0
"""`qgnn plan`: verdict, advice, widths, alternatives, calibrations; exit codes."""
from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from qgnn_dist.cli import app
from qgnn_dist.config import load_config
from qgnn_dist.errors import InputError
from qgnn_dist.planning import rates as rates_file
from qgnn_dist.planning.cut import cut_of_graph, cut_of_numbers
from qgnn_dist.planning.plan import DEFAULT_RATES, check_hosts, choose_rates, make_plan
from qgnn_dist.planning.probe import BUDGET_S, LEAST_RUNS, _Clock
from qgnn_dist.planning.rates import load_rates, save_rates
from qgnn_dist.planning.seconds import Hosts, epoch_seconds
from qgnn_dist.planning.shapes import GraphSize
from qgnn_dist.planning.show import show_plan
from tests.helpers import make_store, small_graph

SIZE = GraphSize(nodes=2_400_000, edges=62_000_000, features=100, classes=47, train=200_000, valid=40_000, stored=100.0)


@pytest.fixture(autouse=True)
def _no_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's own calibration decides what a test sees."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _plan(*words: str, hosts: int = 4, ram: float = 16.0, cores: int = 8, gbps: float = 10.0,
          **more: Any) -> dict[str, Any]:
    return make_plan(cut_of_numbers(SIZE), check_hosts(hosts, ram, cores, gbps, 1), load_config(overrides=list(words)),
                     load_rates(DEFAULT_RATES), "shipped", **more)


def _run(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [str(w) for w in words])


def test_a_plan_is_plain_and_whole() -> None:
    plan = json.loads(json.dumps(_plan()))
    assert set(plan) == {"schema", "graph", "hosts", "workers", "settings", "cut", "rates", "fits", "failed", "memory",
                         "seconds", "widths", "suffice", "alternatives", "advice", "assumptions"}
    assert plan["schema"] == 1
    assert plan["fits"]
    assert not plan["failed"]
    assert plan["advice"] == []
    training = plan["memory"]["training"]
    assert training["anonymous"] == sum(training["items"].values())
    assert training["resident"] == training["anonymous"] + training["mapped"]
    widths = {(row["messages"], row["gradients"]): row for row in plan["widths"]}
    assert set(widths) == {(32, 32), (8, 8), (4, 4), (2, 32), (2, 4), (1, 2)}
    float_row, narrow = widths[32, 32], widths[2, 4]
    rows, rounds = plan["cut"]["halo_rows"], 10
    assert narrow["forward"] == rounds * (rows * 12 + 12 * 64)
    assert narrow["backward"] == rounds * (rows * (24 + 1) + 12 * 64)
    assert float_row["backward"] == rounds * (rows * 188 + 12 * 64)
    assert narrow["epoch_s"] < float_row["epoch_s"]
    assert [way["name"].split(",")[0] for way in plan["alternatives"]] == [
        "the same", "SIGN", "sampled mini-batches"]
    assert any("random cut" in line for line in plan["assumptions"])


def test_more_hosts_take_less_memory_and_a_slow_link_more_time() -> None:
    plans = {count: _plan(hosts=count) for count in (2, 4, 8)}
    memory = [plans[count]["memory"]["training"]["resident"] for count in (2, 4, 8)]
    assert memory[0] > memory[1] > memory[2]
    slow, fast = (_plan("quant.bits=32", gbps=gbps)["seconds"]["epoch"] for gbps in (1.0, 25.0))
    assert slow > 2 * fast
    wire = 10 * 3 * _plan()["cut"]["halo_rows"] / 4 * 188 / (1e9 / 8 * 0.85)
    assert slow == pytest.approx(wire, rel=0.35), "float messages of three passes are what 1 Gbit/s is busy with"


def test_what_does_not_fit_says_why_and_what_to_change() -> None:
    plan = _plan("quant.bits=32", "model.hidden=256", "propagation.rounds=two", hosts=2, ram=3.3)
    assert not plan["fits"]
    assert plan["failed"]
    text = "\n".join(plan["advice"])
    assert "Does not fit: a host needs" in text
    assert "the largest item is states" in text
    least = plan["suffice"]["least_hosts"]
    assert f"{least} hosts of this kind suffice" in text
    assert _plan("quant.bits=32", "model.hidden=256", "propagation.rounds=two", hosts=least, ram=3.3)["fits"]
    assert not _plan("quant.bits=32", "model.hidden=256", "propagation.rounds=two", hosts=least - 1, ram=3.3)["fits"]
    for change in ("quant.features=8", "model.hidden=64"):
        line, = (line for line in plan["advice"] if line.startswith(change))
        assert line.endswith(("then it fits", "not enough alone"))
    crowded = make_plan(cut_of_numbers(SIZE), check_hosts(2, 3.3, 8, 10.0, 4), load_config(),
                        load_rates(DEFAULT_RATES), "shipped")
    assert not crowded["fits"]
    assert "one worker a host" in "\n".join(crowded["advice"])


def test_a_stores_parts_stay(tmp_path: Path) -> None:
    store = make_store(small_graph(nodes=2000), tmp_path / "s", 4)
    result = _run("plan", store.path, "--hosts", 2, "--json")
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)
    assert (plan["workers"], plan["hosts"]["workers"], plan["hosts"]["threads"]) == (4, 2, 8)
    assert [row["hosts"] for row in plan["suffice"]["rows"]] == [1, 2, 3, 4]
    assert plan["cut"]["fraction"] == pytest.approx(store.manifest["cut_fraction"])
    assert "counted in the store's 4 parts" in plan["cut"]["how"]
    one, four = (json.loads(_run("plan", store.path, "--hosts", 1, "--host-cores", cores, "--json").stdout)["seconds"]
                 for cores in (1, 4))
    assert one["perceptron"] == pytest.approx(4 * four["perceptron"]), "four workers take turns on one core"


@pytest.mark.parametrize("parts", [1, 2])
def test_a_store_of_fewer_parts_than_workers_is_planned_as_made_again(tmp_path: Path, parts: int) -> None:
    """By the graph in its one part as by the graph itself, and by its own cut where it has one."""
    graph = small_graph(nodes=2000)
    store = make_store(graph, tmp_path / "s", parts, method="stream")
    result = _run("plan", store.path, "--hosts", 4, "--json")
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)
    assert (plan["workers"], plan["hosts"]["workers"]) == (4, 1)
    assert "would be made again by `qgnn partition --parts 4`" in plan["cut"]["how"]
    assert any("--parts 4" in line for line in plan["assumptions"])
    assert plan["widths"][0]["epoch_bytes"] > 0
    if parts == 1:
        direct = cut_of_graph(graph, GraphSize.of(store), 4)
        assert plan["cut"]["fraction"] == pytest.approx(direct.fraction(4), abs=0.03)
    else:
        assert plan["cut"]["fraction"] == pytest.approx(store.manifest["cut_fraction"] * 1.5)


def test_the_command_and_its_exit_codes(tmp_path: Path) -> None:
    numbers = ("--nodes", 111059956, "--edges", 1615685872, "--features", 128, "--classes", 172)
    fits = _run("plan", *numbers, "--hosts", 32, "--host-ram-gb", 256)
    assert fits.exit_code == 0, fits.stderr
    assert "hosts that suffice" in fits.stdout
    small = _run("plan", *numbers, "--hosts", 2, "--host-ram-gb", 16)
    assert small.exit_code == 1
    assert "Does not fit: a host needs" in small.stdout.replace("\n", " ")
    for words, text in (((), "--nodes, --edges, --features, --classes: missing"),
                        ((*numbers, "--hosts", 0), "--hosts 0: expected a number above 0"),
                        ((*numbers, "--link-gbps", -1), "--link-gbps -1"),
                        ((*numbers, "--workers-per-host", 17), "more than the 16 cores"),
                        ((*numbers, "--set", "model.hiden=3"), "did you mean model.hidden"),
                        ((tmp_path / "nothing",), "is no graph source"),
                        (("synthetic:sbm?nodes=500&edges=900&features=8&classes=3", "--nodes", 3), "--nodes: only")):
        wrong = _run("plan", *words)
        assert wrong.exit_code == 2, (words, wrong.stderr)
        assert text in wrong.stderr, wrong.stderr
    source = _run("plan", "synthetic:sbm?nodes=2000&edges=9000&features=8&classes=3", "--hosts", 4, "--json")
    assert source.exit_code == 0, source.stderr
    assert "`stream` on all of the graph" in json.loads(source.stdout)["cut"]["how"]


def test_tables_are_readable_in_100_columns() -> None:
    console = Console(width=100, record=True, force_terminal=False, file=open("/dev/null", "w"))  # noqa: SIM115
    show_plan(_plan(hosts=1, ram=2.0), console)
    text = console.export_text()
    assert max(len(line) for line in text.splitlines()) <= 100
    for words in ("Does not fit", "states", "anonymous", "float / float", "2 / 4", "SIGN", "Modelled, under these"):
        assert words in text


def test_a_calibration_is_kept_and_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = load_rates(DEFAULT_RATES)
    mine = dataclasses.replace(shipped, machine="mine", far_ns=0.1)
    assert choose_rates(None, False)[1].startswith("not calibrated")
    monkeypatch.setattr("qgnn_dist.planning.probe.probe", lambda threads, say: mine)
    monkeypatch.setattr("os.getloadavg", lambda: (0.1, 0.1, 0.1))
    assert choose_rates(None, True) == (mine, f"calibrated just now, kept in {rates_file.cache_file()}")
    assert choose_rates(None, False)[0] == mine
    monkeypatch.setattr("os.getloadavg", lambda: (1000.0, 0.1, 0.1))
    assert "do it again when they rest" in choose_rates(None, True)[1]
    assert choose_rates(tmp_path / "here.json", True)[0] == mine
    assert choose_rates(tmp_path / "here.json", False) == (mine, f"calibration {tmp_path / 'here.json'}")


def test_a_damaged_calibration_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    with pytest.raises(InputError, match="no such calibration; --calibrate makes one"):
        load_rates(file)
    save_rates(load_rates(DEFAULT_RATES), file)
    good = json.loads(file.read_text())
    assert load_rates(file) == load_rates(DEFAULT_RATES)

    def refused(text: str) -> None:
        file.write_text(text)
        with pytest.raises(InputError, match="not a calibration"):
            load_rates(file)

    refused("")
    refused("[]")
    refused(file.read_text()[:-40])
    refused("[" * 100_000)
    refused(json.dumps({**good, "format_version": 1}))
    refused(json.dumps({**good, "more": 1}))
    refused(json.dumps({k: v for k, v in good.items() if k != "read_ns"}))
    for value in (-1.0, "fast", None, True, 1e300):
        refused(json.dumps({**good, "score_ns": value}))
        refused(json.dumps({**good, "layers": [{**good["layers"][0], "edge_ns": value}, *good["layers"][1:]]}))
    refused(json.dumps({**good, "layers": good["layers"][1:]}))
    refused(json.dumps({**good, "perceptron": good["perceptron"][1:]}))
    refused(json.dumps({**good, "threads": 0}))
    refused(json.dumps(good) + " " * (1 << 20))


def test_elastic_is_planned_for_one_host() -> None:
    """With the memory of its edges, which is most of it here, and no advice to take more hosts."""
    plan = _plan("propagation.kind=elastic", hosts=1, ram=64.0)
    items = plan["memory"]["training"]["items"]
    assert items["edges, by classes"] == 10 * 62_000_000 * (4 * 47 + 12) + 62_000_000 * 16 * 47
    assert plan["memory"]["prediction"]["items"]["edges, by classes"] == 62_000_000 * (8 * 47 + 37)
    assert plan["failed"]
    assert [row["hosts"] for row in plan["suffice"]["rows"]] == [1]
    assert plan["suffice"]["least_hosts"] is None
    assert "the largest item is edges, by classes" in plan["advice"][0]
    assert any("takes one host" in line for line in plan["advice"])
    assert not any("more parts" in line for line in plan["advice"])
    plain, many = _plan("propagation.kind=appnp", hosts=1, ram=64.0), {"hosts": 4, "ram": 64.0}
    assert plain["fits"]
    assert plan["seconds"]["layers"] > 5 * plain["seconds"]["layers"]
    assert plan["seconds"]["perceptron"] == plain["seconds"]["perceptron"]
    with pytest.raises(InputError, match="takes one part, this is 4"):
        _plan("propagation.kind=elastic", **many)


def test_rates_between_and_beyond_what_was_measured() -> None:
    rates = load_rates(DEFAULT_RATES)
    entries = {(r.columns, r.rows): r for r in rates.layers if (r.kind, r.bits) == ("training", 2)}
    for (columns, rows), entry in entries.items():
        assert rates.layer("training", 2, columns, rows).edge_ns == pytest.approx(entry.edge_ns)
    (few, small), (many, large) = min(entries), max(entries)
    near, far, further = (rates.layer("training", 2, many, n).edge_ns for n in (large, 100 * large, 10_000 * large))
    assert near <= far <= further == pytest.approx(entries[many, large].edge_ns + rates.far_ns)
    middle = rates.layer("training", 2, (few + many) // 2, small)
    assert min(e.row_ns for e in entries.values()) <= middle.row_ns <= max(e.row_ns for e in entries.values())
    scaled = dataclasses.replace(rates, serial={**rates.serial, "frozen": 0.0, "training": 0.1})
    assert scaled.speedup("frozen", 8) == 8
    assert scaled.speedup("training", 8) == pytest.approx(8 / 1.7)


def test_the_fastest_of_all_turns_counts() -> None:
    clock, runs = _Clock(), list[int]()
    assert [clock.note(("exchange", 8), seconds) for seconds in (3.0, 2.0, 4.0)] == [3.0, 2.0, 2.0]
    slow = clock.time(("layers",), lambda: runs.append(1) or time.sleep(BUDGET_S))  # type: ignore[func-returns-value]
    assert slow >= BUDGET_S
    assert len(runs) == LEAST_RUNS
    assert clock.time(("layers",), lambda: runs.append(1)) < BUDGET_S / 2
    assert len(runs) > 2 * LEAST_RUNS, "what is fast fills its time"


def test_the_wire_is_hidden_by_interior_rows() -> None:
    """One slow link: a part all interior hides it, a part all boundary waits for it."""
    rates, config = load_rates(DEFAULT_RATES), load_config()
    part, = cut_of_numbers(SIZE).parts(4)
    hosts = Hosts(count=4, ram_bytes=2**36, cores=8, link_gbps=10.0)
    exposed = [epoch_seconds(dataclasses.replace(cut_of_numbers(SIZE), known={4: [dataclasses.replace(
        part, boundary=boundary)]}), 4, config, rates, hosts).exposed
               for boundary in (0, part.rows // 2, part.rows)]
    assert exposed[0] < exposed[1] < exposed[2]
    alone = epoch_seconds(cut_of_numbers(SIZE), 1, config, rates, dataclasses.replace(hosts, count=1))
    assert alone.exposed < 0.01
