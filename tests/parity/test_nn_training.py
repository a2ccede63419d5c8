# SPDX-License-Identifier: Apache-2.0
"""Modules in a loop of one's own against a training worker with the whole graph: the same bits, epoch by epoch."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import qgnn_dist as qgnn
from qgnn_dist.config import RunConfig
from qgnn_dist.training.metrics import loss_gradient
from tests.helpers import as_pyg, make_store, settings, small_graph, train_pool

EPOCHS = 4
SETTINGS = [(), ("quant.bits=1",), ("quant.bits=4", "propagation.rounds=two"), ("quant.bits=32",),
            ("quant.messages=32",), ("messages.coding=direct", "quant.residual=32"), ("quant.gradients=32",),
            ("propagation.kind=appnp", "messages.stride=2", "propagation.layers=9"), ("quant.method=minmax",),
            ("quant.method=lsq",), ("propagation.alpha=1e-4",), ("propagation.constraint=published",)]


def words_of(config: RunConfig) -> list[str]:
    """A resolved configuration as overrides."""
    return [f"{section}.{key}={value}" for section in ("propagation", "messages", "quant", "model")
            for key, value in config.to_dict()[section].items() if value is not None]


@pytest.mark.parametrize(("words", "sparse"), [((), True), *((words, False) for words in SETTINGS)],
                         ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value))
def test_network_is_the_workers(tmp_path: Path, words: tuple[str, ...], sparse: bool) -> None:
    graph = small_graph(sparse=sparse)
    config = settings("model.feature_norm=l2", "seed=7", *words)
    edges = torch.from_numpy(np.concatenate(list(graph.edges()), 1))
    net = qgnn.SMPNet(24, 16, 5, seed=7, overrides=words_of(config))
    optimizer = torch.optim.Adam(net.parameter_groups(config.train.decay("l2")), lr=config.train.lr)
    x = as_pyg(graph).x
    with train_pool(make_store(graph, tmp_path / "store", 1), config) as pool:
        worker = pool.workers[0]
        moved = 0
        for epoch in range(1, EPOCHS + 1):
            pool.call("train_epoch", epoch, True, timeout_s=60)
            optimizer.zero_grad()
            out = net.train()(x, edges)
            rows = worker._split_rows["train"]
            loss_grad = loss_gradient(out.detach().numpy(), rows, worker._labels[rows], len(rows))[1]
            out.backward(torch.from_numpy(loss_grad))
            wanted = worker.gradients()
            found = {name: p.grad.numpy() for name, p in net.perceptron.named_parameters() if p.grad is not None}
            assert set(wanted) <= set(found)
            for name, values in wanted.items():
                np.testing.assert_array_equal(found[name], values, err_msg=f"epoch {epoch}, {name}")
                moved += int(np.count_nonzero(values))
            optimizer.step()
            scores = net.eval()(x, edges).numpy()
            info, theirs = net.pack().info, worker._evaluated.info
            assert (info.multipliers, info.message_steps, info.hidden_step, info.residual_step, info.level) == (
                theirs.multipliers, theirs.message_steps, theirs.hidden_step, theirs.residual_step, theirs.level)
        assert moved > 0
        np.testing.assert_array_equal(net.pack().weight1, worker._evaluated.weight1)
        assert np.isfinite(scores).all()
        if config.propagation.kind == "smp" and "propagation.alpha=1e-4" in words:
            assert any(worker._multipliers)  # the constraint acts, or equal multipliers would say nothing


@pytest.mark.parametrize("words", [
    ("quant.method=qlr", "messages.coding=direct"), ("quant.method=bt_star", "messages.coding=direct"),
    ("quant.method=qlr",), ("quant.method=percentile",), ("quant.method=degree_quant",)], ids=" ".join)
def test_layer_with_affine_grids_is_the_workers(tmp_path: Path, words: tuple[str, ...]) -> None:
    graph = small_graph()
    config = settings("model.feature_norm=l2", "seed=7", "quant.hidden=32", *words)
    edges = torch.from_numpy(np.concatenate(list(graph.edges()), 1))
    conv = qgnn.SMPConv(seed=7, overrides=words_of(config))
    with train_pool(make_store(graph, tmp_path / "store", 1), config) as pool:
        worker = pool.workers[0]
        network = worker._network

        def h0(epoch: int) -> torch.Tensor:
            state: torch.Tensor = network(worker._matrix, worker._dropout(epoch), None)[0]
            return state

        conv.calibrate(h0(0).detach(), conv.graph_of(edges, graph.num_nodes))
        assert conv.ranges is not None
        np.testing.assert_array_equal(conv.ranges.low.detach(), network.ranges.low.detach())
        state = h0(1)  # before the worker's step changes the weights
        out = conv(state, edges)
        rows = worker._split_rows["train"]
        out.backward(torch.from_numpy(loss_gradient(out.detach().numpy(), rows, worker._labels[rows], len(rows))[1]))
        found = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
        pool.call("train_epoch", 1, False, timeout_s=60)
        wanted = worker.gradients()
        for name in ("weight1", "weight2", "bias1", "bias2"):
            np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)
        learned = config.quant.method in ("qlr", "bt", "bt_star")
        assert (conv.ranges.low.grad is not None) == learned
        if learned:
            np.testing.assert_array_equal(conv.ranges.low.grad, wanted["ranges.low"])
            np.testing.assert_array_equal(conv.ranges.high.grad, wanted["ranges.high"])
            assert bool(conv.ranges.low.grad.any())
