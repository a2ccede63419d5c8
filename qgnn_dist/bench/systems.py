# SPDX-License-Identifier: Apache-2.0
"""What a method of a grid may be trained by: `qgnn`, or a reference that a reader knows (`bench/references.py`).

This module loads nothing heavy: cells look a system up before they know their number of threads.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["OWN", "REFERENCES", "REFERENCE_WIDTH", "System", "step_of", "used_words"]

OWN = "qgnn"
REFERENCE_WIDTH = "float"
"""References have one row, under this name, whatever widths the others have."""
_SHARED = ("model.hidden", "model.dropout", "model.feature_norm", "train.epochs", "train.lr", "train.weight_decay",
           "train.patience", "train.metric", "train.eval_every")


@dataclass(frozen=True, kw_only=True, slots=True)
class System:
    """A reference.

    Attributes:
        about: what it is, for tables and errors. depth: its number of layers; None where `propagation.layers` gives it.
        keys: settings that it has a use for, beside those that all have.
    """

    about: str
    depth: int | None = None
    keys: tuple[str, ...] = ()

    def uses(self, key: str) -> bool:
        """Whether a setting reaches it."""
        return key in _SHARED or key in self.keys


REFERENCES = {
    "pyg-gcn": System(about="two of PyG's GCNConv (Kipf and Welling, ICLR 2017)", depth=2),
    "pyg-appnp": System(about="a perceptron of two layers, then PyG's APPNP (Gasteiger et al., ICLR 2019)",
                        keys=("propagation.layers", "propagation.mu")),
    "torch-sign": System(about="a perceptron over features mixed once, hop by hop (SIGN, Rossi et al., 2020)",
                         keys=("propagation.layers",)),
    "torch-mlp": System(about="a perceptron of two layers, which sees no edge", depth=0),
}
"""Name → reference. APPNP's teleport is 1/(1 + mu); SIGN's hops are the layers."""


def used_words(system: str, words: Sequence[str]) -> list[str]:
    """Of `section.key=value` words those that reach a system; all for `qgnn`."""
    if system == OWN:
        return list(words)
    return [word for word in words if REFERENCES[system].uses(word.partition("=")[0].strip())]


def step_of(mu: float) -> float:
    """`propagation.eta` that goes with a weight of the smoothness term: with 1/(1 + mu) layers without a multiplier
    are APPNP's (METHOD law: teleport 1/(1 + mu)), and no weight makes them diverge."""
    return 1 / (1 + mu)
