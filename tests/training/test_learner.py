"""The learner: what hooks receive, and what becomes of the state that they return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from clframe.core import Component, Experience, compose
from clframe.data.samples import TensorSamples
from clframe.errors import ComposeError
from clframe.nn import Network
from clframe.nn.backbones import mlp
from clframe.training.learner import Learner


@dataclass(frozen=True, kw_only=True)
class Counts(Component):
    """Counts updates in a new state each time, and notes what its hooks receive."""

    name: ClassVar[str] = "counts"
    slots: ClassVar[frozenset[str]] = frozenset({"batch"})

    def init_state(self, network: Network) -> Any:
        return {"steps": 0, "drawn": (), "networks": ()}

    def make_batch(self, batch: Any, context: Any, state: Any, network: Network) -> Any:
        assert not network.training or network.classes == 2
        batch.extras = {"network": network, "steps": torch.tensor(state["steps"])}
        return batch

    def after_step(self, network: Network, step: Any, state: Any) -> Any:
        drawn = float(torch.rand((), generator=step.context.generator))
        return {"steps": state["steps"] + 1, "drawn": (*state["drawn"], drawn), "networks": (step.network, network)}


@dataclass(frozen=True, kw_only=True)
class Draws(Component):
    """Draws from the generator that its hook receives."""

    name: ClassVar[str] = "draws"

    def after_step(self, network: Network, step: Any, state: Any) -> Any:
        torch.rand(3, generator=step.context.generator)
        return state


@dataclass(frozen=True, kw_only=True)
class Forgets(Component):
    """Returns nothing."""

    name: ClassVar[str] = "forgets"

    def after_step(self, network: Network, step: Any, state: Any) -> Any:
        pass


def train(*components: Component, steps: int = 3) -> Learner:
    torch.manual_seed(0)
    learner = Learner(Network(mlp((1, 2, 2), width=5)), compose(*components), seed=3)
    samples = TensorSamples(torch.rand(4, 1, 2, 2), torch.arange(4) % 2)
    learner.begin(Experience(0, 1, (0, 1), (), (), samples), classes=(0, 1), epochs=1)
    learner.before_epoch(0)
    for _ in range(steps):
        batch = learner.make_batch(samples.x, samples.y)
        learner.loss(batch, learner.network(batch.x)).sum().backward()
        learner.after_step()
    return learner


def test_the_state_that_after_step_returns_is_what_the_next_hook_receives() -> None:
    learner = train(Counts())
    state = learner.state["counts"]
    assert state["steps"] == len(state["drawn"]) == 3
    assert state["networks"] == (learner.network, learner.network)
    batch = learner.make_batch(torch.rand(1, 1, 2, 2), torch.tensor([0]))
    assert batch.extras["network"] is learner.network and batch.extras["steps"] == 3


def test_each_component_draws_from_its_own_generator_after_a_step() -> None:
    alone, joined = train(Counts()), train(Counts(), Draws())
    assert alone.state["counts"]["drawn"] == joined.state["counts"]["drawn"]


def test_an_after_step_without_a_state_is_refused() -> None:
    with pytest.raises(ComposeError, match=r"'forgets': after_step\(\) returned None; return the state"):
        train(Forgets())
