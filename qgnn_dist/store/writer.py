# SPDX-License-Identifier: Apache-2.0
"""Putting a finished store in place: all or nothing, synced to disk; an older one goes once the new one is there."""
from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files.folders import LOCK, abandoned, held, put_in_place, remove_replaced, sync_folder
from .manifest import CHECKSUM, MANIFEST, manifest_checksum, part_folder, read_manifest

__all__ = ["new_store"]


class NewStore:
    """A store under construction in `folder`, beside its final place."""

    def __init__(self, target: Path, folder: Path) -> None:
        self.target, self.folder = target, folder

    def commit(self, manifest: dict[str, Any]) -> None:
        """Write the manifest, with a checksum of its own, check what was built as a reader would, and rename the folder
        into place.

        Raises:
            StoreError: this host does not see what the builders wrote. OSError: the disk.
        """
        manifest[CHECKSUM] = manifest_checksum(manifest)
        with open(self.folder / MANIFEST, "w", encoding="utf-8") as out:
            json.dump(manifest, out, indent=1)
            out.write("\n")
            out.flush()
            os.fsync(out.fileno())
        for part in range(len(manifest["parts"])):
            sync_folder(self.folder / part_folder(part))
        (self.folder / LOCK).unlink(missing_ok=True)
        sync_folder(self.folder)
        read_manifest(self.folder)
        put_in_place(self.folder, self.target)


@contextmanager
def new_store(target: Path) -> Iterator[NewStore]:
    """A temporary folder beside `target` (absolute) for the time of the block.

    Whatever happens before `commit` leaves nothing behind: neither the folder nor parents that were made for it. What
    processes left that were killed while they built the same store is removed first.
    """
    made: list[Path] = []
    folder = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        for parent in reversed([p for p in target.parents if not p.exists()]):
            parent.mkdir()
            made.append(parent)
        for left in abandoned(target):
            shutil.rmtree(left, ignore_errors=True)
        remove_replaced(target)
        folder.mkdir()
        with held(folder):
            yield NewStore(target, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not target.exists():
            for parent in reversed(made):
                with contextlib.suppress(OSError):
                    parent.rmdir()
