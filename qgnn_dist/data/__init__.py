# SPDX-License-Identifier: Apache-2.0
"""Where graphs come from: OGB folders, .npz files, Parquet tables, PyG objects, generators."""
from __future__ import annotations

from qgnn_dist.data.graph import Graph, SparseFeatures
from qgnn_dist.data.load import load_graph
from qgnn_dist.data.names import ColumnNames

__all__ = ["ColumnNames", "Graph", "SparseFeatures", "load_graph"]
