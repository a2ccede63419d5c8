# SPDX-License-Identifier: Apache-2.0
"""What is needed to try one reader, and a sample of its input of which one file is changed at a time."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.fault.fuzzing import mutate

__all__ = ["Sample", "Target"]

Change = Callable[[np.random.Generator, bytes], bytes]


@dataclass(frozen=True)
class Target:
    """One kind of input.

    Attributes:
        make: writes a valid sample into a folder. read: reads it as the program would and returns a digest of its
            content, None where the sample carries no checksum any more.
        apart: the sample is several that lie side by side; `read` and `verify` get the one that was changed.
        files: which of the sample's files are changed, as glob patterns, each with what knows its format; any bytes are
            changed in any file, too.
        seal: makes checksums right for a changed file; None where the format's own functions do that.
        verify: what `qgnn inspect --verify` looks at besides; raises where bytes differ.
        tells: whether a checksum tells of changes of content that are not sealed.
    """

    make: Callable[[Path], Any]
    read: Callable[[Path], str | None]
    files: dict[str, Change | None]
    seal: Callable[[Path, Path], None] | None = None
    verify: Callable[[Path], Any] | None = None
    tells: bool = False
    apart: bool = False


class Sample:
    """A valid sample in a folder, one of whose files is changed for the time of a read."""

    def __init__(self, target: Target, folder: Path) -> None:
        folder.mkdir(parents=True)
        target.make(folder)
        self.target, self.folder = target, folder
        self.files = [(path, change) for pattern, change in target.files.items()
                      for path in sorted(folder.glob(pattern))]
        assert self.files
        self.digests = {place: target.read(place) for place in {self._place(path) for path, _ in self.files}}
        for place in self.digests if target.verify is not None else ():
            target.verify(place)  # type: ignore[misc]
        self.original = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        self.place, self._changed = folder, [self.files[0][0]]

    def change(self, rng: np.random.Generator) -> tuple[int, bool, bool]:
        """Write a mutant; its size, whether its checksums are right again, and whether it is the sample after all."""
        path, known = mutate.pick(rng, self.files)
        self.place = self._place(path)
        self._changed = [path, *self.place.glob("manifest.json")]  # which a seal may change
        data, sealed = self.original[path], bool(rng.random() < 0.6)
        change = known if known is not None and sealed else mutate.any_bytes
        changed = change(rng, data)
        self._write(path, changed)
        if sealed and self.target.seal is not None:
            self.target.seal(self.folder, path)
        return len(changed), sealed, path.read_bytes() == data

    def restore(self) -> None:
        """The sample as it was before the last change."""
        for path in self._changed:
            self._write(path, self.original[path])

    def _place(self, path: Path) -> Path:
        """What is to be read where `path` has changed."""
        return self.folder / path.relative_to(self.folder).parts[0] if self.target.apart else self.folder

    def _write(self, path: Path, data: bytes) -> None:
        path.unlink(missing_ok=True)  # a new file: the old one may still be mapped
        path.write_bytes(data)
