# SPDX-License-Identifier: Apache-2.0
"""A network and its optimiser as a checkpoint's tensors, and back; and their gradients, the same on all workers."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ..errors import DivergedError, InputError
from ..files.read import shown

if TYPE_CHECKING:
    from ..comm.group import Group
    from ..model.packed import PackedModel

__all__ = ["check_tensors", "checkpointed", "load_tensors", "reduce_gradients", "tensors_of"]


def tensors_of(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, np.ndarray]:
    """Copies of all parameters, and of the optimiser's figures of each."""
    tensors = {f"network.{name}": value.numpy().copy() for name, value in network.state_dict().items()}
    for name, parameter in network.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"adam.{name}.{key}"] = np.asarray(value).copy()
    return tensors


def checkpointed(tensors: Mapping[str, np.ndarray], multipliers: Sequence[float],
                 best: PackedModel | None) -> dict[str, np.ndarray]:
    """What `tensors_of` gave, with what else a worker goes on from: the last multipliers, and the best model so far."""
    more = {} if best is None else {"best": np.frombuffer(best.to_bytes(), np.uint8)}
    return {**tensors, "multipliers": np.array(multipliers, np.float64), **more}


def load_tensors(tensors: Mapping[str, np.ndarray], network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Take what `tensors_of` gave. Raises: InputError: they are another network's; nothing was taken then."""
    check_tensors(tensors, network)
    network.load_state_dict(
        {k.partition(".")[2]: torch.from_numpy(v.copy()) for k, v in tensors.items() if k.startswith("network.")})
    for name, parameter in network.named_parameters():
        prefix = f"adam.{name}."
        found = {k[len(prefix):]: torch.from_numpy(v.copy()) for k, v in tensors.items() if k.startswith(prefix)}
        if found:
            optimizer.state[parameter] = found


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
        if name.startswith("adam.") and name.endswith((".step", ".exp_avg_sq")) and (got < 0).any():
            raise _refused(f"tensor {shown(name)} has numbers below 0")


def _refused(why: str) -> InputError:
    return InputError(f"checkpoint: {why}; it is damaged, or another program's: start again with --overwrite")


def reduce_gradients(network: nn.Module, group: Group | None, epoch: int) -> None:
    """Sum every parameter's gradient over the workers, in one message.

    Raises: DivergedError: one is not finite, on every worker alike; no weight has changed then.
    """
    grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    if group is not None:
        flat = np.concatenate([g.numpy().ravel() for g in grads.values()])
        group.all_reduce_sum(flat)
        at = 0
        for g in grads.values():
            g.copy_(torch.from_numpy(flat[at:at + g.numel()]).view_as(g))
            at += g.numel()
    bad = [name for name, g in grads.items() if not bool(torch.isfinite(g).all())]
    if bad:
        raise DivergedError(f"the gradient of {', '.join(bad)} is not finite at epoch {epoch}; lower train.lr or "
                        "propagation.eta, or look at the features; the last checkpoint is good")
