# SPDX-License-Identifier: Apache-2.0
"""Wrong frames, silent and lost peers: the error names rank, peer and what is wrong, and comes within the deadline."""
from __future__ import annotations

import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from qgnn_dist.comm.exchange import Exchange
from qgnn_dist.comm.formation import Formation, FrameKey
from qgnn_dist.comm.group import EXCHANGE_LANE, ConnectionLostError, Deadline, Group
from qgnn_dist.comm.pool import LocalPool, WorkerContext, blame
from qgnn_dist.comm.wire import HEADER_BYTES, Header, seal_frame
from qgnn_dist.errors import DeadlineError, ExchangeError, InputError, QgnnError, WorkerError

RUN_ID, ROWS, COLUMNS, BITS = 77, 6, 7, 2
EARLIER, FORMATION = Formation.new(RUN_ID, 0), Formation.new(RUN_ID, 1)
KEY = FORMATION.frame_key()
GOOD = Header(RUN_ID, 1, 0, "forward", 4, 5, BITS, ROWS, COLUMNS, sender=1, receiver=0)
PAYLOAD = np.arange(ROWS * 2, dtype=np.uint8)


@dataclass
class Plan:
    peer: int
    send_rows: np.ndarray
    recv_begin: int
    recv_count: int


def with_groups(size: int, *roles: Callable[[Group], Any], timeout_s: float = 1.0) -> list[Any]:
    """Run one role a rank, each in a thread with its own group; the results, exceptions as values."""
    store, port = Group.host_store("127.0.0.1", 10)

    def run(rank: int) -> Any:
        group = Group.open(rank, size, "127.0.0.1", port, "127.0.0.1", timeout_s, store if rank == 0 else None,
                           formation=FORMATION, rendezvous_s=10)
        try:
            return roles[rank](group)
        except Exception as error:
            return error
        finally:
            group.close()

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(run, range(size)))


def exchange_of(group: Group, peers: list[int], timeout_s: float) -> Exchange:
    plans = [Plan(p, np.arange(ROWS, dtype=np.int32), i * ROWS, ROWS) for i, p in enumerate(peers)]
    return Exchange(plans, ROWS, ROWS * len(peers), group, RUN_ID, timeout_s)


def one_round(exchange: Exchange, peers: int) -> np.ndarray:
    buffer = np.zeros((ROWS * (1 + peers), 2), np.uint8)
    exchange.begin(buffer, BITS, COLUMNS, "forward", layer=4, round=5)
    exchange.finish()
    return buffer


def honest(peers: list[int], timeout_s: float = 1.0, linger_s: float = 0.0) -> Callable[[Group], Any]:
    """One round as it should be; `linger_s` keeps the connections open afterwards."""
    def role(group: Group) -> Any:
        start = time.monotonic()
        try:
            return one_round(exchange_of(group, peers, timeout_s), len(peers))
        except QgnnError as error:
            return error, time.monotonic() - start
        finally:
            time.sleep(linger_s)

    return role


def frames(*sent: tuple[np.ndarray, np.ndarray], rounds: int = 1) -> Callable[[Group], Any]:
    """Rank 1 sends these headers and payloads, one a round, and stays for so many rounds of the other rank."""
    def role(group: Group) -> None:
        works, received = [], []
        for head, body in sent:
            received += [group.irecv(0, np.zeros(HEADER_BYTES, np.uint8), EXCHANGE_LANE, header=True),
                         group.irecv(0, np.zeros(len(PAYLOAD), np.uint8), EXCHANGE_LANE)]
            # The receiver's buffer is found by the size of the payload; a truncated one claims the full size.
            works += [group._backend.send([torch.from_numpy(head)], 0, HEADER_BYTES << 3 | 1),
                      group._backend.send([torch.from_numpy(body)], 0, len(PAYLOAD) << 3)]
        group.wait(received[:2 * rounds], Deadline(20.0), "the honest rank")
        time.sleep(0.2)
        del works

    return role


def frame(head: np.ndarray, payload: np.ndarray, tail: Callable[[np.ndarray], np.ndarray]) -> Callable[[Group], Any]:
    """Rank 1 sends this; `tail` changes what is sent after the header."""
    return frames((head, tail(payload.copy())))


def packed(header: Header, payload: np.ndarray = PAYLOAD, changes: dict[int, int] | None = None,
           key: FrameKey = KEY) -> np.ndarray:
    """A header with a right MAC, and then bytes of it changed."""
    head = np.zeros(HEADER_BYTES, np.uint8)
    seal_frame(header, payload, key, head)
    for at, value in (changes or {}).items():
        head[at] = value
    return head


def version_2() -> np.ndarray:
    """A whole header of before."""
    fields = struct.pack("<4sHBBQIIIIIHHQQI", b"QGNF", 2, 1, BITS, RUN_ID, 0, 4, 5, ROWS, COLUMNS, 1, 0, len(PAYLOAD),
                         int(PAYLOAD.sum()), 0)
    return np.frombuffer(fields + struct.pack("<I", 0x12345678), np.uint8).copy()


def unchanged(payload: np.ndarray) -> np.ndarray:
    return payload


def flipped(payload: np.ndarray) -> np.ndarray:
    payload[7] ^= 16
    return payload


def shortened(payload: np.ndarray) -> np.ndarray:
    return payload[:8].copy()


FORGED = ("the MAC of the payload of 12 B (bits=2, rows=6, columns=7) is wrong, and every field right: the frame was "
          "damaged or cut on the way, or made by someone without this run's key")
WRONG = {
    "generation": (packed(replace(GOOD, generation=0), key=EARLIER.frame_key()), unchanged,
                   "generation is 0, expected 1; a worker of before the last restart still talks"),
    "several": (packed(replace(GOOD, generation=0, sequence=9, rows=7, sender=3)), unchanged,
                "generation is 0, expected 1, sequence is 9, expected 0, rows is 7, expected 6, sender is 3, expected"),
    "run id": (packed(replace(GOOD, run_id=78)), unchanged, "run id is 78, expected 77; a worker of another run"),
    "bits": (packed(replace(GOOD, bits=8)), unchanged,
             "bits is 8, expected 2; the workers do not run with the same settings"),
    "rows": (packed(replace(GOOD, rows=9)), unchanged,
             "rows is 9, expected 6; the hosts see different partitions"),
    "columns": (packed(replace(GOOD, columns=8)), unchanged, "columns is 8, expected 7; the workers do not run the"),
    "sequence": (packed(replace(GOOD, sequence=3)), unchanged, "sequence is 3, expected 0; the workers are out of"),
    "layer": (packed(replace(GOOD, layer=3)), unchanged, "layer is 3, expected 4; the workers are out of step"),
    "round": (packed(replace(GOOD, round=6)), unchanged, "round is 6, expected 5; the workers are out of step"),
    "direction": (packed(replace(GOOD, direction="evaluation")), unchanged, "direction is evaluation, expected"),
    "sender": (packed(replace(GOOD, sender=2)), unchanged, "sender is 2, expected 1"),
    "magic": (packed(GOOD, changes={0: 65}), unchanged, "magic is b'AGNF', expected b'QGNF'"),
    "version": (version_2(), unchanged, "frame version is 2, expected 3; install the same qgnn-dist on all hosts"),
    "unknown direction": (packed(GOOD, changes={6: 9}), unchanged, "direction is 9, expected forward"),
    "flipped header": (packed(GOOD, changes={29: 1}), unchanged, "layer is 260, expected 4"),
    "flipped MAC": (packed(GOOD, changes={50: 1}), unchanged, FORGED),
    "flipped payload": (packed(GOOD), flipped, FORGED),
    "truncated payload": (packed(GOOD), shortened, FORGED),
    "truncated header": (packed(GOOD)[:60].copy(), unchanged, FORGED),
    "no key": (packed(GOOD, changes=dict.fromkeys(range(48, 64), 0)), unchanged, FORGED),
    "another key": (packed(GOOD, key=Formation.new(RUN_ID, 1).frame_key()), unchanged, FORGED),
    "earlier key": (packed(GOOD, key=EARLIER.frame_key()), unchanged, FORGED),
    "another frame's MAC": (packed(replace(GOOD, layer=5), changes={28: 4}), unchanged, FORGED),
    "own frame sent back": (packed(replace(GOOD, sender=0, receiver=1)), unchanged,
                            "sender is 0, expected 1, receiver is 1, expected 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_frame_is_refused_by_rank_peer_and_layer(name: str) -> None:
    head, tail, words = WRONG[name]
    (error, seconds), _ = with_groups(2, honest([1]), frame(head, PAYLOAD, tail))
    assert type(error) is ExchangeError
    assert (error.rank, error.peer, error.layer) == (0, 1, 4)
    assert str(error).startswith("rank 0, peer 1, layer 4: forward frame, round 5: ")
    assert words in str(error)
    assert seconds < 1.0


def rounds(count: int) -> Callable[[Group], Any]:
    """As many rounds of layer 4, round 5; the halo rows of those that were accepted, and the error of the last one."""
    def role(group: Group) -> Any:
        exchange, accepted = exchange_of(group, [1], 1.0), []
        try:
            for _ in range(count):
                accepted.append(one_round(exchange, 1)[ROWS:].reshape(-1))
        except ExchangeError as error:
            assert exchange.exchange_rounds == len(accepted)
            with pytest.raises(ValueError, match="the round before has not been finished"):
                one_round(exchange, 1)
            return accepted, error
        return accepted, None

    return role


def numbered(sequence: int, payload: np.ndarray = PAYLOAD) -> tuple[np.ndarray, np.ndarray]:
    return packed(replace(GOOD, sequence=sequence), payload), payload


OTHER = PAYLOAD[::-1].copy()
REORDERED = {
    "in order": ([numbered(0), numbered(1, OTHER), numbered(2)], 3, None),
    "replayed": ([numbered(0), numbered(1, OTHER), numbered(0)], 2, "sequence is 0, expected 2"),
    "replayed at once": ([numbered(0), numbered(0)], 1, "sequence is 0, expected 1"),
    "replayed by the right number": ([numbered(0), (packed(GOOD, changes={16: 1}), PAYLOAD)], 1, FORGED),
    "swapped": ([numbered(1), numbered(0)], 0, "sequence is 1, expected 0"),
    "one lost": ([numbered(0), numbered(2)], 1, "sequence is 2, expected 1"),
    "payloads swapped": ([(numbered(0)[0], OTHER), (numbered(1, OTHER)[0], PAYLOAD)], 0, FORGED),
}


@pytest.mark.parametrize("name", REORDERED)
def test_frames_are_taken_once_and_in_order(name: str) -> None:
    sent, good, words = REORDERED[name]
    (accepted, error), _ = with_groups(2, rounds(len(sent)), frames(*sent, rounds=min(good + 1, len(sent))))
    assert len(accepted) == good
    for got, (_, payload) in zip(accepted, sent):
        np.testing.assert_array_equal(got, payload)
    if words is None:
        assert error is None
    else:
        assert type(error) is ExchangeError
        assert (error.rank, error.peer, error.layer) == (0, 1, 4)
        assert words in str(error)


def test_a_changed_bit_anywhere_in_a_frame_is_refused() -> None:
    """A bit of every byte of header and payload, each in a frame of its own on one connection."""
    size = HEADER_BYTES + len(PAYLOAD)
    sent = []
    for at, bit in enumerate(np.random.default_rng(0).integers(0, 8, size)):
        whole = np.concatenate(numbered(at))
        whole[at] ^= 1 << int(bit)
        sent.append((whole[:HEADER_BYTES].copy(), whole[HEADER_BYTES:].copy()))

    def receive(group: Group) -> Any:
        used, errors = [], []  # a refused round leaves receives behind, whose buffers must live
        for _ in range(size):
            used.append(exchange_of(group, [1], 2.0))
            with pytest.raises(ExchangeError) as caught:
                one_round(used[-1], 1)
            errors.append(caught.value)
        return errors

    errors, other = with_groups(2, receive, frames(*sent, rounds=size))
    assert other is None
    assert [type(error) for error in errors] == [ExchangeError] * size
    assert {(error.rank, error.peer, error.layer) for error in errors} == {(0, 1, 4)}
    assert [FORGED in str(error) for error in errors] == [False] * 48 + [True] * (size - 48)


def test_an_all_reduce_takes_no_stranger_s_frame() -> None:
    """Rank 1 has another key, though it knows the place to meet."""
    def reduce(key: FrameKey) -> Callable[[Group], Any]:
        def role(group: Group) -> Any:
            group.key, mine = key, np.full(90, 1.0 + group.rank, np.float32)
            try:
                group.all_reduce_sum(mine)
            finally:
                time.sleep(0.3)
            return mine

        return role

    (first, _) = with_groups(2, reduce(KEY), reduce(KEY))
    np.testing.assert_array_equal(first, np.full(90, 3.0, np.float32))
    results = with_groups(2, reduce(KEY), reduce(EARLIER.frame_key()))
    assert [type(r) for r in results] == [ExchangeError] * 2
    assert str(results[0]).startswith("rank 0, peer 1: control frame, round 0: the MAC of the payload of 180 B")


def test_the_same_frame_unchanged_is_accepted() -> None:
    buffer, _ = with_groups(2, honest([1]), frame(packed(GOOD), PAYLOAD, unchanged))
    np.testing.assert_array_equal(buffer[ROWS:].reshape(-1), PAYLOAD)


@pytest.mark.parametrize("bits", [1, 8, 32])
def test_a_payload_of_another_size_is_an_error_not_the_end_of_the_process(bits: int) -> None:
    """gloo terminates a process that gets more bytes than it posted a buffer for."""
    def other_bits(group: Group) -> None:
        exchange = exchange_of(group, [0], 2.0)
        exchange.begin(np.zeros((2 * ROWS, (COLUMNS * bits + 7) // 8), np.uint8), bits, COLUMNS, "forward", 4, 5)
        time.sleep(1)

    (error, seconds), _ = with_groups(2, honest([1]), other_bits)
    assert type(error) is ExchangeError
    assert f"bits is {bits}, expected 2" in str(error)
    assert seconds < 1.0


def test_silent_peers_are_named_within_the_deadline() -> None:
    silent = lambda group: time.sleep(2.0)  # noqa: E731
    (error, seconds), *_ = with_groups(2, honest([1]), silent)
    assert type(error) is DeadlineError
    assert (error.rank, error.peer, error.layer) == (0, 1, 4)
    assert "peer(s) 1 sent nothing for forward round 5 within 1 s" in str(error)
    assert "timeouts.exchange_s" in str(error)
    assert 0.9 < seconds < 1.5
    results = with_groups(4, honest([1, 2, 3]), silent, honest([0], 3.0), silent)
    error, seconds = results[0]
    assert "peer(s) 1, 3 sent nothing" in str(error)
    assert error.peer is None
    assert 0.9 < seconds < 1.5


def test_a_peer_that_sends_a_header_alone_is_named() -> None:
    def header_only(group: Group) -> None:
        group.isend(0, packed(GOOD), "forward", EXCHANGE_LANE, header=True)
        time.sleep(2.0)

    (error, _), _ = with_groups(2, honest([1]), header_only)
    assert type(error) is DeadlineError
    assert "peer(s) 1 sent nothing for forward round 5" in str(error)


def test_a_peer_that_takes_nothing_is_named() -> None:
    def never_reads(group: Group) -> None:
        head = packed(GOOD)
        sent = [group.isend(0, head, "forward", EXCHANGE_LANE, header=True),
                group.isend(0, PAYLOAD, "forward", EXCHANGE_LANE)]
        time.sleep(2.0)
        del sent

    (error, seconds), _ = with_groups(2, honest([1]), never_reads)
    assert type(error) is DeadlineError
    assert "peer(s) 1 did not take forward round 5" in str(error)
    assert seconds < 1.5


def test_a_closed_connection_is_noticed_long_before_the_deadline() -> None:
    (error, seconds), _ = with_groups(2, honest([1], timeout_s=20), lambda group: time.sleep(0.2))
    assert type(error) is ConnectionLostError
    assert (error.rank, error.peer) == (0, 1)
    assert "Connection closed by peer" in str(error)
    assert seconds < 2


def test_an_all_reduce_names_who_is_missing_and_who_differs() -> None:
    def reduce(length: int, dtype: Any = np.float32) -> Callable[[Group], Any]:
        def role(group: Group) -> None:
            try:
                group.all_reduce_sum(np.ones(length, dtype))
            finally:
                time.sleep(0.5)
        return role

    results = with_groups(3, reduce(90), lambda group: time.sleep(1.5), reduce(90))
    for rank in (0, 2):
        assert type(results[rank]) is DeadlineError
        assert results[rank].peer == 1
        assert "peer(s) 1 sent nothing for all-reduce 0, step 0" in str(results[rank])
    results = with_groups(2, reduce(90), reduce(94))
    assert {type(r) for r in results} == {ExchangeError}
    assert "columns is 47, expected 45" in str(results[0])
    results = with_groups(2, reduce(90, np.float64), reduce(90, np.int64))
    assert "layer is 2, expected 1" in str(results[0])


def test_a_rendezvous_names_the_ranks_that_do_not_come() -> None:
    store, port = Group.host_store("127.0.0.1", 5)
    start = time.monotonic()
    with pytest.raises(DeadlineError, match=r"rank\(s\) 1, 2 of 3 did not come.*timeouts\.rendezvous_s") as caught:
        Group.open(0, 3, "127.0.0.1", port, "127.0.0.1", 60.0, store, formation=FORMATION, rendezvous_s=0.5)
    assert time.monotonic() - start < 2
    assert caught.value.rank == 0
    with pytest.raises(DeadlineError, match=r"rank 0's rendezvous at 127\.0\.0\.1:9 cannot be reached"):
        Group.open(1, 2, "127.0.0.1", 9, "127.0.0.1", 60.0, formation=FORMATION, rendezvous_s=1.0)


class Failing:
    """Worker of a LocalPool in which rank 1 goes wrong while the others wait for it."""

    def __init__(self, context: WorkerContext) -> None:
        self.context = context

    def go(self, how: str) -> None:
        assert self.context.group is not None
        if self.context.rank == 1:
            if how == "raise":
                raise InputError("no features")
            if how == "hang":
                time.sleep(1.5)
        self.context.group.barrier()


def test_a_local_pool_reports_the_cause_not_its_consequences() -> None:
    pool = LocalPool(Failing, {}, 3, timeout_s=1.0)
    start = time.monotonic()
    with pytest.raises(InputError, match="rank 1: no features"):
        pool.call("go", "raise", timeout_s=30)
    pool.close()
    assert time.monotonic() - start < 3
    pool = LocalPool(Failing, {}, 3, timeout_s=0.5)
    with pytest.raises(DeadlineError, match=r"ranks 0, 2: peer\(s\) 1 sent nothing"):
        pool.call("go", "hang", timeout_s=30)
    pool.close()
    pool = LocalPool(Failing, {}, 2, timeout_s=5.0)
    with pytest.raises(DeadlineError, match=r"rank\(s\) 0, 1 did not answer go\(\) within 0.3 s"):
        pool.call("go", "hang", timeout_s=0.3)
    pool.close()


def test_blame_prefers_causes() -> None:
    lost = {r: ConnectionLostError("lost", rank=r, peer=1) for r in (0, 2)}
    died = WorkerError("killed", rank=1)
    assert blame({**lost, 1: died}) is died
    late = {0: DeadlineError("peer(s) 1", rank=0, peer=1), 1: DeadlineError("peer(s) 2", rank=1, peer=2)}
    assert blame(late) is late[1]
    wrong = ExchangeError("bits is 8", rank=2, peer=0)
    assert blame({**late, 2: wrong}) is wrong
    merged = blame({r: InputError("same", rank=r, host=f"h{r}", file="f") for r in (0, 3)})
    assert str(merged) == "host h0, h3, f: ranks 0, 3: same"
    assert type(merged) is InputError
    plain = KeyError("x")
    assert blame({0: plain, **{1: lost[0]}}) is plain
