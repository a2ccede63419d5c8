# SPDX-License-Identifier: Apache-2.0
"""A checkpoint: everything that a run needs to go on, in one safetensors file (JSON metadata, nothing pickled).

The metadata carry a checksum of all else, so that a file that was damaged anywhere is known before it is used.
"""
from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ..errors import InputError
from ..files.checksum import checksum_of
from ..files.read import parse_json, read_bytes, reason, shown
from ..quant.ranges import Range

__all__ = ["Checkpoint", "Progress"]

VERSION = 2
"""Version 1 had no checksum and one file a run, RUN/checkpoint.safetensors; it is read."""
LARGEST_HEADER, LARGEST_FILE = 16 << 20, 8 << 30
LARGEST_FIGURE = 1e300
"""Of a range: whole numbers of any size are JSON, and none of them a float."""


@dataclass
class Progress:
    """Where a run stands at an epoch's end.

    Attributes:
        epoch: epochs finished. best_epoch: 0 before the first evaluation. best_value, best_loss: validation metric and
            loss there; of epochs with the same metric, the one of the lower loss is the better.
        best_accuracy, best_metric: by split, at the best epoch; None of test without such nodes. finished: nothing
            more to do.
        calibration_bytes: sent before the first epoch, all workers together, by kind.
    """

    epoch: int = 0
    best_epoch: int = 0
    best_value: float = -1.0
    best_loss: float = 0.0
    best_accuracy: dict[str, Any] = field(default_factory=dict)
    best_metric: dict[str, Any] = field(default_factory=dict)
    finished: bool = False
    calibration_bytes: dict[str, int] = field(default_factory=dict)

    def offer(self, epoch: int, accuracy: dict[str, Any], metric: dict[str, Any], loss: float) -> bool:
        """Take an evaluated epoch as the best one where it is: by the validation metric, then the lower loss, then the
        earlier.

        Args: accuracy, metric: by split. loss: of validation, finite.
        """
        if (metric["valid"], -loss) <= (self.best_value, -self.best_loss):
            return False
        self.best_epoch, self.best_value, self.best_loss = epoch, metric["valid"], loss
        self.best_accuracy, self.best_metric = accuracy, metric
        return True

    def out_of_patience(self, patience: int) -> bool:
        """Whether the best epoch lies `patience` epochs back; never where that is 0."""
        return 0 < patience <= self.epoch - self.best_epoch


@dataclass(frozen=True)
class Checkpoint:
    """A run at the end of an epoch.

    Attributes:
        tensors: of `TrainWorker.state()`, equal on all workers. identity: what a resumed run must agree on
            (configuration digest, graph fingerprint, parts, features). server: state of the multiplier server.
    """

    tensors: dict[str, np.ndarray]
    identity: dict[str, Any]
    progress: Progress
    server: dict[str, Any]

    def to_bytes(self) -> bytes:
        """The file's bytes."""
        header = {"version": VERSION, "identity": self.identity, "progress": asdict(self.progress),
                  "server": self.server}
        header["checksum"] = checksum_of(header, self.tensors)
        return save(self.tensors, metadata={"qgnn": json.dumps(header, sort_keys=True)})

    @classmethod
    def read(cls, file: Path) -> Checkpoint:
        """A file's checkpoint, checked.

        Raises: InputError: the file is damaged or of another version; it names the fault.
        """
        try:
            data = read_bytes(file, LARGEST_FILE)
            (size,) = struct.unpack_from("<Q", data)
            if not 0 < size <= min(LARGEST_HEADER, len(data) - 8):
                raise ValueError(f"header of {size} bytes in a file of {len(data)}")
            header = parse_json(parse_json(data[8:8 + size])["__metadata__"]["qgnn"].encode())
            if header["version"] not in (1, VERSION):
                raise InputError(f"checkpoint version {shown(header['version'])}, this program reads 1 to {VERSION}; "
                                 "use the version of qgnn-dist that wrote it", file=str(file))
            tensors = load(data)
            stated = header.pop("checksum", None)
            if header["version"] == VERSION and stated != checksum_of(header, tensors):
                raise ValueError("its checksum is not that of its content")
            progress = Progress(**header["progress"])
            _check(progress, header["identity"], header["server"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error, SafetensorError) as error:
            raise InputError(f"damaged checkpoint: {reason(error)}; start again with --overwrite",
                             file=str(file)) from None
        return cls(tensors, header["identity"], progress, header["server"])


def _check(progress: Progress, identity: Any, server: Any) -> None:
    """Types of a header from outside; ValueError names the field."""
    for name, kind in (("epoch", int), ("best_epoch", int), ("best_value", (int, float)), ("best_loss", (int, float)),
                       ("best_accuracy", dict), ("best_metric", dict), ("finished", bool), ("calibration_bytes", dict)):
        value = getattr(progress, name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"progress: {name} is {shown(value)}")
    for figures, absent in ((progress.best_accuracy, "test"), (progress.best_metric, "test"),
                            (progress.calibration_bytes, None)):
        told = [v for name, v in figures.items() if v is not None or name != absent]
        if not all(isinstance(v, (int, float)) and abs(v) < 2**62 for v in told):
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
        if not all(isinstance(v, (int, float)) and abs(v) < LARGEST_FIGURE for v in asdict(Range(**values)).values()):
            raise ValueError(f"server: range {shown(name)} is {shown(values)}")
