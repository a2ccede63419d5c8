# SPDX-License-Identifier: Apache-2.0
"""Predicted bytes against those that workers count, and predicted parts against those that are built."""
from __future__ import annotations

from pathlib import Path

import pytest

from qgnn_dist.comm.pool import LocalPool
from qgnn_dist.errors import InputError
from qgnn_dist.inference.output import UNFINISHED
from qgnn_dist.inference.worker import PredictWorker
from qgnn_dist.planning.cut import cut_of_graph, cut_of_numbers, cut_of_store
from qgnn_dist.planning.plan import cut_of
from qgnn_dist.planning.shapes import GraphSize, parts_of
from qgnn_dist.planning.traffic import gradient_row_bytes, traffic
from tests.helpers import make_store, settings, small_graph, train_pool, untrained_model


@pytest.mark.parametrize(("words", "parts"), [
    (("quant.bits=2",), 2), (("quant.bits=1",), 4), (("quant.bits=32",), 2), (("propagation.kind=none",), 2),
    (("messages.stride=2", "propagation.layers=9"), 2)])
def test_bytes_of_an_epoch_are_exact(tmp_path: Path, words: tuple[str, ...], parts: int) -> None:
    """Law 5, and the all-reduces beside it."""
    store = make_store(small_graph(), tmp_path / "s", parts)
    config = settings("model.feature_norm=l2", *words)
    with train_pool(store, config) as pool:
        results = pool.call("train_epoch", 1, True, timeout_s=60)
    said = traffic(cut_of_store(store), parts, config)
    for kind in ("forward", "backward", "evaluation", "control"):
        assert getattr(said, kind) == sum(r["wire_bytes"][kind] for r in results), kind


def test_bytes_of_a_prediction_are_exact(tmp_path: Path) -> None:
    store = make_store(small_graph(), tmp_path / "s", 2)
    model = untrained_model(store, bits=2)
    (tmp_path / "out" / UNFINISHED).mkdir(parents=True)
    pool = LocalPool(PredictWorker, {"store": str(store.path), "exchange_s": 60.0}, 2)
    try:
        pool.call("load", store.fingerprint, model.to_bytes(), timeout_s=60)
        pool.call("predict", timeout_s=60)
        got = sum(r["message_bytes"] for r in pool.call("write", str(tmp_path / "out"), False, timeout_s=60))
    finally:
        pool.close()
    assert traffic(cut_of_store(store), 2, settings("quant.bits=2")).predict == got


def test_quantised_gradients_carry_a_scale_byte() -> None:
    assert [gradient_row_bytes(40, bits) for bits in (2, 4, 8, 32)] == [11, 21, 41, 160]


@pytest.mark.parametrize("parts", [2, 5])
def test_a_random_cut_is_predicted_from_degrees(tmp_path: Path, parts: int) -> None:
    """From a store of one part, against stores of `parts` parts by chance."""
    graph = small_graph(nodes=6000, degree=4.0)
    one = cut_of_store(make_store(graph, tmp_path / "1", 1))
    store = make_store(graph, tmp_path / "s", parts)
    real = parts_of(store)
    assert one.fraction(parts) == pytest.approx(store.manifest["cut_fraction"], rel=0.02)
    assert one.sends(parts) == pytest.approx(sum(p.sends for p in real), rel=0.02)
    said, = one.parts(parts)
    assert said.halo == pytest.approx(max(p.halo for p in real), rel=0.1)
    assert said.boundary == pytest.approx(max(p.boundary for p in real), rel=0.1)
    assert (said.rows, said.peers) == (-(-6000 * 105 // (100 * parts)), parts - 1)
    # All nodes at the mean degree read more rows than any other graph of as many edges.
    assert cut_of_numbers(GraphSize.of(store), None).sends(parts) >= one.sends(parts)


def test_a_store_tells_of_other_numbers_of_parts(tmp_path: Path) -> None:
    graph = small_graph(nodes=6000, degree=4.0)
    four = cut_of_store(make_store(graph, tmp_path / "4", 4, "stream"))
    assert four.parts(4) == parts_of(make_store(graph, tmp_path / "4b", 4, "stream"))
    eight = make_store(graph, tmp_path / "8", 8, "stream")
    assert four.sends(8) == pytest.approx(sum(p.sends for p in parts_of(eight)), rel=0.25)


def test_a_source_is_cut_by_the_streaming_partitioner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = small_graph(nodes=6000, degree=16.0)
    size = GraphSize(nodes=6000, edges=0, features=24, classes=5, train=600, valid=1800, stored=24.0)
    whole = cut_of_graph(graph, size, 4)
    store = make_store(graph, tmp_path / "4", 4, "stream")
    assert whole.size.edges == store.num_edges
    assert "all of the graph" in whole.how
    keys = ("rows", "boundary", "halo", "sends", "peers", "edges")
    assert [[getattr(p, k) for k in keys] for p in whole.parts(4)] == \
        [[getattr(p, k) for k in keys] for p in parts_of(store)]
    monkeypatch.setattr("qgnn_dist.planning.cut.SAMPLE_EDGES", 12000)
    drawn = cut_of_graph(graph, size, 4)
    assert "drawn nodes" in drawn.how
    assert drawn.size.edges == pytest.approx(store.num_edges, rel=0.1)
    assert 0.8 * whole.sends(4) <= drawn.sends(4) <= 2.0 * whole.sends(4)
    assert cut_of_graph(graph, size, 1).sends(1) == 0


def test_bare_numbers(tmp_path: Path) -> None:
    numbers = {"--nodes": 1000, "--edges": 5000, "--features": 8, "--classes": 3}
    random, name, parts = cut_of(None, numbers, 4)
    assert (random.fraction(4), name, parts) == (0.75, "", None)
    better, _, _ = cut_of(None, numbers, 4, cut=0.15, train_nodes=10)
    assert better.fraction(4) == pytest.approx(0.15)
    assert better.fraction(8) == pytest.approx(0.2 * 7 / 8)
    assert better.sends(4) < random.sends(4)
    assert better.size.train == 10
    for wrong, text in (({"--edges": None}, "--edges: missing"), ({"--nodes": -3}, "--nodes -3: expected")):
        with pytest.raises(InputError, match=text):
            cut_of(None, {**numbers, **wrong}, 4)
    with pytest.raises(InputError, match=r"--cut 1\.5: expected 0 to 1"):
        cut_of(None, numbers, 4, cut=1.5)
    with pytest.raises(InputError, match="--train-nodes 2000: more than the 1000"):
        cut_of(None, numbers, 4, train_nodes=2000)
    store = make_store(small_graph(), tmp_path / "s", 2)
    with pytest.raises(InputError, match=r"--nodes, .*only without a store"):
        cut_of(str(store.path), numbers, 4)
    assert cut_of(str(store.path), dict.fromkeys(numbers), 2)[1:] == ("small", 2)
    assert cut_of(str(store.path), dict.fromkeys(numbers), 4)[1:] == ("small", None)  # it would be made again
