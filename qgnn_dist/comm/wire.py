# SPDX-License-Identifier: Apache-2.0
"""The frame that carries one round's rows from one rank to one peer: a fixed header, then the packed rows.

Header, 48 bytes, little-endian:

| offset | type | field |
|---|---|---|
| 0 | 4 bytes | magic `QGNF` |
| 4 | u16 | version of the frame format |
| 6 | u8 | direction: 0 forward, 1 backward, 2 evaluation |
| 7 | u8 | bits of a value: 1, 2, 4, 8, or 32 for float32 |
| 8 | u64 | run id, drawn at the start of a run |
| 16 | u32 | sequence: rounds since the exchange was opened |
| 20 | u16, u16 | layer, round |
| 24 | u32 | rows |
| 28 | u32 | columns |
| 32 | u64 | payload bytes |
| 40 | u32 | sender's rank |
| 44 | u32 | CRC-32 of the 44 bytes before |

A receiver knows every field beforehand; anything else is refused with what was got and what was expected.
"""
from __future__ import annotations

import struct
import zlib
from dataclasses import astuple, dataclass, fields

import numpy as np

from ..errors import ExchangeError

__all__ = ["DIRECTIONS", "FRAME_VERSION", "HEADER_BYTES", "FrameHeader", "check_header", "pack_header"]

MAGIC = b"QGNF"
FRAME_VERSION = 1
DIRECTIONS = {"forward": 0, "backward": 1, "evaluation": 2}
_BODY = struct.Struct("<4sHBBQIHHIIQI")
HEADER_BYTES = _BODY.size + 4


@dataclass(frozen=True)
class FrameHeader:
    """All that a header says, in the order of its bytes (magic, version and checksum aside)."""

    direction: int
    bits: int
    run_id: int
    sequence: int
    layer: int
    round: int
    rows: int
    columns: int
    payload_bytes: int
    sender: int


def pack_header(header: FrameHeader) -> bytes:
    """The 48 bytes of a header."""
    body = _BODY.pack(MAGIC, FRAME_VERSION, *astuple(header))
    return body + struct.pack("<I", zlib.crc32(body))


def check_header(data: bytes | np.ndarray, expected: FrameHeader, *, rank: int) -> None:
    """Compare a received header with the expected one, field by field.

    Args:
        data: at least 48 bytes. rank: the receiver, for the error.
    Raises:
        ExchangeError: names rank, peer, layer, the field, what was got and what was expected.
    """
    raw = bytes(data[:HEADER_BYTES])
    peer, layer = expected.sender, expected.layer

    def refuse(what: str) -> ExchangeError:
        return ExchangeError(f"frame refused: {what}; every worker must run the same version, store and settings",
                             rank=rank, peer=peer, layer=layer)

    if len(raw) < HEADER_BYTES:
        raise refuse(f"header is {len(raw)} bytes, expected {HEADER_BYTES}")
    body, (checksum,) = raw[:_BODY.size], struct.unpack("<I", raw[_BODY.size:])
    magic, version, *values = _BODY.unpack(body)
    if magic != MAGIC:
        raise refuse(f"magic is {magic!r}, expected {MAGIC!r}")
    if zlib.crc32(body) != checksum:
        raise refuse(f"header checksum is {checksum:#010x}, its bytes give {zlib.crc32(body):#010x}")
    if version != FRAME_VERSION:
        raise refuse(f"version is {version}, expected {FRAME_VERSION}")
    for spec, value, wanted in zip(fields(FrameHeader), values, astuple(expected)):
        if value != wanted:
            raise refuse(f"{spec.name} is {value}, expected {wanted}")
