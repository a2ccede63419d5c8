# SPDX-License-Identifier: Apache-2.0
"""Files made to harm: what is no file, links that lead outside, counts that promise too much, and bombs.

Each is refused in one line, before what it promises is allocated; `peak` measures that.
"""
from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from qgnn_dist.cluster import api
from qgnn_dist.config import load_config
from qgnn_dist.data import arrays
from qgnn_dist.data.load import load_graph
from qgnn_dist.errors import ConfigError, InputError, ModelError, QgnnError, StoreError
from qgnn_dist.files.ipc import check_compression
from qgnn_dist.files.read import parse_json, parse_toml
from qgnn_dist.model.packed import PackedModel
from qgnn_dist.store.reader import Store
from qgnn_dist.training.checkpoint import Checkpoint
from tests.fault.fuzzing.child import _memory, _reset_peak
from tests.fault.fuzzing.targets import TARGETS
from tests.helpers import edit_manifest, make_store, small_graph, untrained_model

MIB = 1 << 20


def refused(read: Callable[[], Any], kind: type[QgnnError], *words: str, most: int = 64 * MIB) -> None:
    """`read` raises `kind`, whose one line has all words, and takes no more memory than `most`."""
    _reset_peak()
    before = _memory()[0]
    with pytest.raises(kind) as caught:
        read()
    peak = _memory()[1] - before
    text = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in text
    assert len(text) < 2000
    for word in words:
        assert word in text, text
    assert peak < most, f"took {peak / MIB:.0f} MiB"


def sample(name: str, folder: Path) -> Path:
    folder.mkdir()
    TARGETS[name].make(folder)
    return folder


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Of each kind, made once."""
    base = tmp_path_factory.mktemp("samples")

    def made(name: str) -> Path:
        return base / name if (base / name).exists() else sample(name, base / name)
    return made


SAMPLES = [
    ("manifest", "dense/manifest.json"), ("part", "dense/part-00000/rows.arrow"),
    ("part", "sparse/part-00000/features.arrow"), ("model", "int2.safetensors"), ("run", "run/config.toml"),
    ("run", "run/checkpoints/epoch-000003.safetensors"), ("config", "config.toml"), ("npz", "dense.npz"),
    ("parquet", "text/nodes.parquet"), ("arrow", "edges.arrow"), ("ogb-csv", "ogbn_fuzz/raw/edge.csv.gz"),
    ("ogb-csv", "ogbn_fuzz/split/time/train.csv.gz"), ("ogb-npz", "ogbn_fuzz/raw/node-label.npz"),
    ("ogb-split", "ogbn_fuzz/split/time/split_dict.pt"), ("calibration", "rates.json"), ("grid", "grid.toml")]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", ["folder", "pipe", "device", "empty", "absent"])
@pytest.mark.parametrize(("name", "file"), SAMPLES, ids=[file for _, file in SAMPLES])
def test_what_is_no_file_is_refused_and_waited_for_by_nobody(samples: Callable[[str], Path], tmp_path: Path, name: str,
                                                             file: str, what: str) -> None:
    folder = shutil.copytree(samples(name), tmp_path / "s")
    path = folder / file
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    elif what == "empty":
        path.touch()
    # What may be left out; an empty file of settings changes none.
    optional = ("ogbn_fuzz/raw/node-label.npz",)
    place = folder / file.split("/")[0] if TARGETS[name].apart else folder
    if (what == "absent" and file in optional) or (what == "empty" and file == "config.toml"):
        TARGETS[name].read(place)
    else:
        refused(lambda: TARGETS[name].read(place), QgnnError)


@pytest.mark.parametrize("name", ["nodes.parquet", "edges.arrow"])
def test_a_part_of_a_table_that_is_a_pipe(tmp_path: Path, name: str) -> None:
    kind = "parquet" if name.endswith("parquet") else "arrow"
    folder = sample(kind, tmp_path / "s") / ("text" if kind == "parquet" else "")
    stem, suffix = name.split(".")
    (folder / stem).mkdir()
    (folder / name).rename(folder / stem / f"a.{suffix}")
    os.mkfifo(folder / stem / f"b.{suffix}")
    refused(lambda: load_graph(f"parquet:{folder}"), InputError, f"b.{suffix}", "is a named pipe, expected a file")


def test_links_in_a_store(tmp_path: Path) -> None:
    """The store may be reached by a link, and have links inside; none may lead out of it."""
    store = make_store(small_graph(nodes=40, features=6), tmp_path / "s", 2).path
    (tmp_path / "link").symlink_to(store)
    assert Store.open(tmp_path / "link").verify() == 14
    inside = store / "part-00000" / "rows.arrow"
    shutil.move(inside, store / "rows")
    inside.symlink_to("../rows")
    assert Store.open(tmp_path / "link").verify() == 14
    shutil.move(store / "rows", tmp_path / "rows")
    inside.unlink()
    inside.symlink_to(tmp_path / "rows")
    refused(lambda: Store.open(store), StoreError, "rows.arrow", "is a link that leads out of the store")
    shutil.move(store / "part-00001", tmp_path / "part")
    (store / "part-00001").symlink_to(tmp_path / "part")
    inside.unlink()
    shutil.move(tmp_path / "rows", inside)
    refused(lambda: Store.open(store), StoreError, "part-00001", "is a link that leads out of the store")


@pytest.mark.parametrize(("text", "word"), [
    (b'{"a": 1, "a": 2}', "has the key 'a' twice"), (b'{"a": NaN}', "holds NaN"), (b"[-Infinity]", "holds -Infinity"),
    (b"[1e999]", "too large for a number"), (b"[" * 100_000, "nested more than 32 deep"),
    (b"[" * 40 + b"]" * 40, "nested more than 32 deep"), (b'["\\ud800"]', "surrogates not allowed"),
    (b"\xff", "can't decode byte"), (b"9" * 5000, "Exceeds the limit"), (b"", "Expecting value")])
def test_json_that_is_refused(text: bytes, word: str) -> None:
    with pytest.raises(ValueError, match=word.replace("(", r"\(")):
        parse_json(text)


def test_json_that_is_read() -> None:
    assert parse_json(b'{"a": [1, 2.5, "\\u00e4\\ud83d\\ude00", null, true]}') == {"a": [1, 2.5, "ä😀", None, True]}
    assert parse_json(b"[" * 32 + b"]" * 32)
    assert parse_toml("a.b = 1")


@pytest.mark.parametrize(("text", "word"), [
    ("x = " + "[" * 3000 + "]" * 3000, "nested more than 32 deep"), ("seed = 0x" + "f" * 5000, "too long to show"),
    ("[train]\nlr = 1" + "0" * 400, "train.lr="), ("[train]\nepochs = " + "9" * 4000, "train.epochs=999"),
    ("[timeouts]\nstart_s = 1e300", "timeouts.start_s"), ("a = 1\n" * 2, "not a TOML file"),
    ("x" * 50_000 + " = 1", "xxx…: unknown key"), ("[quant]\nmethod = \"" + "a" * 50_000 + '"', "quant.method=aaa"),
    ("seed = nan", "seed=nan"), ("".join(f"k{i} = 1\n" for i in range(20_000)), "and 19980 more"),
    ("#" * (2 << 20), "expected at most 1048576")], ids=lambda v: str(v)[:20])
def test_settings_that_are_refused(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "c.toml").write_text(text)
    refused(lambda: load_config(tmp_path / "c.toml"), ConfigError, word)


def _zip(path: Path, entries: dict[str, bytes], kind: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", kind) as file:
        for name, content in entries.items():
            file.writestr(name, content)


def _npy(descr: str, shape: tuple[int, ...], body: bytes = b"") -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": descr, "fortran_order": False, "shape": shape})
    return out.getvalue() + body


EDGES = _npy("<i8", (2, 3), np.array([[0, 1, 2], [1, 2, 0]]).tobytes())


def test_an_entry_that_promises_more_than_it_can_hold(tmp_path: Path) -> None:
    """The array's header says 2 TiB, the archive's list 4 GiB; a stream of 200 bytes becomes 206 kB at most."""
    path, size = tmp_path / "g.npz", 2 << 40
    header = _npy("<i8", (2, size // 16))
    _zip(path, {"edge_index.npy": header})
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02") + 24  # the list's uncompressed size, in 4 bytes
    data[at:at + 4] = struct.pack("<I", 2**32 - 2)
    path.write_bytes(data)
    refused(lambda: load_graph(path), InputError, "edge_index.npy is damaged", "cannot become 4294967294")


def test_a_list_of_arrays_that_breaks_off(tmp_path: Path) -> None:
    """zipfile reads as far as it gets, and an array that is not listed would only be missing."""
    path = tmp_path / "g.npz"
    ones = {"x.npy": _npy("<f8", (3, 1), bytes(24)), "y.npy": _npy("<i8", (3,), bytes(24))}
    _zip(path, {"edge_index.npy": EDGES, **ones})
    data = bytearray(path.read_bytes())
    third = data.rindex(b"PK\x01\x02")
    second = data.rindex(b"PK\x01\x02", 0, third)
    size = data.rindex(b"PK\x05\x06") - third
    data[second + 32:second + 34] = struct.pack("<H", size)  # its comment swallows the next entry
    path.write_bytes(data)
    refused(lambda: load_graph(path), InputError, "says 3 arrays and lists 2")


def test_entries_that_share_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "g.npz"
    _zip(path, {"edge_index.npy": EDGES, "x.npy": _npy("<f8", (3, 9), bytes(216))}, zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    first = data.index(b"PK\x01\x02")
    for at in (first, data.index(b"PK\x01\x02", first + 4)):  # each says that it has nearly all
        data[at + 20:at + 28] = struct.pack("<II", len(data) - 100, len(data) - 100)
    path.write_bytes(data)
    refused(lambda: load_graph(path), InputError, "its arrays take more than the")


@pytest.mark.parametrize(("entries", "words"), [
    ({"edge_index.npy": _npy("|V0", (1 << 60,))}, ["edge_index is |V0"]),
    ({"edge_index.npy": _npy("<i8", (-2, -3), bytes(48))}, ["edge_index is damaged", "(-2, -3)"]),
    ({"edge_index.npy": EDGES, "x.npy": _npy("<U2000", (3,), bytes(24000))}, ["x is <U2000"]),
    ({"edge_index.npy": EDGES, "num_nodes.npy": _npy("<i8", (), struct.pack("<q", 2**30))},
     ["num_nodes: 1073741824 nodes with 3 edges, expected at most 1048768"]),
    ({"edge_index.npy": EDGES, "num_nodes.npy": _npy("<i8", (), struct.pack("<q", 2**62))},
     ["4611686018427387904 nodes, expected at most 2147483647"]),
    ({"edge_index.npy": _npy("<i8", (2, 1), struct.pack("<qq", 0, 2**30))}, ["1073741825 nodes with 1 edges"]),
    ({"edge_index.npy": EDGES, "y.npy": _npy("<i8", (3,), bytes(24)),
      "class_names.npy": _npy("<U1", (1,), b"\xff" * 4)}, ["class_names is no Unicode"]),
    ({"edge_index.npy": EDGES, "y": EDGES}, ["holds 'y', expected arrays alone, named NAME.npy"]),
    ({"edge_index.npy": b"\x93NUMPY\x03\x00" + EDGES[8:]},
     ["npy version 3.0, this program reads 1.0 and 2.0"]),
    ({"edge_index.npy": b"\x93NUMPY\x01\x00\x10\x00" + b"((((((((((((((((" + bytes(48)}, ["edge_index is damaged"]),
])
def test_arrays_that_are_refused(tmp_path: Path, entries: dict[str, bytes], words: list[str]) -> None:
    _zip(tmp_path / "g.npz", entries)
    refused(lambda: load_graph(tmp_path / "g.npz"), InputError, *words)


def test_an_array_that_is_there_twice(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "g.npz", "w") as file:
        file.writestr("edge_index.npy", EDGES)
        with pytest.warns(UserWarning, match="Duplicate name"):
            file.writestr("edge_index.npy", EDGES)
    refused(lambda: load_graph(tmp_path / "g.npz"), InputError, "holds the array edge_index twice")


def test_a_list_of_arrays_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays._Careful, "limit", 1000)
    _zip(tmp_path / "g.npz", {f"{number}.npy": EDGES for number in range(30)})
    refused(lambda: load_graph(tmp_path / "g.npz"), InputError, "its directory has", "expected at most 1000")


def _gz(path: Path, text: bytes, times: int = 1) -> None:
    with gzip.open(path, "wb", 1) as out:
        for _ in range(times):
            out.write(text)


@pytest.mark.parametrize(("file", "text", "times", "words"), [
    ("raw/node-feat.csv.gz", b"0" * MIB, 200, ["has a first line of 1 columns and 8388608 characters or more"]),
    ("raw/node-label.csv.gz", b"0\n" * MIB, 50, ["node-label has shape", "expected (30,)"]),
    ("raw/num-node-list.csv.gz", b"30\n" * MIB, 30, ["counts the nodes of"]),
    ("split/time/train.csv.gz", b"1\n" * MIB, 50, ["train.csv.gz: has more rows than there are nodes (30)"]),
    ("raw/edge.csv.gz", b"," * 2000 + b"\n", 1, ["has 2001 columns, expected 2"]),
    ("raw/num-node-list.csv.gz", b"2000000000\n", 1, ["node-label has shape (30, 1), expected (2000000000,)"]),
])
def test_csv_bombs(tmp_path: Path, file: str, text: bytes, times: int, words: list[str]) -> None:
    folder = sample("ogb-csv", tmp_path / "s")
    _gz(folder / "ogbn_fuzz" / file, text, times)
    refused(lambda: list(load_graph("ogbn-fuzz", root=folder).edges()), InputError, *words, most=400 * MIB)


@pytest.mark.parametrize(("absent", "words"), [
    (["node-label"], ["node-feat cannot have the 2000000000 rows that num-node-list says"]),
    (["node-label", "node-feat"], ["2000000000 nodes with 90 edges"])])
def test_a_count_of_nodes_that_nothing_bears_out(tmp_path: Path, absent: list[str], words: list[str]) -> None:
    folder = sample("ogb-csv", tmp_path / "s")
    for name in absent:
        (folder / "ogbn_fuzz" / "raw" / f"{name}.csv.gz").unlink()
    _gz(folder / "ogbn_fuzz" / "raw" / "num-node-list.csv.gz", b"2000000000\n")
    refused(lambda: load_graph("ogbn-fuzz", root=folder), InputError, *words)


def test_a_footer_that_says_other_rows(tmp_path: Path) -> None:
    folder = sample("parquet", tmp_path / "s") / "text"
    data = (folder / "edges.parquet").read_bytes()
    (size,) = struct.unpack("<I", data[-8:-4])
    footer = data[-8 - size:-8]
    # Thrift's compact protocol: field 3, i64, 90 as a zigzag varint (180 = 0xb4 0x01), which becomes 2**62.
    assert footer.count(b"\x16\xb4\x01\x19") == 1
    huge = b"\x16" + b"\x80" * 8 + b"\x80\x01" + b"\x19"
    footer = footer.replace(b"\x16\xb4\x01\x19", huge)
    (folder / "edges.parquet").write_bytes(data[:-8 - size] + footer + struct.pack("<I", len(footer)) + b"PAR1")
    refused(lambda: load_graph(f"parquet:{folder}"), InputError, "edges.parquet: is no Parquet", "its row groups")


def test_a_compressed_batch_that_becomes_too_much(tmp_path: Path) -> None:
    """The first eight bytes of a compressed buffer say how large it becomes; Arrow would allocate that."""
    path, size = tmp_path / "nodes.arrow", 800_000
    table = pa.table({"node_id": np.arange(size // 8)})
    with pa.OSFile(str(path), "wb") as out, pa.ipc.new_file(
            out, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    check_compression(path, 2 * size)
    data = path.read_bytes()
    assert data.count(struct.pack("<q", size)) == 1
    path.write_bytes(data.replace(struct.pack("<q", size), struct.pack("<q", 1 << 42)))
    with pytest.raises(ValueError, match="becomes 4398046511105 bytes; expected at most 1600000"):
        check_compression(path, 2 * size)
    pq.write_table(pa.table({"src": [1], "dst": [2]}), tmp_path / "edges.parquet")
    refused(lambda: load_graph(f"parquet:{tmp_path}"), InputError, "nodes.arrow", "becomes 4398046511105 bytes")
    path.write_bytes(data)
    assert load_graph(f"parquet:{tmp_path}").num_nodes == size // 8
    with pytest.raises(ValueError, match="is compressed, expected plain data"):
        check_compression(path, 0)


def test_text_that_is_no_utf8(tmp_path: Path) -> None:
    folder = sample("parquet", tmp_path / "s") / "text"
    offsets, text = pa.py_buffer(np.arange(0, 93, 3, np.int32)), pa.py_buffer(b"\xff\xfe\xfd" * 30)
    ids = pa.StringArray.from_buffers(30, offsets, text)
    pq.write_table(pa.table({"node_id": ids}), folder / "nodes.parquet")
    refused(lambda: load_graph(f"parquet:{folder}"), InputError, "nodes.parquet: is damaged after row 0", "UTF8")


def test_features_and_halos_of_a_store_that_are_none(tmp_path: Path) -> None:
    store = make_store(small_graph(nodes=40, features=6), tmp_path / "s", 2).path
    file = store / "part-00000" / "features.arrow"
    column = pa.FixedSizeListArray.from_arrays(pa.array([0.0, np.nan] * 60, pa.float32()), 6)
    _put(store, file, pa.record_batch([column], names=["x"]))
    refused(lambda: Store.open(store).part(0).features_dense(3, 9), StoreError, "rows from 3 on hold NaN or infinity")
    column = pa.FixedSizeListArray.from_arrays(pa.array([0.0, None] * 60, pa.float32()), 6)
    _put(store, file, pa.record_batch([column], names=["x"]))
    refused(lambda: Store.open(store).part(0).features_dense(3, 9), StoreError, "rows from 0 on hold nulls")
    _put(store, store / "part-00000" / "halo.arrow", pa.record_batch([pa.array([1, 2])], names=["source_index"]))
    refused(lambda: Store.open(store).part(0), StoreError, "halo.arrow: a column is int64 with 2 values")


def _put(store: Path, file: Path, batch: pa.RecordBatch, how: str | None = None) -> None:
    file.unlink()
    with pa.OSFile(str(file), "wb") as out, pa.ipc.new_file(
            out, batch.schema, options=pa.ipc.IpcWriteOptions(compression=how)) as writer:
        writer.write_batch(batch)
    edit_manifest(store, lambda m: m["parts"][0]["files"][file.name].update(bytes=file.stat().st_size))


def test_a_store_is_never_compressed(tmp_path: Path) -> None:
    store = make_store(small_graph(nodes=40, features=6), tmp_path / "s", 1).path
    for name in ("features.arrow", "rows.arrow"):
        whole = shutil.copytree(store, tmp_path / name)
        file = whole / "part-00000" / name
        batch = pa.ipc.open_file(file.read_bytes()).get_batch(0)
        _put(whole, file, batch, "zstd")
        refused(lambda whole=whole: Store.open(whole).part(0), StoreError, name, "is compressed, expected plain data")


def test_a_model_that_is_larger_than_it_says_is_not_read(tmp_path: Path) -> None:
    store = make_store(small_graph(nodes=40, features=6), tmp_path / "s", 1)
    path = tmp_path / "m.safetensors"
    untrained_model(store).save(path)
    os.truncate(path, 1 << 40)
    refused(lambda: PackedModel.load(path), ModelError, "it has 1099511627776 bytes, its description says")


@pytest.mark.parametrize(("tensors", "words"), [
    ({"network.weight1": None}, ["tensor network.", "is missing"]), ({"extra": np.zeros(3)}, ["extra is none of"]),
    ({"multipliers": np.full(2, np.nan)}, ["tensor multipliers", "finite numbers"])])
def test_a_checkpoint_of_another_network(tmp_path: Path, tensors: dict[str, Any], words: list[str]) -> None:
    from qgnn_dist.training.state import check_tensors

    network = torch.nn.Linear(3, 2)
    good = {f"network.{name}": value.numpy() for name, value in network.state_dict().items()}
    good["multipliers"] = np.zeros(2)
    check_tensors(good, network)
    bad = {**good, **tensors}
    if "network.weight1" in tensors:
        bad = {name: value for name, value in good.items() if name != "network.weight"}
    refused(lambda: check_tensors(bad, network), InputError, *words)


def _enlarge(ranges: dict[str, Any]) -> None:
    ranges["hidden"]["rms"] = 10**400


@pytest.mark.parametrize(("change", "words"), [
    (_enlarge, ["damaged checkpoint: server: range hidden is "]),
    (lambda ranges: ranges.pop("news/1"), ["the running figures of 'news/1' are missing", "--overwrite"])])
def test_running_figures_that_are_none(tmp_path: Path, change: Callable[[dict[str, Any]], Any],
                                       words: list[str]) -> None:
    """The checkpoint's checksum is right: somebody wrote it so."""
    folder = sample("checkpoint", tmp_path / "sample")
    (file,) = (folder / "run" / "checkpoints").iterdir()
    found = Checkpoint.read(file)
    change(found.server["ranges"])
    file.write_bytes(found.to_bytes())
    refused(lambda: TARGETS["checkpoint"].read(folder), InputError, *words)


def test_an_optimiser_before_its_first_step(tmp_path: Path) -> None:
    folder = sample("checkpoint", tmp_path / "sample")
    (file,) = (folder / "run" / "checkpoints").iterdir()
    found = Checkpoint.read(file)
    name = min(name for name in found.tensors if name.startswith("adam.") and name.endswith(".step"))
    found.tensors[name] = np.array(-1.0, np.float32)  # Adam would divide by 1 − β⁰
    file.write_bytes(found.to_bytes())
    refused(lambda: TARGETS["checkpoint"].read(folder), InputError, f"tensor {name} has numbers below 0")


@pytest.mark.parametrize(("file", "text", "words"), [
    ("metrics.jsonl", '{"epoch": 1}\n{"epoch"\n', ["damaged", "(line 2)"]),
    ("metrics.jsonl", "[]\n", ["damaged: no object"]),
    ("summary.json", "[1]", ["damaged summary"]), ("summary.json", '{"identity": 3}', ["damaged summary"])])
def test_records_of_a_run_that_are_damaged(tmp_path: Path, file: str, text: str, words: list[str]) -> None:
    folder = sample("run", tmp_path / "s")
    (folder / "run" / file).write_text(text)
    refused(lambda: TARGETS["run"].read(folder), InputError, file, *words)


def test_a_calibration_with_a_rate_that_is_there_twice(tmp_path: Path) -> None:
    file = sample("calibration", tmp_path / "s") / "rates.json"
    rates = json.loads(file.read_text())
    rates["layers"].append({**rates["layers"][0], "edge_ns": 1.0})
    file.write_text(json.dumps(rates))
    refused(lambda: TARGETS["calibration"].read(file.parent), InputError, "are missing, or there twice")


def test_names_from_outside_do_not_write_to_the_terminal(tmp_path: Path) -> None:
    """Markup of ours and control characters are shown as what they are."""
    import contextlib

    from rich.console import Console

    from qgnn_dist import render

    store = make_store(small_graph(nodes=40, features=6), tmp_path / "s", 1).path
    edit_manifest(store, lambda m: m.update(name="[/red]\x1b[2Jx"))
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        render.inspection(api.inspect(store), Console(file=out, width=200))
    assert "[/red]\\x1b[2Jx" in out.getvalue()
    assert "\x1b[2J" not in out.getvalue()
    assert json.dumps(api.inspect(store))
