# SPDX-License-Identifier: Apache-2.0
"""A checkpoint: everything that a run needs to go on, in one safetensors file (JSON metadata, nothing pickled).

The metadata carry a SHA-256 of all else, so that a file that was damaged anywhere is known before it is used.
"""
from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ..errors import InputError

__all__ = ["Checkpoint", "Progress", "write_atomically"]

VERSION = 2
"""Version 1 had no checksum and one file a run, RUN/checkpoint.safetensors; it is read."""
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

    def offer(self, epoch: int, accuracy: dict[str, float], metric: dict[str, float], loss: float) -> bool:
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
        header["sha256"] = _digest(header, self.tensors)
        return save(self.tensors, metadata={"qgnn": json.dumps(header, sort_keys=True)})

    @classmethod
    def read(cls, file: Path) -> Checkpoint:
        """A file's checkpoint, checked.

        Raises: InputError: the file is damaged or of another version; it names the fault.
        """
        try:
            data = file.read_bytes()
            (size,) = struct.unpack_from("<Q", data)
            if not 0 < size <= min(LARGEST_HEADER, len(data) - 8):
                raise ValueError(f"header of {size} bytes in a file of {len(data)}")
            header = json.loads(json.loads(data[8:8 + size])["__metadata__"]["qgnn"])
            if header["version"] not in (1, VERSION):
                raise InputError(f"checkpoint version {header['version']}, this program reads 1 to {VERSION}; use the "
                                 "version of qgnn-dist that wrote it", file=str(file))
            tensors = load(data)
            stated = header.pop("sha256", None)
            if header["version"] == VERSION and stated != _digest(header, tensors):
                raise ValueError("its checksum is not that of its content")
            found = cls(tensors, header["identity"], Progress(**header["progress"]), header["server"])
            found._check()
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError, RecursionError, struct.error, SafetensorError) as error:
            raise InputError(f"damaged checkpoint: {error or type(error).__name__}; start again with --overwrite",
                             file=str(file)) from None
        return found

    def _check(self) -> None:
        """What a well-formed file may still hold wrong: numbers that poison all that follows."""
        if not isinstance(self.identity, dict) or not isinstance(self.server, dict):
            raise ValueError("identity and server are not objects")
        epoch, best = self.progress.epoch, self.progress.best_epoch
        if not (isinstance(epoch, int) and isinstance(best, int) and 0 <= best <= epoch):
            raise ValueError(f"epoch {epoch}, best epoch {best}")
        for name, value in self.tensors.items():
            if value.dtype.kind == "f" and not math.isfinite(float(np.abs(value).max(initial=0))):
                raise ValueError(f"{name} is not finite")


def _digest(header: dict[str, Any], tensors: dict[str, np.ndarray]) -> str:
    """SHA-256 of the header without its own checksum, and of every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        value = np.ascontiguousarray(tensors[name])
        digest.update(f"\n{name} {value.dtype.str} {value.shape}\n".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Temp file beside it, fsync, rename: the file is the old one or the new one, never half of it."""
    temp = path.with_name(f".{path.name}.tmp")
    try:
        with open(temp, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temp, path)
    except OSError:
        temp.unlink(missing_ok=True)
        raise
