# SPDX-License-Identifier: Apache-2.0
"""Seconds of an epoch and of a prediction: kernels at calibrated rates, bytes at the link's, one hidden by the other.

A round posts its messages, works on interior rows while they are on the wire, and then on the boundary rows; in
training the multiplier server's answer is waited for before the interior rows. So a round takes
max(wire, server + interior rows) + boundary rows, of the worker that takes longest.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..comm.wire import HEADER_BYTES
from ..config import RunConfig
from ..propagation.smp import Propagation
from ..quant.packed import row_bytes
from .rates import Rates
from .shapes import GraphSize, PartSize, row_work
from .traffic import gradient_row_bytes, sent_rounds

__all__ = ["LINK_USE", "ROUND_S", "Hosts", "Seconds", "epoch_seconds", "predict_seconds"]

LINK_USE = 0.85
"""Share of a link's rate that payloads reach: 0.83 to 0.94 measured with 16 MB messages on 1 Gbit/s."""
ROUND_S = 1e-3
"""Latency of a round over Ethernet, beside its bytes."""
SERVER_S, LOCAL_SERVER_S = 1.5e-3, 2e-4
"""Round trip to the multiplier server as a Ray actor, and in this process."""
EPOCH_S, LOCAL_EPOCH_S = 8e-3, 2e-3
"""What the controller adds to an epoch: calls, ranges, one record."""


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """Machines of one kind.

    Attributes:
        ram_bytes: of one. cores: of one. link_gbps: full duplex, of one host to a switch. workers: on each host.
    """

    count: int
    ram_bytes: float
    cores: int
    link_gbps: float
    workers: int = 1

    @property
    def threads(self) -> int:
        """Of one worker."""
        return max(self.cores // self.workers, 1)


@dataclass(frozen=True)
class Seconds:
    """Of the slowest worker. exposed: of the wire, what nothing hides."""

    perceptron: float = 0.0
    layers: float = 0.0
    evaluation: float = 0.0
    exposed: float = 0.0
    rest: float = 0.0

    @property
    def total(self) -> float:
        """All together."""
        return self.perceptron + self.layers + self.evaluation + self.exposed + self.rest


def epoch_seconds(parts: Sequence[PartSize], number: int, size: GraphSize, config: RunConfig, rates: Rates,
                  hosts: Hosts) -> Seconds:
    """An epoch with its evaluation, of `number` parts of which `parts` are known (all, or the largest)."""
    return max((_epoch(part, number, size, config, rates, hosts) for part in parts), key=lambda s: s.total)


def predict_seconds(parts: Sequence[PartSize], number: int, size: GraphSize, config: RunConfig, rates: Rates,
                    hosts: Hosts) -> Seconds:
    """A prediction with a model of these settings, without its start and without writing."""
    return max((_frozen(part, number, size, config, rates, hosts, at_rest=True) for part in parts),
               key=lambda s: s.total)


def _epoch(part: PartSize, number: int, size: GraphSize, config: RunConfig, rates: Rates, hosts: Hosts) -> Seconds:
    bits, slower = config.quant.stages(), _slower(rates, hosts)
    keep = 1 - config.model.dropout
    values, weights = row_work(size, config.model.hidden)
    # Rates were measured with half of the values dropped; products skip what is 0.
    perceptron = sum(rates.perceptron_ns(kind, 32, values, weights * keep / 0.5) for kind in ("forward", "backward"))
    scores = rates.score_ns * size.classes
    server = 0.0 if config.propagation.kind != "smp" else SERVER_S if number > 1 else LOCAL_SERVER_S
    forward = _rounds("training", bits["messages"], row_bytes(size.classes, bits["messages"]), sent_rounds(config),
                      server, part, number, size, config, rates, hosts)
    gradient = gradient_row_bytes(size.classes, bits["gradients"])
    backward = _rounds("gradient", 32, gradient, Propagation.of(config).num_rounds, 0.0, part, number, size, config,
                       rates, hosts)
    evaluation = _frozen(part, number, size, config, rates, hosts, at_rest=False)
    return Seconds(
        perceptron=1e-9 * slower * part.rows * (perceptron + scores), layers=forward.layers + backward.layers,
        evaluation=evaluation.total - evaluation.exposed,
        exposed=forward.exposed + backward.exposed + evaluation.exposed,
        rest=(EPOCH_S if number > 1 else LOCAL_EPOCH_S))


def _frozen(part: PartSize, number: int, size: GraphSize, config: RunConfig, rates: Rates, hosts: Hosts, *,
            at_rest: bool) -> Seconds:
    """The packed model's forward. Args: at_rest: features are read from the store, and coded."""
    bits = config.quant.stages()
    values, weights = row_work(size, config.model.hidden)
    integer = max(bits["weights"], bits["hidden"], bits["features"])
    row = rates.perceptron_ns("packed", integer, values, weights) + rates.score_ns * size.classes
    row += rates.read_ns * size.stored * at_rest
    layers = _rounds("frozen", bits["messages"], row_bytes(size.classes, bits["messages"]), sent_rounds(config), 0.0,
                     part, number, size, config, rates, hosts)
    return Seconds(perceptron=1e-9 * _slower(rates, hosts) * part.rows * row, layers=layers.layers,
                   exposed=layers.exposed)


def _rounds(kind: str, bits: int, message_bytes: int, sent: int, server_s: float, part: PartSize, number: int,
            size: GraphSize, config: RunConfig, rates: Rates, hosts: Hosts) -> Seconds:
    """All rounds of one direction: seconds of the layers, and what of the wire they do not hide."""
    rounds = Propagation.of(config).num_rounds
    if not rounds:
        return Seconds()
    slower = _slower(rates, hosts)
    rate = rates.layer(kind, bits, size.classes, part.rows + part.halo)
    start = 1e-9 * slower * rate.start_ns * part.rows
    work = 1e-9 * slower * (rate.row_ns * part.rows + rate.edge_ns * part.edges)
    # Bytes of both directions travel at once; the larger decides.
    largest = max(part.sends, part.halo) * message_bytes + part.peers * HEADER_BYTES
    outside = _outside(number, hosts)
    processor = 1e-9 * rates.exchange_ns * largest
    link = largest * outside * hosts.workers / (hosts.link_gbps * 1e9 / 8 * LINK_USE)
    wire = max(link, processor) + (ROUND_S if outside else rates.round_s) if number > 1 else 0.0
    interior = work * part.interior_share
    exposed = max(wire, server_s + interior) - interior
    return Seconds(layers=start + rounds * work,
                   exposed=sent * exposed + (rounds - sent) * server_s if number > 1 else rounds * server_s)


def _outside(number: int, hosts: Hosts) -> float:
    """Share of a worker's messages that leave its host."""
    return (number - min(hosts.workers, number)) / (number - 1) if number > 1 and hosts.count > 1 else 0.0


def _slower(rates: Rates, hosts: Hosts) -> float:
    """What a rate is multiplied by for one worker that has its share of a host's cores, all of them busy."""
    return rates.speedup(rates.threads) / rates.speedup(hosts.cores) * hosts.workers
