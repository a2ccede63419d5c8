# SPDX-License-Identifier: Apache-2.0
"""The packed model's format: its exact bytes, and what is refused."""
from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qgnn_dist.errors import InputError, ModelError
from qgnn_dist.model.packed import ModelInfo, PackedModel
from qgnn_dist.propagation.elastic import Elastic
from qgnn_dist.quant.grids import AffineGrid

SHA256 = {
    2: "c2d402b72523d5515450cc3739da9b59a656237edbaa710e0d46b825be3784a2",
    4: "2b6fc697821d8b42e748be21c6e1cd98507dd62f8d168a7d5e605fa2295840ab",
    8: "133644b511a37bbe7efd1123b3a6a621d92dc4d988ccef538cacda0ce3020f8a",
    32: "64fe815cdbeb3a6430f4755a5ab502ae49ae365d4d1a7ff5b51483294c2aa01a",
    "elastic": "f5739900d5f29633b0d61cc907ab878fe5cf4f8bc7637c691c102d74ba841964",
    "affine": "01052e104c63003a4d8c0bdda0b138a4e1fd4e2e9fff05485a2b60cf89471919",
}


def _model(bits: int = 2) -> PackedModel:
    low = -(2 ** (min(bits, 8) - 1))
    count = 2 ** min(bits, 8)
    shape1, shape2 = (5, 6), (6, 3)
    codes1 = (low + np.arange(30) * 7 % count).astype(np.int8).reshape(shape1)
    codes2 = (low + np.arange(18) * 5 % count).astype(np.int8).reshape(shape2)
    if bits == 32:
        codes1, codes2 = codes1.astype(np.float32) / 16, codes2.astype(np.float32) / 16
    coded = bits < 32
    info = ModelInfo(
        num_features=5, hidden=6, num_classes=3,
        bits={"weights": bits, "features": bits, "hidden": bits, "messages": bits, "residual": max(bits, 8)},
        method="recipe", coding="innovation", feature_norm="row", feature_signed=False, kind="smp", layers=2, mu=9.0,
        eta=0.1, rounds="merged", multipliers=[0.0, -0.25], message_steps=[0.5, 0.25] if coded else [],
        weight_steps=[0.125, 0.0625], hidden_step=0.75, residual_step=0.03125, level=2000, feature_level=-1,
        class_names=["a", "b", "c"], graph="tiny", fingerprint="f" * 64)
    return PackedModel(info, codes1, np.arange(6, dtype=np.float32), codes2, np.arange(3, dtype=np.float32))


@pytest.mark.parametrize("bits", [2, 4, 8, 32])
def test_bytes_are_golden_and_survive_a_round_trip(bits: int, tmp_path: Path) -> None:
    model = _model(bits)
    data = model.to_bytes()
    assert data == model.to_bytes()
    assert hashlib.sha256(data).hexdigest() == SHA256[bits]
    model.save(tmp_path / "m")
    again = PackedModel.load(tmp_path / "m")
    assert again.info == model.info
    for name in ("weight1", "bias1", "weight2", "bias2"):
        np.testing.assert_array_equal(getattr(again, name), getattr(model, name))
        assert getattr(again, name).dtype == getattr(model, name).dtype
    assert list(tmp_path.iterdir()) == [tmp_path / "m"]


def test_weights_are_really_packed() -> None:
    """Bytes of the weights by hand: INT2 rows of 6 and 3 columns take 2 bytes and 1 byte."""
    data = _model(2).to_bytes()
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8:8 + size])
    assert header["weight1"]["shape"] == [5, 2]
    assert header["weight2"]["shape"] == [6, 1]
    begin, end = header["weight1"]["data_offsets"]
    first_row = data[8 + size + begin:8 + size + end][:2]
    codes = (np.arange(6) * 7 % 4).tolist()  # unsigned codes of row 0: 0 3 2 1 0 3
    by_hand = [codes[0] | codes[2] << 2 | codes[4] << 4, codes[1] | codes[3] << 2 | codes[5] << 4]
    assert list(first_row) == by_hand


def _with_header(data: bytes, **changes: object) -> bytes:
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8:8 + size])
    info = json.loads(header["__metadata__"]["qgnn"])
    info.update(changes)
    if info["checksum"] is None:
        del info["checksum"]
    header["__metadata__"]["qgnn"] = json.dumps(info)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + size:]


@pytest.mark.parametrize(("changes", "text"), [
    ({"format_version": 9}, "model format 9"),
    ({"num_features": 6}, "tensor weight1 is uint8 (5, 2), its description says uint8 (6, 2)"),
    ({"hidden": -1}, "hidden=-1 is out of range"),
    ({"layers": 10**6}, "layers=1000000 is out of range"),
    ({"mu": float("nan")}, "its description holds NaN"),
    ({"graph": "\ud800"}, "not a packed model"),
    ({"bits": {"weights": True}}, "bits="),
    ({"bits": {"weights": 3}}, "bits="),
    ({"message_steps": [0.5]}, "message_steps="),
    ({"message_steps": [0.5, -0.25]}, "message_steps="),
    ({"message_steps": [0.0, 0.25]}, "message_steps="),
    ({"message_steps": [0.5, 0.0], "coding": "direct"}, "message_steps="),
    ({"kind": "elastic"}, "kind="),
    ({"eta": "x"}, "eta="),
    ({"class_names": ["a"]}, "class_names="),
    ({"surprise": 1}, "lacks or adds surprise"),
    ({"grids": {"hidden": [0.0, 0.75, 1.0, 0.5]}}, "grids="),
    ({"grids": None}, "grids="),
    ({"method": 3}, "method="),
])
def test_descriptions_from_outside_are_checked(changes: dict[str, object], text: str, tmp_path: Path) -> None:
    file = tmp_path / "m"
    file.write_bytes(_with_header(_model().to_bytes(), **changes))
    with pytest.raises(ModelError) as caught:
        PackedModel.load(file)
    assert text in str(caught.value)
    assert str(file) in str(caught.value)


def test_changed_bytes_are_seen_by_the_checksum() -> None:
    data = _model().to_bytes()
    changed = bytearray(data)
    changed[-1] ^= 1
    with pytest.raises(ModelError, match="does not fit its own checksum"):
        PackedModel.from_bytes(bytes(changed))
    for change in ({"eta": 0.11}, {"class_names": ["a", "b", "d"]}, {"checksum": "0" * 64}):
        with pytest.raises(ModelError, match="does not fit its own checksum"):
            PackedModel.from_bytes(_with_header(data, **change))
    with pytest.raises(ModelError, match="checksum is 7"):
        PackedModel.from_bytes(_with_header(data, checksum=7))


def test_models_of_earlier_programs_have_no_checksum() -> None:
    again = PackedModel.from_bytes(_with_header(_model().to_bytes(), checksum=None))
    assert again.info == _model().info


def _affine_model() -> PackedModel:
    """The model of `_model`, every stage on an affine grid of its step."""
    model = _model()
    steps = {"weights1": 0.125, "weights2": 0.0625, "hidden": 0.75, "residual": 0.03125, "news/0": 0.5,
             "news/1": 0.25}
    grids = {name: [-0.25, step, 1 / step, 0.5] for name, step in steps.items()}
    return dataclasses.replace(model, info=dataclasses.replace(
        model.info, method="bt", grids={name: [float(np.float32(v)) for v in four] for name, four in grids.items()}))


def test_affine_grids_are_golden_and_survive_a_round_trip() -> None:
    data = _affine_model().to_bytes()
    assert hashlib.sha256(data).hexdigest() == SHA256["affine"]
    again = PackedModel.from_bytes(data)
    assert again.info == _affine_model().info
    assert again.info.grid("hidden") == AffineGrid(-0.25, 0.75, float(np.float32(4 / 3)), 0.5)
    assert again.info.grid("features") is None


@pytest.mark.parametrize("change", [
    {"news/2": [0.0, 0.25, 4.0, 0.5]}, {"news/1": None}, {"hidden": [0.0, 0.75, 1.0]},
    {"hidden": [0.0, 0.75, 0.0, 0.5]}, {"hidden": [0.0, -0.75, 1.0, 0.5]}, {"hidden": [1e30, 0.75, 1.0, 0.5]},
    {"hidden": [0.0, 0.75, "1", 0.5]},
    {"hidden": [0.1, 0.75, 1.0, 0.5]}, {"hidden": [0.0, 0.5, 1.0, 0.5]}, {"hidden": [0.0, 0.75, True, 0.5]}])
def test_affine_grids_from_outside_are_checked(change: dict[str, Any]) -> None:
    """Too many stages, one too few, wrong lengths, signs, sizes and types, not in float32, not the step beside it."""
    model = _affine_model()
    grids = {name: four for name, four in {**model.info.grids, **change}.items() if four is not None}
    with pytest.raises(ModelError, match="grids="):
        PackedModel.from_bytes(_with_header(model.to_bytes(), grids=grids))


def test_a_method_with_affine_grids_must_have_them() -> None:
    with pytest.raises(ModelError, match="grids="):
        PackedModel.from_bytes(_with_header(_affine_model().to_bytes(), grids={}))
    with pytest.raises(ModelError, match="grids="):
        PackedModel.from_bytes(_with_header(_affine_model().to_bytes(), method="recipe"))


def _elastic_model(bits: int = 2) -> PackedModel:
    model = _model(bits)
    return dataclasses.replace(model, info=dataclasses.replace(
        model.info, kind="elastic", multipliers=[], elastic=Elastic(3.0, 0.5, "l21")))


def test_elastic_models_are_of_version_2(tmp_path: Path) -> None:
    model = _elastic_model()
    data = model.to_bytes()
    assert hashlib.sha256(data).hexdigest() == SHA256["elastic"]
    assert b'format_version\\": 2' in data
    assert b'format_version\\": 1' in _model().to_bytes()
    model.save(tmp_path / "m")
    assert PackedModel.load(tmp_path / "m").info == model.info


@pytest.mark.parametrize(("changes", "text"), [
    ({"kind": "smp"}, "kind="), ({"elastic": None}, "elastic="), ({"elastic": {"lambda1": 3.0}}, "elastic="),
    ({"elastic": {"lambda1": -1.0, "lambda2": 3.0, "norm": "l21"}}, "elastic="),
    ({"elastic": {"lambda1": 1.0, "lambda2": "3", "norm": "l21"}}, "elastic="),
    ({"elastic": {"lambda1": 1.0, "lambda2": 3.0, "norm": "l2"}}, "elastic="),
    ({"elastic": {"lambda1": 1.0, "lambda2": float("nan"), "norm": "l1"}}, "holds NaN"),
    ({"format_version": 1}, "lacks or adds elastic")])
def test_elastic_settings_from_outside_are_checked(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ModelError, match=text):
        PackedModel.from_bytes(_with_header(_elastic_model().to_bytes(), **changes))
    with pytest.raises(ModelError, match="lacks or adds elastic"):
        PackedModel.from_bytes(_with_header(_model().to_bytes(), format_version=2))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    data = _model().to_bytes()
    for name, content in (("empty", b""), ("cut", data[:-1]), ("huge", struct.pack("<Q", 1 << 60) + data[8:]),
                          ("text", b"hello, this is not a model at all"), ("head", data[:20])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError, match=name):
            PackedModel.load(tmp_path / name)
    with pytest.raises(ModelError, match="not found"):
        PackedModel.load(tmp_path / "none")


def test_existing_output_is_kept(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("precious")
    with pytest.raises(InputError, match="--overwrite"):
        _model().save(tmp_path / "m")
    assert (tmp_path / "m").read_text() == "precious"
    other = dataclasses.replace(_model(), bias1=np.zeros(6, np.float32))
    other.save(tmp_path / "m", overwrite=True)
    assert PackedModel.load(tmp_path / "m").bias1.tolist() == [0.0] * 6
