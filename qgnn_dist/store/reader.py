# SPDX-License-Identifier: Apache-2.0
"""A graph on disk, one folder a part, memory-mapped.

Legend: n local rows of a part, H halo slots, F features.
"""
from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..config import StorageConfig
from ..data.graph import NO_SPLIT, TEST, SparseFeatures
from ..errors import StoreError
from ..files.read import shown
from ..quant.columns import ColumnGrids
from ..quant.packed import row_bytes
from ..storage.cache import CachedFiles
from ..storage.place import uri_of
from .checks import check_degrees, check_finite, check_order, check_peers, check_range, check_row_pointer
from .columns import (
    as_numpy,
    check_plain,
    check_values,
    checksum,
    forget_pages,
    map_file,
    open_batches,
    read_batch,
    read_columns,
)
from .manifest import SOURCE_ORDER, part_folder, read_manifest
from .remote import RemoteParts

__all__ = ["FEATURE_BLOCK_ROWS", "Part", "PeerPlan", "Store"]

FEATURE_BLOCK_ROWS = 65536
"""Rows of one record batch of dense features."""


@dataclass(frozen=True)
class PeerPlan:
    """What a part exchanges with one other part.

    Attributes:
        peer: the other part. send_rows: int32, our local rows that it reads, ascending.
        recv_begin, recv_count: our halo slots that hold its rows, in the same order as its `send_rows`.
    """

    peer: int
    send_rows: np.ndarray
    recv_begin: int
    recv_count: int


def _stored_values(manifest: dict[str, Any]) -> float:
    if manifest["feature_kind"] != "sparse":
        return float(manifest["num_features"])
    # An index of 4 bytes and a value of 4.
    stored = sum(entry["files"]["features.arrow"]["bytes"] for entry in manifest["parts"]) / 8
    return float(stored / max(manifest["num_nodes"], 1))


class Store:
    """A partitioned graph. Open it by `Store.open`.

    Attributes: path: its folder, or its URI on an object store. stored_values: kept of a feature row in the mean;
        `num_features` where they are dense.
    """

    def __init__(self, path: Path | str, manifest: dict[str, Any], remote: RemoteParts | None = None) -> None:
        self.path, self.manifest, self._remote = path, manifest, remote
        self.fingerprint: str = manifest["fingerprint"]
        self.name: str = manifest["name"]
        self.order: str = manifest["order"]["method"] if "order" in manifest else SOURCE_ORDER
        self.num_parts = len(manifest["parts"])
        self.num_nodes: int = manifest["num_nodes"]
        self.num_edges: int = manifest["num_edges"]
        self.num_features: int = manifest["num_features"]
        self.feature_kind: str | None = manifest["feature_kind"]
        self.feature_bits: int | None = manifest.get("feature_bits")
        self.standardised = "standardised" in manifest
        self.hops = int(manifest["hops"]["count"]) if "hops" in manifest else 0
        self.stored_values = _stored_values(manifest)
        self.num_classes: int = manifest["num_classes"]
        self.class_names: list[str] | None = manifest["class_names"]
        self.has_labels: bool = manifest["has_labels"]
        self.has_split: bool = manifest["has_split"]

    @classmethod
    def open(cls, path: str | Path, storage: StorageConfig | None = None) -> Store:
        """Check the manifest and every file's size.

        Args: path: a folder, or a URI; nothing but the manifest is fetched from there. storage: settings of that.
        Raises:
            StoreError: no store, damaged, or of another version.
            InputError, StorageError: as storage.place.Place.
        """
        uri = uri_of(path)
        if uri is not None:
            remote = RemoteParts(uri, storage or StorageConfig())
            return cls(uri, remote.read_manifest(), remote)
        return cls(Path(path), read_manifest(Path(path)))

    @property
    def place(self) -> str:
        """What opens it in every process: an absolute path, or a URI."""
        return str(self.path) if self._remote is not None else os.path.abspath(self.path)

    def opening_s(self, storage: StorageConfig) -> float:
        """What a worker may take for its part's way from an object store; nothing where the store is a folder."""
        return 0.0 if self._remote is None else storage.fetch_s

    def part(self, index: int) -> Part:
        """One part, its arrays memory-mapped and its sizes checked; fetched first where it is not on this host yet.

        Raises:
            StoreError: no such part, or its files contradict the manifest. InputError, OutputError, DeadlineError: as
            storage.cache.Cache.open.
        """
        if not 0 <= index < self.num_parts:
            raise StoreError(f"no part {index}: the store has {self.num_parts}", file=str(self.path))
        if self._remote is None:
            return Part(self, index, Path(self.path) / part_folder(index))
        held = self._remote.open(index, self.manifest["parts"][index]["files"])
        return Part(self, index, held.folder, held)

    def verify(self) -> int:
        """Compare every file with its checksum; returns the number of files.

        Raises:
            StoreError: names the first file that differs.
        """
        count = 0
        for part, entry in enumerate(self.manifest["parts"]):
            for name, wanted in entry["files"].items():
                path = f"{self.path}/{part_folder(part)}/{name}"
                got = checksum(Path(path)) if self._remote is None else self._remote.checksum(part, name)
                if got != wanted["blake2b"]:
                    raise StoreError(f"checksum is {got[:16]}…, the manifest says {wanted['blake2b'][:16]}…; the file "
                                     "was changed or damaged, partition the graph again", file=path)
                count += 1
        return count


class Part:
    """One part's arrays.

    Attributes:
        indptr: int64 (n+1,). indices: int32, below n a local row, from n on a halo slot; each row's neighbours in the
            order of their source index, whatever the cut. degree: int32 (n,).
        source_index: int64 (n,), the row's place in the source; boundary rows first, then interior, each in the
            store's order.
        labels: int32 (n,) or None. split: int8 (n,) or None. node_ids: Arrow array (n,).
        peers: plans of all parts that it exchanges rows with, ascending.
    """

    def __init__(self, store: Store, index: int, folder: Path, held: CachedFiles | None = None) -> None:
        entry = store.manifest["parts"][index]
        self.index = index
        self.folder, self._held = folder, held  # what is held stays in the host's cache
        self.num_local, self.num_boundary, self.num_halo = entry["rows"], entry["boundary"], entry["halo"]
        self.feature_kind, self.num_features = store.feature_kind, store.num_features
        self.feature_bits, self._num_nodes = store.feature_bits, store.num_nodes
        self.stored_values = store.stored_values
        names = ["source_index", "node_id", "degree"]
        names += ["label"] * store.has_labels + ["split"] * store.has_split
        mapped = map_file(self.folder / "nodes.arrow")
        nodes = read_columns(self.folder / "nodes.arrow", names, mapped)
        self.node_ids: pa.Array = nodes["node_id"]
        if not (pa.types.is_integer(self.node_ids.type) or pa.types.is_string(self.node_ids.type)
                or pa.types.is_large_string(self.node_ids.type)) or len(self.node_ids) != self.num_local:
            raise StoreError(f"node_id is {shown(str(self.node_ids.type))} with {len(self.node_ids)} values, expected "
                             f"integers or text, {self.num_local}; partition the graph again",
                             file=str(self.folder / "nodes.arrow"))
        check_values(self.node_ids, self.folder / "nodes.arrow")
        self.source_index = self._array("nodes.arrow", nodes["source_index"], np.int64, self.num_local)
        self.degree = self._array("nodes.arrow", nodes["degree"], np.int32, self.num_local)
        self.labels = self._array("nodes.arrow", nodes["label"], np.int32, self.num_local) if store.has_labels else None
        self.split = self._array("nodes.arrow", nodes["split"], np.int8, self.num_local) if store.has_split else None
        self.indptr = self._column("rows.arrow", "indptr", np.int64, self.num_local + 1)
        self.indices = self._column("neighbours.arrow", "index", np.int32, entry["directed_edges"])
        if self.feature_kind == "dense":
            check_plain(self.folder / "features.arrow")  # once, as the file is mapped anew for every block
        self._check(store)
        self.peers = self._read_peers(store)
        forget_pages(mapped)  # the checks have read all of it; who needs labels, ids or source indices comes back

    @cached_property
    def halo_source_index(self) -> np.ndarray:
        """int64 (H,): the source index of every halo slot, within a peer in the order of its rows."""
        index = self._column("halo.arrow", "source_index", np.int64, self.num_halo)
        check_range(index, 0, self._num_nodes, "source_index", self.folder / "halo.arrow")
        return index

    def features_dense(self, begin: int, end: int) -> np.ndarray:
        """Rows begin..end as float32 (n, F), C-contiguous; a view where one float32 block holds them, made anew of
        features that are codes in the store."""
        reader, file, grids = self._feature_batches, self.folder / "features.arrow", self._feature_grids
        size = self.num_features if grids is None else row_bytes(self.num_features, grids.bits)
        pieces = []
        for number in range(begin // FEATURE_BLOCK_ROWS, -(-end // FEATURE_BLOCK_ROWS) if end > begin else 0):
            first = number * FEATURE_BLOCK_ROWS
            column = read_batch(reader, number, file).column("x")
            low, high = max(begin - first, 0), min(end - first, len(column))
            flat = column.flatten()
            if column.null_count or flat.null_count or len(flat) != len(column) * size:
                raise StoreError(f"rows from {first} on hold nulls; partition the graph again", file=str(file))
            piece = as_numpy(flat)[low * size:high * size].reshape(-1, size)
            if grids is None and not np.isfinite(piece).all():
                raise StoreError(f"rows from {first + low} on hold NaN or infinity; partition the graph again",
                                 file=str(file))
            pieces.append(piece if grids is None else grids.unpack(piece))
        rows = pieces[0] if len(pieces) == 1 else np.concatenate(
            pieces or [np.empty((0, self.num_features), np.float32)])
        if len(rows) != end - begin:
            raise StoreError(f"holds {len(rows)} of the rows {begin}…{end}; partition the graph again", file=str(file))
        return np.ascontiguousarray(rows, np.float32)

    def features_sparse(self, begin: int, end: int) -> SparseFeatures:
        """Rows begin..end in CSR form, views."""
        return self._sparse.block(begin, end)

    @property
    def _feature_batches(self) -> pa.ipc.RecordBatchFileReader:
        """The dense features' file, mapped anew for every block: what was read once would stay resident otherwise."""
        file = self.folder / "features.arrow"
        reader = open_batches(file)
        kinds, words, width = [pa.float32(), pa.float16()], "float32 or float16", self.num_features
        if self.feature_bits is not None:
            kinds, words, width = [pa.uint8()], "uint8", row_bytes(self.num_features, self.feature_bits)
        if reader.schema not in [pa.schema([("x", pa.list_(kind, width))]) for kind in kinds]:
            raise StoreError(f"columns are {shown(str(reader.schema))}, expected x: {words} [{width}]; partition the "
                             "graph again", file=str(file))
        return reader

    @cached_property
    def _feature_grids(self) -> ColumnGrids | None:
        """What codes of features mean; None where features are not coded."""
        if self.feature_bits is None:
            return None
        low, high = (self._column("feature_grids.arrow", name, np.float32, self.num_features)
                     for name in ("low", "high"))
        if not (np.isfinite(low).all() and np.isfinite(high).all() and (low <= high).all()):
            raise StoreError("a column's grid is not a range of finite numbers; partition the graph again",
                             file=str(self.folder / "feature_grids.arrow"))
        return ColumnGrids(self.feature_bits, low, high)

    @cached_property
    def _sparse(self) -> SparseFeatures:
        indptr = self._column("feature_rows.arrow", "indptr", np.int64, self.num_local + 1)
        count = int(indptr[-1])
        check_row_pointer(indptr, count, self.folder / "feature_rows.arrow")
        indices = self._column("features.arrow", "index", np.int32, count)
        values = self._column("features.arrow", "value", np.float32, count)
        check_range(indices, 0, self.num_features, "feature index", self.folder / "features.arrow")
        check_finite(values, "feature value", self.folder / "features.arrow")
        return SparseFeatures(indptr, indices, values, (self.num_local, self.num_features))

    def _check(self, store: Store) -> None:
        """Refuse what would be read out of bounds, or in another order than the other parts expect."""
        nodes = self.folder / "nodes.arrow"
        self._column("halo.arrow", "source_index", np.int64, self.num_halo)  # what allows for H rows of buffers
        check_order(self.source_index, self.num_boundary, store.num_nodes, store.order == SOURCE_ORDER, nodes)
        check_row_pointer(self.indptr, len(self.indices), self.folder / "rows.arrow")
        check_range(self.indices, 0, self.num_local + self.num_halo, "neighbour", self.folder / "neighbours.arrow")
        check_degrees(self.indptr, self.degree, nodes)
        if self.labels is not None:
            check_range(self.labels, -1, store.num_classes, "label", nodes)
        if self.split is not None:
            check_range(self.split, NO_SPLIT, TEST + 1, "split", nodes)

    def _read_peers(self, store: Store) -> list[PeerPlan]:
        file = self.folder / "peers.arrow"
        columns = read_columns(file, ["peer", "send_begin", "send_count", "recv_begin", "recv_count"])
        table = {name: self._array("peers.arrow", column, np.int32 if name == "peer" else np.int64, len(column))
                 for name, column in columns.items()}
        total = store.manifest["parts"][self.index]["sends"]
        send = self._column("send.arrow", "row", np.int32, total)
        ends = np.cumsum(table["send_count"])
        if (table["send_count"] < 0).any() or (table["send_begin"] != ends - table["send_count"]).any():
            raise StoreError("rows to send do not follow one another; partition the graph again", file=str(file))
        peers = [PeerPlan(int(peer), send[sb:sb + sc], int(rb), int(rc)) for peer, sb, sc, rb, rc in zip(
            table["peer"], table["send_begin"], table["send_count"], table["recv_begin"], table["recv_count"])]
        check_peers(peers, self.index, store.num_parts, self.num_boundary, self.num_halo, total, self.folder)
        return peers

    def _column(self, file: str, name: str, dtype: type, count: int) -> np.ndarray:
        return self._array(file, read_columns(self.folder / file, [name])[name], dtype, count)

    def _array(self, file: str, column: pa.Array, dtype: type, count: int) -> np.ndarray:
        if column.type != pa.from_numpy_dtype(dtype) or len(column) != count or column.null_count:
            raise StoreError(f"a column is {column.type} with {len(column)} values and {column.null_count} nulls, "
                             f"expected {np.dtype(dtype)} with {count}", file=str(self.folder / file))
        return as_numpy(column)
