# SPDX-License-Identifier: Apache-2.0
"""The bytes of a frame's header, field by field: a change here is a new version of the wire format."""
from __future__ import annotations

import zlib

import numpy as np

from qgnn_dist.comm.wire import HEADER_BYTES, Header, check_header, frame_row_bytes, pack_header, payload_sum

HEADER = Header(run_id=0x1122334455667788, sequence=70_000, direction="backward", layer=9, round=10, bits=2, rows=257,
                columns=40, sender=3, receiver=5)
PAYLOAD_SUM = 0xFEDCBA9876543210
GOLDEN = bytes.fromhex(
    "51474e46"          # magic "QGNF"
    "0200"              # version
    "02"                # direction: backward
    "02"                # bits
    "8877665544332211"  # run id
    "70110100"          # sequence
    "09000000"          # layer
    "0a000000"          # round
    "01010000"          # rows
    "28000000"          # columns
    "0300"              # sender
    "0500"              # receiver
    "0b0b000000000000"  # payload bytes: 257 rows of 10 and a scale byte
    "1032547698badcfe"  # payload sum
    "00000000"          # reserved
    "53e8fa8b"          # crc of the 60 bytes before
)


def test_header_bytes() -> None:
    out = np.full(HEADER_BYTES, 0xFF, np.uint8)
    pack_header(HEADER, PAYLOAD_SUM, out)
    assert HEADER_BYTES == 64
    assert out.tobytes().hex() == GOLDEN.hex()
    assert int.from_bytes(GOLDEN[60:], "little") == zlib.crc32(GOLDEN[:60])


def test_golden_header_is_accepted() -> None:
    assert check_header(np.frombuffer(GOLDEN, np.uint8), HEADER) == PAYLOAD_SUM


def test_directions_have_fixed_numbers() -> None:
    out = np.empty(HEADER_BYTES, np.uint8)
    for number, direction in enumerate(("forward", "backward", "evaluation", "control"), start=1):
        pack_header(Header(1, 2, direction, 3, 4, 8, 5, 6, 7, 8), 0, out)
        assert out[6] == number


def test_bytes_of_a_row() -> None:
    """Packed values, and a scale byte where gradients are coded."""
    got = {direction: [frame_row_bytes(7, bits, direction) for bits in (1, 2, 4, 8, 32)]
           for direction in ("forward", "backward", "evaluation")}
    assert got == {"forward": [1, 2, 4, 7, 28], "backward": [2, 3, 5, 8, 28], "evaluation": [1, 2, 4, 7, 28]}


def test_payload_sum() -> None:
    payload = np.arange(1, 12, dtype=np.uint8)
    assert payload_sum(payload) == 0x0807060504030201 + 0x0B0A09
    assert payload_sum(payload[:0]) == 0
    assert payload_sum(np.full(16, 255, np.uint8)) == 2**64 - 2    # modulo 2**64
