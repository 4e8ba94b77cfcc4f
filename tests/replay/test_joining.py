"""How a memory joins training, whoever keeps it."""

from __future__ import annotations

from math import ceil

import pytest
import torch

from clframe.core import Batch, Experience, StepContext
from clframe.data import TensorSamples
from clframe.errors import ConfigError
from clframe.replay.buffers import MemoryPolicy
from clframe.replay.joining import Replay
from clframe.seeding import generator_for


def context(index, classes, per_class=4):
    y = torch.tensor([c for c in classes for _ in range(per_class)])
    part = TensorSamples(torch.arange(len(y)).float().reshape(-1, 1) + 100 * index, y, mean=(1.0,), std=(4.0,))
    return StepContext(Experience(index, 5, tuple(classes), (), (), part), 0, 1, generator_for(0, index))


def kept(replay):
    return replay.renewed(context(0, (0, 1)), replay.empty(), features=lambda index: torch.zeros(len(index), 1))


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("ratio", [0.3, 1.0, 2.5])
def test_how_many_are_replayed(size, ratio):
    assert Replay(owner="er", memory=9, how="extra", ratio=ratio).count(size) == ceil(ratio * size)
    assert Replay(owner="er", memory=9, how="half", ratio=ratio).count(size) == size
    assert Replay(owner="er", memory=9, how="fixed", ratio=ratio, replayed=7).count(size) == 7


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
    replay, new = Replay(owner="er", memory=6, how=how), context(1, (2,)).experience.samples
    assert replay.hooks == hooks and replay.training_set(new, 5, replay.empty()) == (new, 5)
    pooled, found = replay.training_set(new, 5, kept(replay))
    assert (len(pooled), found) == (length, size)


@pytest.mark.parametrize("scale", [1.0, 0.0, 0.5])
def test_samples_join_where_they_are_told_to(scale):
    replay, now = Replay(owner="er", memory=6, scale=scale), context(1, (2,))
    state = kept(replay)
    batch = Batch(torch.zeros(2, 1), torch.tensor([2, 2]))
    assert replay.make_batch(batch, now, replay.empty()) is batch
    index = torch.tensor([3, 0, 3])
    joined = replay.joined(batch, index, now, state)
    assert torch.equal(joined.x[2:], (state["x"][index] - 1) / 4) and torch.equal(joined.y[2:], state["y"][index])
    assert (joined.weight_B is None) if scale == 1 else (joined.weight_B.tolist() == [1.0] * 2 + [scale] * 3)
    drawn = replay.drawn(batch, context(1, (2,)), state)
    again = replay.make_batch(batch, context(1, (2,)), state)
    assert torch.equal(again.y[2:], state["y"][drawn])


def test_a_memory_keeps_what_else_it_is_told_to():
    replay = Replay(owner="der", memory=5, selection="reservoir")
    features = lambda index: torch.zeros(len(index), 1)  # noqa: E731
    state = replay.renewed(context(0, (0, 1)), replay.empty(), features=features, targets=lambda i: {"twice": 2 * i})
    assert torch.equal(state["twice"], 2 * state["x"].flatten().long()) and len(state["twice"]) == 5
    assert replay.policy == MemoryPolicy(5, "total", "reservoir")


def test_messages_name_the_owner():
    with pytest.raises(ConfigError, match=r"^components.der.ratio: found 0; give a number above 0, at most 1000$"):
        Replay(owner="der", memory=5, ratio=0)
    with pytest.raises(ConfigError, match=r"^components.der.memory: found 5 for 6 classes; give at least 6"):
        Replay(owner="der", memory=5, selection="reservoir").check(classes=6)
    Replay(owner="der", memory=5).check(classes=5)
    Replay(owner="der", memory=2, budget="per_class").check(classes=6)
    assert Replay(owner="er", memory=5).by_class and not Replay(owner="er", memory=5, selection="random").by_class


@pytest.mark.parametrize("draws", [1, 2, 3])
def test_a_batch_brings_what_is_stored_with_its_first_draw(draws):
    replay, now = Replay(owner="der", memory=6), context(1, (2,))
    state = {**kept(replay), "number": torch.arange(6)}
    batch = Batch(torch.zeros(2, 1), torch.tensor([2, 2]))
    joined = replay.make_batch(batch, now, state, stored=("number",), draws=draws)
    assert len(joined.y) == 2 + 2 * draws and joined.extras["number"].shape == (2,)
    assert torch.equal(joined.y[2:4], state["y"][joined.extras["number"]])
    alike = context(1, (2,))
    index = torch.cat([replay.drawn(batch, alike, state) for _ in range(draws)])
    assert torch.equal(joined.y[2:], state["y"][index]) and torch.equal(joined.extras["number"], index[:2])
    assert replay.make_batch(batch, context(1, (2,)), state).extras == {}


def test_hooks_that_a_way_of_joining_does_without_are_left_out():
    hooks = ("init_state", "training_set", "make_batch", "losses")
    found = {how: Replay(owner="er", memory=6, how=how).acting(hooks) for how in ("extra", "half", "concatenate")}
    assert found == {"extra": ("init_state", "make_batch", "losses"), "half": hooks, "concatenate": ("init_state", "training_set", "losses")}
