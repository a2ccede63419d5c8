# SPDX-License-Identifier: Apache-2.0
"""The main job on a generated graph with two workers: partition, train at INT2, pack, predict every node.

    python jobs/demo.py [FOLDER]        default folder: demo-run, replaced by every run
"""
from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.dataset

SOURCE = "synthetic:sbm?nodes=20000&edges=120000&features=64&classes=10&seed=0"


def main() -> int:
    """Run the five commands a user would type, each shown before it runs."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-run")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    store, run, model, out = (str(folder / name) for name in ("store", "run", "model.safetensors", "predictions"))
    qgnn = str(Path(sys.executable).with_name("qgnn"))
    for words in (
        ["partition", SOURCE, "--parts", "2", "--out", store],
        ["train", store, "--out", run, "--set", "quant.bits=2", "--set", "train.epochs=60"],
        ["export", run, "--out", model],
        ["predict", store, "--model", model, "--out", out],
        ["inspect", model],
    ):
        print(f"\n$ qgnn {' '.join(words)}", flush=True)
        code = subprocess.run([qgnn, *words], check=False).returncode
        if code:
            return code
    goodbye(run, out)
    return 0


def goodbye(run: str, out: str) -> None:
    """A few predictions, what they are to be compared with, and where to go on from here."""
    print(f"\nPredictions of every node are in {out}/part-*.parquet; the first ones:\n\n   node_id  class  confidence")
    for row in pyarrow.dataset.dataset(out, exclude_invalid_files=True).head(5).to_pylist():
        print(f"  {row['node_id']:>8}  {row['class']:>5}  {row['confidence']:>10.3f}")
    summary = json.loads(Path(out, "summary.json").read_text(encoding="utf-8"))
    nodes = summary["accuracy_by_class"]["test"]["nodes"]
    qgnn = "qgnn" if shutil.which("qgnn") else os.path.relpath(Path(sys.executable).with_name("qgnn"))
    print(f"\nOf the test nodes {100 * summary['accuracy']['test']:.1f} % are right; the most frequent of {len(nodes)} "
          f"classes for every node would make {100 * max(nodes) / sum(nodes):.1f} %."
          f"\nCurves, classes and time of the run as a page: {shlex.join([qgnn, 'report', run])}"
          "\nThe same with a graph of yours: README.md, \"Your graph\", says what its files hold.")


if __name__ == "__main__":
    raise SystemExit(main())
