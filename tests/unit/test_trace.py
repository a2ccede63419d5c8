# SPDX-License-Identifier: Apache-2.0
"""Where a round's time goes: spans, what they say of overlap, and Chrome's format."""
from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from qgnn_dist.comm.exchange import Exchange
from qgnn_dist.comm.group import Group
from qgnn_dist.comm.pool import LocalPool
from qgnn_dist.comm.trace import Span, Trace, chrome_trace, overlap, span
from qgnn_dist.config import TimeoutsConfig
from qgnn_dist.inference.batch import run_prediction
from qgnn_dist.inference.worker import PredictWorker
from tests.helpers import make_store, small_graph, untrained_model


def test_overlap_is_what_the_spans_say() -> None:
    spans = [Span("pack", "", 0.0, 0.1, 0, 0), Span("wire", "", 0.1, 1.1, 0, 0), Span("compute", "", 0.1, 0.9, 0, 0),
             Span("wait", "", 0.9, 1.1, 0, 0), Span("compute", "", 1.1, 1.2, 0, 0), Span("pack", "", 1.3, 1.4, 1, 1),
             Span("compute", "", 1.4, 1.9, 1, 1), Span("compute", "", 5.0, 9.0)]
    first, second = overlap(spans)
    assert (first["layer"], first["round"], second["layer"], second["round"]) == (0, 0, 1, 1)
    assert {k: round(v, 6) for k, v in first.items()} == {
        "layer": 0, "round": 0, "compute": 1.0, "wire": 1.0, "wait": 0.2, "wall": 1.3, "ratio": 1.3}
    assert second["wire"] == second["wait"] == 0
    assert second["ratio"] == pytest.approx(1.0)
    assert overlap([]) == []


def test_chrome_has_a_process_a_rank_and_a_row_a_lane() -> None:
    ranks = [[Span("compute", "rows", 100.0, 100.5, 2, 3)], [Span("wire", "halo", 100.25, 100.5, 2, 3)]]
    events = json.loads(json.dumps(chrome_trace(ranks)))["traceEvents"]
    drawn = [e for e in events if e["ph"] == "X"]
    assert [(e["pid"], e["tid"], e["ts"], e["dur"], e["name"]) for e in drawn] == [
        (0, 0, 0.0, 500000.0, "rows"), (1, 1, 250000.0, 250000.0, "halo")]
    assert drawn[0]["args"] == {"layer": 2, "round": 3}
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == ["rank 0", "rank 1"]


def test_a_block_is_measured_even_where_it_fails() -> None:
    trace = Trace()

    def fail() -> None:
        with span(trace, "compute", "work", 1, 2):
            time.sleep(0.02)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    (one,) = trace.spans
    assert 0.02 <= one.seconds < 5
    assert (one.kind, one.layer, one.round) == ("compute", 1, 2)
    with span(None, "compute", "work"):
        pass


@pytest.mark.parametrize("rounds", ["merged", "two"])
@pytest.mark.parametrize("bits", [2, 32])
def test_a_traced_prediction(tmp_path: Path, rounds: str, bits: int) -> None:
    """Every round of both ranks packs, computes, is on the wire and waits, in that order; nothing else changes."""
    store = make_store(small_graph(), tmp_path / "s", 2)
    model = untrained_model(store, rounds=rounds, bits=bits)
    pool = LocalPool(PredictWorker, {"store": str(store.path), "exchange_s": 60.0}, 2, timeout_s=60)
    try:
        out = tmp_path / "out"
        summary = run_prediction(pool, store, model, out, scores=True, timeouts=TimeoutsConfig(), trace=True)
        plain = run_prediction(pool, store, model, tmp_path / "plain", scores=True, timeouts=TimeoutsConfig())
    finally:
        pool.close()
    assert "overlap" not in plain
    assert not (tmp_path / "plain" / "trace.json").exists()
    for part in ("part-00000.parquet", "part-00001.parquet"):
        assert (out / part).read_bytes() == (tmp_path / "plain" / part).read_bytes()
    count = model.info.layers * (2 if rounds == "two" else 1) - (rounds == "two" and not any(model.info.multipliers))
    for rank in summary["overlap"]:
        assert [one["round"] for one in rank] == list(range(count))
        for one in rank:
            assert one["compute"] > 0
            assert one["wire"] > 0
            assert one["wall"] >= max(one["wait"], one["compute"]) * 0.99
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    for rank in (0, 1):
        own = [e for e in events if e["ph"] == "X" and e["pid"] == rank and e["args"]["round"] == 1 and e["tid"] == 0]
        assert [e["name"] for e in own] == ["pack and send", "interior rows", "wait", "boundary rows"]


def test_a_traced_round_still_ends_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: object) -> None:
        raise TimeoutError("late")

    group = Group.__new__(Group)
    group.rank, group.size = 0, 2
    monkeypatch.setattr(Group, "wait", late)
    exchange = Exchange([], 2, 0, group, 1, 5.0)
    exchange.trace = Trace()
    exchange.begin(np.zeros((2, 1), np.uint8), 2, 4, "forward", 0, 0)
    with pytest.raises(TimeoutError, match="late"):
        exchange.finish()
    assert [one.kind for one in exchange.trace.spans if one.kind == "wire"] == ["wire"]
