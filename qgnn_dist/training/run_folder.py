# SPDX-License-Identifier: Apache-2.0
"""A run's folder: its settings, one line an epoch, the last checkpoints, and the summary, which is written last."""
from __future__ import annotations

import json
import logging
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import DeadlineError, InputError, OutputError, QgnnError
from ..files.read import parse_json, read_json, read_lines, reason
from ..files.write import disk_errors, make_folder, remove_halves, write_atomically
from .checkpoint import Checkpoint

__all__ = ["CheckpointWriter", "RunFolder"]

_LOG = logging.getLogger(__name__)
LARGEST_SUMMARY, LARGEST_LINES = 16 << 20, 128 << 20
_NAME = re.compile(r"epoch-(\d{6,})\.safetensors")


class RunFolder:
    """Reads and writes RUN/; only the controller does."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints, epoch-000010.safetensors and so on."""
        return self.path / "checkpoints"

    @property
    def summary_path(self) -> Path:
        """Written last: its presence says that the run is complete."""
        return self.path / "summary.json"

    @property
    def metrics_path(self) -> Path:
        """One JSON object a line, one line an epoch."""
        return self.path / "metrics.jsonl"

    @property
    def status_path(self) -> Path:
        """How the run stands just now (training.status)."""
        return self.path / "status.json"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's events, where they were asked for."""
        return self.path / "tensorboard"

    @property
    def final_path(self) -> Path:
        """What the best model says of every labelled node, by class and degree (inference.examine); written once."""
        return self.path / "final.json"

    @property
    def trace_path(self) -> Path:
        """Where the time of that forward went, as `predict --trace` has it (comm.trace.chrome_trace)."""
        return self.path / "trace.json"

    @property
    def restarts_path(self) -> Path:
        """One JSON object a line, one line for each failure that the run went on after."""
        return self.path / "restarts.jsonl"

    def checkpoint_files(self) -> list[Path]:
        """All checkpoints, the newest first; that of an older version's run comes last."""
        found = {}
        if self.checkpoints.is_dir():
            for file in self.checkpoints.iterdir():
                match = _NAME.fullmatch(file.name)
                if match:
                    found[int(match[1])] = file
        before = self.path / "checkpoint.safetensors"
        return [found[epoch] for epoch in sorted(found, reverse=True)] + ([before] if before.exists() else [])

    def load_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, with a warning for each newer one; None where none was written yet.

        Raises: InputError: there are some, and all are damaged.
        """
        files = self.checkpoint_files()
        for number, file in enumerate(files):
            try:
                return Checkpoint.read(file)
            except InputError as error:
                if number == len(files) - 1:
                    raise
                _LOG.warning("%s; going back to %s", error, files[number + 1].name)
        return None

    def clear(self) -> None:
        """Remove what an earlier run left: summary, metrics and checkpoints."""
        for old in (self.summary_path, self.final_path, self.trace_path, self.metrics_path, self.restarts_path,
                    self.status_path, *self.checkpoint_files(), *self.stall_files()):
            old.unlink(missing_ok=True)
        shutil.rmtree(self.tensorboard, ignore_errors=True)

    def begin(self, config: str) -> None:
        """Make the folder with its settings; where that fails, nothing is left. What a killed run had begun goes.

        Raises: OutputError: the disk.
        """
        made = not self.path.exists()
        make_folder(self.path, "the run")
        for folder in (self.path, self.checkpoints):
            remove_halves(folder)
        try:
            write_atomically(self.path / "config.toml", config.encode())
        except OutputError:
            if made:
                self.path.rmdir()
            raise

    def read_summary(self) -> dict[str, Any]:
        """The summary of a finished run. Raises: InputError: damaged."""
        try:
            summary = read_json(self.summary_path, LARGEST_SUMMARY)
            if not isinstance(summary, dict) or not isinstance(summary.get("identity"), dict):
                raise ValueError("it has no identity")
        except (OSError, ValueError) as error:
            raise InputError(f"damaged summary: {reason(error)}; start again with --overwrite",
                             file=str(self.summary_path)) from None
        return summary

    def start_metrics(self, epochs: int) -> list[dict[str, Any]]:
        """Cut metrics.jsonl back to its first `epochs` lines and return them: a resumed run writes the rest again."""
        kept = _lines(self.metrics_path, epochs)
        if len(kept) < epochs:
            _LOG.warning("%s has %d of the %d epochs before this one; the summary's times are of those it has",
                         self.metrics_path, len(kept), epochs)
        write_atomically(self.metrics_path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        return kept

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add one epoch's line and hand it to the system."""
        _append(self.metrics_path, record)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All epochs' lines."""
        return _lines(self.metrics_path)

    def append_restart(self, record: dict[str, Any]) -> None:
        """Add the line of a failure that the run goes on after."""
        _append(self.restarts_path, record)

    def read_restarts(self) -> list[dict[str, Any]]:
        """All such lines."""
        return _lines(self.restarts_path)

    def keep_stall(self, epoch: int, text: str) -> None:
        """Write what workers said of themselves while they stood still; where that fails, to the log.

        A run that has no folder yet gets none for it: what is refused at its start must leave nothing.
        """
        file = self.path / "stalls" / f"epoch-{epoch:06d}-{len(self.stall_files()) + 1}.txt"
        try:
            if self.path.exists():
                make_folder(file.parent, "the stalls")
                write_atomically(file, text.encode())
                _LOG.warning("their stacks are in %s", file)
                return
        except OutputError as error:
            _LOG.warning("%s", error)
        _LOG.warning("%s", text)

    def stall_files(self) -> list[Path]:
        """What was written of stalls."""
        return sorted((self.path / "stalls").glob("epoch-*.txt"))

    def epochs_done(self) -> int:
        """Epochs that have their line."""
        return len(self.read_metrics())


def _append(path: Path, record: dict[str, Any]) -> None:
    line = json.dumps(record) + "\n"
    with disk_errors(path.parent, len(line), str(path), "a line"), open(path, "a", encoding="utf-8") as out:
        out.write(line)


def _lines(path: Path, most: int | None = None) -> list[dict[str, Any]]:
    """The first `most` objects of a file of lines, or all that are finished; InputError: damaged. None where there is
    no file."""
    records: list[dict[str, Any]] = []
    if not path.exists():
        return records
    try:
        for line in read_lines(path, LARGEST_LINES)[0][:most]:
            records.append(parse_json(line))
            if not isinstance(records[-1], dict):
                raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise InputError(f"damaged: {reason(error)} (line {len(records) + 1}); start again with --overwrite",
                         file=str(path)) from None
    return records


class CheckpointWriter:
    """Writes checkpoints in a thread of its own, so that no epoch waits for the disk, and keeps the last few.

    A context manager: leaving it waits for the last write. A write that failed raises at the next call.

    Args:
        keep: files to keep. timeout_s: how long a write may take before the next call gives up on it.
    """

    def __init__(self, run: RunFolder, *, keep: int, timeout_s: float) -> None:
        self._run, self._keep, self._timeout_s = run, keep, timeout_s
        self._thread = ThreadPoolExecutor(1, "qgnn-checkpoint")
        self._pending: tuple[Future[None], Path] | None = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            self.flush()
        except QgnnError as failed:
            if error is None:
                raise
            _LOG.warning("the last checkpoint was not written: %s", failed)
        finally:
            self._thread.shutdown(wait=False)

    def save(self, checkpoint: Checkpoint) -> None:
        """Begin to write; waits for the write before. The tensors must not change any more.

        Raises: as `flush`.
        """
        self.flush()
        file = self._run.checkpoints / f"epoch-{checkpoint.progress.epoch:06d}.safetensors"
        self._pending = self._thread.submit(self._write, checkpoint, file), file

    def flush(self) -> None:
        """Return when the last checkpoint is on disk.

        Raises: OutputError: it could not be written. DeadlineError: not in time.
        """
        if self._pending is None:
            return
        (future, file), self._pending = self._pending, None
        try:
            future.result(self._timeout_s)
        except FutureTimeoutError:
            raise DeadlineError(f"a checkpoint was not on disk within {self._timeout_s:g} s; look at the disk, or "
                                "raise timeouts.checkpoint_s", file=str(file)) from None

    def _write(self, checkpoint: Checkpoint, file: Path) -> None:
        make_folder(self._run.checkpoints, "the checkpoints")
        if self._run.metrics_path.exists():  # the epochs that a checkpoint stands for are on disk before it
            with open(self._run.metrics_path, "rb") as metrics:
                os.fsync(metrics.fileno())
        write_atomically(file, checkpoint.to_bytes())
        for old in self._run.checkpoint_files()[self._keep:]:
            old.unlink(missing_ok=True)
