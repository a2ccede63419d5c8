# SPDX-License-Identifier: Apache-2.0
"""A store in words and numbers, for `qgnn inspect`."""
from __future__ import annotations

from typing import Any

from .reader import Store

__all__ = ["describe_store", "summarise"]


def summarise(manifest: dict[str, Any]) -> dict[str, Any]:
    """What people ask of a store: all of its manifest but the files, of which it counts those of the features."""
    parts = [{**{k: v for k, v in entry.items() if not isinstance(v, dict)}, "part": i}
             for i, entry in enumerate(manifest["parts"])]
    features = sum(file["bytes"] for entry in manifest["parts"] for name, file in entry["files"].items()
                   if name.startswith("feature"))
    return {**{k: v for k, v in manifest.items() if k != "parts"}, "feature_bytes": features, "num_parts": len(parts),
            "parts": parts}


def describe_store(store: Store, verify: bool = False) -> dict[str, Any]:
    """Describe a store; with `verify` every checksum is compared first (StoreError names a damaged file)."""
    result = summarise(store.manifest)
    if verify:
        result["verified_files"] = store.verify()
    return result
