# SPDX-License-Identifier: Apache-2.0
"""One formation of a run's workers: who belongs to it, and the secret by which its frames are told from all others.

A run's workers are formed anew at every restart. The controller draws a secret for each formation and hands it over by
an actor call; it is in no file, log, environment variable, command line or `repr`.

The message authentication code (MAC) of a frame is GMAC: AES-256-GCM (NIST SP 800-38D) with the header's fields and the
payload as authenticated data and nothing to encrypt. It runs at memory speed on processors with carry-less products;
docs/security.md has figures beside HMAC-SHA256, BLAKE2b and Poly1305.
"""
from __future__ import annotations

import hashlib
import secrets
import struct
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

__all__ = ["MAC_BYTES", "Formation", "FrameKey", "new_run_id"]

MAC_BYTES = 16
SECRET_BYTES = 32
_NONCE = struct.Struct("<HHQ")
_STEP = 2**30
"""Bytes that OpenSSL is given at once: its lengths are signed and have 32 bits."""


def new_run_id() -> int:
    """A random u64 that tells this run's frames from another's."""
    return secrets.randbits(64)


@dataclass(frozen=True)
class Formation:
    """What the members of one formation know and nobody else.

    Attributes:
        run_id: u64, the same for all formations of a command. generation: u32, which formation of them: 0, and one
            more at each restart. secret: of this formation alone; `repr` hides it.
    """

    run_id: int
    generation: int
    secret: bytes = field(repr=False)

    @classmethod
    def new(cls, run_id: int | None = None, generation: int = 0) -> Formation:
        """A formation with a secret of its own, and a run id of its own unless one is given."""
        return cls(new_run_id() if run_id is None else run_id, generation, secrets.token_bytes(SECRET_BYTES))

    def meeting_place(self) -> str:
        """Prefix of this formation's names in the rendezvous store: who has not the secret cannot guess it."""
        return self._derived(b"qgnn-meeting").hex()

    def frame_key(self) -> FrameKey:
        """The key of this formation's frames."""
        return FrameKey(self._derived(b"qgnn-frames"))

    def _derived(self, purpose: bytes) -> bytes:
        return hashlib.blake2b(key=self.secret, person=purpose, digest_size=32).digest()


class FrameKey:
    """Makes the MACs of one formation's frames.

    GMAC must not see a nonce twice under one key. Its 12 bytes, little-endian, are

        offset  type  what
             0  u16   sender's rank
             2  u16   receiver's rank
             4  u64   2 * sequence, and 1 more in the lane of the all-reduces

    so that two frames have the same nonce only where one rank sends them to the same one, in the same lane, with the
    same sequence. `Group.sequence` counts the frames of each such lane, whatever they are for (forward, backward and
    evaluation share one), and hands out no number twice; the counter cannot go round: 2**63 does not fit and is an
    error. A key is that of one formation, and a group is opened once by each rank of it.

    Args: key: 32 bytes.
    """

    __slots__ = ("_aes",)

    def __init__(self, key: bytes) -> None:
        self._aes = algorithms.AES(key)

    def mac(self, sender: int, receiver: int, number: int, fields: bytes, payload: Any) -> bytes:
        """16 bytes over `fields` and `payload` (contiguous buffer of bytes, not copied).

        Args: number: u64, the last field of the nonce.
        """
        gcm = Cipher(self._aes, modes.GCM(_NONCE.pack(sender, receiver, number))).encryptor()
        gcm.authenticate_additional_data(fields)
        for start in range(0, len(payload), _STEP):
            gcm.authenticate_additional_data(payload[start:start + _STEP])
        gcm.finalize()
        return gcm.tag
