# SPDX-License-Identifier: Apache-2.0
"""Mutations of valid files: of any bytes, and of formats whose checksums are to be right again afterwards.

Every function takes a generator and gives equal bytes for equal generators.
"""
from __future__ import annotations

import gzip
import io
import json
import re
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["any_bytes", "csv_gz", "json_text", "npz", "safetensors", "toml_text"]

Rng = np.random.Generator
INTEGERS = [0, 1, 2, 3, 7, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40,
            2**62, 2**63 - 1]
WORDS = ["", "../../etc/passwd", "/etc/passwd", "\x00", "a" * 100_000, "\ud800", "[/red]", "\x1b[2J", "nan", "ä€😀"]
VALUES: list[Any] = [
    *INTEGERS, *(-value for value in INTEGERS), 2**64, 10**400, 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"),
    -float("inf"), True, False, None, [], {}, [[]], {"": {}}, [0] * 1000, *WORDS]
NUMBER = re.compile(rb"-?\d+(\.\d+)?(e-?\d+)?")


def pick(rng: Rng, choices: Any) -> Any:
    """One of a list, by position: numpy would make an array of it."""
    return choices[int(rng.integers(len(choices)))]


def any_bytes(rng: Rng, data: bytes) -> bytes:
    """One to three changes of bytes: bits, words, cuts, insertions, splices."""
    for _ in range(int(rng.integers(1, 4))):
        data = pick(rng, _BYTE_CHANGES)(rng, data)
    return data


def _place(rng: Rng, size: int) -> int:
    """Anywhere, but every other time near an end, where headers and footers are."""
    if size <= 1:
        return 0
    near = min(size, 256)
    return int(pick(rng, [rng.integers(size), rng.integers(size), rng.integers(near), size - 1 - rng.integers(near)]))


def _flip_bits(rng: Rng, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 9)) if changed else 0):
        changed[_place(rng, len(changed))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _overwrite(rng: Rng, data: bytes) -> bytes:
    """A word of 1, 2, 4 or 8 bytes becomes one that is telling."""
    size = int(pick(rng, [1, 2, 4, 8]))
    word = (int(pick(rng, INTEGERS)) * int(pick(rng, [1, -1]))) % 256**size
    at = _place(rng, max(len(data) - size, 1))
    at -= at % size if rng.random() < 0.5 else 0
    return data[:at] + word.to_bytes(size, "little") + data[at + size:]


def _truncate(rng: Rng, data: bytes) -> bytes:
    return data[:_place(rng, len(data))]


def _insert(rng: Rng, data: bytes) -> bytes:
    at = _place(rng, len(data))
    return data[:at] + rng.bytes(int(rng.integers(1, 64))) + data[at:]


def _delete(rng: Rng, data: bytes) -> bytes:
    at = _place(rng, len(data))
    return data[:at] + data[at + int(rng.integers(1, 64)):]


def _splice(rng: Rng, data: bytes) -> bytes:
    """A piece lies elsewhere too."""
    begin, at, size = _place(rng, len(data)), _place(rng, len(data)), int(rng.integers(1, 256))
    piece = data[begin:begin + size]
    return data[:at] + piece + data[at + (len(piece) if rng.random() < 0.7 else 0):]


def _swap(rng: Rng, data: bytes) -> bytes:
    size = int(pick(rng, [1, 4, 8, 64]))
    first, second = sorted((_place(rng, len(data)), _place(rng, len(data))))
    if second - first < size:
        return data
    return (data[:first] + data[second:second + size] + data[first + size:second] + data[first:first + size]
            + data[second + size:])


def _fill(rng: Rng, data: bytes) -> bytes:
    at, size = _place(rng, len(data)), int(rng.integers(1, 512))
    return data[:at] + bytes([int(pick(rng, [0, 255, 128]))]) * len(data[at:at + size]) + data[at + size:]


_BYTE_CHANGES: list[Callable[[Rng, bytes], bytes]] = [
    _flip_bits, _flip_bits, _overwrite, _overwrite, _overwrite, _truncate, _insert, _delete, _splice, _swap, _fill]


def json_text(rng: Rng, data: bytes) -> bytes:
    """Fields replaced, removed, renamed, swapped, nested or doubled; the text is JSON again, or nearly."""
    value = json.loads(data)
    for _ in range(int(rng.integers(1, 3))):
        value = edit(rng, value)
    text = json.dumps(value)
    if rng.random() < 0.05:
        text = pick(rng, ["[" * 5000 + text, "{" * 50 + text, text + text, text[:-1], "\ufeff" + text, ""])
    if rng.random() < 0.05 and text.startswith("{") and isinstance(value, dict) and value:
        text = "{" + f"{json.dumps(pick(rng, list(value)))}: {json.dumps(pick(rng, VALUES))}, " + text[1:]
    return text.encode("utf-8", "surrogatepass")


def edit(rng: Rng, value: Any) -> Any:
    """One change somewhere inside nested objects and lists."""
    places: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        outer = waiting.pop()
        keys = outer.keys() if isinstance(outer, dict) else range(len(outer)) if isinstance(outer, list) else ()
        for key in list(keys):
            places.append((outer, key))
            waiting.append(outer[key])
    if not places:
        return pick(rng, VALUES)
    outer, key = pick(rng, places)
    change = pick(rng, ["replace", "replace", "replace", "number", "number", "remove", "rename", "swap", "nest",
                        "copy"])
    if change == "replace":
        outer[key] = pick(rng, VALUES)
    elif change == "number" and isinstance(outer[key], (int, float)):
        outer[key] = pick(rng, [outer[key] + 1, outer[key] - 1, outer[key] * 2, -outer[key], float(outer[key]),
                                str(outer[key]), outer[key] * 10**12])
    elif change == "remove":
        del outer[key]
    elif change == "rename" and isinstance(outer, dict):
        outer[pick(rng, [str(key) + "x", str(key).upper(), "", *WORDS])] = outer.pop(key)
    elif change == "swap":
        other, at = pick(rng, places)
        outer[key], other[at] = other[at], outer[key]
        return json.loads(json.dumps(value, default=str)) if _finite(value) else {}
    elif change == "nest":
        for _ in range(int(pick(rng, [1, 40]))):
            outer[key] = [outer[key]]
    elif isinstance(outer, list):
        outer.append(outer[key])
    return value


def _finite(value: Any) -> bool:
    """Whether swapping has put nothing into itself."""
    try:
        json.dumps(value)
        return True
    except ValueError:
        return False


def toml_text(rng: Rng, data: bytes) -> bytes:
    """Lines removed, doubled, moved, and with other values."""
    lines = data.decode().splitlines()
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(len(lines))) if lines else 0
        change = pick(rng, ["value", "value", "value", "remove", "double", "move", "insert"])
        if not lines or change == "insert":
            lines.insert(at, pick(rng, ["[a.b.c]", "x = 1", "[[train]]", "a.b.c.d = 2", "\x00", "= =", "[model",
                                        '"" = 1',
                                        "seed.x = 1", "x" * 100_000 + " = 1", ".".join("a" * 500) + " = 1"]))
        elif change == "remove":
            del lines[at]
        elif change == "double":
            lines.insert(at, lines[at])
        elif change == "move":
            lines.insert(int(rng.integers(len(lines))), lines.pop(at))
        else:
            lines[at] = f"{lines[at].partition('=')[0]} = " + str(pick(rng, [
                *INTEGERS, -1, 0.5, "nan", "inf", "-inf", "true", "1e400", '""', '"recipe"', "[]", "{}", "1979-05-27",
                "07:32:00", "0x" + "f" * 5000, "9" * 4000, "9" * 5000, '"' + "a" * 50_000 + '"', '"\\u0000"',
                '"\\ud800"', "[" * 3000 + "]" * 3000, "{a = {b = {c = 1}}}", '"""x"""', "0o7", "1_000"]))
    return "\n".join(lines).encode()


def safetensors(rng: Rng, data: bytes) -> bytes:
    """The header's length, its entries, the JSON text inside its metadata, or any bytes."""
    (size,) = struct.unpack_from("<Q", data)
    header, rest = json.loads(data[8:8 + size]), data[8 + size:]
    where = pick(rng, ["outer", "inner", "inner", "inner", "length", "data"])
    if where == "inner":
        inner = json_text(rng, header["__metadata__"]["qgnn"].encode()).decode("utf-8", "replace")
        header["__metadata__"]["qgnn"] = inner
    elif where == "outer":
        edited = json_text(rng, json.dumps(header).encode())
        return struct.pack("<Q", len(edited)) + edited + rest
    elif where == "length":
        return struct.pack("<Q", int(pick(rng, INTEGERS)) % 2**64) + data[8:]
    else:
        rest = any_bytes(rng, rest)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + rest


def csv_gz(rng: Rng, data: bytes) -> bytes:
    """The text inside: numbers become telling ones, or any bytes change; compressed anew."""
    text = gzip.decompress(data)
    for _ in range(int(rng.integers(1, 3))):
        found = list(NUMBER.finditer(text))
        if found and rng.random() < 0.7:
            one = pick(rng, found)
            word = str(pick(rng, [*INTEGERS, -1, 10**30, 0.5, "nan", "inf", "", "x", "1,2", "1\n2", '"', "\x00"]))
            text = text[:one.start()] + word.encode() + text[one.end():]
        else:
            text = any_bytes(rng, text)
    return gzip.compress(text, mtime=0)


def npz(rng: Rng, data: bytes) -> bytes:
    """An entry's shape, type or bytes, or the list of entries; every CRC is right again."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    at = int(rng.integers(len(entries)))
    name, content = entries[at]
    change = pick(rng, ["header", "header", "header", "bytes", "bytes", "remove", "twice", "rename", "swap", "nan"])
    if change == "header" and content[:6] == b"\x93NUMPY":
        content = _npy_header(rng, content)
    elif change == "remove":
        del entries[at]
    elif change == "twice":
        entries.append((name, any_bytes(rng, content)))
    elif change == "rename":
        name = pick(rng, ["edge_weight.npy", "x.npy", "y.npy", "../x.npy", "x", "a" * 5000 + ".npy", "num_nodes.npy"])
    elif change == "swap":
        content = pick(rng, entries)[1]
    elif change == "nan":
        content = content[:128] + struct.pack("<d", float(pick(rng, [np.nan, np.inf, 1e300]))) + content[136:]
    else:
        content = any_bytes(rng, content)
    if change != "remove":
        entries[at] = (name, content)
    out = io.BytesIO()
    kind = int(pick(rng, [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    with zipfile.ZipFile(out, "w", kind) as archive:
        for entry, body in entries:
            archive.writestr(zipfile.ZipInfo(entry or "_"), body, compress_type=kind)
    return out.getvalue()


def _npy_header(rng: Rng, content: bytes) -> bytes:
    (size,) = struct.unpack_from("<H", content, 8)
    text, body = content[10:10 + size].decode("latin-1"), content[10 + size:]
    change = pick(rng, ["shape", "shape", "descr", "order", "text"])
    if change == "shape":
        shape = tuple(int(pick(rng, INTEGERS)) * int(pick(rng, [1, 1, -1])) for _ in range(int(rng.integers(0, 4))))
        text = re.sub(r"\(.*\)", str(shape), text)
    elif change == "descr":
        descr = pick(rng, ["|O", "<i4", ">i8", "<f2", "<U9", "|S3", "<U0", "|V0", "<M8[s]", "|b1", "<c8", "<U999999999",
                           "i8,O", "<i3", ""])
        text = re.sub(r"'descr': '[^']*'", f"'descr': '{descr}'", text)
    elif change == "order":
        text = text.replace("False", pick(rng, ["True", "None", "1", "[]"]))
    else:
        text = any_bytes(rng, text.encode("latin-1")).decode("latin-1")
    header = text.encode("latin-1")[:65535]
    return content[:8] + struct.pack("<H", len(header)) + header + body
