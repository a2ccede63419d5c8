# SPDX-License-Identifier: Apache-2.0
"""The whole path as one job, from a graph to a class for every node; submitted again, it goes on where it was.

    python jobs/pipeline.py SOURCE --parts N --out FOLDER [--config FILE] [--set section.key=value …]

FOLDER gets store/, run/, model.safetensors and predictions/. A step whose output is there is not done again, and
training goes on from its last checkpoint. Another source, number of parts or settings need another FOLDER. SOURCE and
FOLDER may lie on an object store (docs/storage.md): then nothing has to be shared by the hosts.
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import qgnn_dist as qgnn
from qgnn_dist.config import StorageConfig
from qgnn_dist.errors import InputError, QgnnError
from qgnn_dist.storage.place import Place, uri_of

LARGEST_NOTE = 1 << 20


def main() -> int:
    """The steps in turn; the exit code is that of `qgnn`'s commands: 2 for bad input, 1 for what failed."""
    parser = argparse.ArgumentParser(description="partition, train, export, predict; goes on where it was")
    parser.add_argument("source", help="as `qgnn partition` takes it")
    parser.add_argument("--parts", type=int, required=True)
    parser.add_argument("--out", required=True, help="folder that all hosts share, or s3://BUCKET/PREFIX")
    parser.add_argument("--config", type=Path, help="TOML file with settings")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="one setting")
    asked = parser.parse_args()
    try:
        run(asked.source, asked.parts, asked.out, asked.config, asked.settings)
    except QgnnError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def run(source: str, parts: int, folder: str, config: Path | None, settings: list[str]) -> None:
    """Do the steps whose output is not there yet. Raises: QgnnError."""
    resolved = qgnn.load_config(config, settings)
    if uri_of(folder) is None:
        Path(folder).mkdir(parents=True, exist_ok=True)
    request = {"source": source, "parts": parts, "config": resolved.digest()}
    _check_same(f"{folder}/pipeline.json", request, resolved.storage)
    store, model, out = f"{folder}/store", f"{folder}/model.safetensors", f"{folder}/predictions"
    if not _there("partition", f"{store}/manifest.json", resolved.storage):
        qgnn.partition(source, parts=parts, out=store, progress=print)
    print("train", flush=True)
    summary = qgnn.train(store, out=f"{folder}/run", config=resolved, resume=True, signals=True,
                         on_epoch=lambda e: print(f"epoch {e['epoch']}: loss {e['loss']:.4f}", flush=True))
    if not _there("export", model, resolved.storage):
        qgnn.export(f"{folder}/run", out=model)
    if not _there("predict", f"{out}/summary.json", resolved.storage):
        qgnn.predict(store, model=model, out=out, config=resolved)
    test = summary["accuracy"]["test"]
    print(f"done: {out}, test accuracy {'–' if test is None else f'{test:.4f}'}, kernels "
          f"{summary['versions']['kernels']}")


def _there(step: str, output: str, storage: StorageConfig) -> bool:
    uri = uri_of(output)
    there = Path(output).exists() if uri is None else Place(uri, storage).size() is not None
    print(f"{step}{': done before' if there else ''}", flush=True)
    return there


def _check_same(note: str, request: dict[str, object], storage: StorageConfig) -> None:
    """Refuse to mix two requests in one folder."""
    uri, file = uri_of(note), Path(note)
    if uri is None:
        text = file.read_bytes() if file.exists() else None
    else:
        text = Place(uri, storage).read(LARGEST_NOTE)
    if text is not None:
        before = json.loads(text)
        other = [key for key in request if before.get(key) != request[key]]
        if other:
            raise InputError(f"was begun with another {' and '.join(other)}; use the same, or another --out",
                             file=note.rpartition("/")[0])
    elif uri is None:
        file.write_text(json.dumps(request))
    else:
        Place(uri, storage).write(json.dumps(request).encode())


if __name__ == "__main__":
    raise SystemExit(main())
