# SPDX-License-Identifier: Apache-2.0
"""Seconds of an epoch and of a prediction: kernels at calibrated rates, bytes at the link's, one hidden by the other.

A round posts its messages, works on interior rows while they are on the wire, and then on the boundary rows; in
training the multiplier server's answer is waited for before the interior rows. So a round takes
max(wire, server + interior rows) + boundary rows, of the worker that takes longest.
"""
from __future__ import annotations

from dataclasses import dataclass

from ..comm.wire import HEADER_BYTES
from ..config import RunConfig
from ..propagation.smp import Propagation
from ..quant.packed import row_bytes
from .cut import Cut
from .rates import Rates
from .shapes import PartSize, row_work
from .traffic import gradient_row_bytes, sent_rounds

__all__ = ["ELASTIC_SLOWER", "LINK_USE", "ROUND_S", "Hosts", "Seconds", "epoch_seconds", "predict_seconds"]

LINK_USE = 0.85
"""Share of a link's rate that payloads reach: 0.83 to 0.94 measured with 16 MB messages on 1 Gbit/s."""
ROUND_S = 1e-3
"""Latency of a round over Ethernet, beside its bytes."""
CORE_BYTES = 1 << 19
"""Of messages that lie around a row and are still in its core's own memory when a neighbour is fetched."""
ELASTIC_SLOWER = {"training": 15.0, "gradient": 20.0, "frozen": 10.0}
"""Elastic layers take as many times as long as appnp's of one thread, on any number: measured on synthetic:arxiv,
40 classes, three of four edges outside the ball."""
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


def epoch_seconds(cut: Cut, number: int, config: RunConfig, rates: Rates, hosts: Hosts) -> Seconds:
    """An epoch with its evaluation, of `number` parts."""
    return max((_Worker(cut, part, number, config, rates, hosts).epoch() for part in cut.parts(number)),
               key=lambda s: s.total)


def predict_seconds(cut: Cut, number: int, config: RunConfig, rates: Rates, hosts: Hosts) -> Seconds:
    """A prediction with a model of these settings, without its start and without writing."""
    return max((_Worker(cut, part, number, config, rates, hosts).frozen("frozen", at_rest=True)
                for part in cut.parts(number)), key=lambda s: s.total)


@dataclass(frozen=True)
class _Worker:
    """One worker, and all that its seconds depend on."""

    cut: Cut
    part: PartSize
    number: int
    config: RunConfig
    rates: Rates
    hosts: Hosts

    def epoch(self) -> Seconds:
        """Both passes, one step and an evaluation."""
        size, config, rates = self.cut.size, self.config, self.rates
        bits = config.quant.stages()
        values, weights = row_work(size, config.model.hidden, bits["features"])
        # Rates were measured with half of the values dropped; products of floats skip what is 0, those of codes don't.
        kept = weights * (1 - config.model.dropout) / 0.5
        coded = self._coded_bits if size.codes_are_dense(bits["features"]) else 32  # see RowBlocks.forward
        row = self._slower("forward") * rates.perceptron_ns("forward", coded, values, weights if coded <= 4 else kept)
        row += self._slower("backward") * rates.perceptron_ns("backward", self._coded_bits, values, kept)
        row += self._slower("packed") * rates.score_ns * size.classes
        server = 0.0 if config.propagation.kind != "smp" else SERVER_S if self.number > 1 else LOCAL_SERVER_S
        forward = self._rounds("training", bits["messages"], row_bytes(size.classes, bits["messages"]),
                               sent_rounds(config), server)
        backward = self._rounds("gradient", 32, gradient_row_bytes(size.classes, bits["gradients"]),
                                Propagation.of(config).num_rounds, 0.0)
        evaluation = self.frozen("training", at_rest=False)  # it records moments, too
        return Seconds(
            perceptron=self.part.rows * row, layers=forward.layers + backward.layers,
            evaluation=evaluation.total - evaluation.exposed,
            exposed=forward.exposed + backward.exposed + evaluation.exposed,
            rest=EPOCH_S if self.number > 1 else LOCAL_EPOCH_S)

    def frozen(self, kind: str, *, at_rest: bool) -> Seconds:
        """The packed model's forward. Args: at_rest: features are read from the store, and coded."""
        size, config, rates = self.cut.size, self.config, self.rates
        bits = config.quant.stages()
        row = rates.perceptron_ns("packed", self._coded_bits, *row_work(size, config.model.hidden, bits["features"]))
        row += rates.score_ns * size.classes + rates.read_ns * size.stored * at_rest
        layers = self._rounds(kind, bits["messages"], row_bytes(size.classes, bits["messages"]), sent_rounds(config),
                              0.0)
        return Seconds(perceptron=self._slower("packed") * self.part.rows * row, layers=layers.layers,
                       exposed=layers.exposed)

    def _rounds(self, kind: str, bits: int, message_bytes: int, sent: int, server_s: float) -> Seconds:
        """All rounds of one direction: seconds of the layers, and what of the wire they do not hide."""
        part, hosts, classes = self.part, self.hosts, self.cut.size.classes
        rounds = Propagation.of(self.config).num_rounds
        if not rounds:
            return Seconds()
        near = self.cut.near(CORE_BYTES // max(row_bytes(classes, bits), 1))
        rate = self.rates.layer(kind, bits, classes, part.rows + part.halo, near)
        start = self._slower(kind) * rate.start_ns * part.rows
        work = self._slower(kind) * (rate.row_ns * part.rows + rate.edge_ns * part.edges)
        if self.config.propagation.kind == "elastic":  # most of it is NumPy's, of one thread
            slower = ELASTIC_SLOWER[kind] * self.rates.speedup(kind, self.hosts.threads)
            start, work = start * slower, work * slower
        if self.number == 1:
            return Seconds(layers=start + rounds * work, exposed=rounds * server_s)
        # Bytes of both directions travel at once; the larger decides.
        largest = max(part.sends, part.halo) * message_bytes + part.peers * HEADER_BYTES
        outside = self._outside
        processor = 1e-9 * self.rates.exchange_ns * largest
        link = largest * outside * hosts.workers / (hosts.link_gbps * 1e9 / 8 * LINK_USE)
        wire = max(link, processor) + (ROUND_S if outside else self.rates.round_s)
        interior = work * part.interior_share
        return Seconds(layers=start + rounds * work, exposed=sent * (max(wire, server_s + interior) - interior)
                       + (rounds - sent) * server_s)

    @property
    def _coded_bits(self) -> int:
        """Of the perceptron's widest stage."""
        bits = self.config.quant.stages()
        return max(bits["weights"], bits["hidden"], bits["features"])

    @property
    def _outside(self) -> float:
        """Share of a worker's messages that leave its host."""
        inside = min(self.hosts.workers, self.number) if self.hosts.count > 1 else self.number
        return (self.number - inside) / (self.number - 1)

    def _slower(self, kind: str) -> float:
        """Seconds of a nanosecond's work of a kind for one worker with its share of a host's cores."""
        rates, hosts = self.rates, self.hosts
        taking_turns = max(hosts.workers / hosts.cores, 1.0)
        return 1e-9 * taking_turns * rates.speedup(kind, rates.threads) / rates.speedup(kind, hosts.threads)
