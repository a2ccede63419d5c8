# SPDX-License-Identifier: Apache-2.0
"""Reads a run's folder again and again while somebody else writes it: what `qgnn top` shows."""
from __future__ import annotations

import os
import socket
import time
from collections import deque
from pathlib import Path
from typing import Any

from ..config import load_config
from ..errors import InputError
from ..files.read import parse_json, read_json, reason
from .run_folder import LARGEST_SUMMARY, RunFolder

__all__ = ["ENDED", "Follow"]

ENDED = ("finished", "stopped", "failed", "lost")
"""States after which nothing comes unless the command is started again."""
SILENT_S = 60.0
"""Without a new status, after which a command on another host is taken for lost; it writes every 5 s."""
HISTORY = 60
"""Epochs whose loss and accuracy are kept, for a line that shows where they go."""
LARGEST_STATUS = 16 << 20


class Follow:
    """A run's folder. Each `look` reads what is new.

    Raises: InputError: no run lies there.
    """

    def __init__(self, path: str | Path) -> None:
        self.run = RunFolder(path)
        if not (self.run.path / "config.toml").exists():
            what = "no config.toml" if self.run.path.exists() else "no such folder"
            raise InputError(f"not a run's folder ({what}); give the --out of `qgnn train`, which is there once its "
                             "workers are", file=str(path))
        self._config = load_config(self.run.path / "config.toml")
        self._forget()

    def look(self) -> dict[str, Any]:
        """The run as it stands: plain values, null where nothing is known yet.

        Returns: `state` (starting, training, recovering, stalled, or of ENDED), `epoch`, `epochs`, `loss`,
            `valid_loss`, `accuracy`, `clipped` (share by stage, when last counted), `multipliers`, `epoch_s`,
            `wire_bytes` of the last epoch and `wire_bytes_total`, `workers`, `messages`, `restarts`, `age_s` of the
            status, `best` (epoch and accuracy) of a finished run, `history`.
        Raises: InputError: a file is damaged.
        """
        self._read_epochs()
        status, summary = self._status(), self._summary()
        last = self._last
        age_s = max(0.0, time.time() - status["time"]) if status else None
        found: dict[str, Any] = {
            "run": str(self.run.path), "state": self._state(status, summary, age_s), "epoch": last.get("epoch", 0),
            "epochs": self._config.train.epochs, "bits": self._config.quant.bits,
            **{key: last.get(key) for key in ("loss", "multipliers", "epoch_s", "wire_bytes")},
            "valid_loss": self._evaluated.get("valid_loss"), "accuracy": self._evaluated.get("accuracy"),
            "clipped": self._clipped,
            "wire_bytes_total": self._sent, "restarts": len(self.run.read_restarts()), "age_s": age_s,
            "workers": status.get("workers", []), "messages": status.get("messages", []),
            "best": None, "history": {"loss": list(self._losses), "valid": list(self._valid)}}
        if not found["workers"] and last:  # of a program before the status file
            found["workers"] = [{"rank": rank, "compute_s": seconds} for rank, seconds in enumerate(last["compute_s"])]
        if summary:
            found["best"] = {"epoch": summary["best_epoch"], "accuracy": summary["accuracy"]}
        return found

    def _forget(self) -> None:
        self._at, self._sent = 0, dict[str, int]()
        self._last, self._evaluated, self._clipped = dict[str, Any](), dict[str, Any](), None
        self._losses, self._valid = deque[float](maxlen=HISTORY), deque[float](maxlen=HISTORY)
        self._file = -1

    def _read_epochs(self) -> None:
        """Lines that are new; from the begin where a resumed run has written the file anew. A half line waits."""
        path = self.run.metrics_path
        if not path.exists():
            self._forget()
            return
        with open(path, "rb") as lines:
            there = os.fstat(lines.fileno())
            if there.st_ino != self._file or there.st_size < self._at:
                self._forget()
                self._file = there.st_ino
            lines.seek(self._at)
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                self._at += len(line)
                self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            record = parse_json(line)
            for kind, count in record["wire_bytes"].items():
                self._sent[kind] = self._sent.get(kind, 0) + count
            self._losses.append(float(record["loss"]))
            if "accuracy" in record:
                self._valid.append(float(record["accuracy"]["valid"]))
                self._evaluated = record
                self._clipped = record.get("clipped", self._clipped)
            self._last = record
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"damaged: {reason(error)}", file=str(self.run.metrics_path)) from None

    def _status(self) -> dict[str, Any]:
        try:
            status = read_json(self.run.status_path, LARGEST_STATUS)
            if not isinstance(status, dict) or not {"state", "time", "pid", "host"} <= status.keys():
                raise ValueError("it has no state")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise InputError(f"damaged: {reason(error)}", file=str(self.run.status_path)) from None
        return status

    def _summary(self) -> dict[str, Any]:
        if not self.run.summary_path.exists():
            return {}
        summary = read_json(self.run.summary_path, LARGEST_SUMMARY)
        if not isinstance(summary, dict) or not {"best_epoch", "accuracy"} <= summary.keys():
            raise InputError("damaged: it has no best_epoch", file=str(self.run.summary_path))
        return summary

    def _state(self, status: dict[str, Any], summary: dict[str, Any], age_s: float | None) -> str:
        if summary:
            return "finished"
        if not status or age_s is None:
            return "starting" if not self._last else "lost"
        state = str(status["state"])
        if state in ENDED:
            return state
        if status["host"] == socket.gethostname():
            return state if _lives(int(status["pid"])) else "lost"
        return "lost" if age_s > SILENT_S else state


def _lives(pid: int) -> bool:
    """Whether a process of this host is there, whoever owns it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
