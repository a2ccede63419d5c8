# SPDX-License-Identifier: Apache-2.0
"""Deep graph neural networks over many hosts, with messages of 1-8 bits. Importing this starts and loads nothing.

    import qgnn_dist as qgnn

    qgnn.partition("graph.npz", parts=2, out="store")
    summary = qgnn.train("store", out="run", overrides=["quant.bits=2"])
    qgnn.export("run", out="model.safetensors")
    qgnn.predict("store", model="model.safetensors", out="predictions")

and, on one machine, torch modules for a training loop of one's own (SMPConv, SMPNet; docs/python.md).
"""
from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cluster.api import export, inspect, partition, predict, train
    from .config import RunConfig, load_config
    from .errors import InputError, QgnnError
    from .model.packed import PackedModel
    from .nn.smp_conv import SMPConv
    from .nn.smp_net import SMPNet

__version__ = "0.1.0"
__all__ = [
    "InputError",
    "PackedModel",
    "QgnnError",
    "RunConfig",
    "SMPConv",
    "SMPNet",
    "export",
    "inspect",
    "load_config",
    "partition",
    "predict",
    "train",
]

_HOMES = {
    **dict.fromkeys(("partition", "train", "export", "predict", "inspect"), "cluster.api"),
    **dict.fromkeys(("RunConfig", "load_config"), "config"),
    **dict.fromkeys(("InputError", "QgnnError"), "errors"),
    "PackedModel": "model.packed",
    "SMPConv": "nn.smp_conv",
    "SMPNet": "nn.smp_net",
}


def __getattr__(name: str) -> Any:
    """Load a public name's module when it is first asked for: torch and Ray take seconds to import."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
