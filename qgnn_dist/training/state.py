# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint's tensors must be before a network takes them."""
from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError
from ..files.read import shown

if TYPE_CHECKING:
    from torch import nn

__all__ = ["check_tensors"]


def check_tensors(tensors: Mapping[str, np.ndarray], network: nn.Module) -> None:
    """Names, shapes and kinds are those of a network, of Adam's figures of its parameters, and of multipliers (n,).

    Args: tensors: of `TrainWorker.state`.
    Raises: InputError: names the tensor.
    """
    wanted = {f"network.{name}": (tuple(value.shape), value.numpy().dtype.kind)
              for name, value in network.state_dict().items()}
    for name, parameter in network.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            if f"adam.{name}.{key}" in tensors or f"adam.{name}.step" in tensors:
                wanted[f"adam.{name}.{key}"] = tuple(parameter.shape), "f"
                wanted[f"adam.{name}.step"] = (), "f"
    wanted["multipliers"] = tensors["multipliers"].shape[:1] if "multipliers" in tensors else (0,), "f"
    for name in tensors.keys() - wanted.keys() - {"best"}:
        raise _refused(f"tensor {shown(name)} is none of this network's")
    for name, (shape, kind) in wanted.items():
        got = tensors.get(name)
        if got is None or got.shape != shape or got.dtype.kind != kind or not np.isfinite(got).all():
            found = "missing" if got is None else f"{got.dtype} {got.shape}"
            raise _refused(f"tensor {shown(name)} is {found}, expected finite numbers {shape}")


def _refused(why: str) -> InputError:
    return InputError(f"checkpoint: {why}; it is damaged, or another program's: start again with --overwrite")
