# SPDX-License-Identifier: Apache-2.0
"""How a fault of a file is told: `PATH: got X, expected Y`; and what JSON schemas find, in these words."""
from __future__ import annotations

import difflib
from collections.abc import Iterable

from jsonschema import ValidationError

__all__ = ["differ", "explain", "join"]


def join(parts: Iterable[object]) -> str:
    """`spec.containers[0].name` from its parts."""
    path = ""
    for part in parts:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path


def differ(path: str, got: object, expected: object) -> list[str]:
    """A fault where two values are not the same, else none."""
    return [] if got == expected else [f"{path}: got {got!r}, expected {expected!r}"]


def explain(error: ValidationError) -> list[str]:
    """What jsonschema found, one line a field."""
    path, value, rule, got = join(error.absolute_path), error.validator_value, error.validator, error.instance
    at = f"{path}." if path else ""
    if rule == "additionalProperties" and isinstance(got, dict) and value is False:
        known = sorted(error.schema.get("properties", {}))
        return [f"{at}{key}: unknown field, expected {_near(str(key), known)}" for key in got if key not in known]
    if rule == "required" and isinstance(got, dict):
        return [f"{at}{key}: missing, expected this field" for key in value if key not in got]
    expected = {"type": f"type {value}", "enum": f"one of {value}", "const": f"{value!r}",
                "pattern": f"text like {value}", "minimum": f"at least {value}",
                "maximum": f"at most {value}"}.get(str(rule), f"{rule} {value}")
    return [f"{path or 'file'}: got {got!r:.80}, expected {expected}"]


def _near(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, 1)
    return f"{near[0]}" if near else f"one of {', '.join(known)}"
