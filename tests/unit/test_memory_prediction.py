# SPDX-License-Identifier: Apache-2.0
"""A packed model on a graph in memory: the bits of `qgnn predict` on a store of one part, and what is refused."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import qgnn_dist as qgnn
from qgnn_dist import kernels
from tests.helpers import as_pyg, make_store, small_graph, untrained_model


def predicted(store: Path, model: Path, out: Path) -> dict[str, np.ndarray]:
    """What `qgnn predict --scores` writes, sorted by node."""
    qgnn.predict(store, model=model, out=out, scores=True)
    table = pq.read_table(out / "part-00000.parquet").sort_by("node_id")
    scores = table["scores"].combine_chunks().flatten().to_numpy()
    return {"classes": table["class"].to_numpy(), "confidence": table["confidence"].to_numpy(),
            "scores": scores.reshape(table.num_rows, -1)}


@pytest.mark.parametrize("what", [
    {"bits": 1}, {"bits": 2}, {"bits": 2, "sparse": True}, {"bits": 4, "signed": True}, {"bits": 8, "rounds": "two"},
    {"bits": 32}, {"bits": 2, "method": "qlr", "coding": "direct"}, {"bits": 2, "kind": "appnp"},
    {"bits": 2, "half": True}, {"bits": 4, "kind": "elastic"}])
def test_memory_and_store_give_the_same_bits(tmp_path: Path, what: dict[str, Any]) -> None:
    what = dict(what)
    half = what.pop("half", False)
    graph = small_graph(sparse=what.pop("sparse", False), signed=what.get("signed", False))
    if half:
        assert isinstance(graph.features, np.ndarray)
        graph = replace(graph, features=graph.features.astype(np.float16))
    store = make_store(graph, tmp_path / "store", 1)
    untrained_model(store, **what).save(tmp_path / "model")
    wanted = predicted(tmp_path / "store", tmp_path / "model", tmp_path / "out")
    found = qgnn.PackedModel.load(tmp_path / "model").predict(as_pyg(graph))
    assert (found.classes.dtype, found.confidence.dtype, found.scores.dtype) == (np.int32, np.float32, np.float32)
    for name, values in wanted.items():
        np.testing.assert_array_equal(getattr(found, name), values, err_msg=name)
    assert len(np.unique(found.scores[:, 0])) > 20  # or equal bits would say little
    np.testing.assert_array_equal(found.probabilities[np.arange(len(found.classes)), found.classes], found.confidence)
    np.testing.assert_allclose(found.probabilities.sum(1), 1, rtol=1e-5)


def test_nothing_depends_on_threads_or_kernels(tmp_path: Path) -> None:
    graph = small_graph()
    model = untrained_model(make_store(graph, tmp_path / "store", 1))
    found = []
    before = torch.get_num_threads()
    try:
        for threads, level in ((1, kernels.isa()), (3, kernels.isa()), (1, "scalar"), (1, "reference")):
            torch.set_num_threads(threads)
            with kernels.using_isa(level):
                found.append(model.predict(as_pyg(graph)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        np.testing.assert_array_equal(other.scores, found[0].scores)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    graph = small_graph()
    model, data = untrained_model(make_store(graph, tmp_path / "store", 1)), as_pyg(graph)
    data.x = data.x[:, :-1].contiguous()
    with pytest.raises(qgnn.QgnnError, match="the model takes 24 features, pyg has 23"):
        model.predict(data)
    data.x = -as_pyg(graph).x
    with pytest.raises(qgnn.QgnnError, match="negative feature values"):
        model.predict(data)
    data.x = None
    with pytest.raises(qgnn.InputError, match="pyg has no features"):
        model.predict(data)
    with pytest.raises(qgnn.InputError, match="neither edge_index nor adj_t"):
        model.predict({"x": 1})
