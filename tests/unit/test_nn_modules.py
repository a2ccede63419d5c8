# SPDX-License-Identifier: Apache-2.0
"""SMPConv and SMPNet as torch modules: adjacencies, gradients, modes, state, what is kept, and what is refused."""
from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import qgnn_dist as qgnn
from qgnn_dist.device.codes import DeviceGraph
from qgnn_dist.nn import graph as nn_graph
from qgnn_dist.nn import smp_conv
from tests.helpers import as_pyg, small_graph

DATA = as_pyg(small_graph())
X = torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
EDGES: Tensor = DATA.edge_index
APPNP = ("propagation.kind=appnp",)


def sparse_matrix(layout: str) -> Any:
    """EDGES as an adjacency, rows their targets."""
    coo = torch.sparse_coo_tensor(EDGES.flip(0), torch.ones(EDGES.shape[1]), (300, 300))
    if layout == "SparseTensor":
        torch_sparse = pytest.importorskip("torch_sparse", reason="extra `sparse` is not installed")
        return torch_sparse.SparseTensor(row=EDGES[1], col=EDGES[0], sparse_sizes=(300, 300))
    return {"coo": coo, "csr": coo.coalesce().bool().float().to_sparse_csr()}[layout]


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", ["coo", "csr", "SparseTensor"])
def test_every_form_of_an_adjacency_is_the_same_graph(layout: str) -> None:
    adjacency = sparse_matrix(layout)
    torch.testing.assert_close(qgnn.SMPConv(4)(X, adjacency), qgnn.SMPConv(4)(X, EDGES), rtol=0, atol=0)


def test_one_way_double_and_own_edges_count_once() -> None:
    both = torch.cat([EDGES, EDGES.flip(0), EDGES[:, :9], torch.arange(300).repeat(2, 1)], 1)
    assert torch.equal(qgnn.SMPConv(4)(X, both), qgnn.SMPConv(4)(X, EDGES))


def test_float_layers_are_appnp() -> None:
    """λ ≡ 0 and η = 1/(1 + μ) give PyG's APPNP with teleport 1/(1 + μ) (law 3)."""
    from torch_geometric.nn import APPNP as Oracle

    both = torch.unique(torch.cat([EDGES, EDGES.flip(0)], 1), dim=1)
    both = both[:, both[0] != both[1]]
    conv = qgnn.SMPConv(6, 32, mu=4.0, eta=0.2, overrides=APPNP)
    torch.testing.assert_close(conv(X, EDGES), Oracle(6, 0.2)(X, both), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Input #0 requires gradient and is not a double")
@pytest.mark.parametrize("words", [APPNP, (), ("propagation.rounds=two", "propagation.alpha=1e-3")], ids=" ".join)
def test_gradients_of_the_float_layers(words: tuple[str, ...]) -> None:
    """With λ frozen the layers are linear: differences are exact at any width, so float32 will do."""
    conv = qgnn.SMPConv(5, 32, overrides=words)
    conv(X, EDGES)
    assert any(conv.multipliers) == (words != APPNP) or words == ()
    edges = torch.tensor([[0, 1, 2, 3, 1], [1, 2, 3, 4, 4]])
    x = torch.randn(6, 2, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: conv.eval()(h, edges), (x,), eps=0.25, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_gradients_pass_straight_through_codes(bits: int) -> None:
    """The backward of coded messages is the float operator's, with the same multipliers."""
    coded, plain = qgnn.SMPConv(6, bits, overrides=("propagation.alpha=1e-3",)), qgnn.SMPConv(6, 32)
    grads = []
    weights = torch.randn(300, 5)
    for conv in (coded, plain):
        x = X.clone().requires_grad_()
        if conv is plain:
            conv.multipliers = coded.multipliers
            conv.eval()
        conv(x, EDGES).mul(weights).sum().backward()
        grads.append(x.grad)
    assert any(coded.multipliers)
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_more_bits_come_nearer_to_float() -> None:
    wanted = qgnn.SMPConv(10, 32)(X, EDGES)
    errors = [float((qgnn.SMPConv(10, bits)(X, EDGES) - wanted).norm() / wanted.norm()) for bits in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.3
    assert errors[3] < 0.01


@pytest.mark.parametrize("method", ["qlr", "bt", "bt_star"])
def test_learned_ranges_get_gradients_and_move(method: str) -> None:
    conv = qgnn.SMPConv(4, 2, method=method, overrides=("messages.coding=direct",))
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
    conv(X, EDGES).square().sum().backward()
    assert conv.ranges is not None
    before = conv.ranges.low.detach().clone()
    assert conv.ranges.low.grad is not None
    optimizer.step()
    assert not torch.equal(conv.ranges.low, before)


@pytest.mark.parametrize("method", ["recipe", "minmax", "percentile", "degree_quant", "qlr"])
def test_evaluation_is_frozen_and_training_is_not(method: str) -> None:
    conv = qgnn.SMPConv(4, 2, method=method)
    first = conv(X, EDGES)
    state = conv.state_dict()
    frozen = [conv.eval()(X * scale, EDGES) for scale in (1.0, 9.0, 1.0)]
    assert torch.equal(frozen[0], frozen[2])
    again = qgnn.SMPConv(4, 2, method=method, seed=conv.config.seed)
    again.load_state_dict(state)
    assert torch.equal(again.eval()(X, EDGES), frozen[0])
    conv.train()(X * 9, EDGES)
    conv(X * 9, EDGES)
    assert not torch.equal(conv.eval()(X, EDGES), frozen[0])
    assert torch.equal(conv(X, EDGES), conv(X, EDGES))
    conv.reset_parameters()
    assert torch.equal(conv.train()(X, EDGES), first)


def test_state_goes_through_files_and_copies() -> None:
    net = qgnn.SMPNet(24, 8, 5, seed=3)
    for _ in range(3):
        net.train()(DATA.x, EDGES)
        net.eval()(DATA.x, EDGES)
    wanted = net.eval()(DATA.x, EDGES)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    read = torch.load(file, weights_only=True)
    assert all(isinstance(value, Tensor) for value in read.values())
    other = qgnn.SMPNet(24, 8, 5, seed=4)
    other.load_state_dict(read)
    for one in (other, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(one.eval()(DATA.x, EDGES), wanted)
        assert one.pack().to_bytes() == net.pack().to_bytes()
    pair = net, copy.deepcopy(net)
    first, second = ([one.train()(DATA.x, EDGES).detach() for one in pair] for _ in range(2))
    assert torch.equal(*first)
    assert torch.equal(*second)
    assert not torch.equal(first[0], second[0])  # another epoch, other masks
    with pytest.raises(qgnn.InputError, match="load the state_dict of a module with the same layers"):
        qgnn.SMPConv(5).load_state_dict(qgnn.SMPConv(4).state_dict())


@pytest.mark.parametrize(("bits", "norm"), [(1, "l2"), (2, "auto"), (2, "none"), (4, "none"), (8, "l2"), (32, "none")])
def test_packed_model_is_the_module_in_evaluation(bits: int, norm: str) -> None:
    net = qgnn.SMPNet(24, 8, 5, bits=bits, seed=1, overrides=[f"model.feature_norm={norm}"])
    optimizer = torch.optim.Adam(net.parameter_groups(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net.train()(DATA.x, EDGES)[DATA.y >= 0], DATA.y[DATA.y >= 0]).backward()
        optimizer.step()
        scores = net.eval()(DATA.x, EDGES)
    packed = qgnn.PackedModel.from_bytes(net.pack(class_names=list("abcde")).to_bytes())
    assert packed.info.class_names == list("abcde")
    found = packed.predict(DATA)
    np.testing.assert_array_equal(found.scores, scores.numpy())
    np.testing.assert_array_equal(found.classes, scores.argmax(1).numpy())
    assert len(np.unique(found.classes)) > 1
    other = as_pyg(small_graph(200, seed=5))
    plain = packed.predict(other).scores
    other.x *= 64  # of another scale: codes of features and states shift with it
    np.testing.assert_array_equal(packed.predict(other).scores, net.eval()(other.x, other.edge_index).numpy())
    if bits < 32:
        np.testing.assert_array_equal(packed.predict(other).scores, plain)


def test_an_evaluation_after_many_epochs_follows_its_own_input() -> None:
    """Trained with dropout and never evaluated, or long ago: grids must not be those of other values."""
    often, late = (qgnn.SMPNet(24, 8, 5, seed=1) for _ in range(2))
    for epoch in range(40):
        for net in (often, late):
            net.train()(DATA.x * (1.0 if net is often or epoch else 4.0), EDGES)
            if net is often or epoch == 0:
                net.eval()(DATA.x * (1.0 if net is often else 4.0), EDGES)
    figures = [net.conv.figures for net in (often, late)]
    assert figures[1].stale
    late.eval()(DATA.x, EDGES)
    scores = [net.eval()(DATA.x, EDGES) for net in (often, late)]
    assert not figures[1].stale
    np.testing.assert_allclose([figures[1].frozen[name].rms for name in figures[1].names],
                               [figures[0].frozen[name].rms for name in figures[0].names], rtol=0.2)
    assert float((scores[1] - scores[0]).norm() / scores[0].norm()) < 0.1
    np.testing.assert_array_equal(late.pack().predict(DATA).scores, scores[1].numpy())


def test_gradients_add_up_and_other_calls_do_not_disturb_them() -> None:
    net, single = qgnn.SMPNet(24, 8, 5, seed=1), qgnn.SMPNet(24, 8, 5, seed=1)
    weights = torch.randn(300, 5)
    outs = [net(DATA.x, EDGES), net(DATA.x, EDGES)]
    net.eval()(DATA.x, EDGES)
    (sum(out for out in outs) * weights).sum().backward()
    for _ in range(2):
        (single(DATA.x, EDGES) * weights).sum().backward()
    for (name, a), b in zip(net.named_parameters(), single.parameters()):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-6, msg=name)
    assert net.perceptron.weight1.grad is not None
    with pytest.raises(RuntimeError, match=r"was used by a backward before|second time"):
        outs[0].sum().backward()


def test_a_graph_is_read_once_until_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    real = nn_graph.neighbourhood_of
    monkeypatch.setattr(nn_graph, "neighbourhood_of", lambda graph: reads.append(1) or real(graph))
    conv, edges = qgnn.SMPConv(3), EDGES.clone()
    for _ in range(3):
        conv(X, edges)
    assert len(reads) == 1
    before = conv.eval()(X, edges)
    edges[:, :20] = edges[:, 20:40]
    assert not torch.equal(conv(X, edges), before)
    assert len(reads) == 2
    conv(X, edges.clone())
    assert len(reads) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_come_back_as_they_went(dtype: torch.dtype) -> None:
    x = X.to(dtype).requires_grad_()
    out = qgnn.SMPConv(4)(x, EDGES)
    assert out.dtype == dtype
    assert torch.equal(out, qgnn.SMPConv(4)(x.float(), EDGES).to(dtype))
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("words", [(), APPNP, ("propagation.rounds=two",), ("quant.gradients=4",), ("quant.bits=32",),
                                   ("messages.coding=direct", "quant.residual=32")], ids=" ".join)
def test_torch_operations_do_the_same(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of other devices, here with torch on the CPU: coded states to the bit, gradients to law 1."""
    host, device = (qgnn.SMPConv(5, seed=1, overrides=("propagation.alpha=1e-3", *words)) for _ in range(2))
    real = smp_conv.SMPConv._layers

    def layers(self: Any, graph: Any, state: Tensor) -> Any:
        if self is not device:
            return real(self, graph, state)
        exchange = smp_conv.open_device_exchange([], graph.num_local, 0, 0, None, 0, 1.0, state.device)
        return smp_conv.DeviceLayers(self.config, DeviceGraph.of(graph, state.device), exchange)

    monkeypatch.setattr(smp_conv.SMPConv, "_layers", layers)
    weights = torch.randn(300, 5)
    for mode in (True, True, False):
        states = [X.clone().requires_grad_() for _ in range(2)]
        outs = [conv.train(mode)(state, EDGES) for conv, state in zip((host, device), states)]
        for out in outs:
            (out * weights).sum().backward()
        exact = "quant.bits=32" not in words
        torch.testing.assert_close(outs[1], outs[0], rtol=0 if exact else 1e-4, atol=0 if exact else 1e-6)
        if "quant.gradients=4" not in words:
            torch.testing.assert_close(states[1].grad, states[0].grad, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(device.multipliers, host.multipliers, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this host")
def test_on_a_gpu_codes_are_the_cpus() -> None:
    host, device = qgnn.SMPConv(5, seed=1), qgnn.SMPConv(5, seed=1)
    out = device(X.cuda(), EDGES.cuda())
    assert out.is_cuda
    assert torch.equal(out.cpu(), host(X, EDGES))
    with pytest.raises(qgnn.InputError, match="runs on the CPU only"):
        qgnn.SMPConv(5, method="qlr")(X.cuda(), EDGES)


@pytest.mark.parametrize(("wrong", "message"), [
    (lambda: qgnn.SMPConv(bits=3), "quant.bits=3: expected one of 1, 2, 4, 8, 32"),
    (lambda: qgnn.SMPConv(overrides=["propagation.alhpa=1"]), "did you mean propagation.alpha"),
    (lambda: qgnn.SMPConv(overrides=["propagation.kind=elastic"]), "expected smp or appnp"),
    (lambda: qgnn.SMPConv(eta=0.2), "diverges on every graph"),
    (lambda: qgnn.SMPNet(24, 8, 5, overrides=["quant.method=qlr"]), "expected recipe, lsq or minmax"),
    (lambda: qgnn.SMPConv()(X.long(), EDGES), r"x is torch.int64 \(300, 5\)"),
    (lambda: qgnn.SMPConv()(X[:9], EDGES), "adjacency names node"),
    (lambda: qgnn.SMPConv()(X[:0], EDGES), "at least one of each"),
    (lambda: qgnn.SMPConv()(X * float("nan"), EDGES), "holds NaN or infinity"),
    (lambda: qgnn.SMPConv(method="qlr")(X * float("inf"), EDGES), "holds NaN or infinity"),
    (lambda: qgnn.SMPNet(0, 8, 5), "0 features and 5 classes"),
    (lambda: qgnn.SMPNet(24, 8, 5).double()(DATA.x, EDGES), "its parameters are torch.float64"),
    (lambda: qgnn.SMPNet(24, 8, 5)([1, 2], EDGES), "x is list"),
    (lambda: qgnn.SMPConv()(X, EDGES.T), "transpose it"),
    (lambda: qgnn.SMPConv()(X, "edges"), "adjacency is str"),
    (lambda: qgnn.SMPConv()(X, torch.sparse_coo_tensor(EDGES, torch.rand(EDGES.shape[1]), (300, 300))), "edge weights"),
    (lambda: qgnn.SMPConv()(X, torch.sparse_coo_tensor(EDGES, torch.ones(EDGES.shape[1]), (310, 310))), "310 nodes"),
    (lambda: qgnn.SMPNet(9, 8, 5)(DATA.x, EDGES), "x has 24 features, expected 9"),
    (lambda: qgnn.SMPNet(24, 8, 5).pack(), "no forward has set the ranges yet"),
    (lambda: qgnn.SMPNet(24, 8, 5)(DATA.x.to("meta"), EDGES), "x is on meta")])
def test_what_is_wrong_is_said_in_one_line(wrong: Any, message: str) -> None:
    with pytest.raises(qgnn.InputError, match=message) as caught:
        wrong()
    assert "\n" not in str(caught.value)
