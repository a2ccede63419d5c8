# SPDX-License-Identifier: Apache-2.0
"""The package's hosts in network namespaces; a test skips, with the reason, where they cannot be made."""
from __future__ import annotations

import pytest

from qgnn_dist.bench import netns

__all__ = ["NetnsCluster"]


class NetnsCluster(netns.NetnsCluster):
    """See qgnn_dist.bench.netns.NetnsCluster."""

    def __enter__(self) -> NetnsCluster:
        reason = netns.cannot(shaped=self._rate is not None)
        if reason:
            pytest.skip(reason)
        super().__enter__()
        return self
