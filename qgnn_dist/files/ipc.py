# SPDX-License-Identifier: Apache-2.0
"""What an Arrow IPC file says of its compressed buffers, looked up before Arrow allocates what they say.

Arrow checks that buffers lie in the file, but takes a compressed one's own word for how large it becomes. The footer
and the headers of batches are FlatBuffers, of which a few fields are read here; the format's documents
(Schema.fbs, Message.fbs, File.fbs) give their numbers.
"""
from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from .read import open_regular

__all__ = ["ARROW_DAMAGE", "check_compression"]

ARROW_DAMAGE: tuple[type[Exception], ...] = (pa.ArrowException, OSError, ValueError, TypeError, KeyError, IndexError,
                                             OverflowError)
"""What Arrow raises on bytes that it did not write."""

_MAGIC = b"ARROW1"
_DICTIONARIES, _BATCHES = 2, 3  # of the footer
_HEADER = 2  # of a message
_BUFFERS, _COMPRESSION = 2, 3  # of a batch
_DATA = 1  # of a dictionary batch: its batch
_BATCH_KIND, _DICTIONARY_KIND = 3, 2
_NO_WORD = -1  # of a buffer's size: it is not compressed after all


def check_compression(path: Path, limit: int) -> None:
    """Refuse a file of which one batch would become more than `limit` bytes; 0 refuses all that are compressed.

    Raises: OSError, ValueError: it is, or it is damaged.
    """
    with open_regular(path) as opened:
        try:
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise ValueError("is empty") from None
        with mapped as data:
            try:
                for number, size in enumerate(_sizes(data)):
                    if size > limit:
                        raise ValueError(f"has a compressed batch, the {number + 1}. one, which becomes {size} bytes; "
                                         f"expected at most {limit}" if limit else "is compressed, expected plain data")
            except struct.error as error:
                raise ValueError(f"has a damaged footer ({error})") from None


def _sizes(data: mmap.mmap) -> Iterator[int]:
    """Bytes that each batch's compressed buffers become; 1 of an empty one that says that it is compressed."""
    end = len(data) - len(_MAGIC) - 4
    if end < len(_MAGIC) or data[:len(_MAGIC)] != _MAGIC or data[-len(_MAGIC):] != _MAGIC:
        raise ValueError("does not begin and end as an Arrow file does")
    (size,) = struct.unpack_from("<i", data, end)
    if not 0 < size <= end:
        raise ValueError(f"has a footer of {size} bytes in a file of {len(data)}")
    footer = _follow(data, end - size)
    for field in (_DICTIONARIES, _BATCHES):
        for offset, header_bytes, _, body_bytes in _structs(data, _field(data, footer, field), "<qiiq"):
            if min(offset, header_bytes, body_bytes) < 0 or offset + header_bytes + body_bytes > len(data):
                raise ValueError(f"has a batch of {body_bytes} bytes at {offset} in a file of {len(data)}")
            found = _becomes(data, offset, offset + header_bytes)
            if found is not None:
                yield found


def _becomes(data: mmap.mmap, begin: int, body: int) -> int | None:
    """Bytes that one batch's buffers become, None where it is not compressed."""
    (first,) = struct.unpack_from("<i", data, begin)
    message = _follow(data, begin + (8 if first == -1 else 4))  # -1: the size follows; older files begin with it
    batch = _field(data, message, _HEADER)
    kind = _field(data, message, _HEADER - 1)
    if batch is None or kind is None:
        raise ValueError("has a batch without a header")
    batch = _follow(data, batch)
    if data[kind] == _DICTIONARY_KIND:
        inner = _field(data, batch, _DATA)
        if inner is None:
            raise ValueError("has a dictionary without values")
        batch = _follow(data, inner)
    elif data[kind] != _BATCH_KIND:
        raise ValueError(f"has a batch of kind {data[kind]}")
    if _field(data, batch, _COMPRESSION) is None:
        return None
    total = 1
    for offset, length in _structs(data, _field(data, batch, _BUFFERS), "<qq"):
        if length >= 8:
            if offset < 0 or body + offset + length > len(data):
                raise ValueError(f"has a buffer of {length} bytes at {body + offset} in a file of {len(data)}")
            (size,) = struct.unpack_from("<q", data, body + offset)
            if size != _NO_WORD:
                if size < 0:
                    raise ValueError(f"has a compressed buffer of {size} bytes")
                total += size
    return total


def _follow(data: mmap.mmap, at: int) -> int:
    """Where an offset at `at` leads; one at a FlatBuffer's begin leads to its root table."""
    return at + int(struct.unpack_from("<I", data, at)[0])


def _field(data: mmap.mmap, table: int, number: int) -> int | None:
    """Where a table's field lies; None where it is absent."""
    places = table - int(struct.unpack_from("<i", data, table)[0])
    if not 0 <= places < len(data):
        raise ValueError("has a damaged footer")
    (size,) = struct.unpack_from("<H", data, places)
    if 4 + 2 * number + 2 > size:
        return None
    (offset,) = struct.unpack_from("<H", data, places + 4 + 2 * number)
    place = table + int(offset)
    if place >= len(data):
        raise ValueError("has a damaged footer")
    return place if offset else None


def _structs(data: mmap.mmap, field: int | None, layout: str) -> Iterator[tuple[int, ...]]:
    """The entries of a vector of structs; none where the field is absent."""
    if field is None:
        return
    place = _follow(data, field)
    (count,) = struct.unpack_from("<I", data, place)
    size = struct.calcsize(layout)
    if place + 4 + count * size > len(data):
        raise ValueError(f"has a list of {count} entries that does not fit in it")
    for number in range(count):
        yield struct.unpack_from(layout, data, place + 4 + number * size)
