# SPDX-License-Identifier: Apache-2.0
"""The packed model: everything prediction needs, in one safetensors file that runs no code when it is opened.

The file holds four tensors (`weight1`, `bias1`, `weight2`, `bias2`) and one metadata entry, `qgnn`, a JSON object of
ModelInfo. Weights under 32 bits are unsigned codes (code + 2^(b−1)), packed row by row in the project's bit order
(quant/packed.py); the others are float32. No time, path or run id: equal models give equal bytes. The description ends
with a checksum of itself and of the tensors; models of earlier programs have none.
"""
from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from .. import kernels
from ..errors import EXISTS, InputError, ModelError
from ..files.checksum import checksum_of
from ..files.read import open_regular, parse_json, reason, shown
from ..files.write import make_folder, remove_abandoned, write_atomically
from ..propagation.elastic import Elastic
from ..propagation.smp import Propagation
from ..quant.grids import AFFINE_METHODS, AffineGrid, stage_names
from ..quant.levels import NUM_LEVELS
from ..quant.packed import row_bytes
from ..quant.straight_through import weight_levels

if TYPE_CHECKING:
    from .memory import Prediction

__all__ = ["ModelInfo", "PackedModel"]

PLAIN_VERSION, ELASTIC_VERSION = 1, 2
"""The second is written for elastic models only, which the first does not know; all others keep their bytes."""
METADATA_KEY, CHECKSUM = "qgnn", "checksum"
LARGEST_HEADER = 4 << 20
MAKE = "`qgnn export RUN --out model.safetensors` makes one of a run"
MOST_HIDDEN, MOST_LAYERS = 65536, 1000
"""As of the settings of a run."""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """All of a packed model but its weights; docs/method.md says why each is needed.

    Attributes:
        bits: stage → width (weights, features, hidden, messages, residual).
        multipliers: λ_0 … of the best epoch, frozen. message_steps: step of each round (empty at 32 bits), 0
            for one that is not sent.
        weight_steps, hidden_step, residual_step: steps of the local grids (1.0 where a stage is float).
        grids: stage → [low, step, scale, bias] of quant.grids.AffineGrid, for the stages weights1, weights2, hidden,
            residual and news/k (round k's messages) that are under 32 bits, where `method` has affine grids; their
            steps stand above, too. Empty for recipe, lsq and minmax, whose grids follow from the steps.
        level: how large D̃^-½·H⁰ was in training (quant/levels.py); −1 unknown. feature_level: the same of the stored
            feature values, where they are coded and not normalised; −1 where their scale does not matter.
        fingerprint: of the graph that it was trained on; reported, not demanded, at prediction.
        elastic: λ₁, λ₂ and norm where `kind` is elastic, which takes neither mu nor eta; None, and not in the
            file, where it is not.
    """

    num_features: int
    hidden: int
    num_classes: int
    bits: dict[str, int]
    method: str
    coding: str
    feature_norm: str
    feature_signed: bool
    kind: str
    layers: int
    mu: float
    eta: float
    rounds: str
    multipliers: list[float]
    message_steps: list[float]
    weight_steps: list[float]
    hidden_step: float
    residual_step: float
    level: int
    feature_level: int
    class_names: list[str] | None
    graph: str
    fingerprint: str
    grids: dict[str, list[float]] = field(default_factory=dict)
    elastic: Elastic | None = None

    @property
    def propagation(self) -> Propagation:
        """The layers that it was trained with."""
        return Propagation(self.kind, self.layers, self.mu, self.eta, self.rounds, self.elastic)

    def described(self) -> dict[str, Any]:
        """All of it as plain values, as the file has them: with the format's version."""
        values = dataclasses.asdict(self) | {"format_version": ELASTIC_VERSION if self.elastic else PLAIN_VERSION}
        if self.elastic is None:
            del values["elastic"]
        return values

    def grid(self, stage: str) -> AffineGrid | None:
        """A stage's affine grid; None where it has none."""
        return AffineGrid(*self.grids[stage]) if stage in self.grids else None


@dataclass(frozen=True)
class PackedModel:
    """A trained, frozen network.

    Attributes:
        info: see ModelInfo.
        weight1 (F, H), weight2 (H, C): int8 codes, or float32 where weights have 32 bits.
        bias1 (H,), bias2 (C,): float32.
    """

    info: ModelInfo
    weight1: np.ndarray
    bias1: np.ndarray
    weight2: np.ndarray
    bias2: np.ndarray

    def predict(self, data: Any) -> Prediction:
        """Classify every node of a graph in memory: no store, no Ray, the same bits as `qgnn predict`.

        Args:
            data: a PyG `Data` (`x` (N, F) float, dense or sparse; `edge_index` (2, E) or `adj_t` (N, N); nothing else
                is looked at), or any source that `qgnn.partition` takes. Kernels use as many threads as torch.
        Returns: `classes` int32 (N,), `confidence` float32 (N,) in 0–1, `probabilities` and `scores` float32 (N, C),
            rows in the order of `data`.
        Raises: InputError, ModelError: the graph is damaged, or does not fit the model.

        >>> import torch, qgnn_dist as qgnn
        >>> from torch_geometric.data import Data
        >>> data = Data(x=torch.rand(5, 8), edge_index=torch.tensor([[0, 1, 2], [1, 2, 3]]))
        >>> net = qgnn.SMPNet(8, 16, 3, bits=2, seed=0)
        >>> _ = net(data.x, data.edge_index)
        >>> found = net.pack().predict(data)
        >>> found.classes.shape, found.probabilities.shape
        ((5,), (5, 3))
        """
        from ..data.load import load_graph
        from .memory import predict_graph

        return predict_graph(self, load_graph(data, labels=False))

    def to_bytes(self) -> bytes:
        """The file's bytes."""
        bits = self.info.bits["weights"]
        tensors = {"bias1": self.bias1, "bias2": self.bias2}
        for name, weight in (("weight1", self.weight1), ("weight2", self.weight2)):
            tensors[name] = weight if bits == 32 else _pack(weight, bits)
        values = self.info.described()
        values[CHECKSUM] = checksum_of(values, tensors)
        return save(tensors, metadata={METADATA_KEY: json.dumps(values, sort_keys=True, allow_nan=False)})

    def save(self, path: str | Path, overwrite: bool = False) -> int:
        """Write atomically (temp + fsync + rename) and return the file's size in bytes; halves of it that killed
        processes left go too.

        Raises:
            InputError: the file exists and `overwrite` is not set. OutputError: the disk.
        """
        target = Path(path)
        if target.exists() and not overwrite:
            raise InputError(EXISTS, file=str(target))
        data = self.to_bytes()
        make_folder(target.parent, "the file")
        remove_abandoned(target)
        write_atomically(target, data)
        return len(data)

    @classmethod
    def load(cls, path: str | Path) -> PackedModel:
        """Read and check a packed model.

        Raises:
            ModelError: missing, damaged, of another version, or with tensors that don't fit its own description.
        """
        file = str(path)
        try:
            with open_regular(path) as opened:
                size = os.fstat(opened.fileno()).st_size
                head = opened.read(min(size, LARGEST_HEADER + 8))
                _check_size(_read_info(head, file)[0], size, head, file)
                data = head + opened.read(size - len(head))
        except FileNotFoundError:
            raise ModelError(f"model file not found; {MAKE}", file=file) from None
        except IsADirectoryError:
            what = "a run's folder" if (Path(path) / "config.toml").exists() else "a folder"
            raise ModelError(f"{what}, not a packed model; {MAKE}", file=file) from None
        except OSError as error:
            raise ModelError(f"cannot be read: {reason(error)}", file=file) from None
        return cls.from_bytes(data, file)

    @classmethod
    def from_bytes(cls, data: bytes, file: str = "model") -> PackedModel:
        """The model in a file's bytes; errors as `load`, which name `file`."""
        info, checksum = _read_info(data, file)
        try:
            tensors = load(data)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"damaged model file: {reason(error)}", file=file) from None
        expected = _tensors(info)
        if set(tensors) != set(expected):
            raise ModelError(f"tensors are {shown(sorted(tensors))}, expected {', '.join(expected)}", file=file)
        for name, (shape, kind) in expected.items():
            _expect(tensors[name], name, shape, kind, file)
        if checksum is not None and checksum != checksum_of(info.described(), tensors):
            raise ModelError("does not fit its own checksum; it was changed or damaged, export the run again",
                             file=file)
        bits = info.bits["weights"]
        if bits < 32:
            for name, columns in (("weight1", info.hidden), ("weight2", info.num_classes)):
                tensors[name] = _unpack(tensors[name], bits, columns)
        return cls(info, tensors["weight1"], tensors["bias1"], tensors["weight2"], tensors["bias2"])


def _tensors(info: ModelInfo) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name → shape and type of what a file of this description holds."""
    bits, (f, h, c) = info.bits["weights"], (info.num_features, info.hidden, info.num_classes)

    def weight(rows: int, columns: int) -> tuple[tuple[int, ...], str]:
        return ((rows, columns), "float32") if bits == 32 else ((rows, row_bytes(columns, bits)), "uint8")

    return {"bias1": ((h,), "float32"), "bias2": ((c,), "float32"), "weight1": weight(f, h), "weight2": weight(h, c)}


def _check_size(info: ModelInfo, size: int, head: bytes, file: str) -> None:
    """Refuse a file that is larger than its description says, before all of it is read."""
    (header,) = struct.unpack_from("<Q", head)
    expected = 8 + header + sum(math.prod(shape) * np.dtype(kind).itemsize for shape, kind in _tensors(info).values())
    if size > expected:
        raise ModelError(f"damaged model file: it has {size} bytes, its description says {expected}", file=file)


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    low, _ = weight_levels(bits)
    unsigned = (codes.astype(np.int16) - low).astype(np.uint8)
    out = np.empty((len(codes), row_bytes(codes.shape[1], bits)), np.uint8)
    kernels.pack(unsigned, bits, out)
    return out


def _unpack(payload: np.ndarray, bits: int, columns: int) -> np.ndarray:
    low, _ = weight_levels(bits)
    out = np.empty((len(payload), columns), np.uint8)
    kernels.unpack(np.ascontiguousarray(payload), bits, out)
    out += np.uint8(low % 256)  # modulo 256, as a signed byte counts
    return out.view(np.int8)


def _expect(tensor: np.ndarray, name: str, shape: tuple[int, ...], kind: str, file: str) -> None:
    if tensor.shape != shape or tensor.dtype != kind:
        raise ModelError(f"tensor {name} is {tensor.dtype} {tensor.shape}, its description says {kind} {shape}",
                         file=file)


def _read_info(data: bytes, file: str) -> tuple[ModelInfo, str | None]:
    """The description, checked before anything is allocated by its sizes, and its checksum."""
    try:
        (size,) = struct.unpack_from("<Q", data)
        if not 0 < size <= min(LARGEST_HEADER, len(data) - 8):
            raise ModelError("not a packed model: its header length is out of range", file=file)
        values: dict[str, Any] = parse_json(parse_json(data[8:8 + size])["__metadata__"][METADATA_KEY].encode())
    except (struct.error, KeyError, TypeError, AttributeError):
        raise ModelError("not a packed model: no readable description", file=file) from None
    except ValueError as error:
        raise ModelError(f"not a packed model: its description {reason(error)}", file=file) from None
    if not isinstance(values, dict):
        raise ModelError("not a packed model: its description is no object", file=file)
    if {"identity", "progress", "server"} <= values.keys():
        raise ModelError(f"a checkpoint of a run, not a packed model; {MAKE}", file=file)
    version, checksum = values.pop("format_version", None), values.pop(CHECKSUM, None)
    if version not in (PLAIN_VERSION, ELASTIC_VERSION):
        raise ModelError(f"model format {shown(version)}, this program reads {PLAIN_VERSION} and {ELASTIC_VERSION}; "
                         "export the run again with this version", file=file)
    if checksum is not None and not isinstance(checksum, str):
        raise ModelError(f"description: checksum is {shown(checksum)}, expected 64 hex digits", file=file)
    wanted = {f.name for f in dataclasses.fields(ModelInfo)} - ({"elastic"} if version == PLAIN_VERSION else set())
    if set(values) != wanted:
        odd = sorted(set(values) ^ wanted)
        raise ModelError(f"description lacks or adds {shown(', '.join(odd))}", file=file)
    _check_values(values, file)
    if version == ELASTIC_VERSION:
        values["elastic"] = Elastic(**values["elastic"])
    return ModelInfo(**values), checksum


def _check_values(values: dict[str, Any], file: str) -> None:
    """Types and ranges of a description from outside."""
    def demand(good: bool, name: str) -> None:
        if not good:
            raise ModelError(f"description: {name}={shown(repr(values[name]))} is out of range", file=file)

    def number(x: Any) -> bool:
        return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < 1e30

    for name, most in (("num_features", 2**31 - 1), ("hidden", MOST_HIDDEN), ("num_classes", 2**31 - 1),
                       ("layers", MOST_LAYERS)):
        demand(type(values[name]) is int and 0 < values[name] <= most, name)
    bits = values["bits"]
    demand(isinstance(bits, dict) and set(bits) == {"weights", "features", "hidden", "messages", "residual"}
           and all(type(b) is int and b in (1, 2, 4, 8, 32) for b in bits.values())
           and all(bits[s] != 1 for s in ("weights", "features", "hidden")), "bits")
    if "elastic" in values:
        demand(values["kind"] == "elastic", "kind")
        own = values["elastic"]
        demand(isinstance(own, dict) and set(own) == {"lambda1", "lambda2", "norm"} and own["norm"] in ("l21", "l1")
               and all(number(own[name]) and own[name] >= 0 for name in ("lambda1", "lambda2")), "elastic")
    else:
        demand(values["kind"] in ("smp", "appnp", "none"), "kind")
    demand(values["rounds"] in ("merged", "two"), "rounds")
    demand(values["coding"] in ("innovation", "direct"), "coding")
    demand(values["feature_norm"] in ("row", "l2", "none"), "feature_norm")
    demand(isinstance(values["feature_signed"], bool), "feature_signed")
    for name in ("mu", "eta", "hidden_step", "residual_step"):
        demand(number(values[name]) and values[name] > 0, name)
    for name in ("multipliers", "message_steps", "weight_steps"):
        demand(isinstance(values[name], list) and all(number(x) for x in values[name]), name)
    demand(len(values["weight_steps"]) == 2 and min(values["weight_steps"]) > 0, "weight_steps")
    rounds = Propagation(values["kind"], values["layers"], values["mu"], values["eta"], values["rounds"]).num_rounds
    demand(len(values["message_steps"]) == (0 if bits["messages"] == 32 else rounds)
           and all(s >= 0 for s in values["message_steps"]) and min(values["message_steps"][:1], default=1) > 0,
           "message_steps")
    demand(values["coding"] == "innovation" or 0 not in values["message_steps"], "message_steps")
    demand(len(values["multipliers"]) <= values["layers"], "multipliers")
    demand(isinstance(values["method"], str), "method")
    _check_grids(values, rounds, demand, number)
    for name in ("level", "feature_level"):
        demand(type(values[name]) is int and -1 <= values[name] < NUM_LEVELS, name)
    names = values["class_names"]
    demand(names is None or (isinstance(names, list) and len(names) == values["num_classes"]
                             and all(isinstance(n, str) for n in names)), "class_names")
    demand(isinstance(values["graph"], str) and isinstance(values["fingerprint"], str), "fingerprint")


def _check_grids(values: dict[str, Any], rounds: int, demand: Callable[[bool, str], None],
                 number: Callable[[Any], bool]) -> None:
    """The affine grids: of the right stages, and those that the steps beside them tell of."""
    grids = values["grids"]
    names = stage_names(values["bits"], rounds) if values["method"] in AFFINE_METHODS else []
    demand(isinstance(grids, dict) and set(grids) == set(names), "grids")
    for four in grids.values():
        demand(isinstance(four, list) and len(four) == 4 and all(number(x) for x in four)
               and four[1] > 0 and four[2] > 0, "grids")
        demand(all(abs(x) < 3e38 and float(np.float32(x)) == x for x in four), "grids")
    steps = {"weights1": values["weight_steps"][0], "weights2": values["weight_steps"][1],
             "hidden": values["hidden_step"], "residual": values["residual_step"],
             **{f"news/{k}": step for k, step in enumerate(values["message_steps"])}}
    demand(all(grids[name][1] == steps[name] for name in grids), "grids")
