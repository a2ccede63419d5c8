# SPDX-License-Identifier: Apache-2.0
"""Where workers stand, and who is told when none of them comes further."""
from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from qgnn_dist.cluster.watch import Stall, StallWatch
from qgnn_dist.comm.standing import Deadline, Report, Standing
from qgnn_dist.config import TimeoutsConfig, load_config
from qgnn_dist.errors import ConfigError, DeadlineError
from qgnn_dist.training.run_folder import RunFolder

STALL_S = 0.4


class _Workers:
    """Workers that answer what they are told to, and how often they were asked."""

    def __init__(self, answers: list[Report | None]) -> None:
        self.answers, self.asked, self.told = answers, 0, list[Stall]()
        self._out: dict[int, int] = {}

    def ask(self, rank: int, stacks_after_s: float) -> int:
        assert stacks_after_s == STALL_S
        self.asked += 1
        self._out[self.asked] = rank
        return self.asked

    def taken(self, refs: Sequence[int]) -> Mapping[int, Report]:
        answers = {ref: self.answers[self._out[ref]] for ref in refs}
        return {ref: one for ref, one in answers.items() if one is not None}

    def watch(self, seconds: float) -> None:
        """A call that is out for so long."""
        who = {rank: f"host h{rank}, rank {rank}, process {rank}" for rank in range(len(self.answers))}
        watch = StallWatch(self.ask, self.taken, who, STALL_S, "train_epoch()", self.told.append)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(min(watch.pause_s(), max(end - time.monotonic(), 0.0)))
            watch.look()


def _report(idle_s: float, steps: int = 7, cpu_s: float = 0.0) -> Report:
    return Report(1, 5, "backward, layer 2, round 3", steps, idle_s, cpu_s, "thread MainThread:" * (idle_s >= STALL_S))


def test_a_stall_is_told_once_with_where_each_rank_stands(caplog: pytest.LogCaptureFixture) -> None:
    workers = _Workers([_report(0.5), None, _report(0.9, cpu_s=0.8)])
    with caplog.at_level(logging.WARNING):
        workers.watch(1.5)
    (stall,) = workers.told
    assert caplog.messages == stall.lines == [
        "no worker has come further for 0.5 s (train_epoch())",
        "host h0, rank 0, process 0: epoch 5, backward, layer 2, round 3; it waits, for 0.5 s",
        "host h1, rank 1, process 1: no answer within 0.2 s; its process or its host is frozen or cannot be reached",
        "host h2, rank 2, process 2: epoch 5, backward, layer 2, round 3; it computes, for 0.9 s"]
    assert stall.epoch == 5
    assert sorted(stall.stacks) == [0, 2]
    assert str(stall).count("thread MainThread:") == 2


def test_where_one_comes_further_or_the_call_is_short_nothing_is_told() -> None:
    workers = _Workers([_report(9.0), _report(0.1), None])
    workers.watch(1.0)
    assert workers.told == []
    assert workers.asked >= 6
    short = _Workers([_report(9.0)])
    short.watch(STALL_S / 5)
    assert short.asked == 0, "a call that is over soon is not asked about"


def test_when_nobody_answers_time_counts_from_the_call_and_a_new_standstill_is_told_again() -> None:
    workers = _Workers([None, None])
    workers.watch(1.2)
    (stall,) = workers.told
    assert stall.epoch == 0
    assert stall.stacks == {}
    again = _Workers([_report(0.5)])
    who = {0: "rank 0"}
    watch = StallWatch(again.ask, again.taken, who, STALL_S, "call()", again.told.append)
    for steps in (7, 7, 8):
        again.answers[0] = _report(0.5, steps)
        for _ in range(2):
            time.sleep(watch.pause_s() + 0.01)
            watch.look()
    assert len(again.told) == 2


def test_of_workers_that_do_not_wait_for_one_another_each_has_a_deadline() -> None:
    """Rank 0 comes further, rank 1 says that it does not, rank 2 says nothing."""
    workers = _Workers([_report(0.0), _report(0.0, steps=3), None])
    who = {rank: f"host h, rank {rank}, process {rank}" for rank in range(3)}
    watch = StallWatch(workers.ask, workers.taken, who, STALL_S, "write()", workers.told.append,
                       Deadline(0.6, "timeouts.write_s"))
    end = time.monotonic() + 0.9
    while time.monotonic() < end:
        time.sleep(min(watch.pause_s(), 0.05))
        watch.look()
        workers.answers[1] = _report(time.monotonic() - end + 0.9, steps=3)
    watch.check([0])
    for rank, doing in ((1, r" \(backward, layer 2, round 3\)"), (2, "")):
        words = (rf"^rank {rank}: host h, rank {rank}, process {rank} has not come further in write\(\) for 0\.\d "
                 rf"s{doing}; .*raise timeouts\.write_s \(0\.6\)$")
        with pytest.raises(DeadlineError, match=words) as caught:
            watch.check([0, rank])
        assert caught.value.rank == rank
    calm = StallWatch(workers.ask, workers.taken, who, STALL_S, "train_epoch()", workers.told.append)
    time.sleep(0.1)
    calm.check([0, 1, 2])


def test_a_standing_shows_the_stack_of_a_thread_that_waits_and_for_how_long() -> None:
    standing, go = Standing(), threading.Event()

    def wait_for_peers() -> None:
        standing.epoch = 3
        standing.round("forward", 2, 4)
        go.wait(10)

    thread = threading.Thread(target=wait_for_peers, name="rank-0")
    thread.start()
    try:
        time.sleep(0.1)
        report = standing.report(0.05)
        assert (report.epoch, report.doing, report.steps) == (3, "forward, layer 2, round 4", 1)
        assert 0.1 <= report.idle_s < 5
        assert report.cpu_s < report.idle_s / 2
        assert "thread rank-0:" in report.stacks
        assert "in wait_for_peers" in report.stacks
        assert "standing.report" not in report.stacks, "not of the thread that asks"
        assert standing.report(60.0).stacks == ""
    finally:
        go.set()
        thread.join()


@pytest.mark.parametrize(("words", "stall_s"), [((), 20.0), (("timeouts.server_s=30",), 10.0),
                                                (("timeouts.exchange_s=4",), 4 / 3), (("timeouts.stall_s=30",), 30.0)])
def test_it_comes_before_the_deadlines(words: Any, stall_s: float) -> None:
    assert load_config(overrides=list(words)).timeouts.stall_s == pytest.approx(stall_s)
    assert TimeoutsConfig(exchange_s=9.0).resolved().stall_s == 3.0


def test_later_than_half_of_a_deadline_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"timeouts\.stall_s=40: .*at most half of .*timeouts\.exchange_s=60"):
        load_config(overrides=["timeouts.stall_s=40"])


def test_a_run_keeps_stalls_and_what_is_no_run_yet_gets_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = RunFolder(tmp_path / "run")
    run.keep_stall(3, "rank 0 waits")
    assert not run.path.exists()
    assert "rank 0 waits" in caplog.text
    run.begin("")
    for _ in range(2):
        run.keep_stall(3, "rank 1 waits")
    assert [file.name for file in run.stall_files()] == ["epoch-000003-1.txt", "epoch-000003-2.txt"]
    assert run.stall_files()[0].read_text() == "rank 1 waits"
    run.clear()
    assert run.stall_files() == []
