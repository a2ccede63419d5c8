# SPDX-License-Identifier: Apache-2.0
"""Every reader of what comes from outside: a valid sample, how it is mutated and sealed again, and how it is read."""
from __future__ import annotations

import atexit
import functools
import gzip
import io
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from safetensors.numpy import load

from qgnn_dist import render
from qgnn_dist.bench.grid import read_grid
from qgnn_dist.cluster import api
from qgnn_dist.comm import wire
from qgnn_dist.comm.formation import Formation
from qgnn_dist.comm.pool import LocalPool
from qgnn_dist.config import load_config
from qgnn_dist.data.load import load_graph
from qgnn_dist.files.checksum import checksum_of
from qgnn_dist.inference.output import UNFINISHED
from qgnn_dist.inference.worker import PredictWorker
from qgnn_dist.model.packed import PackedModel
from qgnn_dist.partitioning.api import partition_graph
from qgnn_dist.planning import rates
from qgnn_dist.propagation.multiplier import InProcessServer, MultiplierRule, MultiplierServer
from qgnn_dist.report.measure import look
from qgnn_dist.report.page import make_page
from qgnn_dist.report.runs import read_runs
from qgnn_dist.store.columns import checksum
from qgnn_dist.store.describe import describe_store
from qgnn_dist.store.reader import Store
from qgnn_dist.training import loop
from qgnn_dist.training.loop import prepare_run
from qgnn_dist.training.run_folder import RunFolder
from tests.fault.fuzzing import mutate
from tests.fault.fuzzing.digest import digest, graph_values, part_values
from tests.fault.fuzzing.target import Target
from tests.helpers import edit_manifest, make_store, small_graph, train_pool, untrained_model

__all__ = ["TARGETS"]


def _show(result: dict[str, Any]) -> None:
    """As `qgnn inspect` prints it, both ways."""
    json.dumps(result)
    render.inspection(result, Console(file=io.StringIO()))


def _make_stores(folder: Path) -> None:
    graph = small_graph(nodes=40, features=6)
    ids = pa.array([f"n{i}" for i in range(40)])
    make_store(replace(graph, node_ids=ids, class_names=list("abcde")), folder / "dense", 2)
    make_store(small_graph(nodes=40, features=6, sparse=True), folder / "sparse", 1, order="community")
    partition_graph(graph, parts=1, out=folder / "coded", features_bits=4)


def _read_manifest(store: Path) -> str | None:
    result = describe_store(Store.open(store))
    _show({"kind": "store", **result})
    return digest(json.dumps(result, sort_keys=True)) if "checksum" in result else None


def _seal_manifest(folder: Path, file: Path) -> None:
    try:
        edit_manifest(file.parent, lambda m: None)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return  # no JSON object any more


def _read_parts(place: Path) -> str:
    """Every part, and a prediction where the store has one."""
    store = Store.open(place)
    values = [value for part in range(store.num_parts) for value in part_values(store.part(part))]
    if store.num_parts == 1:
        _predict(store, untrained_model(store))
    return digest(*values)


def _predict(store: Store, model: PackedModel) -> None:
    pool = LocalPool(PredictWorker, {"store": str(store.path), "exchange_s": 10.0}, 1)
    try:
        pool.call("load", store.fingerprint, model.to_bytes(), timeout_s=10)
        out = store.path.parent.parent / "out"
        (out / UNFINISHED).mkdir(parents=True, exist_ok=True)
        pool.call("predict", timeout_s=10)
        pool.call("write", str(out), True, timeout_s=10)
    finally:
        pool.close()


def _seal_part(folder: Path, file: Path) -> None:
    """The manifest believes a file of a part."""
    entry = {"bytes": file.stat().st_size, "blake2b": checksum(file)}
    part = int(file.parent.name.partition("-")[2])
    edit_manifest(file.parent.parent, lambda m: m["parts"][part]["files"].update({file.name: entry}))


def _make_models(folder: Path) -> None:
    store = make_store(small_graph(nodes=40, features=6), folder / "graph" / "s", 1)
    for name, words in (("int2", {}), ("float", {"bits": 32}), ("affine", {"method": "bt"})):
        untrained_model(store, **words).save(folder / f"{name}.safetensors")  # type: ignore[arg-type]


def _read_model(file: Path) -> str | None:
    store, model = Store.open(file.parent / "graph" / "s"), PackedModel.load(file)
    _show(api.inspect(file))
    if model.info.num_features == store.num_features and model.info.layers < 50:
        _predict(store, model)
    found = digest(model.info, model.weight1, model.bias1, model.weight2, model.bias2)
    return found if b"checksum" in file.read_bytes() else None


def _seal_safetensors(folder: Path, file: Path) -> None:
    """Of packed models and of checkpoints."""
    data = file.read_bytes()
    try:
        (size,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8:8 + size])
        values = json.loads(header["__metadata__"]["qgnn"])
        del values["checksum"]
        values["checksum"] = checksum_of(values, load(data))
        header["__metadata__"]["qgnn"] = json.dumps(values)
    except Exception:  # no such file any more: nothing to seal
        return
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size:])


def _make_run(folder: Path) -> None:
    store = make_store(small_graph(nodes=60, features=6), folder / "graph" / "s", 1)
    api.train(store.path, out=folder / "run", overrides=["train.epochs=3", "model.hidden=4", "propagation.layers=2"])


def _make_checkpoint(folder: Path) -> None:
    """The run's last one, with its summary gone, as of a run that was killed."""
    _make_run(folder)
    (folder / "run" / "summary.json").unlink()


def _read_run(folder: Path) -> str:
    run = folder / "run"
    _show(api.inspect(run))
    api.export(run, out=folder / "exported", overwrite=True)
    store = Store.open(folder / "graph" / "s")
    prepare_run(run, store, load_config(run / "config.toml"), resume=True, overwrite=False)
    RunFolder(run).read_metrics()
    return ""


def _read_report(folder: Path) -> str:
    found = read_runs([folder / "run"])
    make_page(found, look(found, []))
    return ""


@functools.lru_cache(maxsize=1)
def _worker(place: Path) -> tuple[LocalPool, InProcessServer]:
    """What goes on with checkpoints of a run, the same for all mutants: one that is refused must leave it usable."""
    store, config = Store.open(place / "graph" / "s"), load_config(place / "run" / "config.toml")
    server = InProcessServer(MultiplierServer(1, MultiplierRule.of(config, store.num_edges), 10.0))
    made = train_pool(store, config, server)
    atexit.register(made.__exit__, None, None, None)
    return made.__enter__(), server


def _read_checkpoint(folder: Path) -> str | None:
    """As `qgnn inspect`, `qgnn export` and `qgnn train --resume` do, with an epoch more."""
    run, (pool, server) = folder / "run", _worker(folder)
    _show(api.inspect(run))
    api.export(run, out=folder / "exported", overwrite=True)
    prepare_run(run, Store.open(folder / "graph" / "s"), load_config(run / "config.toml"), resume=True, overwrite=False)
    found = RunFolder(run).load_checkpoint()
    assert found is not None
    progress = loop._restore(pool, server.call, found)
    pool.call("train_epoch", progress.epoch + 1, True, timeout_s=10)
    content = digest(found.identity, found.progress, found.server, *sorted(found.tensors.items()))
    return content if b"checksum" in RunFolder(run).checkpoint_files()[0].read_bytes() else None


def _read_config(folder: Path) -> str:
    config = load_config(folder / "config.toml")
    assert load_config(values=config.to_dict()) == config
    return digest(config.to_toml())


def _make_npz(folder: Path) -> None:
    rng = np.random.default_rng(0)
    edges = rng.integers(0, 30, (2, 90))
    rest = {"y": rng.integers(-1, 4, 30), "class_names": np.array(list("abcd"))}
    rest["y"][:20] = np.arange(20) % 4
    split = {f"{name}_idx": np.arange(at, at + 6) for name, at in (("train", 0), ("valid", 6), ("test", 12))}
    np.savez(folder / "dense.npz", edge_index=edges, x=rng.random((30, 4)), **rest, **split)  # type: ignore[arg-type]
    np.savez_compressed(
        folder / "sparse.npz", edge_index=edges.astype(np.int32), x_data=rng.random(40).astype(np.float32),
        x_indices=rng.integers(0, 9, 40), x_indptr=np.minimum(np.arange(31) * 2, 40), x_shape=np.array([30, 9]))
    np.savez(folder / "edges.npz", edge_index=edges, num_nodes=np.int64(30))


def _read_npz(file: Path) -> str:
    return digest(*graph_values(load_graph(file)))


def _tables() -> tuple[pa.Table, pa.Table]:
    rng = np.random.default_rng(0)
    nodes = pa.table({
        "node_id": [f"n{i}" for i in range(30)], "label": pa.array(rng.integers(0, 3, 30), pa.int8()),
        "split": (["train", "valid", "test"] * 10),
        "x": pa.array(rng.random((30, 4)).tolist(), pa.list_(pa.float32()))})
    ends = rng.integers(0, 30, (2, 90))
    return nodes, pa.table({"src": [f"n{i}" for i in ends[0]], "dst": [f"n{i}" for i in ends[1]]})


def _make_parquet(folder: Path) -> None:
    nodes, edges = _tables()
    for name in ("text", "numbers"):
        (folder / name).mkdir()
    pq.write_table(nodes, folder / "text" / "nodes.parquet", row_group_size=12)
    pq.write_table(edges, folder / "text" / "edges.parquet", compression="zstd")
    numbers = pa.table({"node_id": np.arange(30), "a": np.arange(30.0), "b": np.arange(30, dtype=np.int16)})
    pq.write_table(numbers, folder / "numbers" / "nodes.parquet", compression="gzip")
    pq.write_table(pa.table({"src": np.arange(30), "dst": np.arange(30)[::-1]}), folder / "numbers" / "edges.parquet")


def _read_tables(folder: Path) -> str:
    return digest(*graph_values(load_graph(f"parquet:{folder}")))


def _make_arrow(folder: Path) -> None:
    nodes, edges = _tables()
    for name, table, how in (("nodes", nodes, None), ("edges", edges.combine_chunks(), "zstd")):
        table = table.set_column(0, table.schema.names[0], table.column(0).dictionary_encode())
        options = pa.ipc.IpcWriteOptions(compression=how)
        with pa.OSFile(str(folder / f"{name}.arrow"), "wb") as out, pa.ipc.new_file(
                out, table.schema, options=options) as writer:
            writer.write_table(table.unify_dictionaries(), max_chunksize=50)


def _ogb_csv(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(",".join(repr(value) for value in row) + "\n" for row in array.tolist())
    path.write_bytes(gzip.compress(lines.encode(), mtime=0))


def _make_ogb(folder: Path) -> None:
    rng = np.random.default_rng(0)
    raw, split = folder / "ogbn_fuzz" / "raw", folder / "ogbn_fuzz" / "split" / "time"
    _ogb_csv(raw / "edge.csv.gz", rng.integers(0, 30, (90, 2)))
    _ogb_csv(raw / "num-node-list.csv.gz", np.array([[30]]))
    _ogb_csv(raw / "num-edge-list.csv.gz", np.array([[90]]))
    _ogb_csv(raw / "node-feat.csv.gz", rng.random((30, 4)).round(4))
    _ogb_csv(raw / "node-label.csv.gz", rng.integers(0, 4, (30, 1)))
    for name, at in (("train", 0), ("valid", 10), ("test", 20)):
        _ogb_csv(split / f"{name}.csv.gz", np.arange(at, at + 10)[:, None])


def _make_ogb_npz(folder: Path) -> None:
    rng = np.random.default_rng(0)
    raw = folder / "ogbn_fuzz" / "raw"
    raw.mkdir(parents=True)
    np.savez_compressed(raw / "data.npz", edge_index=rng.integers(0, 30, (2, 90)), num_nodes_list=np.array([30]),
                        node_feat=rng.random((30, 4)).astype(np.float16))
    np.savez_compressed(raw / "node-label.npz", node_label=rng.integers(0, 4, (30, 1)).astype(np.float32))


def _make_ogb_split(folder: Path) -> None:
    _make_ogb(folder)
    split = folder / "ogbn_fuzz" / "split" / "time"
    for file in split.iterdir():
        file.unlink()
    arrays = {name: np.arange(at, at + 10) for name, at in (("train", 0), ("valid", 10), ("test", 20))}
    torch.save({**arrays, "valid": torch.from_numpy(arrays["valid"])}, split / "split_dict.pt")


def _read_ogb(folder: Path) -> str:
    return digest(*graph_values(load_graph("ogbn-fuzz", root=folder)))


_KEY = Formation(7, 1, bytes(range(32))).frame_key()
_FRAME = wire.Header(7, 1, 3, "backward", 4, 5, 2, 6, 7, sender=1, receiver=0)


def _make_frame(folder: Path) -> None:
    payload, head = np.arange(_FRAME.payload_bytes, dtype=np.uint8), np.zeros(wire.HEADER_BYTES, np.uint8)
    wire.seal_frame(_FRAME, payload, _KEY, head)
    (folder / "frame").write_bytes(head.tobytes() + payload.tobytes())


def _read_frame(folder: Path) -> str:
    """As a receiver does, whose buffers have the sizes that it expects."""
    data = np.frombuffer((folder / "frame").read_bytes(), np.uint8)
    data = np.resize(data, wire.HEADER_BYTES + _FRAME.payload_bytes) if len(data) else np.zeros(512, np.uint8)
    head, payload = data[:wire.HEADER_BYTES], data[wire.HEADER_BYTES:wire.HEADER_BYTES + _FRAME.payload_bytes]
    wire.check_header(head, _FRAME)
    wire.check_frame(head, payload, _FRAME, _KEY)
    return digest(payload)


def _seal_frame(folder: Path, file: Path) -> None:
    """Who has the key makes the MAC of the changed frame."""
    data = file.read_bytes()
    fields, payload = data[:48], data[wire.HEADER_BYTES:]
    mac = _KEY.mac(_FRAME.sender, _FRAME.receiver, 2 * _FRAME.sequence, fields, payload)
    file.write_bytes(fields + mac + payload)


def _make_rates(folder: Path) -> None:
    (folder / "rates.json").write_bytes((Path(rates.__file__).parent / "rates.json").read_bytes())


def _read_rates(folder: Path) -> str:
    found = rates.load_rates(folder / "rates.json")
    found.layer("training", 2, 40, 1000)
    found.perceptron_ns("packed", 2, 3.0, 4.0)
    return digest(found)


def _make_grid(folder: Path) -> None:
    (folder / "graph.npz").write_bytes(b"")
    (folder / "grid.toml").write_text(
        'seeds = 2\nlayers = [10, 64]\nreference = "float"\nsettings = ["train.epochs=5"]\n\n[datasets.tiny]\n'
        'source = "graph.npz"\nsettings = ["train.lr=0.1"]\n\n[methods.recipe]\nwidths = ["float", "int2"]\n\n'
        '[methods.qlr]\nsettings = ["quant.method=qlr"]\n')


def _read_grid(folder: Path) -> str:
    return digest([row.name for row in read_grid(folder / "grid.toml").rows])


_GRAPHS = {"*/raw/*.csv.gz": mutate.csv_gz, "*/split/*/*.csv.gz": mutate.csv_gz}
TARGETS: dict[str, Target] = {
    "manifest": Target(_make_stores, _read_manifest, {"*/manifest.json": mutate.json_text}, _seal_manifest,
                       tells=True, apart=True),
    "part": Target(_make_stores, _read_parts, {"*/part-*/*.arrow": None}, _seal_part,
                   lambda place: Store.open(place).verify(), tells=True, apart=True),
    "model": Target(_make_models, _read_model, {"*.safetensors": mutate.safetensors}, _seal_safetensors, tells=True,
                    apart=True),
    "run": Target(_make_run, _read_run, {
        "run/checkpoints/*.safetensors": mutate.safetensors, "run/summary.json": mutate.json_text,
        "run/metrics.jsonl": None, "run/config.toml": mutate.toml_text}),
    "checkpoint": Target(_make_checkpoint, _read_checkpoint, {"run/checkpoints/*.safetensors": mutate.safetensors},
                         _seal_safetensors, tells=True),
    "report": Target(_make_run, _read_report, {
        "run/final.json": mutate.json_text, "run/trace.json": mutate.json_text, "run/summary.json": mutate.json_text,
        "run/status.json": mutate.json_text, "run/metrics.jsonl": None}),
    "config": Target(lambda folder: (folder / "config.toml").write_text(load_config().to_toml()), _read_config,
                     {"config.toml": mutate.toml_text}),
    "npz": Target(_make_npz, _read_npz, {"*.npz": mutate.npz}, tells=True, apart=True),
    "parquet": Target(_make_parquet, _read_tables, {"*/*.parquet": None}, apart=True),
    "arrow": Target(_make_arrow, _read_tables, {"*.arrow": None}),
    "ogb-csv": Target(_make_ogb, _read_ogb, _GRAPHS, tells=True),
    "ogb-npz": Target(_make_ogb_npz, _read_ogb, {"*/raw/*.npz": mutate.npz}, tells=True),
    "ogb-split": Target(_make_ogb_split, _read_ogb, {"*/split/*/*.pt": mutate.npz}),
    "frame": Target(_make_frame, _read_frame, {"frame": None}, _seal_frame, tells=True),
    "calibration": Target(_make_rates, _read_rates, {"rates.json": mutate.json_text}),
    "grid": Target(_make_grid, _read_grid, {"grid.toml": mutate.toml_text}),
}
