# SPDX-License-Identifier: Apache-2.0
"""docs/configuration.md is what config.py says, and `qgnn settings` shows the same."""
from __future__ import annotations

import io
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from qgnn_dist.config import known_keys, load_config
from qgnn_dist.errors import ConfigError
from qgnn_dist.settings import MENDING, page, settings, show

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_is_what_the_code_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), f"docs/configuration.md is stale; mend it by: {MENDING}"
    assert MENDING in page()


def test_every_setting_has_its_row_and_its_meaning() -> None:
    assert [one.key for one in settings()] == list(known_keys())
    rows = re.findall(r"^\| `(.*?)` \|", page(), re.M)
    assert rows == list(known_keys())
    for one in settings():
        assert len(one.meaning) > 15, one.key
        assert one.unit == "s" if one.key.endswith("_s") else one.unit != "s", one.key
        assert one.default != "open" or "open: " in one.meaning, f"{one.key}: what fills it in?"


@pytest.mark.parametrize("one", [one for one in settings() if "least" in one.allowed], ids=lambda one: one.key)
def test_the_least_value_is_taken_and_less_is_not(one: object) -> None:
    key, least = one.key, float(re.findall(r"at least (\S+?)(?:,|$)", one.allowed)[0])  # type: ignore[attr-defined]
    load_config(overrides=[f"{key}={least:g}"])
    with pytest.raises(ConfigError, match="expected a"):
        load_config(overrides=[f"{key}={least - 1:g}"])


def test_what_a_resumed_run_may_change_leaves_the_digest() -> None:
    plain = load_config().digest()
    for key in ("train.checkpoint_every", "timeouts.start_s", "cluster.threads", "train.epochs", "model.hidden"):
        one, = (one for one in settings() if one.key == key)
        assert one.resumable == (load_config(overrides=[f"{key}=7"]).digest() == plain), key


def test_eighty_columns_break_no_word_and_say_what_open_is() -> None:
    for word in ("", "quant.", "seed"):
        rows, console = settings(word), Console(width=80, file=io.StringIO(), record=True)
        show({"settings": [asdict(one) for one in rows]}, console)
        told = console.export_text()
        words = set(told.replace("│", " ").split())
        assert max(len(line) for line in told.splitlines()) <= 80
        for one in rows:
            assert {one.key.rpartition(".")[2], *one.default.split(), *one.allowed.split(),
                    *one.meaning.split()} <= words, one.key
        assert ("open: follows other settings" in told) is any(one.default == "open" for one in rows)


def test_a_terminal_of_eighty_columns_shows_them() -> None:
    console = Console(width=80, file=io.StringIO())
    show({"settings": [asdict(one) for one in settings("quant")]}, console)
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[quant]" in told
    assert "step_floor" in told
    assert max(len(line) for line in told.splitlines()) <= 80
    show({"settings": []}, console)
    assert "no such setting" in console.file.getvalue()  # type: ignore[attr-defined]
