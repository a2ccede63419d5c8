# SPDX-License-Identifier: Apache-2.0
"""The controller's loop: epochs, evaluation, early stopping, checkpoints, resuming, and the summary at the end.

It drives a WorkerPool and does not know whether its workers are Ray actors or live in this process.
"""
from __future__ import annotations

import dataclasses
import json
import logging
import math
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__, kernels
from ..comm.pool import WorkerPool
from ..comm.trace import chrome_trace
from ..config import RunConfig
from ..errors import (
    RUN_EXISTS,
    DeadlineError,
    DivergedError,
    ExchangeError,
    HostLeavingError,
    InputError,
    QgnnError,
    WorkerLostError,
)
from ..files.read import shown
from ..files.write import write_atomically
from ..inference.examine import together
from ..model.features import FeatureStatistics, choose_norm
from ..model.packed import PackedModel
from ..planning.admission import check_training
from ..propagation.elastic import refuse_parts
from ..quant.clipped import shares
from ..quant.grids import AFFINE_METHODS
from ..store.manifest import SOURCE_ORDER
from ..store.reader import Store
from .chance import doubt
from .checkpoint import Checkpoint, Progress
from .metrics import figures, valid_loss
from .observer import Observer
from .run_folder import CheckpointWriter, RunFolder
from .slow import SlowWorkers, WorkerShare
from .stop import StoppedError, StopSignals

__all__ = ["check_trainable", "device_can_train", "prepare_run", "run_training", "versions"]

_LOG = logging.getLogger(__name__)
SUMMARY_VERSION = 1
FINAL_VERSION = 1
SOURCES = {"features": "columns of numbers (npz, PyG: x)", "labels": "a column label (npz, PyG: y)",
           "splits": "a column split (npz: train_idx, valid_idx; PyG: train_mask, val_mask)"}
"""What sources call what training needs."""
WIRE_KINDS = ("forward", "backward", "evaluation", "control")
EPOCH_TIMEOUT_S = 24 * 3600.0
"""An epoch as a whole; the waits inside it have their own, shorter deadlines."""
COUNT_EVERY = 10
"""Evaluations of which one counts clipped values."""
KEEP_FINISHED_S = 5.0
"""For one of the workers that are left to hand over its state; longer, and what it saves is computed again by then."""

ServerCall = Callable[..., Any]
OnEpoch = Callable[[dict[str, Any]], None]


def check_trainable(store: Store, config: RunConfig) -> None:
    """Refuse a store that cannot be trained on, before anything starts.

    Raises:
        InputError: features, labels or splits are absent, the metric does not fit the classes, the method of
            quantisation or the kind of propagation does not train on several parts or on the device, or gradients are
            coded and rows too wide for that.
    """
    lacking = [what for what, there in (("features", store.num_features > 0), ("labels", store.has_labels),
                                        ("splits", store.has_split)) if not there]
    if lacking:
        raise InputError(f"the store has no {' and no '.join(lacking)}; training needs features, labels and splits: "
                         f"add {' and '.join(SOURCES[what] for what in lacking)} to the source and partition it again",
                         file=str(store.path))
    if config.train.metric == "roc_auc" and store.num_classes != 2:
        raise InputError(f"train.metric=roc_auc: expected 2 classes, the store has {store.num_classes}",
                         file=str(store.path))
    if config.propagation.kind == "elastic":
        refuse_parts(store.num_parts, str(store.path))
        if config.cluster.device == "cuda":
            raise InputError("cluster.device=cuda: propagation.kind=elastic trains on the CPU only; expected smp, "
                             "appnp or none, or set cluster.device=cpu")
    if config.cluster.device == "cuda" and not device_can_train(config):
        raise InputError(f"cluster.device=cuda: quant.method={config.quant.method} trains on the CPU only; expected "
                         "recipe, lsq or minmax, or set cluster.device=cpu")
    if config.quant.method == "degree_quant" and store.num_parts > 1:
        raise InputError(f"quant.method=degree_quant: trains on a store of one part, this one has {store.num_parts} "
                         "(its protected rows keep full precision, and a round has one width on the wire); partition "
                         "with --parts 1, the model then predicts on any number", file=str(store.path))
    if config.quant.gradients != 32 and store.num_classes > kernels.LAYER_COLUMNS:
        raise InputError(f"quant.gradients={config.quant.gradients}: the store has {store.num_classes} classes, "
                         f"expected at most {kernels.LAYER_COLUMNS}; --set quant.gradients=32 takes any number",
                         file=str(store.path))


def device_can_train(config: RunConfig) -> bool:
    """Whether these settings train elsewhere than on the host: only there are the paper's affine grids, and elastic."""
    return config.quant.method not in AFFINE_METHODS and config.propagation.kind != "elastic"


def prepare_run(out: str | Path, store: Store, config: RunConfig, *, resume: bool,
                overwrite: bool) -> tuple[RunFolder, dict[str, Any] | None]:
    """Decide what an existing output means.

    Returns: the folder, and the summary where `resume` finds the run complete.
    Raises: InputError where the output exists and neither flag is set, or where it belongs to another run.
    """
    run = RunFolder(out)
    if not run.path.exists():
        return run, None
    if resume:
        if run.summary_path.exists():
            summary = run.read_summary()
            _check_identity(summary["identity"], _identity(store, config), run)
            return run, summary
        found = run.load_checkpoint()
        if found is not None:
            _check_identity(found.identity, _identity(store, config), run)
        return run, None
    if not overwrite:
        raise InputError(RUN_EXISTS, file=str(run.path))
    if not (run.path / "config.toml").exists():
        raise InputError("output exists and is not a run's folder; choose another --out", file=str(run.path))
    run.clear()
    return run, None


def run_training(pool: WorkerPool, server_call: ServerCall, store: Store, config: RunConfig, run: RunFolder, *,
                 resume: bool = False, on_epoch: OnEpoch | None = None, signals: bool = False,
                 observer: Observer | None = None) -> dict[str, Any]:
    """Train to the end and write the summary.

    Args:
        pool: one TrainWorker a part. server_call: calls a plain method of the multiplier server (`state`,
            `load_state`).
        on_epoch: called with every epoch's record, for people to see.
        signals: let SIGTERM and SIGINT end the run after an epoch, with a checkpoint.
        observer: is told of workers and epochs.
    Returns: the summary, as written to RUN/summary.json.
    Raises: InputError: the hosts have less memory than this takes; nothing was allocated or written then.
        StoppedError: a signal asked for it. OSError: a checkpoint could not be written; earlier ones are whole.
    """
    started = time.perf_counter()
    if config.cluster.memory_check == "on":
        check_training(pool, store, config)
    loaded = pool.call("load", store.fingerprint,
                       timeout_s=config.timeouts.start_s + store.opening_s(config.storage))
    statistics = sum((w["statistics"] for w in loaded), FeatureStatistics())
    nodes = {name: sum(w["nodes"][name] for w in loaded) for name in loaded[0]["nodes"]}
    empty = [name for name, count in nodes.items() if count == 0 and name != "test"]
    if empty:
        raise InputError(f"no labelled node in split {', '.join(empty)}", file=str(store.path))
    norm = config.model.feature_norm
    norm = choose_norm(statistics, store.num_features) if norm == "auto" else norm
    features = {"norm": norm, "signed": statistics.negative > 0}
    pool.call("setup", features["norm"], features["signed"], nodes["train"], timeout_s=config.timeouts.start_s)
    run.begin(config.to_toml())
    identity = {**_identity(store, config), "features": features}
    found = run.load_checkpoint() if resume else None
    if found is not None:
        progress = _restore(pool, server_call, found)
    else:
        sent = pool.call("calibrate", timeout_s=EPOCH_TIMEOUT_S)
        progress = Progress(calibration_bytes=_add_wire(sent))
    records = run.start_metrics(progress.epoch)
    observer = observer or Observer()
    observer.workers(loaded, records, config.train.epochs)
    slow = SlowWorkers([WorkerShare(w["host"], w["rows"], w["edges"]) for w in loaded])
    keep, limit_s = config.train.keep_checkpoints, config.timeouts.checkpoint_s
    with StopSignals(signals) as stop, CheckpointWriter(run, keep=keep, timeout_s=limit_s) as writer:
        while not progress.finished:
            before = dataclasses.replace(progress)
            try:
                record, reports = _run_epoch(pool, config, progress)
            except (WorkerLostError, ExchangeError, DeadlineError):
                _keep_finished(pool, writer, identity, before)
                raise
            for text in slow.look(record["epoch"], record["compute_s"]):
                _LOG.warning(text)
                record.setdefault("slow_workers", []).append(text)
            records.append(record)
            run.append_metrics(record)
            observer.epoch(record, reports)
            leaving = [rank for rank, report in enumerate(reports) if report["leaving"]]
            progress.finished = progress.epoch >= config.train.epochs or progress.out_of_patience(
                config.train.patience)
            if (progress.finished or stop.received or leaving
                    or progress.epoch % config.train.checkpoint_every == 0):
                tensors = pool.call_one(0, "state", timeout_s=limit_s)
                writer.save(Checkpoint(tensors, identity, dataclasses.replace(progress), server_call("state")))
            if on_epoch is not None:
                on_epoch(record)
            if stop.received and not progress.finished:
                writer.flush()
                raise StoppedError(f"stopped by {stop.received} after epoch {progress.epoch}, with a checkpoint; go on "
                                   "with --resume", file=str(run.path))
            if leaving and not progress.finished:
                writer.flush()
                raise _leaving(leaving, loaded, progress.epoch)
    last, splits = _examine(pool, store, progress, loaded, run)
    summary = _summary(pool, config, store, identity, progress, records, run, time.perf_counter() - started)
    summary["wire_bytes_final"] = last
    classes = splits["valid"]["by_class"]["nodes"] if "valid" in splits else None
    doubts = doubt(records, store.num_classes, config.train.metric, progress.best_accuracy.get("valid"), classes)
    summary["warnings"] += [doubts] * bool(doubts)
    write_atomically(run.summary_path, (json.dumps(summary, indent=2) + "\n").encode())
    return summary


def _keep_finished(pool: WorkerPool, writer: CheckpointWriter, identity: dict[str, Any], progress: Progress) -> None:
    """After an epoch was cut short: what was finished before it, as a checkpoint, by a worker that is left."""
    if pool.size == 1 or progress.epoch == 0:
        return
    try:
        tensors, server = pool.call_any("finished_state", progress.epoch, timeout_s=KEEP_FINISHED_S)
        writer.save(Checkpoint(tensors, identity, progress, server))
    except QgnnError as error:
        _LOG.warning("the state after epoch %d could not be kept (%s); an earlier checkpoint has to do", progress.epoch,
                     error)


def _leaving(ranks: list[int], workers: list[dict[str, Any]], epoch: int) -> HostLeavingError:
    hosts = sorted({str(workers[rank]["host"]) for rank in ranks})
    error = HostLeavingError(f"SIGTERM to rank(s) {', '.join(map(str, ranks))}: stopped after epoch {epoch}, with a "
                             "checkpoint, to go on elsewhere", host=", ".join(hosts),
                             rank=ranks[0] if len(ranks) == 1 else None)
    error.ranks = tuple(ranks)
    return error


def _run_epoch(pool: WorkerPool, config: RunConfig, progress: Progress) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One epoch on all workers; `progress` is brought up to date. Returns: its record, and the workers' reports."""
    epoch = progress.epoch + 1
    start = time.perf_counter()
    evaluate = epoch % config.train.eval_every == 0 or epoch == config.train.epochs
    counted = evaluate and _counts_clipped(epoch, config.train.eval_every)
    results = pool.call("train_epoch", epoch, evaluate, counted, timeout_s=EPOCH_TIMEOUT_S)
    loss = math.fsum(r["loss"] for r in results)
    if not math.isfinite(loss):
        bad = [rank for rank, r in enumerate(results) if not math.isfinite(r["loss"])]
        raise DivergedError(f"the loss is {loss} at epoch {epoch} (rank {bad}); lower train.lr, or propagation.eta")
    record: dict[str, Any] = {"epoch": epoch, "loss": loss}
    if evaluate:
        accuracies, chosen = figures([r["evaluation"] for r in results], config.train.metric)
        record["accuracy"] = accuracies
        if config.train.metric != "accuracy":
            record[config.train.metric] = chosen
        valid = record["valid_loss"] = valid_loss(r["evaluation"] for r in results)
        if counted:
            record["clipped"] = shares(r["evaluation"]["clipped"] for r in results)
        if progress.offer(epoch, accuracies, chosen, valid):
            pool.call("keep_best", timeout_s=config.timeouts.checkpoint_s)
    for key in ("multipliers", "residuals", "clamps"):
        record[key] = results[0][key]
    record["wire_bytes"] = _add_wire([r["wire_bytes"] for r in results])
    record["train_s"] = max(r["train_s"] for r in results)
    record["compute_s"] = [round(r["train_s"] - sum(r["wait_s"].values()), 6) for r in results]
    record["wait_s"] = {what: [round(r["wait_s"][what], 6) for r in results] for what in results[0]["wait_s"]}
    record["evaluation_s"] = max(r.get("evaluation_s", 0.0) for r in results)
    record["epoch_s"] = time.perf_counter() - start
    progress.epoch = epoch
    return record, results


def _counts_clipped(epoch: int, eval_every: int) -> bool:
    """Whether the evaluation of an epoch counts clipped values: the first one, and each COUNT_EVERY-th after it.

    >>> [epoch for epoch in range(1, 26) if _counts_clipped(epoch, 1)]
    [1, 11, 21]
    """
    return (-(-epoch // eval_every) - 1) % COUNT_EVERY == 0


def _add_wire(sent: list[dict[str, int]]) -> dict[str, int]:
    """Bytes that all workers sent, by kind."""
    return {kind: sum(s.get(kind, 0) for s in sent) for kind in WIRE_KINDS}


def _examine(pool: WorkerPool, store: Store, progress: Progress, workers: list[dict[str, Any]],
             run: RunFolder) -> tuple[dict[str, int], dict[str, Any]]:
    """Write what the best model says of every labelled node, and where that forward's time went.

    Returns: the bytes it sent, and what it says, by split.
    """
    if progress.best_epoch == 0:
        return dict.fromkeys(WIRE_KINDS, 0), {}  # patience ended before the first evaluation
    found = pool.call("examine", timeout_s=EPOCH_TIMEOUT_S)
    told = {"schema": FINAL_VERSION, "epoch": progress.best_epoch, "class_names": store.class_names, **together(found),
            "workers": [{key: worker[key] for key in ("host", "rows", "edges")} for worker in workers]}
    write_atomically(run.trace_path, json.dumps(chrome_trace([one.spans for one in found])).encode())
    write_atomically(run.final_path, json.dumps(told).encode())
    return _add_wire([one.wire for one in found]), told["splits"]


def _restore(pool: WorkerPool, server_call: ServerCall, found: Checkpoint) -> Progress:
    tensors, server = dict(found.tensors), found.server
    best = tensors.pop("best", None)
    model = PackedModel.from_bytes(best.tobytes()) if best is not None else None
    server_call("load_state", server)
    pool.call("load_state", tensors, server["ranges"], model, timeout_s=EPOCH_TIMEOUT_S)
    return found.progress


def _identity(store: Store, config: RunConfig) -> dict[str, Any]:
    """What a run is about: the same store, parts and settings give the same numbers."""
    return {"config": config.digest(), "fingerprint": store.fingerprint, "parts": store.num_parts,
            "partitioner": store.manifest["partitioner"], "order": store.order, "feature_bits": store.feature_bits,
            "hops": store.hops, "standardised": store.standardised}


def _check_identity(there: dict[str, Any], here: dict[str, Any], run: RunFolder) -> None:
    older = {"order": SOURCE_ORDER, "feature_bits": None, "hops": 0, "standardised": False}  # they knew no other
    there = {**older, **there}
    for key, name in (("fingerprint", "another graph"), ("parts", "another number of parts"),
                      ("partitioner", "another partition"), ("order", "another order of rows"),
                      ("feature_bits", "features of another width"), ("hops", "features of other hops"),
                      ("standardised", "features of other scales"),
                      ("config", "other settings")):
        if there.get(key) != here[key]:
            raise InputError(f"cannot resume: the run was started with {name} ({key}: {shown(there.get(key), 300)}, "
                             f"now {here[key]}); use the same ones, or --overwrite", file=str(run.path))


def _summary(pool: WorkerPool, config: RunConfig, store: Store, identity: dict[str, Any], progress: Progress,
             records: list[dict[str, Any]], run: RunFolder, seconds: float) -> dict[str, Any]:
    times = [r["epoch_s"] for r in records]
    wire = {kind: float(np.mean([r["wire_bytes"][kind] for r in records])) for kind in WIRE_KINDS}
    memory = pool.call("memory", timeout_s=config.timeouts.start_s)
    return {
        "schema": SUMMARY_VERSION,
        "accuracy": progress.best_accuracy,
        "metric": {"name": config.train.metric, **progress.best_metric},
        "best_epoch": progress.best_epoch,
        "epochs": progress.epoch,
        "seconds": seconds,
        "epoch_s": {"median": float(np.median(times)), "p90": float(np.quantile(times, 0.9))},
        "wire_bytes_per_epoch": wire,
        "wire_bytes_calibration": progress.calibration_bytes,
        "peak_anon_bytes": [m["peak_anon_bytes"] for m in memory],
        "peak_rss_bytes": [m["peak_rss_bytes"] for m in memory],
        "peak_device_bytes": [m.get("peak_device_bytes", 0) for m in memory],
        "devices": [m["device"] for m in memory],
        "bits": config.quant.stages(),
        "features": identity["features"],
        "weight_decay": config.train.decay(identity["features"]["norm"]),
        "multipliers": {"last": records[-1]["multipliers"], "clamped": sum(r["clamps"] for r in records)},
        "warnings": _warnings(config, records),
        "parts": store.num_parts,
        "graph": store.name,
        "fingerprint": store.fingerprint,
        "identity": identity,
        "config": config.to_dict(),
        "restarts": run.read_restarts(),
        "versions": versions(),
    }


def _warnings(config: RunConfig, records: list[dict[str, Any]]) -> list[str]:
    """What a user should know about the run's settings."""
    found = []
    clamped = sum(r["clamps"] for r in records)
    if clamped:
        found.append(f"the multiplier was clamped {clamped} times to stay stable; lower propagation.eta_lambda, or "
                     "raise propagation.alpha")
    if config.propagation.kind == "smp" and config.propagation.constraint == "published":
        found.append("propagation.constraint=published is for reproduction: nothing is clamped, and large graphs can "
                     "diverge; `normalised` is the stable form")
    found += [r["slow_workers"][-1] for r in records if "slow_workers" in r][-1:]
    return found


def versions() -> dict[str, str]:
    """Of this package and of what it computes with."""
    names = ("torch", "ray", "pyarrow", "numpy", "safetensors")
    return {"qgnn-dist": __version__, "python": platform.python_version(), "kernels": kernels.isa(),
            **{name: metadata.version(name) for name in names}}
