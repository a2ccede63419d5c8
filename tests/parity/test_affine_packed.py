# SPDX-License-Identifier: Apache-2.0
"""The paper's quantisers: the packed model against the training forward, law 2, several parts, and resuming."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qgnn_dist import kernels
from qgnn_dist.config import RunConfig
from qgnn_dist.errors import InputError
from qgnn_dist.propagation.affine import AffineMessenger
from qgnn_dist.propagation.multiplier import InProcessServer, MultiplierRule, MultiplierServer
from qgnn_dist.quant.grids import AFFINE_METHODS
from qgnn_dist.store.reader import Store
from qgnn_dist.training.loop import check_trainable
from tests.helpers import by_source, make_store, settings, small_graph, train_pool, worst_excess
from tests.parity.test_predict_bits import bits_of, predictions, trained_model

SCHEMES = [("messages.coding=direct", "propagation.rounds=two"), ("messages.coding=innovation",),
           ("messages.coding=direct", "propagation.kind=appnp"), ("propagation.kind=none",),
           ("messages.coding=direct", "propagation.kind=elastic", "propagation.lambda1=0.5")]


@pytest.mark.parametrize("method", AFFINE_METHODS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", [2, 4])
def test_packed_scores_are_the_training_forwards(tmp_path: Path, method: str, scheme: tuple[str, ...],
                                                 bits: int) -> None:
    """To the last bit: products are whole numbers under 2^24, and the rest is the same operations in one order."""
    store = make_store(small_graph(sparse=bits == 4), tmp_path / "s", 1)
    config = settings(f"quant.method={method}", f"quant.bits={bits}", *scheme, "model.feature_norm=l2",
                      "propagation.alpha=0.001")
    with train_pool(store, config) as pool:
        for epoch in range(1, 4):
            pool.call("train_epoch", epoch, epoch == 3, timeout_s=60)
        want = by_source(pool.call("training_scores", timeout_s=60))
        got = by_source(pool.call("packed_scores", timeout_s=60))
        model = pool.workers[0]._evaluated
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))
    assert np.std(want) > 0
    info = model.info
    assert {"weights1", "weights2", "hidden", "residual"} <= set(info.grids)
    assert len(info.grids) == 4 + len(info.message_steps)
    low = -(2 ** (bits - 1))
    for weight in (model.weight1, model.weight2):
        assert weight.dtype == np.int8
        assert low <= weight.min() < weight.max() < -low


@pytest.mark.parametrize("word", ["quant.weights=32", "quant.features=32", "quant.hidden=32", "quant.messages=32",
                                  "quant.residual=32", "quant.bits=32"])
def test_float_stages_stay_float(tmp_path: Path, word: str) -> None:
    """Float products add up in another order than torch's: law 1's tolerance, where no code flips."""
    store = make_store(small_graph(), tmp_path / "s", 1)
    config = settings("quant.method=qlr", word, "messages.coding=direct", "model.feature_norm=l2")
    with train_pool(store, config) as pool:
        pool.call("train_epoch", 1, True, timeout_s=60)
        want = by_source(pool.call("training_scores", timeout_s=60))
        got = by_source(pool.call("packed_scores", timeout_s=60))
        grids = pool.workers[0]._evaluated.info.grids
    stage = word.partition(".")[2].partition("=")[0]
    assert not [name for name in grids if name.startswith({"messages": "news"}.get(stage, stage))]
    close = np.isclose(got, want, rtol=1e-4, atol=1e-5)
    assert close.mean() > 0.99
    assert len(grids) > 0 or word == "quant.bits=32"


@pytest.mark.parametrize("words", [
    ("quant.method=bt_star", "quant.bits=2", "messages.coding=direct", "propagation.rounds=two"),
    ("quant.method=qlr", "quant.bits=4"), ("quant.method=degree_quant", "quant.bits=2", "quant.hidden=32")])
def test_bits_do_not_depend_on_how_it_is_run(tmp_path: Path, words: tuple[str, ...]) -> None:
    graph = small_graph(nodes=700, sparse="quant.bits=4" in words)
    one = make_store(graph, tmp_path / "1", 1)
    model = trained_model(one, *words, "propagation.alpha=0.001", "model.feature_norm=l2")
    kernels.set_threads(1)
    want = bits_of(predictions(one, model, tmp_path / "want")[0])
    assert len(np.unique(want["class"])) > 1
    for parts, method in ((2, "random"), (4, "metis"), (4, "random")):
        store = make_store(graph, tmp_path / f"{parts}{method}", parts, method)
        got = bits_of(predictions(store, model, tmp_path / f"out{parts}{method}")[0])
        for column, values in want.items():
            np.testing.assert_array_equal(got[column], values, err_msg=f"{parts} {method} {column}")
    for level in ("scalar", "reference"):
        with kernels.using_isa(level):
            got = bits_of(predictions(one, model, tmp_path / level)[0])
        for column, values in want.items():
            np.testing.assert_array_equal(got[column], values, err_msg=f"{level} {column}")
    kernels.set_threads(3)
    got = bits_of(predictions(one, model, tmp_path / "threads")[0])
    kernels.set_threads(1)
    for column, values in want.items():
        np.testing.assert_array_equal(got[column], values, err_msg=f"threads {column}")


@pytest.mark.parametrize("coding", ["direct", "innovation"])
def test_ranges_follow_a_graph_of_another_scale(tmp_path: Path, coding: str) -> None:
    """H⁰ 2^3 times as large: the same codes, and scores 2^3 times as large to the last bit (λ = 0 keeps it linear)."""
    import dataclasses

    store = make_store(small_graph(), tmp_path / "s", 1)
    model = trained_model(store, "quant.method=qlr", "quant.weights=32", "quant.bits=2", "quant.hidden=32",
                          f"messages.coding={coding}", "model.feature_norm=l2", "propagation.kind=appnp")
    want = bits_of(predictions(store, model, tmp_path / "a")[0])
    larger = dataclasses.replace(model, weight2=model.weight2 * 8, bias2=model.bias2 * 8)
    table, summary = predictions(store, larger, tmp_path / "b")
    assert summary["range_gain"] == 3
    got = bits_of(table)
    np.testing.assert_array_equal(got["scores"].view(np.float32), 8 * want["scores"].view(np.float32))


@pytest.mark.parametrize("method", ["qlr", "bt_star", "percentile"])
@pytest.mark.parametrize("coding", ["direct", "innovation"])
def test_training_on_parts_follows_one_part(tmp_path: Path, method: str, coding: str) -> None:
    """Law 10's loss; for direct messages the first epoch's gradients, the learned factors' too, by law 1's tolerance.

    Percentiles are a weighted mean of the parts' own, so that method's ranges move a little with the cut.
    """
    graph = small_graph(nodes=900)
    config = settings(f"quant.method={method}", f"messages.coding={coding}", "model.feature_norm=l2",
                      "propagation.alpha=0.001")
    losses, gradients = {}, {}
    for parts in (1, 2, 4):
        with train_pool(make_store(graph, tmp_path / str(parts), parts), config) as pool:
            losses[parts] = [sum(r["loss"] for r in pool.call("train_epoch", epoch, False, timeout_s=60))
                             for epoch in (1,)]
            gradients[parts] = pool.call_one(0, "gradients", timeout_s=60)
            losses[parts] += [sum(r["loss"] for r in pool.call("train_epoch", epoch, False, timeout_s=60))
                              for epoch in range(2, 11)]
    for parts in (2, 4):
        difference = np.abs(np.array(losses[parts]) / np.array(losses[1]) - 1)
        assert difference.mean() <= 0.01, f"{parts} parts: {difference}"
        if method == "percentile":
            continue
        assert {"ranges.low", "ranges.high", "quantizer1.low"} <= set(gradients[parts])
        for name, value in gradients[parts].items():
            # Codes on the edge of a cell may differ between cuts, one in 1e5.
            assert worst_excess(value, gradients[1][name]) <= 30, f"{parts} parts, {name}"
    if method != "percentile" and coding == "direct":
        assert (gradients[1]["ranges.high"] != 0).all()


@pytest.mark.parametrize("method", ["qlr", "bt_star"])
def test_a_resumed_worker_goes_on_with_the_same_bytes(tmp_path: Path, method: str) -> None:
    store = make_store(small_graph(), tmp_path / "s", 1)
    config = settings(f"quant.method={method}", "messages.coding=direct", "model.feature_norm=l2")
    whole, _, _ = _train(store, config, None, range(1, 7))
    half, server, ranges = _train(store, config, None, range(1, 4))
    assert {"network.ranges.low", "network.quantizer1.high", "adam.ranges.low.exp_avg"} <= set(half)
    assert (half["network.ranges.low"] != 1).all()
    resumed, _, _ = _train(store, config, (half, server, ranges), range(4, 7))
    assert set(resumed) == set(whole)
    for name, value in whole.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)


def _train(store: Store, config: RunConfig, start: Any, epochs: range) -> tuple[dict[str, np.ndarray], Any, Any]:
    """Some epochs in a process of its own, so to say: tensors, the server's state, and its ranges."""
    server = InProcessServer(MultiplierServer(1, MultiplierRule.of(config, store.num_edges), 60))
    try:
        with train_pool(store, config, server) as pool:
            if start is not None:
                tensors, state, ranges = start
                server.call("load_state", state)
                pool.call("load_state", {k: v for k, v in tensors.items() if k != "best"}, ranges, None, timeout_s=60)
            for epoch in epochs:
                pool.call("train_epoch", epoch, True, timeout_s=60)
            pool.call("keep_best", timeout_s=60)
            return pool.call_one(0, "state", timeout_s=60), server.call("state"), server.call("state")["ranges"]
    finally:
        server.close()


def test_degree_quant_protects_in_training_only(tmp_path: Path) -> None:
    store = make_store(small_graph(nodes=900), tmp_path / "s", 1)
    config = settings("quant.method=degree_quant", "messages.coding=direct", "model.feature_norm=l2")
    with train_pool(store, config) as pool:
        worker = pool.workers[0]
        training = worker._affine
        masks = [training.protected(epoch) for epoch in (1, 2)]
        assert all(0.02 < mask.mean() < 0.09 for mask in masks)  # half of p_max on average
        assert (masks[0] != masks[1]).any()
        degree = worker._graph.degree
        many = np.mean([training.protected(e)[degree >= np.quantile(degree, 0.8)].mean() for e in range(40)])
        few = np.mean([training.protected(e)[degree <= np.quantile(degree, 0.2)].mean() for e in range(40)])
        assert many > 2 * few
        rng = np.random.default_rng(0)
        state = rng.normal(size=(store.num_nodes, 5)).astype(np.float32)
        grids = training.grids(worker._ranges)
        for innovation in (False, True):
            sums = {}
            for name, protected in (("none", np.zeros(len(state), bool)), ("some", masks[0]), ("coded", None)):
                messenger = AffineMessenger(
                    worker._graph, worker._exchange, 5, "forward", bits=2, innovation=innovation, protected=protected,
                    grids=[grids[f"news/{k}"] for k in range(4)])
                messenger.gather(state, 0)
                sums[name] = messenger.gather(state, 1).copy()
            np.testing.assert_allclose(sums["none"], sums["coded"], rtol=1e-4, atol=1e-4)
            assert np.abs(sums["some"] - sums["coded"]).max() > 1e-3


def test_degree_quant_trains_on_one_part_only(tmp_path: Path) -> None:
    store = make_store(small_graph(), tmp_path / "s", 2)
    with pytest.raises(InputError, match=r"quant\.method=degree_quant: trains on a store of one part, this one has 2") \
            as caught:
        check_trainable(store, settings("quant.method=degree_quant"))
    assert caught.value.exit_code == 2
    check_trainable(store, settings("quant.method=percentile"))
