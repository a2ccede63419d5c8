# SPDX-License-Identifier: Apache-2.0
"""A run's folder: its settings, one line an epoch, and the last checkpoint (safetensors and JSON, nothing pickled)."""
from __future__ import annotations

import json
import os
import struct
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from ..errors import InputError

__all__ = ["Progress", "RunFolder"]

CHECKPOINT_VERSION = 1
LARGEST_HEADER = 64 << 20


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
            with open(file, "rb") as opened:
                (size,) = struct.unpack("<Q", opened.read(8))
                if not 0 < size <= LARGEST_HEADER:
                    raise ValueError("header length out of range")
                header = json.loads(json.loads(opened.read(size))["__metadata__"]["qgnn"])
            if header["version"] != CHECKPOINT_VERSION:
                raise InputError(f"checkpoint version {header['version']}, this program reads {CHECKPOINT_VERSION}",
                                 file=str(file))
            return load_file(file), header["identity"], Progress(**header["progress"]), header["server"]
        except (OSError, ValueError, KeyError, TypeError, struct.error, SafetensorError) as error:
            raise InputError(f"damaged checkpoint: {error}; start again with --overwrite", file=str(file)) from None

    def start_metrics(self, epochs: int) -> list[dict[str, Any]]:
        """Cut metrics.jsonl back to its first `epochs` lines and return them: a resumed run writes the rest again."""
        kept: list[dict[str, Any]] = []
        if self.metrics_path.exists():
            for line in self.metrics_path.read_text(encoding="utf-8").splitlines()[:epochs]:
                kept.append(json.loads(line))
        write_atomically(self.metrics_path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        return kept

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add one epoch's line and hand it to the system."""
        with open(self.metrics_path, "a", encoding="utf-8") as out:
            out.write(json.dumps(record) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All epochs' lines."""
        return [json.loads(line) for line in self.metrics_path.read_text(encoding="utf-8").splitlines()]


def write_atomically(path: Path, data: bytes) -> None:
    """Temp file beside it, fsync, rename: the file is the old one or the new one, never half of it."""
    temp = path.with_name(f".{path.name}.tmp")
    with open(temp, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temp, path)
