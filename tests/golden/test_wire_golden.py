# SPDX-License-Identifier: Apache-2.0
"""The bytes of a frame's header, field by field: a change here is a new version of the wire format."""
from __future__ import annotations

import numpy as np

from qgnn_dist.comm.formation import Formation
from qgnn_dist.comm.wire import HEADER_BYTES, Header, check_frame, check_header, frame_row_bytes, seal_frame

FORMATION = Formation(run_id=0x1122334455667788, generation=3, secret=bytes(range(32)))
HEADER = Header(FORMATION.run_id, FORMATION.generation, sequence=70_000, direction="backward", layer=9, round=10,
                bits=2, rows=257, columns=40, sender=3, receiver=5)
PAYLOAD = (np.arange(257 * 11) % 251).astype(np.uint8)
GOLDEN = bytes.fromhex(
    "51474e46"          # magic "QGNF"
    "0300"              # version
    "02"                # direction: backward
    "02"                # bits
    "8877665544332211"  # run id
    "7011010000000000"  # sequence
    "03000000"          # generation
    "09000000"          # layer
    "0a000000"          # round
    "01010000"          # rows
    "28000000"          # columns
    "0300"              # sender
    "0500"              # receiver
    "cf8de69a96c784c7e748b4ec8a5ff3e6"  # MAC
)


def test_header_bytes() -> None:
    out = np.full(HEADER_BYTES, 0xFF, np.uint8)
    seal_frame(HEADER, PAYLOAD, FORMATION.frame_key(), out)
    assert HEADER_BYTES == 64
    assert HEADER.payload_bytes == len(PAYLOAD)
    assert out.tobytes().hex() == GOLDEN.hex()


def test_golden_header_is_accepted() -> None:
    head = np.frombuffer(GOLDEN, np.uint8)
    check_header(head, HEADER)
    check_frame(head, PAYLOAD, HEADER, FORMATION.frame_key())


def test_what_is_made_of_a_secret() -> None:
    assert FORMATION.meeting_place() == "830337d5dae48849c1dc9f7feef24c2f1316ea78420776e9111e17843fcc22b9"
    assert FORMATION.frame_key().mac(0, 0, 0, b"", b"").hex() == "5f24bdcb8154d7512d60e3401a286d60"


def test_directions_have_fixed_numbers() -> None:
    for number, direction in enumerate(("forward", "backward", "evaluation", "control"), start=1):
        assert Header(1, 0, 2, direction, 3, 4, 8, 5, 6, 7, 8).to_bytes()[6] == number


def test_bytes_of_a_row() -> None:
    """Packed values, and a scale byte where gradients are coded."""
    got = {direction: [frame_row_bytes(7, bits, direction) for bits in (1, 2, 4, 8, 32)]
           for direction in ("forward", "backward", "evaluation")}
    assert got == {"forward": [1, 2, 4, 7, 28], "backward": [2, 3, 5, 8, 28], "evaluation": [1, 2, 4, 7, 28]}
