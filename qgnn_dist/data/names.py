# SPDX-License-Identifier: Apache-2.0
"""What a user may call the columns of Parquet tables."""
from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ColumnNames"]


@dataclass(frozen=True)
class ColumnNames:
    """Columns of the nodes table (`node_id`, `label`, `split`) and the edges table (`src`, `dst`)."""

    node_id: str = "node_id"
    src: str = "src"
    dst: str = "dst"
    label: str = "label"
    split: str = "split"
