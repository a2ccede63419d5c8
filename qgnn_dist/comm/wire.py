# SPDX-License-Identifier: Apache-2.0
"""The frame that travels from one worker to another: rows of packed bytes, and a fixed header, two messages of gloo's.

Header, 64 bytes, little-endian, every field at a multiple of its own size:

    offset  type  field          meaning
         0  4s    magic          b"QGNF"
         4  u16   version        2; another one is refused
         6  u8    direction      1 forward, 2 backward, 3 evaluation, 4 control (all-reduce)
         7  u8    bits           width of a value: 1, 2, 4, 8, 32 (64 in control frames only)
         8  u64   run id         drawn once a run; a worker of another run is refused
        16  u32   sequence       frames counted from 0 by sender and receiver alike, modulo 2**32
        20  u32   layer          of the propagation; in control frames the type of the elements
        24  u32   round          of messages in this forward or backward; in control frames the step
        28  u32   rows           in the payload
        32  u32   columns        values in a row
        36  u16   sender         rank
        38  u16   receiver       rank
        40  u64   payload bytes  rows * frame_row_bytes(columns, bits, direction)
        48  u64   payload sum    the payload as little-endian u64 words (zero-padded), added up modulo 2**64
        56  u32   reserved       0
        60  u32   header crc     CRC-32 (zlib's) of bytes 0 to 59

The payload is rows of planar packed bytes (quant/packed.py), or float32 little-endian at 32 bits, without gaps. In
backward frames of fewer than 32 bits a row's bytes are followed by its scale byte (kernels/gradients.py says what it
means; every value of it means something). Version 1 had no such rows, and is the same otherwise.

The payload sum is no CRC: it runs at memory speed and finds every single changed bit and lost tails; TCP has its own
check below it.
"""
from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, fields

import numpy as np

from ..errors import ExchangeError
from ..quant.packed import row_bytes

__all__ = [
    "DIRECTIONS", "HEADER_BYTES", "Header", "check_header", "check_payload", "frame_row_bytes", "pack_header",
    "payload_sum",
]

MAGIC = b"QGNF"
VERSION = 2
DIRECTIONS = {"forward": 1, "backward": 2, "evaluation": 3, "control": 4}
_DIRECTION_NAMES = {number: name for name, number in DIRECTIONS.items()}
_LAYOUT = struct.Struct("<4sHBBQIIIIIHHQQI")
_CRC = struct.Struct("<I")
HEADER_BYTES = _LAYOUT.size + _CRC.size

_ADVICE = {
    "run_id": "a worker of another run answered; start the command again",
    "rows": "the hosts see different partitions of the graph; the store's path must be the same shared folder",
    "columns": "the workers do not run the same model",
    "bits": "the workers do not run with the same settings",
    "payload_bytes": "the workers do not run with the same settings",
}
_OUT_OF_STEP = "the workers are out of step; look at the other workers' own errors"


def frame_row_bytes(columns: int, bits: int, direction: str) -> int:
    """Bytes that a row takes in a frame: its values, and the scale byte of a coded gradient row.

    >>> frame_row_bytes(7, 2, "forward"), frame_row_bytes(7, 2, "backward"), frame_row_bytes(7, 32, "backward")
    (2, 3, 28)
    """
    return row_bytes(columns, bits) + (1 if direction == "backward" and bits < 32 else 0)


@dataclass(frozen=True)
class Header:
    """What a frame says of itself; see the module's table. `direction` is a name of DIRECTIONS."""

    run_id: int
    sequence: int
    direction: str
    layer: int
    round: int
    bits: int
    rows: int
    columns: int
    sender: int
    receiver: int

    @property
    def payload_bytes(self) -> int:
        """Bytes that follow the header."""
        return self.rows * frame_row_bytes(self.columns, self.bits, self.direction)


def payload_sum(payload: np.ndarray) -> int:
    """Sum of a payload (uint8, 1-D, contiguous, any alignment) as little-endian u64 words modulo 2**64.

    >>> payload_sum(np.array([1, 0, 0, 0, 0, 0, 0, 0, 2, 1], np.uint8))    # 1 + (2 + 256)
    259
    """
    whole = len(payload) // 8 * 8
    total = int(payload[:whole].view("<u8").sum(dtype=np.uint64)) if whole else 0
    return (total + int.from_bytes(payload[whole:].tobytes(), "little")) % 2**64


def pack_header(header: Header, checksum: int, out: np.ndarray) -> None:
    """Write the header's 64 bytes to `out`, uint8 (64,).

    Args:
        checksum: `payload_sum` of the payload.
    Raises:
        ValueError: a field that does not fit its place.
    """
    out.data[:] = _bytes_of(header, checksum)


def _bytes_of(header: Header, checksum: int) -> bytes:
    try:
        fields = _LAYOUT.pack(MAGIC, VERSION, DIRECTIONS[header.direction], header.bits, header.run_id, header.sequence,
                              header.layer, header.round, header.rows, header.columns, header.sender, header.receiver,
                              header.payload_bytes, checksum, 0)
    except (struct.error, KeyError) as error:
        raise ValueError(f"frame header: {header} does not fit its fields: {error}") from None
    return fields + _CRC.pack(zlib.crc32(fields))


def check_header(received: np.ndarray, expected: Header) -> int:
    """Compare the 64 bytes that came with what this round must bring.

    Args:
        received: uint8 (64,). expected: with `receiver` this rank and `sender` the peer.
    Returns:
        The payload sum that the header announces, for `check_payload`.
    Raises:
        ExchangeError: names rank, peer, layer, every field that differs, what came and what was expected.
    """
    data = received.tobytes()
    (magic, version, direction, bits, run_id, sequence, layer, round_, rows, columns, sender, receiver, size,
     checksum, reserved) = _LAYOUT.unpack_from(data)
    if data == _bytes_of(expected, checksum):
        return int(checksum)
    if magic != MAGIC:
        raise _refused(expected, f"magic is {magic!r}, expected {MAGIC!r}; something else talks on this connection")
    (crc,), computed = _CRC.unpack_from(data, _LAYOUT.size), zlib.crc32(data[:_LAYOUT.size])
    if crc != computed:
        raise _refused(expected, f"header crc is {crc:#010x}, expected {computed:#010x}; bytes changed on the way")
    if version != VERSION:
        raise _refused(expected, f"frame version is {version}, expected {VERSION}; install the same qgnn-dist on all "
                                 "hosts")
    if direction not in _DIRECTION_NAMES or reserved != 0:
        raise _refused(expected, f"direction is {direction} and the reserved field {reserved}, expected 1 to 4 and 0")
    got = Header(run_id, sequence, _DIRECTION_NAMES[direction], layer, round_, bits, rows, columns, sender, receiver)
    wrong = {f.name: (getattr(got, f.name), getattr(expected, f.name)) for f in fields(Header)
             if getattr(got, f.name) != getattr(expected, f.name)}
    if size != expected.payload_bytes:
        wrong["payload_bytes"] = (size, expected.payload_bytes)
    listed = ", ".join(f"{name.replace('_', ' ')} is {was}, expected {should}"
                       for name, (was, should) in wrong.items())
    raise _refused(expected, f"{listed}; {next((_ADVICE[n] for n in wrong if n in _ADVICE), _OUT_OF_STEP)}")


def check_payload(payload: np.ndarray, checksum: int, expected: Header) -> None:
    """Compare a payload (uint8, 1-D) with the sum that its header announced; ExchangeError where they differ."""
    computed = payload_sum(payload)
    if computed != checksum:
        raise _refused(expected, f"the payload of {len(payload)} B (bits={expected.bits}, rows={expected.rows}, "
                                 f"columns={expected.columns}) sums to {computed:#018x}, expected {checksum:#018x}; "
                                 "bytes were changed or lost on the way")


def _refused(expected: Header, why: str) -> ExchangeError:
    layer = expected.layer if expected.direction != "control" else None
    return ExchangeError(f"{expected.direction} frame, round {expected.round}: {why}", rank=expected.receiver,
                         peer=expected.sender, layer=layer)
