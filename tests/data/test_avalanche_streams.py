"""Avalanche's streams have the same samples, classes and tasks as the benchmark."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from numbered_samples import toy

from clframe.data.avalanche import describe, import_avalanche
from clframe.data.benchmark import class_incremental
from clframe.data.streams import (
    blurry_stream,
    online_stream,
    permuted_stream,
    rotated_stream,
)


def streams_of_all_kinds():
    source = toy(5)
    classes = class_incremental(source, experiences=3, seed=1, validation=0.3)
    tasks = class_incremental(source, experiences=3, seed=1, validation=0.3, task_labels=True)
    return {
        "classes": classes,
        "tasks": tasks,
        "first": class_incremental(source, experiences=2, first=4),
        "permuted": permuted_stream(source, experiences=3, validation=0.3),
        "rotated": rotated_stream(source, experiences=2, angles=(0.0, 30.0)),
        "online": online_stream(classes, size=4),
        "online tasks": online_stream(tasks, size=4),
        "online domains": online_stream(permuted_stream(source, experiences=2), size=5),
        "hidden": online_stream(classes, size=4, boundaries=False),
        "blurry": blurry_stream(classes, size=4),
        "lazy": class_incremental(toy(5, lazy=True), experiences=3),
    }


KINDS = tuple(streams_of_all_kinds())


@pytest.mark.parametrize("kind", KINDS)
def test_avalanche_sees_the_same_samples(kind):
    benchmark = streams_of_all_kinds()[kind]
    streams = benchmark.avalanche.streams
    expected = {"train": benchmark.train, "test": benchmark.test}
    expected |= {"valid": benchmark.validation} if benchmark.validation else {}
    expected |= {"original_train": benchmark.original} if benchmark.online else {}
    assert set(streams) == set(expected)
    for name, parts in expected.items():
        assert len(streams[name]) == len(parts)
        for i, (experience, part) in enumerate(zip(streams[name], parts, strict=True)):
            assert experience.current_experience == i and experience.origin_stream.name == name
            assert list(experience.dataset.targets) == part.y.tolist()
            for k in range(len(part)):
                x, y, task = experience.dataset[k]
                assert torch.equal(x, part.prepare(part.raw(torch.tensor([k])))[0]) and y == int(part.y[k])
                if not benchmark.task_labels:
                    assert task == 0
                elif name != "train" or not benchmark.online:
                    assert task == i


@pytest.mark.parametrize("kind", KINDS)
def test_every_experience_knows_its_classes_the_past_and_what_is_ahead(kind):
    benchmark = streams_of_all_kinds()[kind]
    train, past = benchmark.avalanche.streams["train"], ()
    parts = [set(part.y.tolist()) for part in benchmark.train]
    for i, experience in enumerate(train):
        seen = describe(experience, count=len(train), past=past, samples=None)
        assert set(seen.classes) == parts[i] == experience.classes_in_this_experience
        assert set(seen.past) == set().union(*parts[:i]) == experience.previous_classes
        assert set(seen.classes_so_far) == set().union(*parts[: i + 1]) == experience.classes_seen_so_far
        assert set(seen.ahead) == set(range(5)) - set(seen.classes_so_far) == experience.future_classes
        assert seen.index == i and seen.count == len(train)
        assert torch.equal(seen.samples.y, benchmark.train[i].y)
        past = tuple(sorted({*past, *seen.classes}))
    assert past == tuple(range(5))


@pytest.mark.parametrize("size", [4, 5])
@pytest.mark.parametrize("boundaries", [False, True])
def test_small_experiences_are_those_of_avalanches_splitter(boundaries, size):
    import_avalanche()
    from avalanche.benchmarks import OnlineCLExperience, split_online_stream

    benchmark = online_stream(class_incremental(toy(5), experiences=2), size=size, boundaries=boundaries)
    whole = replace(benchmark, train=benchmark.original, online=None)
    theirs = list(split_online_stream(whole.avalanche.streams["train"], size, shuffle=False))
    ours = benchmark.avalanche.streams["train"]
    assert len(ours) == len(theirs)
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert isinstance(mine, OnlineCLExperience) and mine.access_task_boundaries == boundaries
        assert mine.subexp_size == other.subexp_size and mine.sub_stream_length == other.sub_stream_length
        assert mine.is_first_subexp == other.is_first_subexp
        index = mine.origin_experience.current_experience
        assert mine.is_last_subexp == (i == benchmark.sub_experiences(index)[-1])
        assert list(mine.dataset.targets) == list(other.dataset.targets)
        assert all(torch.equal(mine.dataset[k][0], other.dataset[k][0]) for k in range(len(mine.dataset)))


@pytest.mark.parametrize("size", [None, 4])
def test_models_with_a_head_for_each_task_are_told_the_task(size):
    import_avalanche()
    from avalanche.models import MultiTaskModule
    from avalanche.training import Naive

    class Heads(MultiTaskModule):
        """Remembers which tasks it was asked for."""

        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(9, 5)
            self.asked = []

        def forward(self, x, task_labels):
            self.asked.append(set(task_labels.tolist()))
            return self.linear(x.flatten(1))

    benchmark = class_incremental(toy(5), experiences=3, task_labels=True)
    benchmark = benchmark if size is None else online_stream(benchmark, size=size)
    streams, model = benchmark.avalanche.streams, Heads()
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-9),
        criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=100,
        eval_mb_size=100,
        evaluator=_quiet_evaluator(),
    )
    for i in range(3):
        own = [streams["train"][k] for k in benchmark.sub_experiences(i)]
        assert {(e.task_label, tuple(e.task_labels)) for e in own} == {(i, (i,))}
        model.asked.clear()
        strategy.train(own, eval_streams=[])
        assert model.asked == [{i}] * len(own)
    model.asked.clear()
    strategy.eval(streams["test"])
    assert model.asked == [{0}, {1}, {2}]
    plain = class_incremental(toy(5), experiences=3).avalanche.streams["train"][0]
    assert not hasattr(plain, "task_label") and not hasattr(plain, "task_labels")


def _quiet_evaluator():
    import warnings

    from avalanche.training.plugins import EvaluationPlugin

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No loggers specified")
        return EvaluationPlugin()
