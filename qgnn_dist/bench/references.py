# SPDX-License-Identifier: Apache-2.0
"""References of a grid: what a reader knows, trained by the protocol of `qgnn train` on the same store.

The same features and normalisation, splits, Adam, decay on the first weights alone, dropout of input and hidden values,
and the same rule of the best epoch. Legend: n nodes, F features, H hidden, C classes.
"""
from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu
from torch_geometric.nn import APPNP, GCNConv
from torch_geometric.nn.conv.gcn_conv import gcn_norm
from torch_geometric.utils import spmm

from .. import kernels
from ..config import RunConfig
from ..errors import DivergedError, InputError
from ..inference.groups import groups
from ..propagation.neighbourhood import Neighbourhood
from ..store.reader import Store
from ..training.checkpoint import Progress
from ..training.loop import check_trainable, versions
from ..training.metrics import evaluation, figures, valid_loss
from .sign import Sign, mixed_features
from .stock import told_symmetric
from .task import Task, csr_tensor, dropped

__all__ = ["Reference", "reference", "train_reference"]


class _Gcn(GCNConv):
    """PyG's layer; its product knows that Â is symmetric, which gives the same gradient without a transpose."""

    def message_and_aggregate(self, adj_t: Tensor, x: Tensor) -> Tensor:
        return told_symmetric(lambda h: spmm(adj_t, h))(x)


class _Appnp(APPNP):
    """As _Gcn."""

    def message_and_aggregate(self, adj_t: Tensor, x: Tensor) -> Tensor:
        return told_symmetric(lambda h: spmm(adj_t, h))(x)


class Reference(nn.Module):
    """A network over all nodes of a task.

    Attributes: decayed: the weights that `train.weight_decay` is for: those that see the features first, biases left
        out, as our first weight matrix.
    """

    decayed: Sequence[Tensor]

    def forward(self) -> Tensor:
        """Scores (n, C), of what training needs of them: SIGN's are of the training rows alone while training."""
        raise NotImplementedError

    @torch.no_grad()
    def scores(self) -> Tensor:
        """Scores (n, C) of all nodes, without dropout."""
        self.eval()
        scores: Tensor = self()
        return scores

    def loss(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy of some rows, with dropout. Args: rows int64 (m,); labels int64 (m,)."""
        self.train()
        return cross_entropy(self()[rows], labels)


class PygGcn(Reference):
    """Dropout, GCNConv, relu, dropout, GCNConv."""

    def __init__(self, task: Task, config: RunConfig) -> None:
        super().__init__()
        self._x, self._edges, self._share = task.x, _normalised(task.graph), config.model.dropout
        self.first = _Gcn(task.x.shape[1], config.model.hidden, normalize=False)
        self.second = _Gcn(config.model.hidden, task.classes, normalize=False)
        self.decayed = [self.first.lin.weight]

    def forward(self) -> Tensor:
        x = dropped(self._x, self._share, self.training)
        h = dropped(relu(self.first(x, self._edges)), self._share, self.training)
        scores: Tensor = self.second(h, self._edges)
        return scores


class TorchMlp(Reference):
    """Dropout, a linear layer, relu, dropout, a linear layer."""

    def __init__(self, task: Task, config: RunConfig) -> None:
        super().__init__()
        self._x, self._share = task.x, config.model.dropout
        self.first = nn.Linear(task.x.shape[1], config.model.hidden)
        self.second = nn.Linear(config.model.hidden, task.classes)
        self.decayed = [self.first.weight]

    def forward(self) -> Tensor:
        # nn.Linear takes no sparse rows with a bias.
        before = dropped(self._x, self._share, self.training) @ self.first.weight.t() + self.first.bias
        scores: Tensor = self.second(dropped(relu(before), self._share, self.training))
        return scores


class PygAppnp(TorchMlp):
    """The perceptron, then PyG's APPNP of teleport 1/(1 + mu)."""

    def __init__(self, task: Task, config: RunConfig) -> None:
        super().__init__(task, config)
        self._edges, p = _normalised(task.graph), config.propagation
        self.spread = _Appnp(p.layers, 1 / (1 + p.mu), normalize=False)

    def forward(self) -> Tensor:
        scores: Tensor = self.spread(super().forward(), self._edges)
        return scores


class TorchSign(Reference):
    """SIGN on all training rows at once, with the others' dropout of its input too."""

    def __init__(self, task: Task, config: RunConfig) -> None:
        super().__init__()
        hops = config.propagation.layers
        self._x, self._share = mixed_features(task, hops), config.model.dropout
        self.net = Sign(task.x.shape[1], config.model.hidden, task.classes, hops, config.model.dropout,
                        batch_norm=False)
        self.decayed = [weight for name, weight in self.net.hops.named_parameters() if name.endswith("weight")]

    def scores(self) -> Tensor:
        return self.net.all_rows(self._x)

    def loss(self, rows: Tensor, labels: Tensor) -> Tensor:
        self.train()
        return cross_entropy(self.net([dropped(one[rows], self._share, True) for one in self._x]), labels)


_NETWORKS: dict[str, Callable[[Task, RunConfig], Reference]] = {
    "pyg-gcn": PygGcn, "pyg-appnp": PygAppnp, "torch-sign": TorchSign, "torch-mlp": TorchMlp}


def reference(system: str, task: Task, config: RunConfig) -> Reference:
    """The untrained network of a system of REFERENCES; the seed's start is the library's own."""
    torch.manual_seed(config.seed)
    return _NETWORKS[system](task, config)


def train_reference(store: Store, system: str, config: RunConfig, *,
                    on_epoch: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Train a reference on a store of one part, in this process and its number of threads.

    Args: on_epoch: called with each record: epoch, loss, and on evaluation accuracy and the chosen metric by split.
    Returns: what the summary of `qgnn train` has of accuracy, metric, epochs, seconds, features and versions, and
        `groups`, see inference.groups.groups.
    Raises: InputError: the store does not serve, or memory does not. DivergedError: the loss is no number.
    """
    check_trainable(store, config)
    start = time.perf_counter()
    task = Task(store, config.model.feature_norm)
    empty = [name for name, rows in task.rows.items() if len(rows) == 0]
    if empty:
        raise InputError(f"no labelled node in split {', '.join(empty)}", file=str(store.path))
    network, labels, rows = reference(system, task, config), task.y.numpy(), torch.from_numpy(task.rows["train"])
    decayed = {id(parameter) for parameter in network.decayed}
    groups: list[dict[str, Any]] = [
        {"params": list(network.decayed), "weight_decay": config.train.decay(task.norm)},
        {"params": [p for p in network.parameters() if id(p) not in decayed]}]
    optimizer = torch.optim.Adam(groups, lr=config.train.lr)
    progress, train, best = Progress(), config.train, np.zeros((len(labels), task.classes), np.float32)
    while progress.epoch < train.epochs and not progress.out_of_patience(train.patience):
        progress.epoch += 1
        optimizer.zero_grad()
        loss = network.loss(rows, task.y[rows])
        torch.autograd.backward(loss)
        optimizer.step()
        record: dict[str, Any] = {"epoch": progress.epoch, "loss": float(loss.detach())}
        if not math.isfinite(record["loss"]):
            raise DivergedError(f"the loss is {record['loss']} at epoch {progress.epoch}; lower train.lr")
        if progress.epoch % train.eval_every == 0 or progress.epoch == train.epochs:
            scores = np.ascontiguousarray(network.scores().numpy())
            counts = evaluation(scores, scores.argmax(1), labels, task.rows, task.classes, train.metric)
            accuracies, chosen = figures([counts], train.metric)
            if progress.offer(progress.epoch, accuracies, chosen, valid_loss([counts])):
                best = scores
            record |= {"accuracy": accuracies, train.metric: chosen}
        if on_epoch is not None:
            on_epoch(record)
    return {"accuracy": progress.best_accuracy, "metric": {"name": train.metric, **progress.best_metric},
            "best_epoch": progress.best_epoch, "epochs": progress.epoch, "seconds": time.perf_counter() - start,
            "bits": config.quant.stages(), "features": {"norm": task.norm, "signed": task.statistics.negative > 0},
            "multipliers": {"last": [], "clamped": 0}, "warnings": [],
            "groups": _groups(task, best), "graph": store.name,
            "fingerprint": store.fingerprint,
            "versions": {**versions(), "torch_geometric": metadata.version("torch-geometric")}}


def _groups(task: Task, scores: np.ndarray) -> dict[str, Any]:
    """What a cell tells of its test nodes."""
    classes, confidence = np.empty(len(scores), np.int32), np.empty(len(scores), np.float32)
    kernels.softmax(scores, classes, confidence, None)
    test, train = (np.isin(np.arange(len(scores)), task.rows[name]) for name in ("test", "train"))
    return groups(classes, confidence, task.y.numpy(), task.graph.degree, test, train)


def _normalised(graph: Neighbourhood) -> Tensor:
    """Â in CSR form, as PyG makes it: what its layers would do themselves, once for all of them."""
    n = graph.num_local
    plain = csr_tensor(torch.from_numpy(np.array(graph.indptr, np.int64)),
                       torch.from_numpy(graph.indices.astype(np.int64)), torch.ones(len(graph.indices)), (n, n))
    with warnings.catch_warnings():  # as csr_tensor
        warnings.simplefilter("ignore", UserWarning)
        normalised: Tensor = gcn_norm(plain, num_nodes=n)[0]
        return normalised
