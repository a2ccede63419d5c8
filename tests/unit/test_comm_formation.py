# SPDX-License-Identifier: Apache-2.0
"""The secret of a formation, and the MAC made with it: against GMAC computed by hand, and what it covers."""
from __future__ import annotations

import pickle
import struct
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from qgnn_dist.comm import formation as formation_module
from qgnn_dist.comm.formation import Formation, FrameKey
from qgnn_dist.comm.group import CONTROL_LANE, EXCHANGE_LANE, Group
from qgnn_dist.comm.wire import HEADER_BYTES, Header, check_frame, check_header, seal_frame
from qgnn_dist.errors import ExchangeError

FORMATION = Formation(run_id=7, generation=2, secret=bytes(range(32)))
HEADER = Header(7, 2, 3, "backward", 4, 5, 2, 6, 7, sender=1, receiver=0)
PAYLOAD = np.arange(18, dtype=np.uint8)


def gmac(key: bytes, nonce: bytes, data: bytes) -> bytes:
    """NIST SP 800-38D, section 6, bit by bit: GHASH of the data and its length, and the first block of the counter."""
    def block(value: bytes) -> int:
        return int.from_bytes(Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(value), "big")

    def product(x: int, y: int) -> int:
        z = 0
        for bit in range(127, -1, -1):
            z ^= y if x >> bit & 1 else 0
            y = y >> 1 ^ (0xE1 << 120 if y & 1 else 0)
        return z

    subkey, state = block(bytes(16)), 0
    padded = data + bytes(-len(data) % 16) + struct.pack(">QQ", 8 * len(data), 0)
    for start in range(0, len(padded), 16):
        state = product(state ^ int.from_bytes(padded[start:start + 16], "big"), subkey)
    return (state ^ block(nonce + b"\0\0\0\1")).to_bytes(16, "big")


def test_the_mac_is_gmac() -> None:
    """AES-256-GCM's first published vector (key, nonce and data of zeros) belongs to nonces of rank 0 to rank 0."""
    assert gmac(bytes(32), bytes(12), b"").hex() == "530f8afbc74536b9a963b4f1c4cb738b"
    assert FrameKey(bytes(32)).mac(0, 0, 0, b"", b"").hex() == "530f8afbc74536b9a963b4f1c4cb738b"
    key = bytes(range(100, 132))
    nonce = bytes.fromhex("0302" "0504" "0d0c0b0a09080706")
    for size in (0, 1, 15, 16, 17, 100):
        payload = np.arange(size, dtype=np.uint8)
        got = FrameKey(key).mac(0x0203, 0x0405, 0x060708090A0B0C0D, b"the header", payload)
        assert got == gmac(key, nonce, b"the header" + payload.tobytes())


def test_large_payloads_go_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    key, payload = FORMATION.frame_key(), np.arange(100, dtype=np.uint8)
    whole = key.mac(1, 0, 4, b"fields", payload)
    for step in (1, 7, 99, 100):
        monkeypatch.setattr(formation_module, "_STEP", step)
        assert key.mac(1, 0, 4, b"fields", payload) == whole


def test_every_changed_bit_is_found() -> None:
    """Header, MAC and payload: the fields by name, the rest by the MAC."""
    key, head = FORMATION.frame_key(), np.zeros(HEADER_BYTES, np.uint8)
    seal_frame(HEADER, PAYLOAD, key, head)
    frame = np.concatenate([head, PAYLOAD])
    check_header(head, HEADER)
    check_frame(head, PAYLOAD, HEADER, key)
    for bit in range(8 * len(frame)):
        changed = frame.copy()
        changed[bit // 8] ^= 1 << bit % 8
        if bit < 8 * 48:
            with pytest.raises(ExchangeError, match=r"magic is|version is|is .*, expected"):
                check_header(changed[:HEADER_BYTES], HEADER)
        else:
            check_header(changed[:HEADER_BYTES], HEADER)
            with pytest.raises(ExchangeError, match="the MAC of the payload of 18 B"):
                check_frame(changed[:HEADER_BYTES], changed[HEADER_BYTES:], HEADER, key)


@pytest.mark.parametrize("change", [
    {"run_id": 8}, {"generation": 1}, {"sequence": 4}, {"direction": "forward"}, {"direction": "control"}, {"layer": 0},
    {"round": 0}, {"bits": 4}, {"rows": 18}, {"columns": 8}, {"sender": 2}, {"receiver": 2}])
def test_a_mac_belongs_to_one_header(change: dict[str, object]) -> None:
    key, head = FORMATION.frame_key(), np.zeros(HEADER_BYTES, np.uint8)
    other = replace(HEADER, **change)
    seal_frame(other, PAYLOAD, key, head)
    with pytest.raises(ExchangeError, match="MAC"):
        check_frame(head, PAYLOAD, HEADER, key)


def test_another_formation_has_other_macs_and_another_place_to_meet() -> None:
    head = np.zeros(HEADER_BYTES, np.uint8)
    others = [Formation.new(7, 2), Formation.new(7, 2), replace(FORMATION, secret=bytes(32))]
    for other in others:
        seal_frame(HEADER, PAYLOAD, other.frame_key(), head)
        with pytest.raises(ExchangeError, match="someone without this run's key"):
            check_frame(head, PAYLOAD, HEADER, FORMATION.frame_key())
    places = {one.meeting_place() for one in (FORMATION, *others)}
    assert len(places) == 4
    assert FORMATION.meeting_place() == Formation(8, 9, FORMATION.secret).meeting_place()
    assert not any(one.secret.hex() in place for one in (FORMATION, *others) for place in places)


def test_a_formation_hides_its_secret() -> None:
    """Whatever prints one: itself, what holds it, the error of a call with it."""
    formation = Formation.new()
    assert len(formation.secret) == 32
    group = Group(0, 2, 1.0, formation, None, None)
    shown = "".join(form(one) for one in (formation, [formation], group, group.key) for form in (repr, str))
    shown += f"{formation!r:>200}{formation}" + str(vars(group))
    for spelling in (repr(formation.secret), str(formation.secret)[2:-1], formation.secret.hex()):
        assert spelling not in shown
    assert "secret" not in shown
    assert pickle.loads(pickle.dumps(formation)) == formation


def test_no_nonce_is_used_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames of all directions and lanes, sent and received by one rank, over several exchanges and all-reduces."""
    group, nonces = Group(0, 3, 1.0, FORMATION, None, None), []
    real = modes.GCM

    def noted(nonce: bytes) -> modes.GCM:
        nonces.append(nonce)
        return real(nonce)

    monkeypatch.setattr(formation_module.modes, "GCM", noted)
    for _ in range(3):
        for direction in ("forward", "backward", "evaluation", "control"):
            lane = CONTROL_LANE if direction == "control" else EXCHANGE_LANE
            for peer in (1, 2):
                for receiving in (False, True):
                    sender, receiver = (peer, 0) if receiving else (0, peer)
                    sequence = group.sequence(peer, lane, receiving=receiving)
                    header = replace(HEADER, sequence=sequence, direction=direction, sender=sender, receiver=receiver)
                    header.mac(PAYLOAD, group.key)
    assert len(nonces) == 3 * 4 * 2 * 2
    assert len(set(nonces)) == len(nonces)


@pytest.mark.parametrize("sequence", [2**63, 2**64, -1])
def test_a_sequence_that_would_use_a_nonce_again_is_an_error(sequence: int) -> None:
    key = FORMATION.frame_key()
    assert len(replace(HEADER, sequence=2**63 - 1, direction="control").mac(PAYLOAD, key)) == 16
    with pytest.raises(ValueError, match="frame header"):
        replace(HEADER, sequence=sequence).mac(PAYLOAD, key)
