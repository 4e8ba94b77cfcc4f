"""A replay buffer with a held-out part."""

from __future__ import annotations

import io
from collections import Counter

import pytest
import torch

from clframe.core import Experience
from clframe.data import TensorSamples
from clframe.replay.buffers import BufferSamples, SplitMemory
from clframe.seeding import generator_for


def experience(index, sizes, past=()):
    """Images with a unique first pixel."""
    y = torch.tensor([c for c, n in sizes.items() for _ in range(n)], dtype=torch.long)
    x = torch.rand(len(y), 1, 2, 2)
    x[:, 0, 0, 0] = 1000 * index + torch.arange(len(y))
    return Experience(index, 9, tuple(sizes), tuple(past), (), TensorSamples(x, y, mean=(1.0,), std=(2.0,)))


def numbers(x):
    return x[:, 0, 0, 0].tolist()


def no_features(samples):
    def features(index):
        raise AssertionError("a balanced memory reads no features")

    return features


def run(memory, stream, features=no_features):
    """The training samples of each experience, and the buffer after it."""
    state, past, steps = memory.empty(), (), []
    for index, sizes in enumerate(stream):
        now = experience(index, sizes, past)
        pool = memory.training_pool(now.samples, state)
        before = state
        state = memory.update(state, now, generator=generator_for(0, index), features=features)
        steps.append((now, pool, before, state))
        past = (*past, *sizes)
    return steps


STREAM = [{0: 40, 1: 40}, {2: 40}, {3: 40, 4: 3}, {0: 5}]


@pytest.mark.parametrize("budget, size", [("total", 40), ("total", 7), ("per_class", 12), ("per_class", 1)])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_nothing_held_out_is_ever_trained_on(budget, size, share):
    trained, ever_held = set(), set()
    memory = SplitMemory(size, budget, "balanced", share)
    for _, pool, _, state in run(memory, STREAM):
        trained |= set(numbers(pool.x))
        ever_held |= set(numbers(state["held"]["x"]))
        assert len(set(numbers(pool.x))) == len(pool)
        kept = len(state["y"]) + len(state["held"]["y"])
        classes = len(set(state["owner"]))
        assert kept <= (size if budget == "total" else size * classes)
        assert set(state["y"].tolist()) == set(state["owner"])  # every class can be replayed
    assert not trained & ever_held and (ever_held or size == 1)


def test_sizes_of_both_parts():
    steps = run(SplitMemory(40, "total", "balanced", 0.1), STREAM[:2])
    counts = [(Counter(s["y"].tolist()), Counter(s["held"]["y"].tolist())) for *_, s in steps]
    assert counts == [({0: 18, 1: 18}, {0: 2, 1: 2}), ({0: 11, 1: 11, 2: 11}, {0: 2, 1: 2, 2: 2})]
    (_, first, _, _), (_, second, before, _) = steps
    assert Counter(first.y.tolist()) == {0: 38, 1: 38}
    assert Counter(second.y.tolist()) == {2: 38, 0: 18, 1: 18}
    assert set(numbers(before["x"])) < set(numbers(second.x))


@pytest.mark.parametrize("room, held", [(1, 0), (2, 1), (10, 1), (11, 1), (12, 2), (20, 2), (200, 20)])
def test_one_of_two_is_held_out_and_never_the_only_one(room, held):
    assert SplitMemory(room, "per_class", "balanced", 0.1).capacities([0, 1]) == (room - held, held)


def test_a_class_with_one_sample_keeps_it_for_training():
    (_, pool, _, state), *_ = run(SplitMemory(40, "total", "balanced", 0.5), [{0: 1, 1: 8}])
    assert Counter(pool.y.tolist())[0] == 1 and 0 not in state["held"]["y"]


def test_a_class_smaller_than_its_room_gives_up_a_share_of_what_it_has():
    (_, pool, _, state), *_ = run(SplitMemory(2000, "total", "balanced", 0.1), [{0: 41, 1: 12}])
    assert Counter(pool.y.tolist()) == {0: 37, 1: 10} and Counter(state["held"]["y"].tolist()) == {0: 4, 1: 2}


def test_the_split_is_a_function_of_the_memory():
    memory = SplitMemory(40, "total", "balanced", 0.2)
    y = torch.arange(3).repeat(30)
    assert torch.equal(memory.held_out(y, memory.empty()), memory.held_out(y, memory.empty()))
    other = memory.held_out(y, {**memory.empty(), "seed": 1})
    assert not torch.equal(other, memory.held_out(y, memory.empty()))
    assert Counter(y[other].tolist()) == {0: 3, 1: 3, 2: 3}


def test_herding_reads_the_samples_that_were_trained_on():
    def features(samples):
        return lambda index: torch.stack([samples.raw(index)[:, 0, 0, 0], torch.ones(len(index))], 1)

    (_, pool, _, state), *_ = run(SplitMemory(10, "total", "herding", 0.2), [{0: 9, 1: 9}], features)
    assert set(numbers(state["x"])) <= set(numbers(pool.x)) and len(state["y"]) == 8


def test_it_goes_on_from_a_checkpoint():
    memory = SplitMemory(12, "total", "balanced", 0.3)
    now, _, before, after = run(memory, STREAM[:2])[1]
    file = io.BytesIO()
    torch.save(before, file)
    file.seek(0)
    again = memory.update(
        torch.load(file, weights_only=True), now, generator=generator_for(0, 1), features=no_features
    )
    assert torch.equal(again["x"], after["x"]) and torch.equal(again["held"]["x"], after["held"]["x"])
    assert again["seed"] == after["seed"] != before["seed"]


def test_kept_samples_are_read_like_new_ones():
    now, _, _, state = run(SplitMemory(10, "total", "balanced", 0.2), STREAM[:1])[0]
    kept = BufferSamples(state["held"], now.samples)
    index = torch.tensor([1, 0])
    assert len(kept) == 2 and kept.y.tolist() == [0, 1]
    assert torch.equal(kept.prepare(kept.raw(index)), (state["held"]["x"][index] - 1) / 2)
