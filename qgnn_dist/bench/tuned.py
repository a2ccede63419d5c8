# SPDX-License-Identifier: Apache-2.0
"""Settings that a search found, as files: DATASET/METHOD-WIDTH.toml, which `qgnn train --config` reads too."""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import known_keys
from ..errors import ConfigError
from ..files.read import read_toml, reason, shown

__all__ = ["read_tuned", "tuned_file", "tuned_text"]


def tuned_file(folder: Path, dataset: str, method: str, width: str) -> Path:
    """Where a row's found settings lie."""
    return folder / dataset / f"{method}-{width}.toml"


def tuned_text(params: Mapping[str, Any], notes: Sequence[str]) -> str:
    """The file: lines of comment, then the found settings alone, by section."""
    lines = [f"# {note}" for note in notes]
    for section in dict.fromkeys(key.partition(".")[0] for key in params):
        lines += ["", f"[{section}]"]
        lines += [f"{key.partition('.')[2]} = {json.dumps(value)}" for key, value in params.items()
                  if key.startswith(f"{section}.")]
    return "\n".join(lines) + "\n"


def read_tuned(file: Path) -> list[str] | None:
    """The file's settings as `section.key=value` words; None where there is no such file.

    Raises: ConfigError: it is no TOML file of settings. Their values are the caller's to check.
    """
    try:
        table = read_toml(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"not a TOML file: {reason(error)}", file=str(file)) from None
    words = []
    for section, inner in table.items():
        if not isinstance(inner, dict):
            raise ConfigError(f"{shown(section)}: expected settings in tables of their sections, as `qgnn bench "
                              "search` writes them", file=str(file))
        for key, value in inner.items():
            if f"{section}.{key}" not in known_keys():
                raise ConfigError(f"{shown(section)}.{shown(key)}: unknown key", file=str(file))
            words.append(f"{section}.{key}={json.dumps(value)}")
    return words
