"""Arguments and modes of a caller: numbers of a strategy, torch's modes, types of weights, and lazy streams."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.benchmarks import EagerCLStream, split_online_stream
from avalanche.benchmarks.scenarios import CLStream
from lightning import Fabric

import clframe
from clframe.data import Benchmark, TensorSamples, class_incremental
from clframe.data.avalanche import LazySamples
from clframe.data.source import Source
from clframe.errors import ConfigError, UnsupportedError
from clframe.nn import Network
from clframe.nn.backbones import mlp
from clframe.process_state import default_modes
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy


def stream() -> Benchmark:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, 1, 2, 2, generator=generator), torch.arange(24) % 4
    return class_incremental(Source("own", TensorSamples(x, y), TensorSamples(x, y), classes=4), experiences=2)


def strategy(text: str = "naive", *, dtype: torch.dtype = torch.float32, **options: Any) -> LightningStrategy:
    torch.manual_seed(0)
    network = Network(mlp((1, 2, 2), width=4)).to(dtype)
    module = ContinualModule(network, text, optimizer=partial(torch.optim.SGD, lr=0.1), seed=0)
    return LightningStrategy(model=module, evaluator=None, **{"train_mb_size": 4, "train_epochs": 1, **options})


@pytest.mark.parametrize(
    "option, value, advice",
    [
        ("accumulate", 0, "give at least 1"),
        ("accumulate", 1.5, "give a whole number of at least 1"),
        ("train_mb_size", 0, "give at least 1"),
        ("train_mb_size", -1, "give at least 1"),
        ("eval_mb_size", 0, "give at least 1"),
        ("limit_batches", 0, "give at least 1"),
        ("train_epochs", -1, "give at least 0"),
        ("train_epochs", True, "give a whole number of at least 0"),
    ],
)
def test_a_number_with_which_nothing_can_be_trained_is_refused(option: str, value: Any, advice: str) -> None:
    with pytest.raises(ConfigError, match=rf"^LightningStrategy.{option}: found {str(value).lower()}; {advice}$"):
        strategy(**{option: value})


@contextmanager
def double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "double": double, "meta": lambda: torch.device("meta")}


@pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))
def test_torch_has_its_own_modes_inside_and_those_of_the_caller_afterwards(mode: Any) -> None:
    def modes() -> tuple[Any, ...]:
        return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), torch.empty(1).device)

    usual = modes()
    with mode():
        callers = modes()
        assert callers != usual
        with default_modes():
            assert modes() == usual
        assert modes() == callers


@pytest.mark.slow
@pytest.mark.parametrize("mode", [torch.inference_mode, double], ids=["inference", "double"])
def test_a_run_is_the_same_in_any_mode_of_the_caller(mode: Any, tmp_path: Path) -> None:
    options = ["backbone=mlp", "strategy=er", "trainer.fast_dev_run=2", "trainer.figures=none"]
    plain = clframe.run("quickstart", options, output=tmp_path)
    with mode():
        found = clframe.run("quickstart", options, output=tmp_path)
    weights = [clframe.load(result.run_folder).network.state_dict() for result in (plain, found)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_without_gradients_is_refused_by_a_strategy(mode: Any) -> None:
    loop, data = strategy(), stream()
    expected = r"^LightningStrategy.train: found gradients switched off, as inside torch.no_grad\(\)"
    with mode(), pytest.raises(UnsupportedError, match=expected):
        loop.train(data.avalanche.train_stream[0])


def test_weights_of_another_type_than_the_inputs_are_refused() -> None:
    data, loop = stream(), strategy(dtype=torch.float64)
    expected = "LightningStrategy: found a network with weights of torch.float64 for inputs of torch.float32; convert it"
    with pytest.raises(UnsupportedError, match=f"^{re.escape(expected)}"):
        loop.train(data.avalanche.train_stream[0])
    fabric = Fabric(accelerator="cpu", devices=1, precision="64-true")
    loop = strategy(dtype=torch.float64, benchmark=data, fabric=fabric)
    loop.train(data.avalanche.train_stream[0])
    assert {value.dtype for value in loop.module.network.parameters()} == {torch.float64}  # type: ignore[union-attr]


@pytest.mark.parametrize("text", ["er(memory=8) + lwf", "cumulative"])
@pytest.mark.parametrize("boundaries", [False, True])
def test_a_lazy_online_stream_trains_as_the_list_of_its_experiences(text: str, boundaries: bool) -> None:
    def weights(lazy: bool) -> tuple[Any, ...]:
        loop = strategy(text)
        small = split_online_stream(
            stream().avalanche.train_stream, experience_size=4, access_task_boundaries=boundaries, seed=1
        )
        for experience in small if lazy else EagerCLStream("train", list(small)):
            loop.train(experience)
        assert loop.learner is not None and loop.learner.past == (0, 1, 2, 3)
        return loop.clock.train_iterations, *loop.learner.network.parameters()

    (steps, *found), (known_steps, *known) = weights(True), weights(False)
    assert steps == known_steps > 5 and all(torch.equal(a, b) for a, b in zip(found, known, strict=True))


def test_an_experience_for_which_a_buffer_has_no_room_is_read_as_no_samples() -> None:
    samples = LazySamples(stream().avalanche.train_stream[0])
    assert samples.raw(torch.empty(0, dtype=torch.long)).shape == (0, 1, 2, 2)
    assert samples.raw(torch.tensor([1, 0])).shape == (2, 1, 2, 2)


def test_components_see_the_number_of_experiences_of_a_lazy_stream() -> None:
    loop = strategy()
    small = split_online_stream(stream().avalanche.train_stream, experience_size=4, seed=1)
    assert [len(loop.stream_of(experience)) for experience in small] == [6] * 6


def test_a_stream_that_can_be_read_only_once_is_refused() -> None:
    once = CLStream("once", iter(list(stream().avalanche.train_stream)))
    with pytest.raises(UnsupportedError, match=r"^LightningStrategy: found the stream 'once' of an iterator, which can"):
        strategy().train(next(iter(once)))
