# SPDX-License-Identifier: Apache-2.0
"""A run's folder: its settings, one line an epoch, and the last checkpoint (safetensors and JSON, nothing pickled)."""
from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from ..errors import InputError, OutputError
from ..files.read import open_regular, parse_json, read_bytes, read_json, reason, shown
from ..files.write import disk_errors, make_folder, write_atomically
from ..quant.ranges import Range

__all__ = ["Progress", "RunFolder"]

CHECKPOINT_VERSION = 1
LARGEST_HEADER, LARGEST_METRICS = 16 << 20, 128 << 20


@dataclass
class Progress:
    """Where a run stands at an epoch's end.

    Attributes:
        epoch: epochs finished. best_epoch: 0 before the first evaluation. best_value, best_loss: validation metric and
            loss there; of epochs with the same metric, the one of the lower loss is the better.
        best_accuracy, best_metric: by split, at the best epoch. finished: nothing more to do.
        calibration_bytes: sent before the first epoch, all workers together, by kind.
    """

    epoch: int = 0
    best_epoch: int = 0
    best_value: float = -1.0
    best_loss: float = 0.0
    best_accuracy: dict[str, float] = field(default_factory=dict)
    best_metric: dict[str, float] = field(default_factory=dict)
    finished: bool = False
    calibration_bytes: dict[str, int] = field(default_factory=dict)


class RunFolder:
    """Reads and writes RUN/; only the controller does."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def checkpoint_path(self) -> Path:
        """The newest checkpoint's file."""
        return self.path / "checkpoint.safetensors"

    @property
    def summary_path(self) -> Path:
        """Written last: its presence says that the run is complete."""
        return self.path / "summary.json"

    @property
    def metrics_path(self) -> Path:
        """One JSON object a line, one line an epoch."""
        return self.path / "metrics.jsonl"

    def begin(self, config: str) -> None:
        """Make the folder with its settings; where that fails, nothing is left.

        Raises:
            OutputError: the disk.
        """
        made = not self.path.exists()
        make_folder(self.path, "the run")
        try:
            write_atomically(self.path / "config.toml", config.encode())
        except OutputError:
            if made:
                self.path.rmdir()
            raise

    def save_checkpoint(self, tensors: dict[str, np.ndarray], identity: dict[str, Any], progress: Progress,
                        server: dict[str, Any]) -> None:
        """Replace the checkpoint atomically.

        Args:
            identity: what a resumed run must agree on (configuration digest, graph fingerprint, parts, features).
            server: state of the multiplier server.
        """
        header = {"version": CHECKPOINT_VERSION, "identity": identity, "progress": asdict(progress), "server": server}
        data = save(tensors, metadata={"qgnn": json.dumps(header, sort_keys=True)})
        write_atomically(self.checkpoint_path, data)

    def load_checkpoint(self) -> tuple[dict[str, np.ndarray], dict[str, Any], Progress, dict[str, Any]] | None:
        """Tensors, identity, progress and server state; None where no checkpoint was written yet.

        Raises:
            InputError: the file is damaged or of another version.
        """
        file = self.checkpoint_path
        if not file.exists():
            return None
        try:
            with open_regular(file) as opened:
                (size,) = struct.unpack("<Q", opened.read(8))
                if not 0 < size <= LARGEST_HEADER:
                    raise ValueError("header length out of range")
                header = parse_json(parse_json(opened.read(size))["__metadata__"]["qgnn"].encode())
            if header["version"] != CHECKPOINT_VERSION:
                raise InputError(f"checkpoint version {shown(header['version'])}, this program reads "
                                 f"{CHECKPOINT_VERSION}; start again with --overwrite", file=str(file))
            progress = Progress(**header["progress"])
            _check(progress, header["identity"], header["server"])
            return load_file(file), header["identity"], progress, header["server"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error, SafetensorError) as error:
            raise InputError(f"damaged checkpoint: {reason(error)}; start again with --overwrite",
                             file=str(file)) from None

    def start_metrics(self, epochs: int) -> list[dict[str, Any]]:
        """Cut metrics.jsonl back to its first `epochs` lines and return them: a resumed run writes the rest again."""
        kept: list[dict[str, Any]] = []
        if self.metrics_path.exists():
            kept = self.read_metrics(epochs)
        write_atomically(self.metrics_path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        return kept

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add one epoch's line and hand it to the system."""
        line = json.dumps(record) + "\n"
        with disk_errors(self.path, len(line), str(self.metrics_path), "the epoch's line"), open(
                self.metrics_path, "a", encoding="utf-8") as out:
            out.write(line)

    def read_metrics(self, epochs: int | None = None) -> list[dict[str, Any]]:
        """The lines of the first `epochs`, or of all.

        Raises:
            InputError: damaged.
        """
        records: list[dict[str, Any]] = []
        try:
            for line in read_bytes(self.metrics_path, LARGEST_METRICS).splitlines()[:epochs]:
                records.append(parse_json(line))
                if not isinstance(records[-1], dict):
                    raise ValueError("no object")
        except (OSError, ValueError) as error:
            raise InputError(f"damaged metrics: {reason(error)} (line {len(records) + 1}); start again with "
                             "--overwrite", file=str(self.metrics_path)) from None
        return records

    def read_summary(self) -> dict[str, Any]:
        """The summary of a finished run.

        Raises:
            InputError: damaged.
        """
        try:
            summary = read_json(self.summary_path, LARGEST_HEADER)
            if not isinstance(summary, dict) or not isinstance(summary.get("identity"), dict):
                raise ValueError("it has no identity")
        except (OSError, ValueError) as error:
            raise InputError(f"damaged summary: {reason(error)}; start again with --overwrite",
                             file=str(self.summary_path)) from None
        return summary


def _check(progress: Progress, identity: Any, server: Any) -> None:
    """Types of a header from outside; ValueError names the field."""
    for name, kind in (("epoch", int), ("best_epoch", int), ("best_value", (int, float)), ("best_loss", (int, float)),
                       ("best_accuracy", dict), ("best_metric", dict), ("finished", bool), ("calibration_bytes", dict)):
        value = getattr(progress, name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"progress: {name} is {shown(value)}")
    for figures in (progress.best_accuracy, progress.best_metric, progress.calibration_bytes):
        if not all(isinstance(v, (int, float)) and abs(v) < 2**62 for v in figures.values()):
            raise ValueError(f"progress: figures are {shown(figures)}")
    if not 0 <= progress.best_epoch <= progress.epoch < 2**31:
        raise ValueError(f"progress: epoch {shown(progress.epoch)}, the best one {shown(progress.best_epoch)}")
    if not isinstance(identity, dict) or not isinstance(identity.get("fingerprint"), str) or not isinstance(
            identity.get("features"), dict) or not isinstance(identity["features"].get("norm"), str) or not isinstance(
            identity.get("parts"), int):
        raise ValueError(f"identity is {shown(identity)}")
    if not isinstance(server, dict) or not isinstance(server.get("ranges"), dict):
        raise ValueError(f"server is {shown(server)}")
    for name, values in server["ranges"].items():
        if not all(isinstance(v, (int, float)) for v in asdict(Range(**values)).values()):
            raise ValueError(f"server: range {shown(name)} is {shown(values)}")
