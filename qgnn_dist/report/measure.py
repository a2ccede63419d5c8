# SPDX-License-Identifier: Apache-2.0
"""What only a look at the graph tells: a run's best model on the nodes of a store, measured by `diagnosis`."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import StorageConfig
from ..diagnosis.report import diagnose
from ..errors import InputError
from ..inference.batch import check_predictable
from ..store.reader import Store
from .runs import RunData

__all__ = ["Looks", "look"]


@dataclass(frozen=True)
class Looks:
    """What is known of one run's best model beyond its epochs.

    Attributes:
        splits, class_names: as inference.examine.together tells, of `epoch`. sent_rows: rows that a part sends another
            in a round, or None. diagnosis: see diagnosis.report.combine, or None. why_not: in words, why there is none.
    """

    splits: dict[str, Any]
    class_names: list[str] | None
    epoch: int
    sent_rows: list[list[int]] | None
    diagnosis: dict[str, Any] | None
    why_not: str = ""


def look(runs: Sequence[RunData], stores: Sequence[str | Path], storage: StorageConfig | None = None,
         say: Callable[[str], None] | None = None) -> list[Looks]:
    """Of each run: what it left at its end, and what its model does on the store of its graph, where one is given.

    Raises: StoreError: no store. InputError: no run is of a store's graph. ModelError: see diagnosis.report.diagnose.
    """
    opened = [Store.open(path, storage) for path in stores]
    for store in opened:
        if not any(_of_graph(run, store) for run in runs):
            raise InputError("--store: it is of another graph than the runs; give the store that they were trained on",
                             file=str(store.path))
    found = []
    for run in runs:
        own = next((one for one in opened if _of_graph(run, one)), None)
        if own is not None and say is not None and run.model is not None:
            say(f"measuring {run.name} on {own.name}")
        found.append(_look(run, own))
    return found


def _of_graph(run: RunData, store: Store) -> bool:
    return run.identity is not None and run.identity["fingerprint"] == store.fingerprint


def _look(run: RunData, store: Store | None) -> Looks:
    names = run.final["class_names"] if run.final else run.model.info.class_names if run.model else None
    why_not, diagnosis = "", None
    if run.model is None:
        why_not = "no checkpoint holds an evaluated model yet"
    elif store is None:
        why_not = "no store was given that the model could be measured on"
    else:
        check_predictable(store, run.model, run.path)
        diagnosis = diagnose(store, run.model, run.path, exchange_s=float(run.config.timeouts.exchange_s))
    if run.final is not None:
        return Looks(run.final["splits"], names, run.final["epoch"], run.final["sent_rows"], diagnosis, why_not)
    if diagnosis is None or store is None:
        return Looks({}, names, 0, None, None, why_not)
    same_cut = run.identity is not None and run.identity["parts"] == store.num_parts and run.identity.get(
        "partitioner") == store.manifest["partitioner"]
    examined = diagnosis["examined"]
    return Looks(examined["splits"], names, run.model_epoch, examined["sent_rows"] if same_cut else None, diagnosis)
