# SPDX-License-Identifier: Apache-2.0
"""The five things a user does, as functions: partition, train, export, predict, inspect.

Each chooses where its workers live: with one part in this process, otherwise as Ray actors, one a part.
"""
from __future__ import annotations

import dataclasses
import functools
import logging
import os
import shlex
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import logs
from ..comm.device import sees_gpu
from ..comm.formation import Formation, new_run_id
from ..comm.pool import LocalPool, WorkerPool
from ..config import RunConfig, StorageConfig, load_config
from ..data.graph import Graph
from ..data.remote import local_source
from ..diagnosis.pictures import MODEL_PICTURES, RUN_PICTURES, check_pictures, draw_diagnosis, draw_run
from ..diagnosis.report import diagnose
from ..errors import EXISTS, HostLeavingError, InputError, QgnnError
from ..inference.batch import check_output, check_predictable, run_prediction
from ..inference.remote_output import check_remote_output
from ..inference.worker import PredictWorker
from ..model.packed import PackedModel
from ..partitioning.api import partition_graph
from ..propagation.multiplier import InProcessServer, MultiplierRule, MultiplierServer
from ..storage.local import fetched
from ..storage.place import Place, uri_of
from ..storage.publish import published_file, published_folder
from ..store.describe import describe_store
from ..store.manifest import MANIFEST, PART_FILE
from ..store.reader import Store
from ..training.loop import check_trainable, device_can_train, prepare_run, run_training
from ..training.observer import EpochLog, Observer, Observers, told_its_end
from ..training.remote_run import fetched_run, mirrored_run
from ..training.run_folder import RunFolder
from ..training.status import RunStatus
from ..training.stop import StoppedError, sigterm_stops
from ..training.worker import TrainWorker
from .recovery import Restart, Restarts
from .telemetry import Telemetry

if TYPE_CHECKING:
    from ..data.names import ColumnNames

__all__ = ["export", "inspect", "partition", "predict", "train"]

_LOG = logging.getLogger(__name__)
PARTS_KEPT = "finished parts are kept, the same command goes on"
HOSTS_BACK_S, PLACE_AGAIN_S = 1.0, 5.0
"""How long a lost host's CPUs are waited for before workers share what is left; and after a loss, to be placed: Ray may
still count on a host that is gone.
"""


def partition(source: Any, *, parts: int, out: str | Path, method: str = "auto", order: str = "auto", seed: int = 0,
              memory_gb: float | None = None, balance: float | None = None, edge_balance: float | None = None,
              like: str | Path | None = None, root: str | Path | None = None, yes: bool = False,
              columns: ColumnNames | None = None, standardise: bool = False, hops: int = 0,
              features_bits: int | None = None, overwrite: bool = False, ray_address: str | None = None,
              progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Cut a graph into parts and write a store.

    Args:
        source: an OGB name, `FILE.npz`, `parquet:DIR`, `synthetic:…`, a Graph, or a PyG `Data`; file and folder may be
            URIs of an object store, as text (docs/storage.md), and so may all paths of stores, runs and models here.
        parts: number of parts; with more than one, Ray actors build them side by side.
        out: the store's folder; must not exist unless `overwrite`. ray_address: of a cluster to join, where there are
            several parts; None for RAY_ADDRESS, or a local Ray.
        method: `auto`, `metis`, `mtkahypar`, `stream` or `random`. seed: of its draws; equal ones give equal stores.
        order: of a part's rows: `auto`, `source`, `degree`, `rcm`, `community` or `random`; no result depends on it.
        memory_gb: bound of the anonymous memory that edges may take, and what `auto` may count on; None for half of
            what the machine has available. balance, edge_balance: most nodes of a part over the mean (1.05), most
            edges and training nodes (2), of `stream`. like: a store of an earlier state of the graph, whose nodes keep
            their parts. root: where OGB data sets lie. yes: agree to a download.
        columns: Parquet column names. standardise: dense feature columns get mean 0 and deviation 1, by the earlier
            state's where there is `like`. hops: means over the neighbours of so many hops stand beside a node's own
            dense features. features_bits: 8, 4 or 2 keep dense features as codes of so many bits.
        progress: called with the name of each step.
    Returns: the manifest's summary: counts, cut fraction, halo sizes, bytes a round, seconds, peak memory.
    Raises: InputError for bad input; nothing is written then.
    """
    if uri_of(out) is None and Path(out).exists() and not overwrite:
        raise InputError(EXISTS, file=str(out))
    storage = StorageConfig()
    with (published_folder(out, storage, overwrite, last=MANIFEST, data=PART_FILE, what="a store") as target,
          local_source(source, storage) as local):
        if isinstance(local, Graph):
            graph = local
        elif isinstance(local, (str, os.PathLike)):
            from ..data.load import load_graph

            graph = load_graph(os.fspath(local), root=root, yes=yes, columns=columns, progress=progress)
        else:
            from ..data.pyg import from_pyg

            graph = from_pyg(local)
        if not 1 <= parts <= graph.num_nodes:
            raise InputError(f"--parts {parts}: expected 1 to {graph.num_nodes}, the number of nodes")
        build = functools.partial(partition_graph, graph, parts=parts, out=target, method=method, order=order,
                                  seed=seed, memory_gb=memory_gb, balance=balance, edge_balance=edge_balance, like=like,
                                  standardise=standardise, hops=hops, features_bits=features_bits, overwrite=overwrite,
                                  progress=progress)
        if parts == 1:
            return build()
        from .builders import count_builders, ray_builders
        from .session import RaySession

        here = uri_of(out) is not None  # what is built for an object store is on this host's own disk until then
        with RaySession(ray_address, num_cpus=min(parts, os.cpu_count() or 1)):
            builders = count_builders(parts, here=here)
            return build(run_builders=ray_builders(here=here), builders=builders) if builders else build()


def train(store: str | Path, *, out: str | Path, config: RunConfig | dict[str, Any] | str | Path | None = None,
          overrides: Sequence[str] = (), resume: bool = False, overwrite: bool = False,
          ray_address: str | None = None, on_epoch: Callable[[dict[str, Any]], None] | None = None,
          signals: bool = False) -> dict[str, Any]:
    """Train on a store, one worker a part.

    Args:
        store: folder of a store with features, labels and splits. out: the run's folder.
        config: settings, resolved or nested or a TOML file. overrides: `section.key=value` words on top.
        resume: go on from the last checkpoint; start where there is none; return at once where the run is complete.
        overwrite: replace an existing run. ray_address: see partition.
        on_epoch: called with every epoch's record. signals: let SIGTERM and SIGINT end the run after an epoch, with
            a checkpoint (training.stop.StoppedError), in place of what this process does with them.
    Returns: the summary (RUN/summary.json).
    Raises: InputError before anything is written; WorkerError, ExchangeError, DeadlineError while running.
    """
    resolved = _resolve(config, overrides)
    label = uri_of(out) or os.path.abspath(out)
    logs.start(resolved.log.format)
    logs.place(run=label)
    opened = Store.open(store, resolved.storage)
    check_trainable(opened, resolved)
    rule = MultiplierRule.of(resolved, opened.num_edges)
    kwargs = {"store": opened.place, "config": resolved}

    noted = 0

    def once(pool: WorkerPool, server_call: Callable[..., Any], restarts: list[Restart]) -> dict[str, Any]:
        nonlocal noted
        for restart in restarts[noted:]:
            run.append_restart({**restart.to_dict(), "started_s": round(time.time() - restart.time, 3)})
        noted = len(restarts)
        return run_training(pool, server_call, opened, resolved, run, resume=resume or bool(restarts),
                            on_epoch=on_epoch, signals=signals, observer=observer)

    with mirrored_run(out, resolved.storage, keep=resolved.train.keep_checkpoints, resume=resume,
                      overwrite=overwrite) as folder:
        observers = _observers(RunFolder(folder), resolved, opened.num_parts, label)
        run, summary = prepare_run(folder, opened, resolved, resume=resume, overwrite=overwrite)
        if summary is not None:
            return summary
        with RunStatus(run) as status:
            observer = Observers([status, *observers])
            return _with_workers(TrainWorker, kwargs, opened.num_parts, resolved, ray_address, rule, once,
                                 run.epochs_done, run.keep_stall, observer, Telemetry(label, resolved.log))


def export(run: str | Path, *, out: str | Path, bits: int | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Write the packed model of a run's best epoch so far, at the widths it was trained with.

    Args:
        run: the run's folder. out: the model's file. overwrite: replace it.
        bits: checked against the trained `quant.bits`; a model is never repacked at another width.
    Returns: what the file holds, and its size.
    Raises: InputError: no such run or nothing trained yet, another width, or the output exists.
    """
    storage = StorageConfig()
    with fetched_run(run, storage) as place, published_file(out, storage, overwrite) as target:
        folder = RunFolder(place)
        if not (folder.path / "config.toml").exists():
            raise InputError("not a run's folder (no config.toml); give the --out of `qgnn train`", file=str(place))
        found = folder.load_checkpoint()
        if found is None or "best" not in found.tensors:
            raise InputError("nothing to export yet: no checkpoint holds an evaluated model", file=str(place))
        trained = load_config(folder.path / "config.toml").quant.bits
        if bits is not None and bits != trained:
            raise InputError(f"--bits {bits}: the run was trained with quant.bits={trained}; train again at {bits} "
                             "bits", file=str(place))
        model = PackedModel.from_bytes(found.tensors["best"].tobytes(), str(folder.checkpoint_files()[0]))
        size = model.save(target, overwrite)
    return {**_describe_model(model, size), "epoch": found.progress.best_epoch,
            "accuracy": found.progress.best_accuracy}


def predict(store: str | Path, *, model: str | Path, out: str | Path, scores: bool = False,
            config: RunConfig | dict[str, Any] | str | Path | None = None, trace: bool = False, overwrite: bool = False,
            ray_address: str | None = None, signals: bool = False) -> dict[str, Any]:
    """Classify every node of a store and write Parquet, one file a part.

    Args:
        store: folder of a store with features. model: the packed model's file. out: folder of the predictions.
        config: its `cluster` and `timeouts` are used; all else comes from the model.
        scores: write the scores of all classes too. trace: write OUT/trace.json too, see run_prediction.
        signals: let SIGTERM end it at once (training.stop.StoppedError), with what is finished kept, in place of what
            this process does with it.
        overwrite: replace earlier predictions. ray_address: see partition.
    Returns: the summary (OUT/summary.json): accuracy by split where labels exist, seconds, bytes.
    Raises: InputError, StoreError, ModelError before anything is written.
    """
    resolved = _resolve(config, ())
    logs.start(resolved.log.format)
    logs.place(run=uri_of(out) or os.path.abspath(out))
    opened, storage = Store.open(store, resolved.storage), resolved.storage
    with fetched(model, storage) as local:
        packed = PackedModel.load(local)
    check_predictable(opened, packed, str(model))
    target = uri_of(out)
    if target is not None:
        check_remote_output(target, storage, overwrite)
    else:
        target = os.path.abspath(check_output(out, overwrite))
    kwargs = {"store": opened.place, "exchange_s": resolved.timeouts.exchange_s, "storage": storage}

    def once(pool: WorkerPool, server_call: Callable[..., Any], restarts: list[Restart]) -> dict[str, Any]:
        with sigterm_stops(PARTS_KEPT, signals):
            return run_prediction(pool, opened, packed, target, scores=scores, timeouts=resolved.timeouts,
                                  storage=storage, trace=trace, check_memory=resolved.cluster.memory_check == "on")

    with sigterm_stops(PARTS_KEPT, signals):
        return _with_workers(PredictWorker, kwargs, opened.num_parts, resolved, ray_address, None, once, lambda: 0)


def inspect(path: str | Path, *, verify: bool = False, store: str | Path | None = None,
            pictures: str | Path | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Describe a store, a run or a packed model; with `store`, diagnose the model on its nodes.

    The diagnosis runs in this process, a thread a part: what quantising does to every stage, and how smooth every
    layer is (diagnosis.report.combine says what it holds).

    Args:
        path: the store's or run's folder, or the model's file.
        verify: check every checksum of a store, or read a model's tensors (a model is always read whole).
        store: a store to run a packed model on; the result then has `diagnosis`.
        pictures: folder for pictures of that diagnosis, or of a run's multipliers; the result then has `pictures`.
        overwrite: replace pictures that exist.
    Raises: InputError: nothing of ours lies there, or it is damaged; `store` or `pictures` do not go with it.
        StoreError, ModelError: the model does not fit the store.
    """
    storage = StorageConfig()
    if (uri := uri_of(path)) is not None and not Place(uri, storage).at(MANIFEST).size():
        is_run = bool(Place(uri, storage).at("config.toml").size())
        with fetched_run(uri, storage) if is_run else fetched(uri, storage) as local:
            return inspect(local, verify=verify, store=store, pictures=pictures, overwrite=overwrite)
    place = Path(path)
    is_store, is_run = uri is not None or (place / MANIFEST).exists(), (place / "config.toml").exists()
    if store is not None and (is_store or is_run):
        raise InputError(f"--store goes with a packed model, this is a {'store' if is_store else 'run'}; give the file "
                         "that `qgnn export` wrote", file=str(path))
    if is_store:
        if pictures is not None:
            raise InputError("--pictures go with a run, or with a packed model and --store; this is a store",
                             file=str(path))
        return {"kind": "store", **describe_store(Store.open(path), verify=verify)}
    if is_run:
        drawn = _draw_run(RunFolder(place), pictures, overwrite) if pictures is not None else {}
        return _describe_run(RunFolder(place)) | drawn
    if place.is_file() and place.suffix != ".npz":
        model = PackedModel.load(place)
        result = _describe_model(model, place.stat().st_size)
        if store is not None:
            return result | _diagnose(model, place, store, pictures, overwrite)
        if pictures is not None:
            raise InputError("--pictures of a model show it on a graph; add --store", file=str(path))
        return result
    raise InputError(_something_else(place), file=str(path))


def _something_else(place: Path) -> str:
    """What lies there that is neither store, run nor model, and what to do with it."""
    if not place.exists():
        return "no such path"
    if (place / "summary.json").exists() and any(place.glob("part-*.parquet")):
        return ("predictions; read them with pyarrow.dataset.dataset(FOLDER, exclude_invalid_files=True), and "
                "accuracy and seconds in their summary.json")
    is_table = any((place / f"{name}{suffix}").exists() for name in ("nodes", "edges")
                   for suffix in (".parquet", ".arrow", ""))
    if is_table or place.suffix == ".npz":
        source = shlex.quote(f"parquet:{place}" if is_table else str(place))
        return f"a graph, not yet a store; make one with `qgnn partition {source} --parts 1 --out store`"
    return "neither a store, nor a run, nor a packed model"


def _resolve(config: RunConfig | dict[str, Any] | str | Path | None, overrides: Sequence[str]) -> RunConfig:
    if isinstance(config, RunConfig):
        return load_config(values=config.to_dict(), overrides=list(overrides)) if overrides else config
    if isinstance(config, dict):
        return load_config(values=config, overrides=list(overrides))
    return load_config(config, list(overrides))


Work = Callable[[WorkerPool, Callable[..., Any], list[Restart]], dict[str, Any]]
"""What a command does with its workers: pool, how to call the multiplier server, the restarts so far."""


def _with_workers(worker: type, kwargs: dict[str, Any], size: int, config: RunConfig, ray_address: str | None,
                  rule: MultiplierRule | None, work: Work, epochs_done: Callable[[], int],
                  keep_stall: Callable[[int, str], None] | None = None, observer: Observer | None = None,
                  telemetry: Telemetry | None = None) -> dict[str, Any]:
    """Do `work` with one worker a part; where some are lost, again with new ones, as `cluster.recovery` decides.

    Args: keep_stall: writes what workers said of themselves while they stood still, in an epoch. observer: is told of
        restarts, stalls and the end. telemetry: see RayPool.
    """
    observer = observer or Observer()
    times, cluster = config.timeouts, config.cluster
    if rule is None or (cluster.device == "auto" and not device_can_train(config)):
        cluster = dataclasses.replace(cluster, device="cpu")  # predictions are the host's kernels', bit for bit
    if size == 1:
        server = InProcessServer(MultiplierServer(1, rule, times.server_s)) if rule is not None else None
        on_gpu = cluster.device == "cuda" or (cluster.device == "auto" and sees_gpu())
        local = LocalPool(worker, kwargs, 1, server=server, timeout_s=times.exchange_s,
                          threads=cluster.threads or os.cpu_count() or 1, device="cuda" if on_gpu else None)
        try:
            with told_its_end(observer):
                return work(local, server.call if server is not None else _no_server, [])
        finally:
            local.close()
            if server is not None:
                server.close()
    from .hosts import placeable_cpus, unreachable_hosts
    from .pool import RayPool
    from .session import RaySession
    from .watch import Stall

    def on_stall(stall: Stall) -> None:
        observer.stall(stall.epoch)
        if keep_stall is not None:
            keep_stall(stall.epoch, str(stall))

    factory = _ServerFactory(size, rule, times.server_s) if rule is not None else None
    restarts = Restarts.of("train" if rule is not None else "predict", cluster)
    begun, run_id = False, new_run_id()
    place_s, leaving, without = times.start_s, set[str](), set[str]()
    with RaySession(ray_address, num_cpus=size * cluster.cpus_per_worker), told_its_end(observer):
        while True:
            try:
                with RayPool(worker, kwargs, size, cluster=cluster, timeouts=times, server_factory=factory,
                             place_s=place_s, formation=Formation.new(run_id, len(restarts.made)), without=without,
                             on_stall=on_stall if keep_stall is not None else None, telemetry=telemetry) as pool:
                    begun = True
                    return work(pool, pool.server_call, restarts.made)
            except QgnnError as error:
                if not begun:
                    raise  # nothing was lost that was there
                restart = restarts.after(error, epochs_done())
                _LOG.warning("%s", restarts.told(restart))
                observer.restart(restart.to_dict())
                time.sleep(restart.pause_s)
                if isinstance(error, HostLeavingError):
                    leaving |= {pool.nodes()[rank] for rank in error.ranks}
            without = leaving | unreachable_hosts()
            cpus = placeable_cpus(size, config.cluster.cpus_per_worker, HOSTS_BACK_S, without)
            if cpus == 0 and leaving:
                advice = PARTS_KEPT if rule is None else \
                    "what was finished is in a checkpoint, --resume goes on with it"
                raise StoppedError("stopped by SIGTERM: all hosts end their workers, and none is left to go on with; "
                                   f"{advice}")
            cpus = cpus or config.cluster.cpus_per_worker  # the placement's error says what is there
            if cpus < cluster.cpus_per_worker:
                _LOG.warning("the hosts that are left have %g CPUs for each of %d workers, %g were asked for", cpus,
                             size, config.cluster.cpus_per_worker)
            cluster, place_s = dataclasses.replace(cluster, cpus_per_worker=cpus), min(times.start_s, PLACE_AGAIN_S)


def _observers(run: RunFolder, config: RunConfig, size: int, label: str) -> list[Observer]:
    """Who else is to be told of a run, as its settings say. Args: label: names the run in metrics."""
    found: list[Observer] = []
    if config.log.tensorboard == "on":
        from ..training.tensorboard import TensorBoard

        found.append(TensorBoard(run))
    if config.log.metrics == "on" and size == 1:
        _LOG.warning("log.metrics=on: no Ray is started for one part, so that there is no endpoint for metrics; more "
                     "parts have one, and RUN/status.json and metrics.jsonl have the same figures")
    elif config.log.metrics == "on":
        from .metrics import RunMetrics

        found.append(RunMetrics(label, socket.gethostname()))
    if logs.is_json():
        found.append(EpochLog())
    return found


@dataclasses.dataclass(frozen=True)
class _ServerFactory:
    """Builds the multiplier server inside its actor."""

    size: int
    rule: MultiplierRule
    deadline_s: float

    def __call__(self) -> MultiplierServer:
        return MultiplierServer(self.size, self.rule, self.deadline_s)


def _no_server(method: str, *_: Any) -> Any:
    raise InputError(f"no multiplier server runs here ({method})")


def _describe_model(model: PackedModel, size: int) -> dict[str, Any]:
    info = model.info.described()
    info["propagation"] = info.pop("kind")
    return {"kind": "model", **info, "model_bytes": size,
            "float_bytes": 4 * (model.weight1.size + model.weight2.size + model.bias1.size + model.bias2.size)}


def _diagnose(model: PackedModel, file: Path, store: str | Path, pictures: str | Path | None,
              overwrite: bool) -> dict[str, Any]:
    opened = Store.open(store)
    check_predictable(opened, model, str(file))
    if pictures is not None:
        check_pictures(pictures, MODEL_PICTURES, overwrite)
    found = diagnose(opened, model, str(file), exchange_s=load_config().timeouts.exchange_s)
    drawn = {"pictures": draw_diagnosis(found, pictures)} if pictures is not None else {}
    return {"diagnosis": found, **drawn}


def _draw_run(run: RunFolder, pictures: str | Path, overwrite: bool) -> dict[str, Any]:
    if load_config(run.path / "config.toml").propagation.kind != "smp":
        raise InputError("--pictures of a run show its multipliers, and only propagation.kind=smp has any",
                         file=str(run.path))
    check_pictures(pictures, RUN_PICTURES, overwrite)
    records = run.read_metrics() if run.metrics_path.exists() else []
    found = run.load_checkpoint()
    if not records or found is None:
        raise InputError("nothing to draw yet: no epoch and checkpoint", file=str(run.path))
    return {"pictures": draw_run(records, found.progress.best_epoch, pictures)}


def _describe_run(run: RunFolder) -> dict[str, Any]:
    config = load_config(run.path / "config.toml")
    found = run.load_checkpoint()
    result: dict[str, Any] = {"kind": "run", "complete": run.summary_path.exists(), "bits": config.quant.stages()}
    if found is not None:
        identity, progress = found.identity, found.progress
        result |= {"epoch": progress.epoch, "best_epoch": progress.best_epoch, "accuracy": progress.best_accuracy,
                   "parts": identity["parts"], "features": identity["features"],
                   "fingerprint": identity["fingerprint"]}
    return result
