"""Arguments of Lightning's Trainer next to a strategy: what contradicts it, or could not act, is refused by name."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch import callbacks

from clframe.avalanche_bridge.fabric import default_fabric
from clframe.errors import ClframeError, ConfigError, UnsupportedError
from clframe.nn import BACKBONES, Network
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy
from clframe.training.trainer_arguments import _INSTEAD, ALLOWED, check_arguments
from clframe.training.trainer_options import check_callbacks


def module(**options: Any) -> ContinualModule:
    network = Network(BACKBONES.get("mlp")((4,), width=3))
    return ContinualModule(network, optimizer=partial(torch.optim.SGD, lr=0.1), **options)


def refused(arguments: dict[str, Any], *, engine: str = "trainer") -> str:
    with pytest.raises(ClframeError) as found:
        check_arguments(arguments, engine=engine, fabric=default_fabric("cpu"))
    assert "\n" not in str(found.value)
    return str(found.value)


@pytest.mark.parametrize("name", sorted(_INSTEAD))
def test_an_argument_that_contradicts_the_strategy_is_refused_by_name(name: str) -> None:
    assert refused({"callbacks": [], name: 2}) == f"LightningStrategy.trainer.{name}: found 2; {_INSTEAD[name]}"


def test_arguments_of_the_strategy_and_module_that_the_messages_name_exist() -> None:
    takes = inspect.signature(LightningStrategy).parameters
    for name in ("limit_batches", "train_epochs", "accumulate", "device", "fabric", "eval_every"):
        assert name in takes
        assert any(f"{name}=" in advice for advice in _INSTEAD.values())
    assert "clip" in inspect.signature(ContinualModule).parameters


def test_every_argument_of_lightnings_trainer_is_allowed_or_refused() -> None:
    assert set(inspect.signature(lightning.Trainer).parameters) == {*ALLOWED, *_INSTEAD}


def test_an_unknown_argument_is_named_with_the_nearest_one() -> None:
    assert refused({"log_every_n_step": 3}) == (
        "LightningStrategy.trainer.log_every_n_step: unknown argument of Lightning's Trainer; did you mean "
        "'log_every_n_steps'?"
    )
    assert refused({"quux": 3}).startswith(
        "LightningStrategy.trainer.quux: unknown argument of Lightning's Trainer; arguments are callbacks, logger"
    )


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16", 16])
def test_a_precision_other_than_that_of_evaluation_is_refused(precision: Any) -> None:
    assert "while the strategy evaluates in 32-true; give fabric=Fabric(precision=...)" in refused(
        {"precision": precision}
    )


@pytest.mark.parametrize("precision", ["32-true", "32", 32, None])
def test_the_precision_of_the_strategy_may_be_given_by_each_of_its_names(precision: Any) -> None:
    check_arguments({"precision": precision}, engine="trainer", fabric=default_fabric("cpu"))


def test_trainer_arguments_without_a_trainer_are_refused() -> None:
    message = (
        "LightningStrategy.trainer: found callbacks with engine 'fabric', which has no Trainer; give engine='trainer', "
        "or leave it out"
    )
    assert refused({"callbacks": [callbacks.Timer()]}, engine="fabric") == message
    with pytest.raises(UnsupportedError) as found:
        LightningStrategy(model=module(), trainer={"callbacks": [callbacks.Timer()]}, evaluator=None)
    assert str(found.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "Trainer"}, "engine: found 'Trainer' (text); did you mean 'trainer'? (known: fabric, trainer)"),
        ({"peval_mode": "epok"}, "peval_mode: found 'epok' (text); did you mean 'epoch'?"),
        ({"capture": "yes"}, "capture: found 'yes' (text); give one of auto or true or false"),
    ],
)
def test_words_that_a_strategy_does_not_know_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as found:
        LightningStrategy(model=module(), evaluator=None, **options)
    assert str(found.value).startswith(f"LightningStrategy.{message}")


def test_a_word_that_a_module_does_not_know_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^ContinualModule\.on_nonfinite: found 'stopp' \(text\); did you mean 'stop'"
    ):
        module(on_nonfinite="stopp")


@pytest.mark.parametrize(
    ("callback", "reason"),
    [
        (callbacks.SpikeDetection(), "the loss that a training_step returns, which is none here"),
        (callbacks.WeightAveraging(), "set use_buffers: false, or use EMAWeightAveraging or trainer.ema"),
    ],
    ids=["SpikeDetection", "WeightAveraging"],
)
def test_callbacks_that_fail_in_the_first_steps_are_refused(callback: Any, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"^trainer\.callbacks: {type(callback).__name__} cannot .*{reason}"):
        check_callbacks({"callbacks": [callback]})


def test_callbacks_that_average_weights_only_or_by_their_own_function_are_allowed() -> None:
    allowed = [callbacks.WeightAveraging(use_buffers=False), callbacks.EMAWeightAveraging()]
    check_callbacks({"callbacks": allowed})
