# SPDX-License-Identifier: Apache-2.0
"""The whole path as one job, from a graph to a class for every node; submitted again, it goes on where it was.

    python jobs/pipeline.py SOURCE --parts N --out FOLDER [--config FILE] [--set section.key=value …]

FOLDER gets store/, run/, model.safetensors and predictions/. A step whose output is there is not done again, and
training goes on from its last checkpoint. Another source, number of parts or settings need another FOLDER.
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import qgnn_dist as qgnn
from qgnn_dist.errors import InputError, QgnnError


def main() -> int:
    """The steps in turn; the exit code is that of `qgnn`'s commands: 2 for bad input, 1 for what failed."""
    parser = argparse.ArgumentParser(description="partition, train, export, predict; goes on where it was")
    parser.add_argument("source", help="as `qgnn partition` takes it")
    parser.add_argument("--parts", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder that all hosts share")
    parser.add_argument("--config", type=Path, help="TOML file with settings")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="one setting")
    asked = parser.parse_args()
    try:
        run(asked.source, asked.parts, asked.out, asked.config, asked.settings)
    except QgnnError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def run(source: str, parts: int, folder: Path, config: Path | None, settings: list[str]) -> None:
    """Do the steps whose output is not there yet. Raises: QgnnError."""
    resolved = qgnn.load_config(config, settings)
    folder.mkdir(parents=True, exist_ok=True)
    _check_same(folder / "pipeline.json", {"source": source, "parts": parts, "config": resolved.digest()})
    store, model, out = folder / "store", folder / "model.safetensors", folder / "predictions"
    if not _there("partition", store / "manifest.json"):
        qgnn.partition(source, parts=parts, out=store, progress=print)
    print("train", flush=True)
    summary = qgnn.train(store, out=folder / "run", config=resolved, resume=True, signals=True,
                         on_epoch=lambda e: print(f"epoch {e['epoch']}: loss {e['loss']:.4f}", flush=True))
    if not _there("export", model):
        qgnn.export(folder / "run", out=model)
    if not _there("predict", out / "summary.json"):
        qgnn.predict(store, model=model, out=out, config=resolved)
    print(f"done: {out}, test accuracy {summary['accuracy']['test']:.4f}, kernels "
          f"{summary['versions']['kernels']}")


def _there(step: str, output: Path) -> bool:
    there = output.exists()
    print(f"{step}{': done before' if there else ''}", flush=True)
    return there


def _check_same(note: Path, request: dict[str, object]) -> None:
    """Refuse to mix two requests in one folder."""
    if not note.exists():
        note.write_text(json.dumps(request))
        return
    before = json.loads(note.read_text())
    other = [key for key in request if before.get(key) != request[key]]
    if other:
        raise InputError(f"was begun with another {' and '.join(other)}; use the same, or another --out",
                         file=str(note.parent))


if __name__ == "__main__":
    raise SystemExit(main())
