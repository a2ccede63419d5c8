# SPDX-License-Identifier: Apache-2.0
"""The perceptron's pass in row blocks against autograd over all rows at once."""
from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qgnn_dist import kernels
from qgnn_dist.config import RunConfig
from qgnn_dist.model import row_blocks
from qgnn_dist.model.features import FeatureScheme, read_block
from qgnn_dist.model.perceptron import STAGE_HIDDEN, STAGE_INPUT, DropoutKey, FeatureMatrix, Perceptron
from qgnn_dist.model.row_blocks import RowBlocks
from qgnn_dist.quant.straight_through import round_through, scale_gradient
from tests.helpers import make_store, settings, small_graph, train_pool, worst_excess

HIDDEN_STEP = 0.37


def _weighted(quantizer: Any, weight: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    codes, step = quantizer(weight) if quantizer is not None else (weight, torch.ones(()))
    return (x @ codes) * (scale * step)


def _mask(key: DropoutKey, stage: int, columns: int) -> Tensor:
    mask = np.ones((len(key.rows), columns), np.float32)
    if key.share > 0:
        kernels.dropout_dense(key.seed, key.epoch, stage, 0, key.rows, columns, key.share, mask)
    return torch.from_numpy(mask)


def reference(network: Perceptron, x: np.ndarray, scale: np.ndarray, key: DropoutKey, step: float | None) -> Tensor:
    """H⁰ by torch operations on all rows, in double; its backward is autograd's."""
    values = torch.from_numpy(x).double() * _mask(key, STAGE_INPUT, x.shape[1])
    before = _weighted(network.quantizer1, network.weight1, values, torch.from_numpy(scale)[:, None]) + network.bias1
    hidden, factor = torch.relu(before), torch.ones(())
    if step is not None and network.bits_hidden < 32:
        factor = torch.tensor(step)
        if network.method == "lsq":
            share = 1 / math.sqrt(hidden.shape[1] * (2**network.bits_hidden - 1))
            factor = scale_gradient(network.hidden_step.abs(), share)
        hidden = round_through((hidden / factor).clamp(0, 2**network.bits_hidden - 1))
    hidden = hidden * _mask(key, STAGE_HIDDEN, hidden.shape[1])
    return _weighted(network.quantizer2, network.weight2, hidden, factor) + network.bias2


def _parts(tmp_path: Path, config: RunConfig, sparse: bool, signed: bool) -> tuple[Perceptron, FeatureMatrix, Any]:
    part = make_store(small_graph(sparse=sparse, signed=signed), tmp_path / "s", 1).part(0)
    block = read_block(part, FeatureScheme("none", signed, int(config.quant.features or 32)), 0, part.num_local)
    network = Perceptron(config, block.num_features, 5)
    with torch.no_grad():
        network.hidden_step.fill_(HIDDEN_STEP)
        network.bias1.add_(0.3)
    return network, FeatureMatrix(block), (block, np.ascontiguousarray(part.source_index))


def _dense(block: Any) -> np.ndarray:
    if block.indptr is None:
        return block.values.astype(np.float32)
    x = np.zeros((len(block.scale), block.num_features), np.float32)
    x[np.repeat(np.arange(len(x)), np.diff(block.indptr)), block.indices] = block.values
    return x


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_what_is_kept_gives_the_gradients_of_what_is_computed_again(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int, share: float) -> None:
    monkeypatch.setattr(row_blocks, "MOST_ROWS", 64)
    network, matrix, (_, rows) = _parts(tmp_path, settings(f"quant.bits={bits}"), False, signed=True)
    grad = np.random.default_rng(2).normal(size=(matrix.num_rows, 5)).astype(np.float32)
    found = []
    for kept_bits, threads in ((8, 1), (8, 2), (0, 1)):
        monkeypatch.setattr(row_blocks, "KEPT_BITS", kept_bits)
        kernels.set_threads(threads)
        try:
            network.zero_grad()
            blocks = RowBlocks(network, matrix)
            h0, figures = blocks.forward(DropoutKey(3, 7, rows, share), HIDDEN_STEP)
            blocks.backward(grad)
        finally:
            kernels.set_threads(1)
        found.append({"h0": h0, "figures": np.array(figures),
                      **{name: p.grad.numpy().copy() for name, p in network.named_parameters() if p.grad is not None}})
    assert len(found[0]) >= 6
    for other in found[1:]:
        for name, value in found[0].items():
            np.testing.assert_array_equal(value, other[name], err_msg=name)


@pytest.mark.parametrize("words", [
    ("quant.bits=2",), ("quant.bits=4",), ("quant.bits=8",), ("quant.bits=32",), ("quant.method=lsq",),
    ("quant.method=minmax",), ("quant.method=lsq", "quant.weights=32"), ("quant.bits=4", "quant.features=32"),
    ("quant.bits=4", "quant.hidden=32"), ("quant.bits=32", "quant.hidden=2")], ids=",".join)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.3])
def test_gradients_are_autograds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], sparse: bool,
                                 share: float) -> None:
    monkeypatch.setattr(row_blocks, "MOST_ROWS", 64)  # several blocks, and a last one that is shorter
    network, matrix, (block, rows) = _parts(tmp_path, settings(*words), sparse, signed=not sparse)
    key = DropoutKey(3, 7, rows, share)
    step = float(network.hidden_step.detach()) if network.bits_hidden < 32 else None
    exact = copy.deepcopy(network).double()
    h0 = reference(exact, _dense(block), block.scale, key, step)
    grad = np.random.default_rng(1).normal(size=tuple(h0.shape)).astype(np.float32)
    h0.backward(torch.from_numpy(grad).double())
    want = {name: p.grad.numpy() for name, p in exact.named_parameters() if p.grad is not None}
    blocks = RowBlocks(network, matrix)
    for _ in range(2):  # the second time gives the same: nothing is left from the first
        got, moments = blocks.forward(key, step)
        blocks.backward(grad)
        assert worst_excess(got, h0.detach().numpy()) <= 1
        gradients = {name: p.grad.numpy().copy() for name, p in network.named_parameters() if p.grad is not None}
        assert set(gradients) == set(want)
        for name, value in want.items():
            assert worst_excess(gradients[name], value) <= 1, name
            assert np.abs(value).max() > 0, name
        network.zero_grad()
    hidden = torch.relu(_weighted(network.quantizer1, network.weight1,
                                  torch.from_numpy(_dense(block)) * _mask(key, STAGE_INPUT, block.num_features),
                                  torch.from_numpy(block.scale)[:, None]) + network.bias1).detach().double()
    np.testing.assert_allclose(moments, [float((hidden**2).sum()), float(hidden.sum()), float(hidden.max()),
                                         hidden.numel()], rtol=1e-5)


@pytest.mark.parametrize("words", [("quant.bits=2",), ("quant.bits=32",)], ids=",".join)
def test_threads_and_instruction_sets_give_one_gradient(tmp_path: Path, words: tuple[str, ...]) -> None:
    network, matrix, (_, rows) = _parts(tmp_path, settings(*words), False, signed=True)
    key, results = DropoutKey(3, 7, rows, 0.5), []
    grad = np.random.default_rng(1).normal(size=(len(rows), 5)).astype(np.float32)
    try:
        for level in ("scalar", "avx2") if kernels.isa() == "avx2" else ("scalar",):
            for threads in (1, 3):
                kernels.set_threads(threads)
                with kernels.using_isa(level):
                    blocks = RowBlocks(network, matrix)
                    h0, moments = blocks.forward(key, HIDDEN_STEP)
                    blocks.backward(grad)
                results.append([h0, np.array(moments), *(p.grad.numpy().copy() for p in network.parameters()
                                                         if p.grad is not None)])
                network.zero_grad()
    finally:
        kernels.set_threads(1)
    for other in results[1:]:
        for a, b in zip(results[0], other):
            np.testing.assert_array_equal(a, b)


def test_training_keeps_no_array_of_all_hidden_values(tmp_path: Path) -> None:
    """What a worker holds, with its largest arrays by name: codes of the features, never floats of (n, F) or (n, H)."""
    import tracemalloc

    nodes, features = 6000, 200
    store = make_store(small_graph(nodes, features=features, signed=True), tmp_path / "s", 1)
    for words in ((), ("quant.bits=32",)):
        with train_pool(store, settings("model.hidden=300", *words)) as pool:
            pool.call("train_epoch", 1, True, timeout_s=60)
            tracemalloc.start()
            pool.call("train_epoch", 2, False, timeout_s=60)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        print(f"{words}: peak of an epoch {peak / 2**20:.1f} MiB, hidden values {nodes * 300 * 4 / 2**20:.1f} MiB")
        assert peak < 0.5 * nodes * features * 4
