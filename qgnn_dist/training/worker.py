# SPDX-License-Identifier: Apache-2.0
"""One worker of a training run: the state of one part's rows, and the same network as every other worker.

All workers are called with the same method at the same time (comm.pool.WorkerPool); within an epoch they meet in the
rounds of messages and in one all-reduce of the weights' gradients. Legend: n local rows, C classes.
"""
from __future__ import annotations

import dataclasses
import logging
import os
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import kernels
from ..comm import faults
from ..comm.device import choose_device
from ..comm.exchange import Exchange
from ..comm.pool import TimedClient
from ..comm.trace import Span, Trace
from ..config import RunConfig
from ..data.graph import SPLITS
from ..device.training import DeviceTraining
from ..errors import InputError, StoreError
from ..inference.examine import Examined, examine
from ..memory import MemoryWatch
from ..model.features import FeatureScheme, feature_level, feature_statistics, read_block, reads_dense
from ..model.forward import PackedForward
from ..model.packed import PackedModel
from ..model.perceptron import DropoutKey, FeatureMatrix, Perceptron
from ..model.row_blocks import RowBlocks
from ..planning.admission import room
from ..propagation.messages import GradientCoding, value_moments
from ..propagation.multiplier import MultiplierRule
from ..propagation.neighbourhood import Neighbourhood
from ..propagation.smp import FrozenMultipliers, LiveMultipliers, Multipliers
from ..quant.clipped import Clipped
from ..quant.grids import AFFINE_METHODS
from ..quant.ranges import EVALUATION, Range, evaluation_ranges, residual_step
from ..store.reader import Store
from .affine import AffineTraining
from .finished import FinishedEpoch
from .frozen import About, frozen_model, step_of_hidden, steps_of_rounds
from .layers import HostLayers
from .metrics import evaluation, loss_gradient
from .state import checkpointed, load_tensors, reduce_gradients, tensors_of

if TYPE_CHECKING:
    from ..comm.pool import WorkerContext

__all__ = ["TrainWorker"]

_LOG = logging.getLogger(__name__)
CALIBRATION_EPOCH = 0
"""Training epochs count from 1; the float forward that sets the first ranges is epoch 0."""


class TrainWorker:
    """Owns part `context.rank` of a store.

    Args:
        store: path of the store, through this host's own mount, or its URI.
        config: resolved settings, the same on every worker.
    """

    def __init__(self, context: WorkerContext, *, store: str, config: RunConfig) -> None:
        self._context, self._config = context, config
        self._server = TimedClient(context.server) if context.server is not None else None
        self._store_path = store
        self._ranges: dict[str, Range] = {}
        self._multipliers: list[float] = []
        self._evaluated: PackedModel | None = None
        self._best: PackedModel | None = None
        self._memory = MemoryWatch()
        self._epoch = CALIBRATION_EPOCH

    def room(self) -> dict[str, Any]:
        """See planning.admission.room; called before `load`."""
        return room(self._context.host)

    def load(self, fingerprint: str) -> dict[str, Any]:
        """Open the part through this host's mount.

        Returns: host, rows, edges, statistics of its training rows' features, and nodes per split.
        Raises: StoreError where this host sees another graph under the path.
        """
        context = self._context
        self._place = choose_device(context.device, context.rank, context.host) if context.device else None
        self._store = Store.open(self._store_path, self._config.storage)
        if self._store.fingerprint != fingerprint:
            raise StoreError(f"this host sees graph {self._store.fingerprint[:12]}, the controller {fingerprint[:12]}; "
                             "the path must be shared by all hosts", host=context.host, rank=context.rank,
                             file=self._store_path)
        part = self._part = self._store.part(context.rank)
        self._graph = Neighbourhood.of(part)
        assert part.labels is not None
        assert part.split is not None
        labelled = part.labels >= 0
        self._split_rows = {name: np.flatnonzero((part.split == number) & labelled) for name, number in SPLITS.items()}
        self._labels = part.labels.astype(np.int64)
        _LOG.info("opened part %d of %s: %d rows, %d edges", context.rank, self._store_path, part.num_local,
                  len(part.indices))
        return {"rows": part.num_local, "edges": len(part.indices), "host": context.host,
                "statistics": feature_statistics(part, self._split_rows["train"]),
                "nodes": {name: len(rows) for name, rows in self._split_rows.items()}}

    def setup(self, norm: str, signed: bool, num_train: int) -> None:
        """Code the features and build the network, its optimiser and the exchange."""
        config, part = self._config, self._part
        self._num_train = num_train
        self._scheme = FeatureScheme(norm, signed, int(config.quant.features or 32))
        as_dense = reads_dense(part, self._scheme) and config.quant.method not in AFFINE_METHODS
        self._block = read_block(part, self._scheme, 0, part.num_local, as_dense=as_dense)
        self._feature_level = -1
        if norm == "none" and self._scheme.bits < 32:
            self._feature_level = feature_level(part, self._context.group)
        self._matrix = FeatureMatrix(self._block)
        self._network = Perceptron(config, self._store.num_features, self._store.num_classes)
        self._optimizer = torch.optim.Adam(
            self._network.parameter_groups(config.train.decay(norm)), lr=config.train.lr)
        self._finished = FinishedEpoch(self._network, self._optimizer)
        self._blocks = RowBlocks(self._network, self._matrix)
        self._exchange = Exchange(part.peers, part.num_local, part.num_halo, self._context.group,
                                  self._context.run_id, config.timeouts.exchange_s)
        self._exchange.on_round = self._look
        self._device: DeviceTraining | None = None
        if self._place is not None:
            self._device = DeviceTraining(self._place, self._context, config, self._network, self._block, part,
                                          self._graph)
        self._affine: AffineTraining | None = None
        if self._network.ranges is not None:
            self._affine = AffineTraining(config, self._network.ranges, self._graph, self._exchange,
                                          self._context.group, source_index=part.source_index,
                                          num_nodes=self._store.num_nodes)
        else:  # nothing large is left to torch, whose threads would wait for work where the kernels' should run
            torch.set_num_threads(1)
        self._layers = HostLayers(config, self._graph, self._exchange, self._affine)

    def calibrate(self) -> dict[str, int]:
        """One forward with float messages and hidden values sets the first ranges; returns the bytes it sent."""
        before = self._wire()
        key = self._dropout(CALIBRATION_EPOCH)
        if self._affine is not None:
            with torch.no_grad():
                state, hidden = (t.numpy() for t in self._network(self._matrix, key, None))
            values = {**self._layers.values(state), "hidden": hidden}
            self._follow(CALIBRATION_EPOCH, self._affine.moments(values))
            self._affine.start(values, self._ranges)
            return self._sent_since(before)
        if self._device is not None:
            self._follow(CALIBRATION_EPOCH, self._device.calibrate(key))
        else:
            state, figures = self._blocks.forward(key, None)
            self._follow(CALIBRATION_EPOCH, {
                **self._layers.moments(state), "residual": value_moments(state), "hidden": figures})
        if self._config.quant.method == "lsq":
            levels = 2 ** int(self._config.quant.hidden or 32) - 1
            with torch.no_grad():
                self._network.hidden_step.fill_(2 * self._ranges["hidden"].mean / levels**0.5 + 1e-8)
        return self._sent_since(before)

    def train_epoch(self, epoch: int, evaluate: bool, count_clipped: bool = False) -> dict[str, Any]:
        """One step of full-graph training, and an evaluation where asked, with counts of clipped values where asked.

        Returns: this worker's share of the loss, and on evaluation its confusion matrices (and scores for roc_auc);
        seconds and bytes sent; `wait_s`, the seconds of `train_s` in which it waited, by what for; what the
        multipliers did; `memory`, see MemoryWatch.now; `leaving`, whether this host is about to end it.
        """
        self._epoch = self._context.standing.epoch = epoch
        self._context.standing.step("perceptron, forward")
        self._finished.begin(epoch, self._multipliers, self._ranges, self._best)
        start, before, waited = time.perf_counter(), self._wire(), self._waits()
        with np.errstate(over="ignore", invalid="ignore"):  # the loss and the gradients are looked at, by name
            loss, report = self._step(epoch)
        result: dict[str, Any] = {"loss": loss, "train_s": time.perf_counter() - start, **report}
        result["wait_s"] = {what: seconds - waited[what] for what, seconds in self._waits().items()}
        if evaluate:
            start = time.perf_counter()
            result["evaluation"] = self._evaluate(epoch, count_clipped)
            result["evaluation_s"] = time.perf_counter() - start
        return {**result, "wire_bytes": self._sent_since(before), "memory": self._memory.now(),
                "leaving": self._context.standing.leaving}

    def keep_best(self) -> None:
        """The model evaluated last is the best one so far."""
        self._best = self._evaluated

    def examine(self) -> Examined:
        """The best model once more on all rows, traced; every worker must be called together."""
        assert self._best is not None
        self._context.standing.step("the best model's last forward")
        before, self._exchange.trace = self._wire(), Trace()
        try:
            forward = PackedForward(self._graph, self._exchange, self._context.group, "evaluation")
            scores = forward.run(self._best, self._block.rows)
            spans = self._exchange.trace.spans
        finally:
            self._exchange.trace = None
        found = examine(self._part, scores, self._store.num_classes, self._context.size)
        return dataclasses.replace(found, spans=spans, wire=self._sent_since(before))

    def state(self) -> dict[str, np.ndarray]:
        """Everything of this worker that a checkpoint needs; equal on all workers at an epoch's end."""
        return checkpointed(tensors_of(self._network, self._optimizer), self._multipliers, self._best)

    def finished_state(self, epoch: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """See training.finished.FinishedEpoch.state; another thread may call it."""
        return self._finished.state(epoch)

    def load_state(self, tensors: dict[str, np.ndarray], ranges: dict[str, dict[str, float]],
                   best: PackedModel | None) -> None:
        """Go on from `state()` of an earlier process and the server's running ranges; InputError for other tensors."""
        load_tensors(tensors, self._network, self._optimizer)
        self._multipliers = [float(v) for v in tensors["multipliers"]]
        self._ranges = {name: Range(**values) for name, values in ranges.items()}
        self._best = best
        try:
            self._frozen_model()  # asks for all figures that epochs ask for
        except KeyError as error:
            raise InputError(f"checkpoint: the running figures of {error} are missing; it is damaged, or another "
                             "program's: start again with --overwrite") from None

    def best_model(self) -> bytes | None:
        """The best model so far as the bytes of a packed model file."""
        return self._best.to_bytes() if self._best is not None else None

    def gradients(self) -> dict[str, np.ndarray]:
        """The all-reduced gradients of the last step, by parameter name."""
        return {name: p.grad.numpy().copy() for name, p in self._network.named_parameters() if p.grad is not None}

    def training_scores(self) -> dict[str, np.ndarray]:
        """Scores of the training forward's float arithmetic, without dropout, at the frozen ranges; for comparison."""
        ranges = self._packed_ranges()
        key = dataclasses.replace(self._dropout(CALIBRATION_EPOCH), share=0.0)
        if self._device is not None:
            h0 = self._device.forward(key, step_of_hidden(self._config, self._network, ranges))[0]
            scores, _ = self._device_layers(self._device, h0, FrozenMultipliers(self._multipliers), ranges, False)
            return {"source_index": np.asarray(self._part.source_index), "scores": scores.cpu().numpy()}
        if self._affine is not None:
            with torch.no_grad():
                state = self._network(self._matrix, key, self._affine.hidden(ranges, None))[0].numpy()
        else:
            state, _ = self._blocks.forward(key, step_of_hidden(self._config, self._network, ranges))
        out, _ = self._layers.forward(state, FrozenMultipliers(self._multipliers), ranges, record=False)
        return {"source_index": np.asarray(self._part.source_index), "scores": out}

    def packed_scores(self) -> dict[str, np.ndarray]:
        """Scores of the packed model as it is now, as evaluation and prediction compute them."""
        forward = PackedForward(self._graph, self._exchange, self._context.group, "evaluation")
        return {"source_index": np.asarray(self._part.source_index),
                "scores": forward.run(self._frozen_model(), self._block.rows)}

    def trace(self, on: bool) -> list[Span]:
        """Collect where rounds spend their time from now on, or no longer; returns what was collected before."""
        before, self._exchange.trace = self._exchange.trace, Trace() if on else None
        return before.spans if before is not None else []

    def memory(self) -> dict[str, Any]:
        """Peak memory of this worker's process, and of its device where that is a GPU; the device's name."""
        if self._device is None:
            return {**self._memory.peaks(), "device": "cpu"}
        return {**self._memory.peaks(), **self._device.memory(), "device": self._device.name}

    def close(self) -> None:
        """Stop the memory watch."""
        self._memory.close()

    def _look(self, direction: str, layer: int, round: int) -> None:
        """It came to a round, where tests place faults."""
        self._context.standing.round(direction, layer, round)
        if faults.ENVIRONMENT in os.environ:
            fault = faults.Fault.of(os.environ[faults.ENVIRONMENT])
            fault.look(self._context.rank, self._epoch, direction, layer, round)

    def _device_step(self, device: DeviceTraining, epoch: int) -> tuple[float, dict[str, Any]]:
        """`_step` of rows that lie on a device."""
        self._optimizer.zero_grad()
        step = step_of_hidden(self._config, self._network, self._ranges)
        state, figures, residual = device.forward(self._dropout(epoch), step)
        multipliers = self._live_multipliers(epoch, residual[0])
        out, moments = self._device_layers(device, state, multipliers, self._ranges, True)
        if self._config.quant.residual != 32:
            moments = {**moments, "residual": residual}
        if isinstance(multipliers, LiveMultipliers):
            self._multipliers = multipliers.values
        rows = self._split_rows["train"]
        loss, grad = device.loss(out, rows, self._labels[rows], self._num_train)
        device.backward(grad, self._multipliers, self._gradient_coding(epoch))
        self._update()
        return loss, self._follow(epoch, {**moments, "hidden": figures})

    def _update(self) -> None:
        """Sum the gradients over all workers and take the optimiser's step."""
        self._context.standing.step("sum of the gradients")
        reduce_gradients(self._network, self._context.group, self._epoch)
        if self._context.group is not None:
            self._finished.before_step()
        self._optimizer.step()

    def _device_layers(self, device: DeviceTraining, state: torch.Tensor, multipliers: Multipliers,
                       ranges: dict[str, Range], record: bool) -> tuple[torch.Tensor, dict[str, list[float]]]:
        """HostLayers.forward, of rows that lie on a device."""
        quant, step = self._config.quant, 1.0
        if quant.residual != 32:
            step = residual_step(ranges["residual"], int(quant.residual or 32), quant.method)
        steps = [] if quant.messages == 32 else steps_of_rounds(self._config, ranges)
        return device.propagate(state, multipliers, steps=steps, residual_step=step, record=record)

    def _step(self, epoch: int) -> tuple[float, dict[str, Any]]:
        if self._device is not None:
            return self._device_step(self._device, epoch)
        key, affine = self._dropout(epoch), self._affine
        self._optimizer.zero_grad()
        protected = affine.protected(epoch) if affine is not None else None
        if affine is not None:
            h0, hidden = self._network(self._matrix, key, affine.hidden(self._ranges, protected))
            state = np.ascontiguousarray(h0.detach().numpy())
            figures = affine.moments({"hidden": hidden.numpy()})["hidden"]
        else:
            state, figures = self._blocks.forward(key, step_of_hidden(self._config, self._network, self._ranges))
        residual = value_moments(state)
        multipliers = self._live_multipliers(epoch, residual[0])
        out, moments = self._layers.forward(state, multipliers, self._ranges, record=True, protected=protected)
        if affine is None and self._config.quant.residual != 32:
            moments["residual"] = residual
        del state
        if isinstance(multipliers, LiveMultipliers):
            self._multipliers = multipliers.values
        rows = self._split_rows["train"]
        loss, grad = loss_gradient(out, rows, self._labels[rows], self._num_train)
        del out
        grad, factors = self._layers.backward(grad, self._multipliers, self._ranges, self._gradient_coding(epoch))
        if affine is not None and factors is not None:
            affine.add_gradients(factors)
            h0.backward(torch.from_numpy(grad))
        else:
            self._blocks.backward(grad)
        self._update()
        return loss, self._follow(epoch, {**moments, "hidden": figures})

    def _evaluate(self, epoch: int, count_clipped: bool) -> dict[str, Any]:
        """Run the packed model itself, as prediction will, and compare with the labels."""
        config = self._config
        model = self._frozen_model()
        clipped = Clipped(self._part.source_index, self._store.num_nodes) if count_clipped else None
        forward = PackedForward(self._graph, self._exchange, self._context.group, "evaluation",
                                record=config.quant.method == "recipe", clipped=clipped)
        scores = forward.run(model, self._block.rows)
        if forward.moments:
            self._follow(epoch, {EVALUATION + name: moments for name, moments in forward.moments.items()})
        self._evaluated = dataclasses.replace(
            model, info=dataclasses.replace(model.info, level=forward.level))
        classes = np.empty(len(scores), np.int32)
        kernels.softmax(scores, classes, np.empty(len(scores), np.float32), None)
        result = evaluation(scores, classes, self._labels, self._split_rows, self._store.num_classes,
                            config.train.metric)
        if clipped is None:
            return result
        if self._context.rank == 0:  # all have the same weights
            for weight, grid in self._network.weight_grids():
                clipped.add("weights", weight, grid)
        return {**result, "clipped": clipped.counts}

    def _frozen_model(self) -> PackedModel:
        """The network as it is now, frozen with the ranges so far and the last training forward's multipliers."""
        store, ranges = self._store, self._packed_ranges()
        about = About(self._scheme, self._feature_level, store.class_names, store.name, store.fingerprint)
        return frozen_model(self._config, self._network, ranges, self._multipliers, about,
                            self._affine.grids(ranges) if self._affine is not None else None)

    def _packed_ranges(self) -> dict[str, Range]:
        """What a packed model's grids follow: evaluations in the recipe, training in the methods it is compared to."""
        return evaluation_ranges(self._ranges)

    def _dropout(self, epoch: int) -> DropoutKey:
        return DropoutKey(self._config.seed, epoch, np.ascontiguousarray(self._part.source_index),
                          self._config.model.dropout)

    def _gradient_coding(self, epoch: int) -> GradientCoding | None:
        bits = int(self._config.quant.gradients or 32)
        if bits == 32:
            return None
        return GradientCoding(bits, self._config.seed, epoch, np.ascontiguousarray(self._part.source_index, np.int64))

    def _live_multipliers(self, epoch: int, energy: float) -> Multipliers:
        """The server's multipliers for smp; none at all for the other kinds. energy: ‖H⁰‖² of the local rows."""
        if self._config.propagation.kind != "smp":
            return FrozenMultipliers([])
        rule = MultiplierRule.of(self._config, self._store.num_edges)
        assert self._server is not None
        return LiveMultipliers(self._server, epoch, rule.start()[0], energy, self._config.timeouts.server_s)

    def _follow(self, epoch: int, moments: dict[str, list[float]]) -> dict[str, Any]:
        """Post this epoch's moments, take the running ranges for the next one."""
        assert self._server is not None
        self._context.standing.step("the multiplier server's ranges")
        reply = self._server.post_ranges(epoch, moments).result(self._config.timeouts.server_s)
        self._ranges = {name: Range(*figures) for name, figures in reply["ranges"].items()}
        return {key: reply[key] for key in ("multipliers", "residuals", "clamps")}

    def _waits(self) -> dict[str, float]:
        """Seconds so far in which this worker waited for its peers' messages, in all-reduces and for the server."""
        group, server = self._context.group, self._server
        return {"exchange": self._exchange.wait_s, "reduce": group.reduce_s if group is not None else 0.0,
                "server": server.wait_s if server is not None else 0.0}

    def _wire(self) -> dict[str, int]:
        group = self._context.group
        return dataclasses.asdict(group.counters) if group is not None else {}

    def _sent_since(self, before: dict[str, int]) -> dict[str, int]:
        return {kind: count - before[kind] for kind, count in self._wire().items()}
