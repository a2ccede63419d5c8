# SPDX-License-Identifier: Apache-2.0
"""Every setting of a run: its default, its range, and how it is read (defaults < TOML file < `--set a.b=c`)."""
from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .files.read import parse_toml, read_toml, reason, shown
from .logs import FORMATS

__all__ = [
    "ClusterConfig",
    "LogConfig",
    "MessagesConfig",
    "ModelConfig",
    "PropagationConfig",
    "QuantConfig",
    "RunConfig",
    "StorageConfig",
    "TimeoutsConfig",
    "TrainConfig",
    "load_config",
]


def _setting(default: Any, doc: str, *, unit: str = "", choices: tuple[Any, ...] = (), low: float | None = None,
             high: float | None = None, above: float | None = None) -> Any:
    """A dataclass field with its documentation, its unit and the values it may take; settings.py shows them."""
    limits = {"doc": doc, "unit": unit, "choices": choices, "low": low, "high": high, "above": above}
    return field(default=default, metadata=limits)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The perceptron."""

    hidden: int = _setting(64, "width of the perceptron's hidden layer", unit="columns", low=1, high=65536)
    dropout: float = _setting(0.5, "share of input and hidden values dropped in training", low=0.0, high=0.95)
    feature_norm: str = _setting(
        "auto", "feature rows divided by their sum, their l2 norm, or not; auto decides by the training rows",
        choices=("auto", "row", "l2", "none"))


@dataclass(frozen=True, kw_only=True, slots=True)
class PropagationConfig:
    """The layers, and the smoothness constraint."""

    kind: str = _setting("smp", "smoothness-constrained, plain personalised PageRank, elastic message passing (one "
                                "part only), or the perceptron alone", choices=("smp", "appnp", "elastic", "none"))
    layers: int = _setting(10, "K, the number of propagation layers", unit="layers", low=1, high=1000)
    mu: float = _setting(9.0, "weight of the smoothness term", above=0.0)
    eta: float = _setting(0.1, "step size of a layer; stable below 2/(1+2*mu)", above=0.0)
    alpha: float = _setting(1.0, "threshold of the layer-wise smoothness constraint", low=0.0)
    lambda0: float = _setting(0.0, "multiplier λ at the first layer")
    slack0: float = _setting(0.0, "slack at the first layer (published form only)")
    eta_lambda: float = _setting(1.0, "step size of the multiplier", low=0.0)
    eta_slack: float = _setting(1e-5, "step size of the slack (published form only)", low=0.0)
    constraint: str = _setting("normalised", "threshold on <D,G>/|H0|^2, or the paper's on <D,G> with a slack",
                               choices=("normalised", "published"))
    rounds: str = _setting("merged", "one exchange a layer, or the published two", choices=("merged", "two"))
    lambda1: float = _setting(3.0, "weight of the edge term (elastic only)", low=0.0)
    lambda2: float = _setting(3.0, "weight of the smoothness term (elastic only; smp and appnp have mu)", low=0.0)
    elastic_norm: str = _setting("l21", "edge term: the norms of the edges' differences, or of each column's",
                                 choices=("l21", "l1"))


@dataclass(frozen=True, kw_only=True, slots=True)
class MessagesConfig:
    """What a round sends."""

    coding: str = _setting("innovation", "send what changed, or each state afresh", choices=("innovation", "direct"))
    stride: int = _setting(1, "from the fifth round on, send each stride-th only; what is left out comes with the next "
                              "(innovation only)", unit="rounds", low=1, high=64)


WIDTHS = (1, 2, 4, 8, 32)
GRADIENT_BITS = 4
"""The lowest width with which no graph's validation figure fell by more than 0.3 points (docs/method.md)."""
WEIGHT_DECAY = 1e-3
_ONE_STEP = ("recipe", "lsq", "minmax")
LARGEST_WHOLE, LONGEST_WAIT_S = 2**63, 1e9
"""No whole number and no deadline is as large; clocks and files have room for those."""
MOST_FAULTS, LONGEST_KEY = 20, 100
"""So many are told; longer keys are near no known one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantConfig:
    """Widths left open follow `bits`: weights, features and hidden at least 2, residual at least 8.

    Gradients left open have GRADIENT_BITS where messages are innovation-coded on a grid of one step, else 32.
    """

    method: str = _setting("recipe", "how ranges are found, and how values are rounded inside them", choices=(
        "recipe", "qlr", "bt", "bt_star", "lsq", "minmax", "percentile", "degree_quant"))
    bits: int = _setting(2, "width of all stages that are not set apart; 32 is float", unit="bits",
                         choices=WIDTHS)
    weights: int | None = _setting(None, "width of the weights; open: bits, at least 2", unit="bits",
                                   choices=(2, 4, 8, 32))
    features: int | None = _setting(None, "width of the input features; open: bits, at least 2", unit="bits",
                                    choices=(2, 4, 8, 32))
    hidden: int | None = _setting(None, "width of the hidden activations; open: bits, at least 2", unit="bits",
                                  choices=(2, 4, 8, 32))
    messages: int | None = _setting(None, "width of the messages; open: bits", unit="bits", choices=WIDTHS)
    residual: int | None = _setting(None, "width of the local H0 term, which never travels; open: bits, at least 8",
                                    unit="bits", choices=WIDTHS)
    gradients: int | None = _setting(
        None, "width of the gradient messages, rounded at random; open: 4 where messages are innovation-coded by "
              "recipe, lsq or minmax, else 32", unit="bits", choices=(2, 4, 8, 32))
    step_floor: float | None = _setting(
        None, "a round's step is at least this share of the step before (recipe); open: 0.75 up to 20 layers, rising "
              "to 0.85 at 64", low=0.0, high=1.0)

    def resolved(self, layers: int, *, innovation: bool) -> QuantConfig:
        """The same settings with every open width and the step floor filled in (METHOD: step floor by depth).

        Args: innovation: whether messages are of smp or appnp, and innovation-coded.
        """
        def at_least(value: int | None, least: int) -> int:
            return value if value is not None else max(self.bits, least)

        floor = self.step_floor
        if floor is None:
            floor = 0.75 + 0.10 * min(1.0, max(0.0, (layers - 20) / 44))
        coded = innovation and self.bits < 32 and self.method in _ONE_STEP
        gradients = self.gradients or (GRADIENT_BITS if coded else 32)
        return dataclasses.replace(
            self, weights=at_least(self.weights, 2), features=at_least(self.features, 2),
            hidden=at_least(self.hidden, 2), messages=at_least(self.messages, 1),
            residual=at_least(self.residual, 8), gradients=gradients, step_floor=round(floor, 6))

    def stages(self) -> dict[str, int]:
        """Stage name → bits, of a resolved configuration."""
        names = ("weights", "features", "hidden", "messages", "residual", "gradients")
        return {name: int(getattr(self, name)) for name in names}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The optimiser, and when a run ends."""

    epochs: int = _setting(200, "passes over the graph at most", unit="epochs", low=1)
    lr: float = _setting(0.02, "Adam's learning rate", above=0.0)
    weight_decay: float | None = _setting(
        None, "on the first weight matrix only; open: 0.001 where rows of features are normalised, else none", low=0.0)
    patience: int = _setting(100, "epochs without a better validation figure before stopping; 0 never stops",
                             unit="epochs", low=0)
    metric: str = _setting("accuracy", "figure that picks the best epoch", choices=("accuracy", "roc_auc", "macro_f1"))
    eval_every: int = _setting(1, "epochs between evaluations", unit="epochs", low=1)
    checkpoint_every: int = _setting(10, "epochs between checkpoints", unit="epochs", low=1)
    keep_checkpoints: int = _setting(3, "the newest so many checkpoints stay; a damaged one falls back to the one "
                                        "before", low=1)

    def decay(self, norm: str) -> float:
        """The weight decay, an open one by the normalisation of the rows, `none`, `row` or `l2`.

        Features that are taken as they are have one value a category, say: decay then starves the weights of rare ones
        (docs/method.md).
        """
        if self.weight_decay is not None:
            return self.weight_decay
        return 0.0 if norm == "none" else WEIGHT_DECAY


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """Where workers run; no result depends on it."""

    cpus_per_worker: float = _setting(1.0, "CPUs that Ray reserves for one worker; fractions allowed", unit="CPUs",
                                      above=0.0)
    threads: int = _setting(0, "threads of one worker; 0 = its CPUs", low=0, high=1024)
    max_restarts: int = _setting(5, "times that a run goes on by itself after a lost worker, host or message", low=0,
                                 high=1000)
    memory_check: str = _setting("on", "refuse a run whose estimate exceeds what its hosts have left",
                                 choices=("on", "off"))
    device: str = _setting("cpu", "where training computes: our own kernels, or torch on one GPU a worker; auto takes "
                                  "GPUs where each worker gets one", choices=("cpu", "cuda", "auto"))


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeoutsConfig:
    """The deadline of every wait; no result depends on them."""

    start_s: float = _setting(120.0, "until all workers are placed and started", unit="s", above=0.0)
    rendezvous_s: float = _setting(60.0, "until all workers have met", unit="s", above=0.0)
    exchange_s: float = _setting(60.0, "until a round of messages has arrived", unit="s", above=0.0)
    server_s: float = _setting(60.0, "until the multiplier server has answered", unit="s", above=0.0)
    checkpoint_s: float = _setting(120.0, "until a checkpoint is on disk", unit="s", above=0.0)
    write_s: float = _setting(600.0, "until a worker that writes predictions has come further, by a row group or its "
                                     "file", unit="s", above=0.0)
    stall_s: float | None = _setting(
        None, "until workers of which none comes further are asked where they stand; open: a third of the shorter of "
              "exchange_s and server_s", unit="s", above=0.0)

    def resolved(self) -> TimeoutsConfig:
        """The same settings with an open `stall_s` filled in."""
        return self if self.stall_s is not None else dataclasses.replace(self, stall_s=self.shortest_s / 3)

    @property
    def shortest_s(self) -> float:
        """After which a worker that waits for others gives up."""
        return min(self.exchange_s, self.server_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class StorageConfig:
    """Object stores; no result depends on them."""

    cache_dir: str | None = _setting(None, "folder on every host for parts of stores on object stores; open: "
                                           "QGNN_CACHE_DIR, else qgnn/storage in the user's cache")
    cache_gb: float = _setting(100.0, "GB that such parts may take there; those go that nobody has open, the longest "
                                      "unused first", unit="GB", above=0.0)
    retry_s: float = _setting(60.0, "for how long an object store that fails is tried again", unit="s", low=0.0,
                              high=86400.0)
    fetch_s: float = _setting(1800.0, "until a worker has its part from an object store", unit="s", above=0.0,
                              high=86400.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """What a run says of itself; no result depends on it."""

    format: str = _setting("text", "log records on stderr as text, or as JSON, one a line", choices=FORMATS)
    metrics: str = _setting("off", "gauges and counters for Ray's Prometheus endpoints", choices=("on", "off"))
    tensorboard: str = _setting("off", "events for TensorBoard in RUN/tensorboard", choices=("on", "off"))


PUBLISHED_DEFAULTS = {"lambda0": 1e-3, "slack0": 1e-3, "eta_lambda": 1e-5, "eta_slack": 1e-5, "alpha": 0.2}
"""Defaults of the published constraint form; they replace the normalised form's where a user chose `published`."""

FREE_SECTIONS = ("cluster", "timeouts", "storage", "log")
FREE_KEYS = ("checkpoint_every", "keep_checkpoints")
"""Sections, and settings of [train], that no result depends on: a resumed run may change them."""

_SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "propagation": PropagationConfig,
    "messages": MessagesConfig,
    "quant": QuantConfig,
    "train": TrainConfig,
    "cluster": ClusterConfig,
    "timeouts": TimeoutsConfig,
    "storage": StorageConfig,
    "log": LogConfig,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One run's settings, resolved: no width is open any more. Build it by `load_config`."""

    seed: int = _setting(0, "of weights and of every random draw", low=0, high=2**63 - 1)
    model: ModelConfig = field(default_factory=ModelConfig)
    propagation: PropagationConfig = field(default_factory=PropagationConfig)
    messages: MessagesConfig = field(default_factory=MessagesConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    timeouts: TimeoutsConfig = field(default_factory=TimeoutsConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, in the order of the sections."""
        return dataclasses.asdict(self)

    def to_toml(self) -> str:
        """The resolved settings as a file that `load_config` reads back to the same settings."""
        lines = [f"seed = {self.seed}"]
        for section in _SECTIONS:
            lines += ["", f"[{section}]"]
            values = dataclasses.asdict(getattr(self, section))
            lines += [f"{key} = {json.dumps(value)}" for key, value in values.items() if value is not None]
        return "\n".join(lines) + "\n"

    def digest(self) -> str:
        """Hash of all that decides the result; where, how long to wait, what is kept and told is left out."""
        values = self.to_dict()
        for section in FREE_SECTIONS:
            del values[section]
        for key in FREE_KEYS:
            del values["train"][key]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def load_config(path: str | Path | None = None, overrides: list[str] | tuple[str, ...] = (),
                values: dict[str, Any] | None = None) -> RunConfig:
    """Read, merge, check and resolve the settings of a run.

    Args:
        path: a TOML file, or None.
        overrides: `section.key=value` words; the value is read as TOML, a bare word as a string.
        values: nested settings from Python, merged after the file and before the overrides.

    Raises:
        ConfigError: names *every* fault: unknown keys (with the nearest known one) and values that don't fit.
    """
    faults: list[str] = []
    given: dict[str, tuple[Any, str]] = {}
    if path is not None:
        _merge(given, _read_file(Path(path)), str(path), faults)
    if values:
        _merge(given, values, "config", faults)
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals:
            faults.append(f"--set {shown(word)}: expected key=value")
        else:
            _put(given, key.strip(), _parse_value(text.strip()), "--set", faults)
    if given.get("propagation.constraint", ("", ""))[0] == "published":
        for name, value in PUBLISHED_DEFAULTS.items():
            given.setdefault(f"propagation.{name}", (value, "default of constraint=published"))
    typed = {key: _checked(key, value, origin, faults) for key, (value, origin) in given.items()}
    if faults:
        more = [f"and {len(faults) - MOST_FAULTS} more"] if len(faults) > MOST_FAULTS else []
        raise ConfigError("; ".join(faults[:MOST_FAULTS] + more))
    sections = {
        name: kind(**{k.partition(".")[2]: v for k, v in typed.items() if k.startswith(name + ".")})
        for name, kind in _SECTIONS.items()
    }
    config = RunConfig(**({"seed": typed["seed"]} if "seed" in typed else {}), **sections)
    innovation = config.messages.coding == "innovation" and config.propagation.kind in ("smp", "appnp")
    config = dataclasses.replace(
        config, quant=config.quant.resolved(config.propagation.layers, innovation=innovation),
        timeouts=config.timeouts.resolved())
    _check_together(config)
    return config


@functools.cache
def known_keys() -> dict[str, dataclasses.Field[Any]]:
    """Dotted key → its dataclass field, for every setting."""
    keys = {"seed": next(f for f in dataclasses.fields(RunConfig) if f.name == "seed")}
    for section, kind in _SECTIONS.items():
        keys.update({f"{section}.{f.name}": f for f in dataclasses.fields(kind)})
    return keys


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return read_toml(path)
    except FileNotFoundError:
        raise ConfigError("configuration file not found", file=str(path)) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"not a TOML file: {reason(error)}", file=str(path)) from None


def _parse_value(text: str) -> Any:
    try:
        return parse_toml(f"value = {text}")["value"]
    except ValueError:
        return text


def _merge(given: dict[str, tuple[Any, str]], values: dict[str, Any], origin: str, faults: list[str]) -> None:
    for name, value in values.items():
        if isinstance(value, dict):
            for key, inner in value.items():
                _put(given, f"{name}.{key}", inner, origin, faults)
        else:
            _put(given, name, value, origin, faults)


def _put(given: dict[str, tuple[Any, str]], key: str, value: Any, origin: str, faults: list[str]) -> None:
    keys = known_keys()
    if key not in keys and (len(faults) >= MOST_FAULTS or len(key) > LONGEST_KEY):  # no looking for near ones then
        faults.append(f"{shown(key)}: unknown key ({origin})")
    elif key not in keys:
        word = shown(key)
        tail = difflib.get_close_matches(key.rpartition(".")[2], [k.rpartition(".")[2] for k in keys], 1)
        near = difflib.get_close_matches(key, keys, 1, 0.75) or [k for k in keys if k.rpartition(".")[2] in tail]
        faults.append(f"{word}: unknown key ({origin})" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    elif value is not None:
        given[key] = (value, origin)


def _checked(key: str, value: Any, origin: str, faults: list[str]) -> Any:
    """The value in the field's type, or a fault."""
    spec = known_keys()[key]
    wanted = str(spec.type).replace(" | None", "")
    limits = spec.metadata
    if wanted == "float" and isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST_WHOLE:
        value = float(value)
    if isinstance(value, bool) or type(value).__name__ != wanted:
        faults.append(f"{key}={shown(value)}: expected {_expected(wanted, limits)} ({origin})")
        return value
    bad = bool(limits["choices"]) and value not in limits["choices"]
    if wanted in ("int", "float"):
        most = LARGEST_WHOLE if wanted == "int" else LONGEST_WAIT_S if key.startswith("timeouts.") else math.inf
        bad = bad or not abs(value) < most
        bad = bad or (limits["low"] is not None and value < limits["low"])
        bad = bad or (limits["high"] is not None and value > limits["high"])
        bad = bad or (limits["above"] is not None and value <= limits["above"])
    if bad:
        near = difflib.get_close_matches(shown(value), [str(c) for c in limits["choices"]], 1)
        hint = f"; did you mean {near[0]}?" if near and wanted == "str" else ""
        faults.append(f"{key}={shown(value)}: expected {_expected(wanted, limits)} ({origin}){hint}")
    return value


def _expected(wanted: str, limits: Any) -> str:
    if limits["choices"]:
        return "one of " + ", ".join(str(c) for c in limits["choices"])
    noun = {"int": "a whole number", "float": "a number", "str": "a word"}[wanted]
    if limits["above"] is not None:
        return f"{noun} above {limits['above']:g}"
    if limits["low"] is not None and limits["high"] is not None:
        return f"{noun} in {limits['low']:g}…{limits['high']:g}"
    return f"{noun} of at least {limits['low']:g}" if limits["low"] is not None else noun


def _check_together(config: RunConfig) -> None:
    """Faults that only several settings together can have."""
    p = config.propagation
    if p.kind in ("smp", "appnp") and p.eta >= 2 / (1 + 2 * p.mu):
        raise ConfigError(
            f"propagation.eta={p.eta:g}: diverges on every graph at mu={p.mu:g}; "
            f"expected less than 2/(1+2*mu) = {2 / (1 + 2 * p.mu):g}")
    times = config.timeouts
    if times.stall_s is not None and times.stall_s > times.shortest_s / 2:
        raise ConfigError(
            f"timeouts.stall_s={times.stall_s:g}: workers would be gone before they are asked where they stand; "
            f"expected at most half of the shorter of timeouts.exchange_s={times.exchange_s:g} and "
            f"timeouts.server_s={times.server_s:g}")
    if config.messages.stride > 1:
        wrong = [f"{key}={value}" for key, value, fits in (
            ("messages.coding", config.messages.coding, "innovation"), ("propagation.rounds", p.rounds, "merged"),
            ("quant.method", config.quant.method, "recipe"), ("quant.messages", config.quant.messages, None))
            if value != fits and not (fits is None and value != 32)]
        if wrong:
            raise ConfigError(f"messages.stride={config.messages.stride}: does not go with {', '.join(wrong)}; only "
                              "merged rounds of innovation-coded messages of the recipe can be left out")
