# SPDX-License-Identifier: Apache-2.0
"""The checksum that a safetensors file of ours carries in its own metadata."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["checksum_of"]


def checksum_of(values: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> str:
    """BLAKE2b-256, hex, of a description without its checksum and of the tensors as they lie in the file.

    Raises: ValueError: a value that is not finite.
    """
    digest = hashlib.blake2b(json.dumps(values, sort_keys=True, allow_nan=False).encode(), digest_size=32)
    for name in sorted(tensors):
        digest.update(f"{name}:{tensors[name].dtype.str}:{tensors[name].shape};".encode())
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()
