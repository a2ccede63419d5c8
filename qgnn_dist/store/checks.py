# SPDX-License-Identifier: Apache-2.0
"""What must hold between the arrays of a part before anything computes with them. Each raises StoreError in one line.

Legend: n local rows, H halo slots.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import StoreError

if TYPE_CHECKING:
    from .reader import PeerPlan

__all__ = ["check_degrees", "check_finite", "check_order", "check_peers", "check_range", "check_row_pointer"]

BLOCK_VALUES = 1 << 20
AGAIN = "; partition the graph again"
BLOCK_ROWS = 1 << 16
"""Rows compared at once, so that a check needs no array of a part's size."""


def check_row_pointer(indptr: np.ndarray, count: int, file: Path) -> None:
    """It rises from 0 to `count`."""
    if indptr[0] != 0 or indptr[-1] != count:
        raise StoreError(f"row pointer runs from {indptr[0]} to {indptr[-1]}, expected 0 to {count}{AGAIN}",
                         file=str(file))
    for begin in range(0, len(indptr) - 1, BLOCK_ROWS):
        some = indptr[begin:begin + BLOCK_ROWS + 1]
        falls = np.flatnonzero(some[1:] < some[:-1])
        if len(falls):
            raise StoreError(f"row pointer falls after row {begin + falls[0]}{AGAIN}", file=str(file))


def check_degrees(indptr: np.ndarray, degree: np.ndarray, file: Path) -> None:
    """They are the rows' lengths."""
    for begin in range(0, len(degree), BLOCK_ROWS):
        if not np.array_equal(np.diff(indptr[begin:begin + BLOCK_ROWS + 1]), degree[begin:begin + BLOCK_ROWS]):
            raise StoreError(f"degrees differ from the rows' lengths{AGAIN}", file=str(file))


def check_range(values: np.ndarray, low: int, high: int, what: str, file: Path) -> None:
    """Every value lies in low…high−1."""
    if len(values) and (int(values.min()) < low or int(values.max()) >= high):
        at = int(np.argmax((values < low) | (values >= high)))
        raise StoreError(f"{what} {at} is {values[at]}, expected {low} to {high - 1}{AGAIN}", file=str(file))


def check_finite(values: np.ndarray, what: str, file: Path) -> None:
    """Every value is a number, a block at a time."""
    for begin in range(0, len(values), BLOCK_VALUES):
        finite = np.isfinite(values[begin:begin + BLOCK_VALUES])
        if not finite.all():
            at = begin + int(np.argmin(finite))
            raise StoreError(f"{what} {at} is {values[at]}, expected a finite number{AGAIN}", file=str(file))


def check_order(source_index: np.ndarray, num_boundary: int, num_nodes: int, rising: bool, file: Path) -> None:
    """Source indices lie in the graph, each once; where they are `rising`, boundary rows do and then interior ones."""
    check_range(source_index, 0, num_nodes, "source_index", file)
    if not rising:
        ascending = np.sort(source_index)
        twice = np.flatnonzero(ascending[1:] == ascending[:-1])
        if len(twice):
            raise StoreError(f"source_index holds {ascending[twice[0]]} twice{AGAIN}", file=str(file))
        return
    for first, last in ((0, num_boundary), (num_boundary, len(source_index))):
        for begin in range(first, last, BLOCK_ROWS):
            some = source_index[begin:min(begin + BLOCK_ROWS + 1, last)]
            falls = np.flatnonzero(some[1:] <= some[:-1])
            if len(falls):
                raise StoreError(f"source_index does not rise after row {begin + falls[0]}{AGAIN}", file=str(file))


def check_peers(peers: Sequence[PeerPlan], part: int, num_parts: int, num_boundary: int, num_halo: int, num_sends: int,
                folder: Path) -> None:
    """Peers rise, their halo slots fill the halo one after the other, rows to send are boundary rows in order."""
    file, expected, before, sent = str(folder / "peers.arrow"), 0, -1, 0
    for plan in peers:
        if not before < plan.peer < num_parts or plan.peer == part:
            raise StoreError(f"peer {plan.peer} follows {before} in the plan of part {part} of {num_parts}{AGAIN}",
                             file=file)
        if plan.recv_begin != expected or plan.recv_count < 0:
            raise StoreError(f"peer {plan.peer}: {plan.recv_count} halo slots begin at {plan.recv_begin}, expected "
                             f"{expected}{AGAIN}", file=file)
        check_range(plan.send_rows, 0, num_boundary, f"peer {plan.peer}: row to send", folder / "send.arrow")
        if (np.diff(plan.send_rows) <= 0).any():
            raise StoreError(f"peer {plan.peer}: rows to send do not rise{AGAIN}",
                             file=str(folder / "send.arrow"))
        before, expected, sent = plan.peer, expected + plan.recv_count, sent + len(plan.send_rows)
    if expected != num_halo or sent != num_sends:
        raise StoreError(f"plans receive {expected} and send {sent} rows, the manifest says {num_halo} and "
                         f"{num_sends}{AGAIN}", file=file)
