"""Options of components with a replay buffer, and how replayed samples join training."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import pytest
import torch

from clframe.core import COMPONENTS, Batch, Experience, StepContext
from clframe.data import TensorSamples
from clframe.errors import ConfigError
from clframe.replay.buffers import MemoryPolicy
from clframe.replay.joining import BufferComponent, ReplayComponent
from clframe.seeding import generator_for


@dataclass(frozen=True, kw_only=True)
class Replay(ReplayComponent):
    """A component with nothing but the shared options, and options for the properties that subclasses override."""

    name: ClassVar[str] = "der"
    scale: float = 0.0
    draws: int = 1

    @property
    def replay_weight(self) -> float:
        return self.scale

    @property
    def draws_per_batch(self) -> int:
        return self.draws


@dataclass(frozen=True, kw_only=True)
class WithLogits(Replay):
    stores_logits: ClassVar[bool] = True


def context(index, classes, per_class=4):
    y = torch.tensor([c for c in classes for _ in range(per_class)])
    part = TensorSamples(torch.arange(len(y)).float().reshape(-1, 1) + 100 * index, y, mean=(1.0,), std=(4.0,))
    return StepContext(Experience(index, 5, tuple(classes), (), (), part), 0, 1, generator_for(0, index))


def filled(replay):
    found = replay.policy.update(
        replay.policy.empty(), context(0, (0, 1)).experience, generator=context(0, (0, 1)).generator,
        features=lambda index: torch.zeros(len(index), 1),
    )  # fmt: skip
    return found


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("ratio", [0.3, 1.0, 2.5])
def test_how_many_are_replayed(size, ratio):
    assert Replay(memory=9, replay="extra", ratio=ratio).replay_count(size) == ceil(ratio * size)
    assert Replay(memory=9, replay="half", ratio=ratio).replay_count(size) == size
    assert Replay(memory=9, replay="fixed", ratio=ratio, replayed=7).replay_count(size) == 7


@pytest.mark.parametrize(
    "how, hooks, length, size",
    [
        ("extra", {"make_batch"}, 4, 5),
        ("fixed", {"make_batch"}, 4, 5),
        ("half", {"training_set", "make_batch"}, 4, 3),
        ("concatenate", {"training_set"}, 10, 5),
    ],
)
def test_what_an_epoch_runs_over(how, hooks, length, size):
    replay, new = Replay(memory=6, replay=how), context(1, (2,)).experience.samples
    assert {"training_set", "make_batch"} & set(replay.acts_at()) == hooks
    assert replay.training_set(new, 5, replay.policy.empty()) == (new, 5)
    pooled, found = replay.training_set(new, 5, filled(replay))
    assert (len(pooled), found) == (length, size)


@pytest.mark.parametrize("scale", [1.0, 0.0, 0.5])
def test_samples_join_where_they_are_told_to(scale):
    replay, now = Replay(memory=6, scale=scale), context(1, (2,))
    state = filled(replay)
    batch = Batch(torch.zeros(2, 1), torch.tensor([2, 2]))
    assert replay.make_batch(batch, now, replay.policy.empty(), None) is batch
    index = torch.tensor([3, 0, 3])
    joined = replay.join(batch, index, now, state)
    assert torch.equal(joined.x[2:], (state["x"][index] - 1) / 4) and torch.equal(joined.y[2:], state["y"][index])
    assert (joined.weight_B is None) if scale == 1 else (joined.weight_B.tolist() == [1.0] * 2 + [scale] * 3)
    index = replay.draw(batch, context(1, (2,)), state)
    again = replay.make_batch(batch, context(1, (2,)), state, None)
    assert torch.equal(again.y[2:], state["y"][index])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"memory": 0}, r"^components.der.memory: found 0; give at least 1 sample$"),
        ({"ratio": 0}, r"^components.der.ratio: found 0\.0; give a number above 0, at most 1000$"),
        ({"ratio": float("nan")}, r"^components.der.ratio: found nan"),
        ({"replayed": 0}, r"^components.der.replayed: found 0; give at least 1 sample$"),
        ({"budget": "per_class", "selection": "random"}, r"^components.der.budget: found per_class with selection rand"),
        ({"update": "step"}, r"^components.der.update: found step with selection balanced"),
        ({"update": "step", "selection": "reservoir", "replay": "concatenate"}, "^components.der.update: found step with"),
        ({"batches": "apart", "replay": "concatenate"}, "^components.der.batches: found apart with replay concatenate"),
    ],
)
def test_options_that_cannot_be_name_the_component(options, message):
    with pytest.raises(ConfigError, match=message):
        Replay(**options)


def test_a_total_budget_needs_a_sample_of_each_class():
    with pytest.raises(ConfigError, match=r"^components.der.memory: found 5 for 6 classes; give at least 6"):
        Replay(memory=5, selection="reservoir").check(classes=6)
    Replay(memory=5).check(classes=5)
    Replay(memory=2, budget="per_class").check(classes=6)
    assert Replay(memory=5, selection="reservoir").policy == MemoryPolicy(5, "total", "reservoir")
    with pytest.raises(ConfigError, match=r"^MemoryPolicy\.selection: found 'herdng' \(text\); did you mean 'herding'\?"):
        MemoryPolicy(5, "total", "herdng")


@pytest.mark.parametrize("name", ["er", "der", "derpp", "agem", "bic"])
def test_shared_options_are_stated_once(name):
    """Strategies state other defaults, but inherit options, checks and the policy that fills the buffer."""
    component = COMPONENTS.get(name)
    assert issubclass(component, BufferComponent) and component.policy is BufferComponent.policy
    with pytest.raises(ConfigError, match=f"^components.{name}.memory: found 0; give at least 1 sample$"):
        component(memory=0)


@pytest.mark.parametrize("draws", [1, 2, 3])
def test_a_batch_has_the_stored_logits_of_its_first_draw(draws):
    replay, now = WithLogits(memory=6, replay="fixed", replayed=2, draws=draws), context(1, (2,))
    state = {**filled(replay), "logits": torch.arange(6.0).reshape(6, 1, 1)}
    batch = Batch(torch.zeros(2, 1), torch.tensor([2, 2]))
    joined = replay.make_batch(batch, now, state, None)
    first = joined.extras["logits"].flatten().long()
    assert len(joined.y) == 2 + 2 * draws and first.shape == (2,)
    assert torch.equal(joined.y[2:4], state["y"][first])
    same = context(1, (2,))
    index = torch.cat([replay.draw(batch, same, state) for _ in range(draws)])
    assert torch.equal(joined.y[2:], state["y"][index]) and torch.equal(first, index[:2])
    assert Replay(memory=6).make_batch(batch, context(1, (2,)), state, None).extras == {}


def test_hooks_that_the_options_do_not_need_are_left_out():
    found = {how: set(Replay(memory=6, replay=how).acts_at()) for how in ("extra", "half", "concatenate")}
    both = {"init_state", "training_set", "make_batch", "after_experience"}
    assert found == {"extra": both - {"training_set"}, "half": both, "concatenate": both - {"make_batch"}}
    stepwise = Replay(memory=6, replay="half", update="step", selection="reservoir")
    assert set(stepwise.acts_at()) == both - {"after_experience"} | {"after_step"}
