# SPDX-License-Identifier: Apache-2.0
"""The main job on a generated graph with two workers: partition, train at INT2, pack, predict every node.

    python jobs/demo.py [FOLDER]        default folder: demo-run, replaced by every run
"""
from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

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
    print(f"\nPredictions of every node: {out}/part-*.parquet")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
