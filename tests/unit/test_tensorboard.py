# SPDX-License-Identifier: Apache-2.0
"""TensorBoard's events are the figures of metrics.jsonl, also of a run that went on."""
from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import qgnn_dist as qgnn
from qgnn_dist.errors import InputError
from qgnn_dist.training.tensorboard import scalars
from tests.helpers import make_store, settings, small_graph

WORDS = ("log.tensorboard=on", "train.epochs=6", "train.checkpoint_every=2", "train.eval_every=2")


def events(run: Path) -> dict[tuple[str, int], float]:
    """Tag and epoch → value, of the one file."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util import tensor_util

    (file,) = (run / "tensorboard").iterdir()
    found: dict[tuple[str, int], float] = {}
    for event in EventFileLoader(str(file)).Load():
        for value in event.summary.value:
            assert (value.tag, event.step) not in found
            found[value.tag, event.step] = float(tensor_util.make_ndarray(value.tensor))
    return found


def wanted(run: Path) -> dict[tuple[str, int], float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(tag, record["epoch"]): value for record in records for tag, value in scalars(record)}


def test_events_are_what_metrics_jsonl_has(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    store, run = make_store(small_graph(), tmp_path / "s", 1), tmp_path / "run"

    def stop(record: dict[str, Any]) -> None:
        if record["epoch"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qgnn.train(store.path, out=run, config=settings(*WORDS), on_epoch=stop)
    assert events(run) == wanted(run)
    qgnn.train(store.path, out=run, config=settings(*WORDS), resume=True)
    found = events(run)
    assert found == wanted(run)
    assert {epoch for tag, epoch in found if tag == "accuracy/valid"} == {2, 4, 6}
    assert {tag for tag, _ in found} >= {"loss", "valid_loss", "wire_bytes/forward", "multipliers/0", "epoch_s"}
    qgnn.train(store.path, out=run, config=settings(*WORDS[1:]), overwrite=True)
    assert not (run / "tensorboard").exists()


def test_without_the_package_it_is_refused_before_anything_is_written(tmp_path: Path,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(small_graph(), tmp_path / "s", 1)
    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"pip install 'qgnn-dist\[tensorboard\]'"):
        qgnn.train(store.path, out=tmp_path / "run", config=settings(*WORDS))
    assert not (tmp_path / "run").exists()
