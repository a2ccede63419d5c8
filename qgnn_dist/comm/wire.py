# SPDX-License-Identifier: Apache-2.0
"""The frame that travels from one worker to another: rows of packed bytes, and a fixed header, two messages of gloo's.

Header, 64 bytes, little-endian, every field at a multiple of its own size:

    offset  type  field          meaning
         0  4s    magic          b"QGNF"
         4  u16   version        3; another one is refused
         6  u8    direction      1 forward, 2 backward, 3 evaluation, 4 control (all-reduce)
         7  u8    bits           width of a value: 1, 2, 4, 8, 32 (64 in control frames only)
         8  u64   run id         drawn once a run; a worker of another run is refused
        16  u64   sequence       frames from this sender to this receiver, counted from 0; control frames by themselves
        24  u32   generation     which formation of the run's workers: counts its restarts
        28  u32   layer          of the propagation; in control frames the type of the elements
        32  u32   round          of messages in this forward or backward; in control frames the step
        36  u32   rows           in the payload
        40  u32   columns        values in a row
        44  u16   sender         rank
        46  u16   receiver       rank
        48  16s   MAC            of bytes 0 to 47 and the payload, by the formation's key (comm/formation.py)

The payload is rows of planar packed bytes (quant/packed.py), or float32 little-endian at 32 bits, without gaps: rows *
frame_row_bytes(columns, bits, direction) bytes. In backward frames of fewer than 32 bits a row's bytes are followed by
its scale byte (kernels/gradients.py says what it means; every value of it means something).

A receiver knows every field beforehand. It compares them before it waits for the payload, and the MAC before anything
of the payload is used. Version 2 had a sum of the payload and a CRC in the place of the MAC, which tell an accident and
not a forger; version 1 had no scale bytes.
"""
from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass, fields

import numpy as np

from ..errors import ExchangeError
from ..quant.packed import row_bytes
from .formation import MAC_BYTES, FrameKey

__all__ = ["DIRECTIONS", "HEADER_BYTES", "Header", "check_frame", "check_header", "frame_row_bytes", "seal_frame"]

MAGIC = b"QGNF"
VERSION = 3
DIRECTIONS = {"forward": 1, "backward": 2, "evaluation": 3, "control": 4}
_DIRECTION_NAMES = {number: name for name, number in DIRECTIONS.items()}
_FIELDS = struct.Struct("<4sHBBQQIIIIIHH")
HEADER_BYTES = _FIELDS.size + MAC_BYTES

_ADVICE = {
    "run_id": "a worker of another run answered; start the command again",
    "generation": "a worker of before the last restart still talks; see that none is left over",
    "rows": "the hosts see different partitions of the graph; the store's path must be the same shared folder",
    "columns": "the workers do not run the same model",
    "bits": "the workers do not run with the same settings",
}
_OUT_OF_STEP = ("the workers are out of step, the frame was sent before, or its header was damaged; look at the other "
                "workers' own errors")


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
    generation: int
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
        """Bytes of the rows that the header goes with."""
        return self.rows * frame_row_bytes(self.columns, self.bits, self.direction)

    def to_bytes(self) -> bytes:
        """The header's fields, 48 bytes.

        Raises: ValueError: a field that does not fit its place.
        """
        try:
            return _FIELDS.pack(MAGIC, VERSION, DIRECTIONS[self.direction], self.bits, self.run_id, self.sequence,
                                self.generation, self.layer, self.round, self.rows, self.columns, self.sender,
                                self.receiver)
        except (struct.error, KeyError) as error:
            raise ValueError(f"frame header: {self} does not fit its fields: {error}") from None

    def mac(self, payload: np.ndarray, key: FrameKey) -> bytes:
        """The MAC of these fields and a payload, uint8, 1-D, contiguous.

        Raises: ValueError: a field that does not fit its place, or a sequence of 2**63 or more.
        """
        if self.sequence >= 2**63:
            raise ValueError(f"frame header: {self}: sequence {self.sequence} would need a nonce that was used")
        number = 2 * self.sequence + (self.direction == "control")
        return key.mac(self.sender, self.receiver, number, self.to_bytes(), payload.data)


def seal_frame(header: Header, payload: np.ndarray, key: FrameKey, out: np.ndarray) -> None:
    """Write the 64 bytes that go with a payload.

    Args:
        payload: uint8, 1-D, contiguous; must stay as it is until it was sent. out: uint8 (64,).
    Raises:
        ValueError: as Header.mac.
    """
    out.data[:] = header.to_bytes() + header.mac(payload, key)


def check_header(received: np.ndarray, expected: Header) -> None:
    """Compare the fields of the 64 bytes that came with what this round must bring; `check_frame` follows.

    Args:
        received: uint8 (64,). expected: with `receiver` this rank and `sender` the peer.
    Raises:
        ExchangeError: names rank, peer, layer, every field that differs, what came and what was expected.
    """
    data = received.tobytes()[:_FIELDS.size]
    if data == expected.to_bytes():
        return
    (magic, version, direction, bits, run_id, sequence, generation, layer, round_, rows, columns, sender,
     receiver) = _FIELDS.unpack(data)
    if magic != MAGIC:
        raise _refused(expected, f"magic is {magic!r}, expected {MAGIC!r}; something else talks on this connection")
    if version != VERSION:
        raise _refused(expected, f"frame version is {version}, expected {VERSION}; install the same qgnn-dist on all "
                                 "hosts")
    got = Header(run_id, generation, sequence, _DIRECTION_NAMES.get(direction, str(direction)), layer, round_, bits,
                 rows, columns, sender, receiver)
    wrong = {f.name: (getattr(got, f.name), getattr(expected, f.name)) for f in fields(Header)
             if getattr(got, f.name) != getattr(expected, f.name)}
    listed = ", ".join(f"{name.replace('_', ' ')} is {was}, expected {should}"
                       for name, (was, should) in wrong.items())
    raise _refused(expected, f"{listed}; {next((_ADVICE[n] for n in wrong if n in _ADVICE), _OUT_OF_STEP)}")


def check_frame(received: np.ndarray, payload: np.ndarray, expected: Header, key: FrameKey) -> None:
    """Whether this payload was sent with these fields by who has the key; until then it is a stranger's.

    Args: received: uint8 (64,), as `check_header` found it. payload: uint8, 1-D, contiguous.
    Raises: ExchangeError: the MAC is another one.
    """
    if not hmac.compare_digest(received.tobytes()[_FIELDS.size:], expected.mac(payload, key)):
        raise _refused(expected, f"the MAC of the payload of {len(payload)} B (bits={expected.bits}, rows="
                                 f"{expected.rows}, columns={expected.columns}) is wrong, and every field right: the "
                                 "frame was damaged or cut on the way, or made by someone without this run's key")


def _refused(expected: Header, why: str) -> ExchangeError:
    layer = expected.layer if expected.direction != "control" else None
    return ExchangeError(f"{expected.direction} frame, round {expected.round}: {why}", rank=expected.receiver,
                         peer=expected.sender, layer=layer)
