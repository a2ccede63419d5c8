# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from qgnn_dist.config import load_config
from qgnn_dist.errors import ConfigError


def test_int2_means_what_the_design_says() -> None:
    assert load_config().quant.stages() == {
        "weights": 2, "features": 2, "hidden": 2, "messages": 2, "residual": 8, "gradients": 4}
    one = load_config(overrides=["quant.bits=1"]).quant.stages()
    assert (one["weights"], one["features"], one["hidden"], one["messages"], one["residual"]) == (2, 2, 2, 1, 8)
    assert set(load_config(overrides=["quant.bits=32"]).quant.stages().values()) == {32}
    assert load_config(overrides=["quant.residual=2"]).quant.residual == 2
    for bits in (2, 4, 8, 32):
        assert load_config(overrides=[f"quant.gradients={bits}"]).quant.gradients == bits
        assert load_config(overrides=["quant.bits=32", f"quant.gradients={bits}"]).quant.gradients == bits


def test_gradients_left_open_are_coded_where_messages_are_innovations() -> None:
    for words, bits in (((), 4), (("quant.bits=1",), 4), (("quant.bits=8",), 4), (("quant.method=minmax",), 4),
                        (("propagation.kind=appnp",), 4), (("quant.bits=32",), 32), (("quant.method=qlr",), 32),
                        (("messages.coding=direct", "propagation.rounds=two"), 32), (("propagation.kind=none",), 32),
                        (("propagation.kind=elastic",), 32), (("messages.coding=direct", "quant.gradients=8"), 8)):
        resolved = load_config(overrides=list(words))
        assert resolved.quant.gradients == bits, words
        assert load_config(values=resolved.to_dict()) == resolved


@pytest.mark.parametrize(("layers", "floor"), [(2, 0.75), (20, 0.75), (42, 0.8), (64, 0.85), (100, 0.85)])
def test_step_floor_follows_depth(layers: int, floor: float) -> None:
    assert load_config(overrides=[f"propagation.layers={layers}"]).quant.step_floor == pytest.approx(floor)


@pytest.mark.parametrize(("word", "text"), [
    ("quant.bit=2", "did you mean quant.bits"),
    ("quant.bits=3", "quant.bits=3: expected one of 1, 2, 4, 8, 32"),
    ("quant.weights=1", "quant.weights=1: expected one of 2, 4, 8, 32"),
    ("quant.gradients=1", "quant.gradients=1: expected one of 2, 4, 8, 32"),
    ("propagation.kind=smq", "did you mean smp"),
    ("train.epochs=0", "train.epochs=0: expected a whole number of at least 1"),
    ("train.lr=nan", "train.lr=nan"),
    ("train.epochs=true", "train.epochs=True"),
    ("model.dropout=2", "a number in 0…0.95"),
    ("propagation.eta=0.2", "expected less than 2/(1+2*mu)"),
    ("propagation.lambda1=-1", "propagation.lambda1=-1.0: expected a number of at least 0"),
    ("propagation.elastic_norm=l2", "expected one of l21, l1"),
    ("hidden=3", "did you mean model.hidden"),
    ("train.lr", "expected key=value"),
])
def test_faults_are_named(word: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=[word])
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_all_faults_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=["quant.bits=5", "train.lr=-1", "nothing.like=this"])
    assert all(text in str(caught.value) for text in ("quant.bits=5", "train.lr=-1", "nothing.like"))


def test_toml_round_trip_and_precedence(tmp_path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("seed = 7\n[quant]\nbits = 4\n[train]\nlr = 1\n")
    config = load_config(file, ["quant.bits=8", "model.feature_norm=l2"])
    assert (config.seed, config.quant.bits, config.train.lr, config.model.feature_norm) == (7, 8, 1.0, "l2")
    (tmp_path / "b.toml").write_text(config.to_toml())
    again = load_config(tmp_path / "b.toml")
    assert again == config
    assert again.digest() == config.digest()
    assert load_config(overrides=["seed=8"]).digest() != load_config().digest()
    assert load_config(overrides=["cluster.threads=3"]).digest() == load_config().digest()
    with pytest.raises(ConfigError, match="not found"):
        load_config(tmp_path / "none.toml")
    file.write_text("seed = = 7")
    with pytest.raises(ConfigError, match="not a TOML file"):
        load_config(file)


def test_published_form_brings_its_own_defaults() -> None:
    p = load_config(overrides=["propagation.constraint=published", "propagation.alpha=0.01"]).propagation
    assert (p.alpha, p.lambda0, p.slack0, p.eta_lambda) == (0.01, 1e-3, 1e-3, 1e-5)


def test_rounds_can_only_be_left_out_where_the_next_one_makes_up_for_them() -> None:
    assert load_config(overrides=["messages.stride=2"]).messages.stride == 2
    for words, text in ((["messages.coding=direct"], "coding=direct"), (["quant.bits=32"], "quant.messages=32"),
                        (["propagation.rounds=two"], "propagation.rounds=two"), (["quant.method=qlr"], "method=qlr")):
        with pytest.raises(ConfigError, match=text):
            load_config(overrides=["messages.stride=2", *words])


def test_elastic_has_the_papers_defaults_and_no_step_of_its_own() -> None:
    p = load_config(overrides=["propagation.kind=elastic", "propagation.eta=5"]).propagation
    assert (p.lambda1, p.lambda2, p.elastic_norm, p.layers) == (3.0, 3.0, "l21", 10)
