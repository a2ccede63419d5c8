# SPDX-License-Identifier: Apache-2.0
"""What every test may ask for."""
from __future__ import annotations

import os
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
