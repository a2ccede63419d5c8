# SPDX-License-Identifier: Apache-2.0
"""`qgnn bench exchange` without links: what it asks for, what it computes from spans, and what it shows."""
from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qgnn_dist.bench import exchange, netns
from qgnn_dist.bench.exchange import CELLS, on_the_wire, parse_cell
from qgnn_dist.bench.exchange_table import draw, tables
from qgnn_dist.cli import app
from qgnn_dist.comm.trace import COMPUTE, PACK, WIRE, Span
from qgnn_dist.errors import InputError, QgnnError
from tests.helpers import make_store, small_graph
from tests.netns import NetnsCluster


def _row(forward: int, gradients: int, seconds: float | None, **more: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"shape": "a", "method": "random", "workers": 4, "rate": "1gbit", "cut_fraction": 0.75,
                           "forward": forward, "gradients": gradients, "evaluation": False, **more}
    if seconds is None:
        return {**row, "why": "not available: no such width"}
    sent = {"forward": [2_000_000, 4_000_000], "backward": [5_000_000] * 2, "control": [10_000] * 2}
    return {"epoch_s": {"median": seconds, "p10": seconds / 2, "p90": 2 * seconds}, "speedup": 8 / seconds,
            "bytes": sent, "bytes_equal": True, "interface_ratio": 1.0123, "link_use": 0.876,
            "wait_s": {"exchange": 0.5, "reduce": 0.25, "server": 0.125}, "cpu_floor_s": 1.5, **row}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_hosts_are_taken_down_waits(monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    """As a second Ctrl-C has it: it comes through in the end, and no namespace is left."""
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    real, before = netns._end, signal.signal(number, interrupt)

    def end(name: str) -> None:
        os.kill(os.getpid(), number)
        real(name)

    made = list[Path]()
    monkeypatch.setattr(netns, "_end", end)
    try:
        with NetnsCluster(1) as cluster:
            made += [netns.NAMESPACES / name for name in cluster._made]
            assert all(place.exists() for place in made)
            with pytest.raises(KeyboardInterrupt):
                cluster.close()
    finally:
        signal.signal(number, before)
    assert len(made) == 2
    assert not any(place.exists() for place in made)


def test_what_cannot_be_removed_is_named_and_the_rest_goes(monkeypatch: pytest.MonkeyPatch,
                                                           caplog: pytest.LogCaptureFixture) -> None:
    real = netns._run

    def run(*command: str) -> str:
        if command[:3] == ("ip", "netns", "pids") or command[2:] == ("del", made[0].name):
            raise QgnnError("busy")
        return real(*command)

    with NetnsCluster(1) as cluster:
        made = [netns.NAMESPACES / name for name in cluster._made]
        with monkeypatch.context() as patched:
            patched.setattr(netns, "_run", run)
            cluster.close()
        stayed = [place.exists() for place in made]
        real("ip", "netns", "del", made[0].name)
        assert stayed == [True, False]
        assert f"network namespace {made[0].name} is left (busy); `ip netns del" in caplog.text


def test_commands_of_hosts_are_not_in_the_terminals_group() -> None:
    """A terminal's Ctrl-C goes to all processes of the foreground's group."""
    assert int(netns._run("ps", "-o", "pgid=", "-p", str(os.getpid()))) == os.getpgid(0)
    assert int(netns._run("sh", "-c", "ps -o pgid= -p $$")) != os.getpgid(0)


def test_a_table_from_rows() -> None:
    rows = [_row(32, 32, 8.0, time_s=60.0, test_accuracy=None, epochs_in_time=0),
            _row(2, 4, 2.0, time_s=60.0, test_accuracy=0.71234, epochs_in_time=30), _row(1, 2, None),
            _row(2, 4, 3.0, evaluation=True, bytes_equal=False), _row(32, 32, 9.0, rate="none", link_use=None)]
    (title, columns, lines), (other, narrow, _) = tables(rows)
    assert title == "a, 4 workers, random cut, 1gbit (75.0 % of the edges cut)"
    assert other.startswith("a, 4 workers, random cut, unshaped")
    assert columns == [*narrow, "test % after 60 s", "epochs"]
    assert lines[1] == ["INT2 / INT4", "2.000", "1.000-4.000", "4.00", "3.00", "5.00", "0.01", "equal", "1.012", "88",
                        "0.500", "0.250", "0.125", "1.500", "71.23", "30"]
    assert lines[0][-2:] == ["–", "0"]
    assert lines[2][:2] == ["INT1 / INT2", "not available: no such width"]
    assert lines[3][0] == "INT2 / INT4, evaluated"
    assert lines[3][7] == "DIFFERS"
    assert {len(line) for line in lines} == {len(columns)}
    figure = draw(rows)
    assert len(figure.axes) == 2
    assert [bar.get_height() for bar in figure.axes[0].patches] == [8.0, 2.0]


def test_where_rounds_spend_their_time() -> None:
    ranks = [[Span(PACK, "pack and send", 0.0, 1.0, 0, 0), Span(WIRE, "forward round 0", 1.0, 5.0, 0, 0),
              Span(COMPUTE, "rows", 5.0, 7.0, 0, 0), Span(WIRE, "backward round 0", 7.0, 9.0, 0, 0)],
             [Span(WIRE, "forward round 0", 3.0, 4.0, 0, 0), Span(WIRE, "backward round 0", 6.0, 9.5, 0, 0)]]
    found = on_the_wire(ranks, [50_000_000, 25_000_000], "100mbit")
    assert found == {"wire_s": (4 + 2 + 1 + 3.5) / 2, "compute_s": 1.0, "pack_s": 0.5, "tail_s": 2.0 + 2.5,
                     "full_link_s": 4.0, "link_use": 4.0 / 4.5}
    assert "link_use" not in on_the_wire(ranks, [1, 1], "none")


def test_cells_and_rates_as_words() -> None:
    assert parse_cell("2/4") == (2, 4)
    assert all(parse_cell(f"{a}/{b}") == (a, b) for a, b in CELLS)
    for word in ("2", "2/1", "3/4", "2/4/8", "float/4"):
        with pytest.raises(InputError, match="expected FORWARD/GRADIENTS"):
            parse_cell(word)
    assert [netns.bits_per_second(rate) for rate in ("100mbit", "1gbit", "2.5gbit")] == [1e8, 1e9, 2.5e9]
    for rate in ("fast", "100", "mbit", "-1gbit", "0gbit"):
        with pytest.raises(InputError, match="expected a number and kbit"):
            netns.bits_per_second(rate)


def test_hosts_that_cannot_be_made_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netns.os, "geteuid", lambda: 1000)
    with pytest.raises(QgnnError, match="network namespaces need root"), netns.NetnsCluster(2):
        pass
    monkeypatch.setattr(netns.os, "geteuid", lambda: 0)
    monkeypatch.setattr(netns.shutil, "which", lambda tool: None if tool == "tc" else f"/bin/{tool}")
    assert netns.cannot(shaped=True) == "network namespaces need `tc`, which is not installed"
    with pytest.raises(QgnnError, match="need `tc`"), netns.NetnsCluster(2, "1gbit"):
        pass


def test_shaped_rows_are_skipped_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where links cannot be shaped nothing is started, and the table says why."""
    monkeypatch.setattr(exchange, "cannot", lambda *, shaped=False: "network namespaces need root")
    monkeypatch.setattr(exchange, "Ranks", None)
    make_store(small_graph(signed=True), tmp_path / "s", 2)
    words = ["bench", "exchange", str(tmp_path / "s"), "--out", str(tmp_path / "out"), "--rate", "100mbit", "--cell",
             "2/32", "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    table = json.loads((tmp_path / "out" / "table.json").read_text(encoding="utf-8"))
    assert [(row["forward"], row["gradients"], row["why"]) for row in table["rows"]] == [
        (32, 32, "skipped: network namespaces need root"), (2, 32, "skipped: network namespaces need root")]
    assert "| INT2 / float | skipped: network namespaces need root |" in (tmp_path / "out" / "table.md").read_text()
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 2
    assert "--overwrite" in again.stderr
