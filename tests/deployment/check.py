# SPDX-License-Identifier: Apache-2.0
"""Are the files of cluster_configs/ right? Offline: no cloud, cluster or Docker is asked.

    python -m tests.deployment.check [FILE …]    default: all of cluster_configs/; exit code 1 where one is wrong
"""
from __future__ import annotations

import sys
from pathlib import Path

import yaml

from .dockerfile import check_dockerfile
from .kubernetes import check_kubernetes
from .launcher import check_launcher
from .project import ROOT, usage

__all__ = ["FILES", "check"]

FILES = sorted(p for p in (ROOT / "cluster_configs").iterdir() if p.suffix == ".yaml" or p.name == "Dockerfile")


def check(name: str, text: str) -> list[str]:
    """Faults of one file by its text, each `NAME: PATH: got X, expected Y`; which kind it is, the text tells."""
    if name.endswith("Dockerfile"):
        found = check_dockerfile(text)
    else:
        try:
            documents = list(yaml.load_all(text, _Strict))
        except yaml.YAMLError as error:
            return [f"{name}: file: got no YAML, expected it ({' '.join(str(error).split())})"]
        first = documents[0] if len(documents) == 1 else None
        launcher = isinstance(first, dict) and not {"apiVersion", "kind"} & first.keys()
        found = check_launcher(first, text) if launcher else check_kubernetes(documents, text)
    return [f"{name}: {fault}" for fault in found + usage(text)]


class _Strict(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML that refuses a key that stands twice; the last one would win silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def main() -> int:
    """Print the faults of the files that are named, or of all."""
    files = [Path(word) for word in sys.argv[1:]] or FILES
    faults = [fault for file in files for fault in check(file.name, file.read_text())]
    print("\n".join(faults) if faults else f"{len(files)} files are right")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
