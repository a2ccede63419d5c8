# SPDX-License-Identifier: Apache-2.0
"""`qgnn report`: one or several runs as one HTML page that needs nothing else."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..config import StorageConfig
from ..errors import EXISTS, InputError
from ..files.write import write_atomically
from ..storage.place import uri_of
from ..storage.publish import published_file
from .measure import look
from .page import make_page
from .runs import read_runs

__all__ = ["make_report"]

DEFAULT = "report.html"


def make_report(runs: Sequence[str | Path], *, out: str | Path | None = None, stores: Sequence[str | Path] = (),
                overwrite: bool = False, say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Write the page of one run, or of several beside each other.

    Args:
        runs: folders, or URIs, of runs, which may still be trained. out: the file; default: report.html in the run's
            folder, or here where there are several runs, or the run lies on an object store.
        stores: of the runs' graphs, to measure their best models on. overwrite: replace a file that is there.
        say: is told what takes a while.
    Returns: `path`, `bytes`, and of each run `name`, `epochs`, `best_epoch`, whether it is `complete`, and `measured`.
    Raises: InputError: see runs.read_runs and measure.look; or the output exists. OutputError: the disk.
    """
    target = out if out is not None else _default(runs)
    if uri_of(target) is None and Path(target).exists() and not overwrite:
        raise InputError(f"{EXISTS}, or --out FILE", file=str(target))
    storage = StorageConfig()
    found = read_runs(runs, storage)  # first: the default page lies in a run's folder, and that may be none
    if uri_of(target) is None and not Path(target).absolute().parent.is_dir():
        raise InputError("no such folder to write the page to", file=str(Path(target).absolute().parent))
    looks = look(found, stores, storage, say)
    page = make_page(found, looks).encode()
    with published_file(target, storage, overwrite) as local:
        write_atomically(local, page)
    return {"path": str(target), "bytes": len(page), "runs": [
        {"name": run.name, "epochs": run.records[-1]["epoch"], "best_epoch": run.best_epoch,
         "complete": run.summary is not None, "measured": one.diagnosis is not None}
        for run, one in zip(found, looks)]}


def _default(runs: Sequence[str | Path]) -> Path:
    return Path(runs[0], DEFAULT) if len(runs) == 1 and uri_of(runs[0]) is None else Path(DEFAULT)
