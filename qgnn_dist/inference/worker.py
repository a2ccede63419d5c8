# SPDX-License-Identifier: Apache-2.0
"""One worker of a batch prediction: scores its part's nodes with a packed model and writes them as Parquet.

No float sparse product and no torch matmul runs here: integer kernels, elementwise float32, and packed codes between
the workers (a model trained at 32 bits uses this project's own float kernels, in a fixed order).
"""
from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .. import kernels
from ..comm import faults
from ..comm.exchange import Exchange
from ..comm.trace import Span, Trace
from ..config import StorageConfig
from ..data.graph import SPLITS
from ..errors import HostLeavingError, QgnnError, StoreError
from ..memory import MemoryWatch
from ..model.features import FeatureScheme, refuse_negative
from ..model.forward import PackedForward, feature_gain, model_reader
from ..model.packed import PackedModel
from ..planning.admission import room
from ..planning.memory import WRITTEN_ROWS
from ..propagation.neighbourhood import Neighbourhood
from ..storage.local import shown_as, work_folder
from ..storage.place import uri_of
from ..store.columns import as_arrow, as_strings
from ..store.reader import Store
from .groups import Counts, count
from .output import keep_part, open_part
from .remote_output import put_part

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..comm.pool import WorkerContext

__all__ = ["PredictWorker"]


class PredictWorker:
    """Owns part `context.rank` of a store during one prediction.

    Args:
        store: path of the store, through this host's own mount, or its URI. exchange_s: deadline of a round of
            messages. storage: settings of object stores.
    """

    def __init__(self, context: WorkerContext, *, store: str, exchange_s: float,
                 storage: StorageConfig | None = None) -> None:
        self._context, self._store_path, self._exchange_s = context, store, exchange_s
        self._storage = storage or StorageConfig()
        self._memory = MemoryWatch()

    def room(self) -> dict[str, Any]:
        """See planning.admission.room; called before `load`."""
        return room(self._context.host)

    def load(self, fingerprint: str, model: bytes) -> None:
        """Open the part and the model.

        Raises:
            StoreError: this host sees another graph under the path.
            ModelError: the features don't fit the model's grid.
        """
        context, start = self._context, time.perf_counter()
        store = Store.open(self._store_path, self._storage)
        if store.fingerprint != fingerprint:
            raise StoreError(f"this host sees graph {store.fingerprint[:12]}, the controller {fingerprint[:12]}; "
                             "the path must be shared by all hosts", host=context.host, rank=context.rank,
                             file=self._store_path)
        self._part, self._store_classes = store.part(context.rank), store.num_classes
        self._model = PackedModel.from_bytes(model)
        info = self._model.info
        refuse_negative(self._part, FeatureScheme(info.feature_norm, info.feature_signed, info.bits["features"]),
                        self._store_path)
        self._graph = Neighbourhood.of(self._part)
        self._exchange = Exchange(self._part.peers, self._part.num_local, self._part.num_halo, context.group,
                                  context.run_id, self._exchange_s)
        self._exchange.on_round = self._look
        self._load_s = time.perf_counter() - start

    def predict(self, trace: bool = False) -> list[Span]:
        """Score all local nodes; every worker must call it together.

        Args: trace: measure where each layer's time goes; this is what is returned then.
        """
        self._forward = PackedForward(self._graph, self._exchange, self._context.group, "evaluation")
        self._exchange.trace = Trace() if trace else None
        start = time.perf_counter()
        self._gain = feature_gain(self._part, self._model, self._context.group)
        self._load_s += time.perf_counter() - start
        self._scores = self._forward.run(self._model, model_reader(self._part, self._model, self._gain))
        return self._exchange.trace.spans if self._exchange.trace is not None else []

    def write(self, folder: str, with_scores: bool, kept: Sequence[int] = ()) -> dict[str, Any] | None:
        """Write the scored nodes to `folder`/part-NNNNN.parquet, and keep it (inference.output.keep_part).

        Args:
            folder: a path, or a URI, whose part is written to this host's disk first.
            kept: parts that are finished; for such a one nothing is done.
        Returns: rows, Counts of the labelled nodes by split, class counts, seconds, bytes sent, peak memory.
        """
        context, scores = self._context, self._scores
        del self._scores
        if context.rank in kept:
            return None
        classes = np.empty(len(scores), np.int32)
        confidence = np.empty(len(scores), np.float32)
        kernels.softmax(scores, classes, confidence, None)
        uri = uri_of(folder)
        written = scores if with_scores else None
        if uri is None:
            return self._write_and_keep(Path(folder), None, written, classes, confidence)
        with work_folder(self._storage) as local, shown_as(local, uri):
            return self._write_and_keep(local, uri, written, classes, confidence)

    def _write_and_keep(self, folder: Path, uri: str | None, scores: np.ndarray | None, classes: np.ndarray,
                        confidence: np.ndarray) -> dict[str, Any]:
        """See `write`. Args: folder: of this host, which stands in for `uri` where there is one."""
        context, forward, start = self._context, self._forward, time.perf_counter()
        self._write(folder, scores, classes, confidence)
        seconds = {"load": self._load_s, **forward.seconds, "exchange": self._exchange.wait_s,
                   "write": time.perf_counter() - start}
        group = context.group
        result = {"rows": len(classes), "counts": self._counts(classes, confidence), "seconds": seconds,
                  "gain": forward.gain, "feature_gain": self._gain,
                  "classes": np.bincount(classes, minlength=self._model.info.num_classes),
                  "message_bytes": group.counters.evaluation if group is not None else 0, **self._memory.peaks()}
        if uri is not None:
            put_part(uri, self._storage, folder, context.rank, result)
        else:
            keep_part(folder, context.rank, result)
        self._look("written")
        return result

    def written(self) -> None:
        """Calls of a worker run one after the other: once this one returns, so has `write`."""

    def close(self) -> None:
        """Stop the memory watch."""
        self._memory.close()

    def _counts(self, classes: np.ndarray, confidence: np.ndarray) -> dict[str, Counts]:
        """By split, where labels and splits exist."""
        part = self._part
        if part.labels is None or part.split is None:
            return {}
        num_classes = max(self._model.info.num_classes, self._store_classes)  # another graph may have more
        return {name: count(classes, confidence, part.labels, part.degree, part.split == number, num_classes)
                for name, number in SPLITS.items()}

    def _write(self, folder: Path, scores: np.ndarray | None, classes: np.ndarray, confidence: np.ndarray) -> None:
        """Rows in the order of the source, a row group at a time: no column is copied as a whole."""
        order = np.argsort(self._part.source_index, kind="stable")
        names = self._model.info.class_names

        def group(begin: int) -> pa.Table:
            rows = order[begin:begin + WRITTEN_ROWS]
            columns: dict[str, pa.Array] = {
                "node_id": self._part.node_ids.take(as_arrow(rows)),
                "class": as_arrow(classes[rows]),
                "confidence": as_arrow(confidence[rows]),
            }
            if names is not None:
                columns["class_name"] = as_strings(names).take(columns["class"])
            if scores is not None:
                columns["scores"] = pa.FixedSizeListArray.from_arrays(as_arrow(scores[rows].ravel()), scores.shape[1])
            return pa.table(columns)

        size = len(order) * (16 + (0 if scores is None else 4 * scores.shape[1]))
        with open_part(folder, self._context.rank, size, self._context.run_id) as file:
            with pq.ParquetWriter(file, group(len(order)).schema) as writer:
                for number, begin in enumerate(range(0, len(order), WRITTEN_ROWS)):
                    self._look("write", number)
                    writer.write_table(group(begin))
            rows = pq.read_metadata(file).num_rows
            if rows != len(order):
                raise QgnnError(f"{rows} rows can be read back, expected {len(order)}; look at the disk",
                                file=str(folder))

    def _look(self, direction: str, layer: int = 0, round: int = 0) -> None:
        """Tell where this worker stands. Tests place faults there: rounds as of epoch 1; `write` and a row group;
        `written`.

        Raises: HostLeavingError: in a round of a worker that was told to go.
        """
        standing = self._context.standing
        standing.round(direction, layer, round)
        if faults.ENVIRONMENT in os.environ:
            fault = faults.Fault.of(os.environ[faults.ENVIRONMENT])
            fault.look(self._context.rank, 1, direction, layer, round)
        if direction == "evaluation" and standing.leaving:  # a part that is being written is finished first
            error = HostLeavingError("SIGTERM to the worker: stopped before it had its scores, to go on elsewhere",
                                     host=self._context.host, rank=self._context.rank)
            error.ranks = (self._context.rank,)
            raise error
