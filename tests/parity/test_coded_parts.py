# SPDX-License-Identifier: Apache-2.0
"""Law 10 (quantised training on several parts follows one part's) and the packed model against the training forward."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qgnn_dist import kernels
from qgnn_dist.comm.exchange import Exchange
from qgnn_dist.quant.ranges import hidden_step
from tests.helpers import by_source, make_store, settings, small_graph, train_pool


def _first_epoch_codes(monkeypatch: pytest.MonkeyPatch, store, config, bits: int) -> np.ndarray:
    """Codes of all rounds of the first epoch: (rounds, nodes, columns) in source order."""
    seen: dict[tuple[int, int], tuple[np.ndarray, int]] = {}
    begin = Exchange.begin

    def record(self: Exchange, buffer: np.ndarray, width: int, columns: int, direction: str, layer: int, round: int,
               **named: Any) -> None:
        if direction == "forward" and width == bits:
            seen[id(self), round] = buffer[:self._num_local].copy(), columns
        begin(self, buffer, width, columns, direction, layer, round, **named)

    monkeypatch.setattr(Exchange, "begin", record)
    with train_pool(store, config) as pool:
        order = np.argsort(np.concatenate([w._part.source_index for w in pool.workers]))
        pool.call("train_epoch", 1, False, timeout_s=60)
        exchanges = [w._exchange for w in pool.workers]
    monkeypatch.setattr(Exchange, "begin", begin)
    rounds = 1 + max(r for _, r in seen)
    out = []
    for k in range(rounds):
        rows = []
        for exchange in exchanges:
            payload, columns = seen[id(exchange), k]
            codes = np.empty((len(payload), columns), np.uint8)
            kernels.unpack(payload, bits, codes)
            rows.append(codes)
        out.append(np.concatenate(rows)[order])
    return np.stack(out)


@pytest.mark.parametrize("kind", ["smp", "appnp"])
@pytest.mark.parametrize(("bits", "coding"), [(2, "innovation"), (1, "innovation"), (4, "direct")])
def test_first_epoch_codes_do_not_depend_on_the_cut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str,
                                                    bits: int, coding: str) -> None:
    graph = small_graph(nodes=2000)
    config = settings(f"quant.bits={bits}", f"propagation.kind={kind}", f"messages.coding={coding}",
                      "model.feature_norm=l2")
    want = _first_epoch_codes(monkeypatch, make_store(graph, tmp_path / "1", 1), config, bits)
    assert len(np.unique(want)) > 2 ** (bits - 1)
    for parts, method in ((2, "metis"), (4, "random")):
        store = make_store(graph, tmp_path / f"{parts}{method}", parts, method)
        got = _first_epoch_codes(monkeypatch, store, config, bits)
        share = float((got != want).mean())
        print(f"law 10, {kind} {bits} bits {coding}, {parts} parts {method}: share of differing codes {share:.1e}")
        assert share <= 1e-5


def test_fifty_epochs_follow_one_part(tmp_path: Path) -> None:
    graph = small_graph(nodes=1500)
    config = settings("quant.bits=2", "model.feature_norm=l2", "train.lr=0.01")
    losses, accuracies = {}, {}
    for parts in (1, 2, 4):
        store = make_store(graph, tmp_path / str(parts), parts, "metis")
        with train_pool(store, config) as pool:
            runs = [pool.call("train_epoch", e, e == 50, timeout_s=60) for e in range(1, 51)]
            confusion = sum(r["evaluation"]["confusion"]["test"] for r in runs[-1])
        losses[parts] = np.array([sum(r["loss"] for r in epoch) for epoch in runs])
        accuracies[parts] = np.trace(confusion) / confusion.sum()
    assert losses[1][-1] < 0.7 * losses[1][0]
    for parts in (2, 4):
        drift = float((np.abs(losses[parts] - losses[1]) / losses[1]).mean())
        print(f"law 10, {parts} parts: mean |Δloss| {drift:.2e}, test {accuracies[parts]:.3f} / {accuracies[1]:.3f}")
        assert drift <= 0.01
        assert abs(accuracies[parts] - accuracies[1]) <= 0.03


@pytest.mark.parametrize("words", [("quant.bits=2",), ("quant.bits=4", "messages.coding=direct"), ("quant.bits=8",),
                                   ("quant.messages=1",), ("quant.method=lsq",), ("quant.method=minmax",),
                                   ("quant.bits=32",), ("quant.features=32",), ("quant.weights=32", "quant.hidden=4"),
                                   ("propagation.rounds=two",), ("propagation.kind=none",),
                                   ("messages.stride=3", "propagation.layers=9")])
@pytest.mark.parametrize("sparse", [False, True])
def test_packed_evaluation_is_the_training_forward(tmp_path: Path, words: tuple[str, ...], sparse: bool) -> None:
    """The integer model's scores against the float arithmetic that trains it, the same weights and ranges."""
    store = make_store(small_graph(nodes=600, sparse=sparse), tmp_path / "s", 2, "metis")
    config = settings(*words, "model.feature_norm=l2")
    with train_pool(store, config) as pool:
        for epoch in range(1, 16):
            pool.call("train_epoch", epoch, epoch == 15, timeout_s=60)
        trained = by_source(pool.call("training_scores", timeout_s=60))
        packed = by_source(pool.call("packed_scores", timeout_s=60))
    agreement = float((trained.argmax(1) == packed.argmax(1)).mean())
    worst = float(np.abs(trained - packed).max() / np.abs(trained).max())
    print(f"packed against training forward, {words} sparse={sparse}: agreement {agreement:.4f}, worst {worst:.1e}")
    assert agreement >= 0.999
    assert len(np.unique(packed.argmax(1))) > 1


def test_packed_grids_follow_evaluations_on_any_number_of_parts(tmp_path: Path) -> None:
    """Without dropout the same weights give smaller values: the packed model's steps are those of the evaluations."""
    graph, config = small_graph(nodes=2000), settings("quant.bits=2", "model.feature_norm=l2", "train.lr=1e-9")
    found = []
    for parts in (1, 3):
        with train_pool(make_store(graph, tmp_path / str(parts), parts), config) as pool:
            for epoch in range(1, 7):
                pool.call("train_epoch", epoch, epoch % 2 == 0, timeout_s=60)
            workers = pool.workers
            info = workers[0]._frozen_model().info
            ranges = workers[0]._ranges
            assert all(w._frozen_model().info == info for w in workers)
        for stage in ("hidden", "residual", "news/0", "news/1"):
            assert 0 < ranges[f"evaluation/{stage}"].rms < ranges[stage].rms, stage
        assert info.hidden_step == hidden_step(ranges["evaluation/hidden"], 2, "recipe")
        found.append((info.hidden_step, info.residual_step, info.message_steps))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert found[1][1:] == found[0][1:]
