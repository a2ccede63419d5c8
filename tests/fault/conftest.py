# SPDX-License-Identifier: Apache-2.0
"""A cluster that may lose its hosts, and a run that nothing happened to."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qgnn_dist.store.reader import Store
from tests.helpers import make_store, small_graph


@pytest.fixture(scope="module")
def all_hosts() -> Iterator[object]:
    from tests.recovering import Hosts

    with Hosts() as running:
        yield running


@pytest.fixture
def hosts(all_hosts: object) -> Iterator[object]:
    """See tests.recovering.Hosts; whole again after every test."""
    yield all_hosts
    all_hosts.mend()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(small_graph(), tmp_path_factory.mktemp("store") / "s", 2)


@pytest.fixture(scope="module")
def whole(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to, on workers in this process."""
    from tests.recovering import config, undisturbed

    return undisturbed(store, tmp_path_factory.mktemp("whole") / "run", config())
