# SPDX-License-Identifier: Apache-2.0
"""What every test may ask for."""
from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder with the real graphs; tests that need it skip, visibly, where it is absent."""
    folder = os.environ.get("QGNN_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("QGNN_TEST_DATA names no folder with the real graphs")
    return Path(folder)


@pytest.fixture(scope="session")
def s3_running() -> Iterator[object]:
    """One S3 server for all tests; see tests.s3.S3."""
    from tests.s3 import s3_server

    with s3_server() as server:
        yield server


@pytest.fixture
def s3(s3_running: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> object:
    """The S3 server, with an empty bucket, this process's environment and a cache of its own."""
    monkeypatch.setenv("QGNN_CACHE_DIR", str(tmp_path / "cache"))
    s3_running.use(monkeypatch)  # type: ignore[attr-defined]
    s3_running.empty()  # type: ignore[attr-defined]
    return s3_running
