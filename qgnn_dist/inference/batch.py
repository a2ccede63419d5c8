# SPDX-License-Identifier: Apache-2.0
"""The controller of a batch prediction: every node of a store, complete or not there at all."""
from __future__ import annotations

import contextlib
import functools
import json
import operator
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..comm.pool import WorkerPool
from ..comm.standing import Deadline
from ..comm.trace import Span, chrome_trace, overlap
from ..config import StorageConfig, TimeoutsConfig
from ..errors import EXISTS, InputError, ModelError, QgnnError
from ..model.packed import PackedModel
from ..planning.admission import check_prediction
from ..propagation.elastic import refuse_parts
from ..storage.place import uri_of
from ..store.reader import Store
from .groups import describe
from .output import Predictions
from .remote_output import RemotePredictions

__all__ = ["check_output", "check_predictable", "run_prediction"]

SUMMARY_VERSION = 1
PREDICT_TIMEOUT_S = 24 * 3600.0
"""The batch as a whole; the waits inside it have their own, shorter deadlines."""
FINISH_S = 60.0
"""How long parts that are being written are waited for once a worker is lost."""


def check_predictable(store: Store, model: PackedModel, model_file: str) -> None:
    """Refuse a model that does not fit the store, before anything starts."""
    if store.num_features == 0:
        raise InputError("the store has no features; prediction needs them", file=str(store.path))
    if store.num_features != model.info.num_features:
        raise ModelError(f"the model takes {model.info.num_features} features, the store {store.path} has "
                         f"{store.num_features}; export a model trained on such features, or partition with the --hops"
                         " of its store", file=model_file)
    if model.info.kind == "elastic":
        refuse_parts(store.num_parts, str(store.path))


def check_output(out: str | Path, overwrite: bool) -> Path:
    """The output folder's path; InputError where it exists and may not be replaced."""
    path = Path(out)
    if path.exists() and not overwrite:
        raise InputError(EXISTS, file=str(path))
    if path.exists() and not (path.is_dir() and (path / "summary.json").exists()):
        raise InputError("output exists and is not a folder of predictions; choose another --out", file=str(path))
    return path


def run_prediction(pool: WorkerPool, store: Store, model: PackedModel, out: str | Path, *, scores: bool,
                   timeouts: TimeoutsConfig, storage: StorageConfig | None = None, trace: bool = False,
                   check_memory: bool = True) -> dict[str, Any]:
    """Predict all nodes on the pool's workers (one PredictWorker a part) and put the folder in place.

    What an earlier call with the same store, model and columns has finished is kept. Every worker is needed for the
    scores of any, so that all compute them again where a part is missing; only missing parts are written.

    Args:
        out: an absolute path, or a URI. storage: settings of object stores.
        trace: also write OUT/trace.json, where each layer's time goes on every rank (comm.trace.chrome_trace).
        check_memory: refuse what the hosts cannot hold (InputError), before anything is allocated.
    Returns: the summary, as written to OUT/summary.json; with `trace`, it has `overlap` by rank.
    Raises: HostLeavingError: a worker was told to go before its scores were there. DeadlineError: one that writes has
        not come further for `timeouts.write_s`. Finished parts are kept.
    """
    started, storage = time.perf_counter(), storage or StorageConfig()
    with _output(out, store, model, scores, storage) as output:
        kept, spans = output.kept, list[list[Span]]()
        results: list[dict[str, Any] | None] = [None] * store.num_parts
        if trace or not output.complete:
            if check_memory:
                check_prediction(pool, store, model.info, scores=scores, timeout_s=timeouts.start_s)
            pool.call("load", store.fingerprint, model.to_bytes(),
                      timeout_s=timeouts.start_s + store.opening_s(storage))
            spans = pool.call("predict", trace, timeout_s=PREDICT_TIMEOUT_S)
            results = _write(pool, output, scores, timeouts)
        found = [kept.get(part, one) for part, one in enumerate(results)]
        rows = sum(r["rows"] for r in found if r is not None)
        if rows != store.num_nodes:
            raise QgnnError(f"predicted {rows} rows, the store has {store.num_nodes} nodes")
        summary = _summary(store, model, [r for r in found if r is not None], time.perf_counter() - started)
        files = {}
        if trace:
            summary["overlap"] = [overlap(own) for own in spans]
            files["trace.json"] = json.dumps(chrome_trace(spans))
        output.commit({**files, "summary.json": json.dumps(summary, indent=2)})
    return summary


def _output(out: str | Path, store: Store, model: PackedModel, scores: bool,
            storage: StorageConfig) -> Predictions | RemotePredictions:
    uri = uri_of(out)
    if uri is not None:
        return RemotePredictions(uri, store, model, scores=scores, settings=storage)
    return Predictions(Path(out), store, model, scores=scores)


def _write(pool: WorkerPool, output: Predictions | RemotePredictions, scores: bool,
           timeouts: TimeoutsConfig) -> list[dict[str, Any] | None]:
    """All parts that are missing; where a worker is lost meanwhile, the others' are finished before that is told."""
    output.begin()
    try:
        return pool.call("write", str(output.folder), scores, sorted(output.kept), timeout_s=PREDICT_TIMEOUT_S,
                         step=Deadline(timeouts.write_s, "timeouts.write_s"))
    except QgnnError as error:
        until = time.monotonic() + FINISH_S
        for rank in range(pool.size):
            if rank == error.rank:
                continue  # it is lost, frozen, or has said what it could not do
            with contextlib.suppress(QgnnError):  # of a worker that is lost too, or cannot write either
                pool.call_one(rank, "written", timeout_s=max(0.0, until - time.monotonic()))
        raise


def _summary(store: Store, model: PackedModel, results: Sequence[dict[str, Any]], seconds: float) -> dict[str, Any]:
    counts = {name: functools.reduce(operator.add, (r["counts"][name] for r in results))
              for name in results[0]["counts"]}
    counts = {name: one for name, one in counts.items() if one.nodes}
    told = {name: describe(one) for name, one in counts.items()}
    return {
        "schema": SUMMARY_VERSION,
        "rows": store.num_nodes,
        "parts": store.num_parts,
        "accuracy": {name: one.right / one.nodes for name, one in counts.items()},
        "ece": {name: one["ece"] for name, one in told.items()},
        "accuracy_by_degree": {name: one["by_degree"] for name, one in told.items()},
        "accuracy_by_class": {name: one["by_class"] for name, one in told.items()},
        "reliability": {name: one["reliability"] for name, one in told.items()},
        "class_counts": [int(c) for c in sum(r["classes"] for r in results)],
        "seconds": {**{k: max(r["seconds"][k] for r in results) for k in results[0]["seconds"]}, "total": seconds},
        "model_bytes": len(model.to_bytes()),
        "message_bytes": sum(r["message_bytes"] for r in results),
        "peak_anon_bytes": [r["peak_anon_bytes"] for r in results],
        "peak_rss_bytes": [r["peak_rss_bytes"] for r in results],
        "bits": model.info.bits,
        "range_gain": results[0]["gain"],
        "feature_gain": results[0]["feature_gain"],
        "graph": store.name,
        "fingerprint": store.fingerprint,
        "model_fingerprint": model.info.fingerprint,
        "same_graph": store.fingerprint == model.info.fingerprint,
    }
