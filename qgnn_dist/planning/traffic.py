# SPDX-License-Identifier: Apache-2.0
"""Bytes on the wire, of all workers together: law 5's formula, and the all-reduces beside the rounds."""
from __future__ import annotations

from dataclasses import dataclass

from ..comm.wire import HEADER_BYTES
from ..config import RunConfig
from ..propagation.smp import Propagation
from ..quant.levels import NUM_LEVELS
from ..quant.packed import row_bytes
from ..quant.ranges import is_sent
from .cut import Cut
from .shapes import weight_count

__all__ = ["Traffic", "gradient_row_bytes", "sent_rounds", "traffic"]


@dataclass(frozen=True)
class Traffic:
    """Bytes of an epoch by direction, and of a prediction."""

    forward: int
    backward: int
    evaluation: int
    control: int
    predict: int

    @property
    def epoch(self) -> int:
        """All that an epoch with an evaluation sends."""
        return self.forward + self.backward + self.evaluation + self.control


def traffic(cut: Cut, parts: int, config: RunConfig) -> Traffic:
    """Of `parts` workers; with two rounds a layer the last one is counted, which λ = 0 makes needless."""
    if parts == 1:
        return Traffic(0, 0, 0, 0, 0)
    classes, bits, rows, frames = cut.size.classes, config.quant.stages(), cut.sends(parts), cut.frames(parts)
    coded = rows * row_bytes(classes, bits["messages"]) + frames * HEADER_BYTES
    gradient = rows * gradient_row_bytes(classes, bits["gradients"]) + frames * HEADER_BYTES
    rounds, sent = Propagation.of(config).num_rounds, sent_rounds(config)
    weights = weight_count(cut.size, config.model.hidden) + 2 * (bits["weights"] < 32)  # and their learned steps
    levels = _all_reduce(NUM_LEVELS, 8, parts)
    return Traffic(sent * coded, rounds * gradient, sent * coded, _all_reduce(weights, 4, parts) + levels,
                   sent * coded)


def sent_rounds(config: RunConfig) -> int:
    """Rounds of a forward that send something (messages.stride leaves some out)."""
    rounds, stride = Propagation.of(config).num_rounds, config.messages.stride
    return sum(is_sent(k, rounds, stride) for k in range(rounds)) if stride > 1 else rounds


def gradient_row_bytes(classes: int, bits: int) -> int:
    """Packed bytes of a row of gradients, and one byte of scale where they are quantised."""
    return row_bytes(classes, bits) + (bits < 32)


def _all_reduce(count: int, item_bytes: int, parts: int) -> int:
    """Bytes of Group.all_reduce_sum: every slice goes to its owner, its sum to all others, a header each."""
    return 2 * (parts - 1) * (count * item_bytes + min(parts, count) * HEADER_BYTES)
