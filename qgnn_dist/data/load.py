# SPDX-License-Identifier: Apache-2.0
"""From what a user calls a graph to a Graph."""
from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qgnn_dist.data.graph import Graph
from qgnn_dist.data.names import ColumnNames
from qgnn_dist.errors import InputError

__all__ = ["load_graph"]

_GRAMMAR = "an OGB name such as ogbn-arxiv, FILE.npz, parquet:DIR, or synthetic:arxiv|products|mid|sbm?…"


def load_graph(
    source: Any,
    *,
    root: str | Path | None = None,
    yes: bool = False,
    columns: ColumnNames | None = None,
    progress: Callable[[str], None] | None = None,
    labels: bool = True,
) -> Graph:
    """The graph that SOURCE names; every array in it is checked, edges while they are read.

    Args:
        source: text (or a path to a .npz file) as on the command line, a PyG `Data`, or a Graph, which is returned.
        root: folder with the OGB folders, default `dataset` as OGB's own.
        yes: agrees to a download of an OGB graph; nothing ever asks.
        columns: names of the Parquet columns.
        progress: is called with a line of text now and then.
        labels: False takes edges and features alone of a PyG `Data`.

    Raises:
        InputError: the source does not exist or something in it is wrong.
    """
    if isinstance(source, Graph):
        return source
    if not isinstance(source, str | Path):
        from qgnn_dist.data.pyg import from_pyg

        return from_pyg(source, labels=labels)
    text = str(source)
    kind, colon, rest = text.partition(":")
    if columns is not None and columns != ColumnNames() and not (colon and kind == "parquet"):
        raise InputError(f"{text}: column names are for parquet:DIR; this source has fixed names")
    if colon and kind == "synthetic":
        from qgnn_dist.data.synthetic import generate, parse_shape

        return generate(parse_shape(rest), progress)
    if colon and kind == "parquet":
        from qgnn_dist.data.parquet import load_parquet

        return load_parquet(rest, columns or ColumnNames(), progress)
    if text.startswith("ogbn-"):
        from qgnn_dist.data.ogb import load_ogb

        return load_ogb(text, root=root, yes=yes, progress=progress)
    if text.endswith(".npz"):
        from qgnn_dist.data.npz import load_npz

        return load_npz(text, progress)
    raise InputError(f"{text!r} is no graph source{_hint(text, kind if colon else '')}; expected {_GRAMMAR}")


def _hint(text: str, kind: str) -> str:
    close = difflib.get_close_matches(kind, ["synthetic", "parquet"], n=1)
    if close:
        return f" (did you mean {close[0]}:{text.partition(':')[2]}?)"
    if text.startswith("ogbn_"):
        return f" (did you mean {text.replace('_', '-')}?)"
    if Path(text).is_dir():
        return f" (for a folder of Parquet tables: parquet:{text})"
    return ""
