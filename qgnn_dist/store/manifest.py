# SPDX-License-Identifier: Apache-2.0
"""The store's manifest: read with distrust, written last."""
from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import StoreError
from ..files.read import check_regular, is_inside, read_json, reason, shown
from ..quant.columns import FEATURE_BITS

__all__ = ["CHECKSUM", "CODED_VERSION", "FORMAT_VERSION", "LARGEST_MANIFEST", "MANIFEST", "ORDERED_VERSION",
           "PART_FILE", "SOURCE_ORDER", "check_manifest", "manifest_checksum", "part_folder", "read_manifest"]

FORMAT_VERSION, ORDERED_VERSION, CODED_VERSION = 1, 2, 3
"""Of a store whose rows lie in the order of the source, which every reader knows; in another order; and of one whose
dense features are codes, in any order."""
SOURCE_ORDER = "source"
MANIFEST = "manifest.json"
CHECKSUM = "checksum"
"""Of the manifest itself; stores of earlier programs have none."""
LARGEST_MANIFEST = 32 << 20
LARGEST_FLOAT = sys.float_info.max
"""JSON has larger whole numbers, which become no float."""
"""Bytes: some 15,000 parts."""
MOST_COLUMNS = 2**31 - 1
"""Features, as their indices are int32."""
MOST_CLASSES = 65536
"""Or as many as there are nodes."""
_FILE_NAME = re.compile(r"[a-z_]+\.arrow")
PART_FILE = re.compile(rf"part-\d{{5,}}/{_FILE_NAME.pattern}")
"""Names of a store's files but its manifest, relative to its folder."""
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_TOP: dict[str, type | tuple[type, ...]] = {
    "format_version": int, "fingerprint": str, "name": str, "num_nodes": int, "num_edges": int, "num_features": int,
    "feature_kind": (str, type(None)), "num_classes": int, "class_names": (list, type(None)), "has_labels": bool,
    "has_split": bool, "partitioner": dict, "cleaned": dict, "cut_fraction": (int, float), "balance": dict,
    "halo_rows": int, "bytes_per_round": dict, "peak": dict, "parts": list,
}
_NUMBER = (int, float)
_PART: dict[str, type] = {"rows": int, "boundary": int, "halo": int, "sends": int, "directed_edges": int, "files": dict}
_FILES = {"nodes.arrow", "rows.arrow", "neighbours.arrow", "halo.arrow", "peers.arrow", "send.arrow"}
_FEATURE_FILES = {None: set[str](), "dense": {"features.arrow"}, "sparse": {"features.arrow", "feature_rows.arrow"}}


def part_folder(part: int) -> str:
    """Name of a part's folder inside the store."""
    return f"part-{part:05d}"


def read_manifest(store: Path) -> dict[str, Any]:
    """Read and check a store's manifest and the sizes of all files that it lists.

    Raises:
        StoreError: no store here, another format version, fields missing or odd, a file missing or of another size.
    """
    file = store / MANIFEST
    try:
        manifest = read_json(file, LARGEST_MANIFEST)
    except FileNotFoundError:
        raise StoreError("not a store (no manifest.json); make one with `qgnn partition`", file=str(store)) from None
    except NotADirectoryError:
        raise StoreError("not a store but a file; make a store with `qgnn partition`", file=str(store)) from None
    except (OSError, ValueError) as error:
        raise StoreError(f"manifest cannot be read: {reason(error)}; partition the graph again",
                         file=str(file)) from None
    return check_manifest(manifest, file, lambda part, files: _check_on_disk(store, part, files))


def check_manifest(manifest: Any, file: Path | str, look: Callable[[int, dict[str, Any]], None]) -> dict[str, Any]:
    """A manifest whose every field is checked.

    Args: file: for errors. look: checks that a part's files, by the manifest, are there.
    Raises:
        StoreError: another format version, fields missing or odd; and what `look` raises.
    """
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version not in (FORMAT_VERSION, ORDERED_VERSION, CODED_VERSION):
        raise StoreError(f"store format {shown(version)}, this program reads {FORMAT_VERSION} to {CODED_VERSION}; "
                         "partition the graph again", file=str(file))
    _demand(manifest, _TOP, file, "manifest")
    _check_top(manifest, file)
    _check_order(manifest, file)
    _check_feature_bits(manifest, file)
    _check_hops(manifest, file)
    _check_standardised(manifest, file)
    feature_files = _FEATURE_FILES[manifest["feature_kind"]]
    if version == CODED_VERSION:
        feature_files = {*feature_files, "feature_grids.arrow"}
    for part, entry in enumerate(manifest["parts"]):
        if not isinstance(entry, dict):
            raise StoreError(f"part {part} is no object", file=str(file))
        _demand(entry, _PART, file, f"part {part}")
        _check_files(part, entry["files"], _FILES | feature_files, file)
        look(part, entry["files"])
    _check_sums(manifest, file)
    _check_told(manifest, file)
    # Last, so that a fault that can be named is.
    if CHECKSUM in manifest and manifest[CHECKSUM] != manifest_checksum(manifest):
        raise StoreError("manifest does not fit its own checksum; it was changed or damaged, partition the graph again",
                         file=str(file))
    return dict(manifest)


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """BLAKE2b-256, hex, of all that a manifest says, but for its checksum; independent of how its JSON is laid out."""
    rest = {key: value for key, value in manifest.items() if key != CHECKSUM}
    return hashlib.blake2b(json.dumps(rest, sort_keys=True).encode(), digest_size=32).hexdigest()


def _check_top(manifest: dict[str, Any], file: Path | str) -> None:
    """What the fields of the manifest say of one another."""
    kind, names = manifest["feature_kind"], manifest["class_names"]
    if kind not in _FEATURE_FILES or (kind is None) != (manifest["num_features"] == 0):
        raise StoreError(f"feature_kind is {shown(repr(kind))} with {manifest['num_features']} features, expected "
                         "'dense' or 'sparse', or null without any", file=str(file))
    if names is not None and (len(names) != manifest["num_classes"] or not all(isinstance(n, str) for n in names)):
        raise StoreError(f"class_names are not {manifest['num_classes']} texts", file=str(file))
    if not _FINGERPRINT.fullmatch(manifest["fingerprint"]):
        raise StoreError(f"fingerprint is {shown(repr(manifest['fingerprint']))}, expected 64 hex digits",
                         file=str(file))
    if manifest["num_features"] > MOST_COLUMNS:
        raise StoreError(f"num_features is {manifest['num_features']}, expected at most {MOST_COLUMNS}", file=str(file))
    if manifest["num_classes"] > max(manifest["num_nodes"], MOST_CLASSES):
        raise StoreError(f"num_classes is {manifest['num_classes']}, expected at most {MOST_CLASSES}, or as many as "
                         "nodes", file=str(file))
    if not 0 <= manifest["cut_fraction"] <= 1:
        raise StoreError(f"cut_fraction is {manifest['cut_fraction']}, expected 0 to 1", file=str(file))


def _check_order(manifest: dict[str, Any], file: Path | str) -> None:
    """Version 1 means the order of the source, said or not; another order is named, and is version 2 (or 3)."""
    if "order" in manifest or manifest["format_version"] != FORMAT_VERSION:
        _demand(manifest, {"order": dict}, file, "manifest")
        _demand(manifest["order"], {"method": str}, file, "order")
        if manifest["format_version"] == CODED_VERSION:
            return
        if (manifest["order"]["method"] != SOURCE_ORDER) != (manifest["format_version"] == ORDERED_VERSION):
            raise StoreError(f"order is {shown(repr(manifest['order']['method']))} in store format "
                             f"{manifest['format_version']}; expected {SOURCE_ORDER!r} in {FORMAT_VERSION} alone",
                             file=str(file))


def _check_feature_bits(manifest: dict[str, Any], file: Path | str) -> None:
    """Dense features are codes in version 3, and in no other."""
    bits, version = manifest.get("feature_bits"), manifest["format_version"]
    fits = type(bits) is int and bits in FEATURE_BITS and manifest["feature_kind"] == "dense"
    if fits != (version == CODED_VERSION) or (bits is not None and not fits):
        raise StoreError(f"feature_bits is {shown(bits)} with {manifest['feature_kind']} features in store format "
                         f"{version}; expected 8, 4 or 2 with dense ones in {CODED_VERSION} alone", file=str(file))


def _check_hops(manifest: dict[str, Any], file: Path | str) -> None:
    """Mixed features are dense, and have a scale a hop."""
    if "hops" not in manifest:
        return
    _demand(manifest, {"hops": dict}, file, "manifest")
    _demand(manifest["hops"], {"count": int, "scales": list}, file, "hops")
    count, scales = manifest["hops"]["count"], manifest["hops"]["scales"]
    fits = count > 0 and len(scales) == count and all(
        isinstance(s, _NUMBER) and not isinstance(s, bool) and 0 < s <= LARGEST_FLOAT for s in scales)
    if not fits or manifest["feature_kind"] != "dense" or manifest["num_features"] % (count + 1):
        raise StoreError(f"hops has count {shown(count)} and {len(scales)} scales with {manifest['num_features']} "
                         f"{manifest['feature_kind']} features; expected a number above 0 for each hop, and dense "
                         "features, as many for every hop", file=str(file))


def _check_standardised(manifest: dict[str, Any], file: Path | str) -> None:
    """A mean and a deviation of each of a node's own columns, which are dense."""
    if "standardised" not in manifest:
        return
    _demand(manifest, {"standardised": dict}, file, "manifest")
    _demand(manifest["standardised"], {"means": list, "deviations": list}, file, "standardised")
    means, deviations = manifest["standardised"]["means"], manifest["standardised"]["deviations"]
    columns = manifest["num_features"] // (manifest["hops"]["count"] + 1 if "hops" in manifest else 1)
    numbers = all(isinstance(v, _NUMBER) and not isinstance(v, bool) and abs(v) <= LARGEST_FLOAT
                  for v in (*means, *deviations))
    if (manifest["feature_kind"] != "dense" or not numbers or not len(means) == len(deviations) == columns
            or min(deviations) <= 0):
        raise StoreError(f"standardised has {len(means)} means and {len(deviations)} deviations of {columns} "
                         f"{manifest['feature_kind']} columns; expected numbers, deviations above 0, of each dense "
                         "column", file=str(file))


def _check_sums(manifest: dict[str, Any], file: Path | str) -> None:
    parts = manifest["parts"]
    for key, total, what in (("rows", manifest["num_nodes"], "nodes"), ("halo", manifest["halo_rows"], "halo rows"),
                             ("directed_edges", 2 * manifest["num_edges"], "directed edges")):
        found = sum(entry[key] for entry in parts)
        if not parts or found != total:
            raise StoreError(f"the {len(parts)} parts hold {found} {what}, the manifest counts {total}", file=str(file))
    for part, entry in enumerate(parts):
        if not entry["boundary"] <= entry["rows"] or entry["rows"] + entry["halo"] >= 2**31:
            raise StoreError(f"part {part}: {entry['boundary']} boundary rows and {entry['halo']} halo rows do not fit "
                             f"{entry['rows']} rows", file=str(file))


def _check_told(manifest: dict[str, Any], file: Path | str) -> None:
    """What is there for people to see: of the right types, so that showing it cannot fail."""
    told: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("partitioner", manifest["partitioner"], {"method": str, "seed": int, "reason": str}),
        ("balance", manifest["balance"], {"rows": _NUMBER, "edges": _NUMBER}),
        ("peak", manifest["peak"], {"peak_anon_bytes": int, "peak_rss_bytes": int})]
    if "memory_gb" in manifest["peak"]:
        told.append(("peak", manifest["peak"], {"memory_gb": _NUMBER, "builder_anon_bytes": int}))
    if "order" in manifest:
        told.append(("order", manifest["order"], {"reason": str}))
    for name, kind in (("cleaned", int), ("bytes_per_round", int), ("seconds", _NUMBER)):
        values = manifest.get(name, {})
        if not isinstance(values, dict):
            raise StoreError(f"{name} is no object", file=str(file))
        told.append((name, values, dict.fromkeys(values, kind)))
    counts = dict.fromkeys((key for key in manifest["parts"][0] if key not in _PART), int)
    told += [(f"part {part}", entry, counts) for part, entry in enumerate(manifest["parts"])]
    for where, values, wanted in told:
        _demand(values, wanted, file, where)


def _demand(values: dict[str, Any], wanted: dict[str, Any], file: Path | str, where: str) -> None:
    for key, kind in wanted.items():
        if key not in values or not isinstance(values[key], kind) or isinstance(values[key], bool) != (kind is bool):
            raise StoreError(f"{where}: {shown(key)} is {shown(repr(values.get(key)))}, which is missing or of the "
                             "wrong type", file=str(file))
        if kind in (int, _NUMBER) and not 0 <= values[key] < 2**62:
            raise StoreError(f"{where}: {shown(key)}={shown(values[key])} is out of range", file=str(file))


def _check_files(part: int, files: dict[str, Any], needed: set[str], manifest: Path | str) -> None:
    if lacking := sorted(needed - set(files)):
        raise StoreError(f"part {part}: the manifest does not list {', '.join(lacking)}", file=str(manifest))
    for name, entry in files.items():
        if not _FILE_NAME.fullmatch(name):
            raise StoreError(f"part {part}: file name {shown(repr(name))} is not one that a store has",
                             file=str(manifest))
        if not isinstance(entry, dict) or type(entry.get("bytes")) is not int or type(entry.get("blake2b")) is not str:
            raise StoreError(f"part {part}: {name} has no size and checksum", file=str(manifest))


def _check_on_disk(store: Path, part: int, files: dict[str, Any]) -> None:
    """A part's files are there, are files inside the store, and of the sizes that the manifest says."""
    for name, entry in files.items():
        path = store / part_folder(part) / name
        try:
            size = check_regular(path)
        except (FileNotFoundError, NotADirectoryError):
            raise StoreError("file is missing; partition the graph again", file=str(path)) from None
        except OSError as error:
            raise StoreError(f"{reason(error)}; partition the graph again", file=str(path)) from None
        if not is_inside(path, store):
            raise StoreError("is a link that leads out of the store; copy the file to its place", file=str(path))
        if size != entry["bytes"]:
            raise StoreError(f"is {size} bytes, the manifest says {entry['bytes']}; partition the graph again",
                             file=str(path))
