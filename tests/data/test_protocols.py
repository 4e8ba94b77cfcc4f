"""Splits into experiences and held-out samples: none is lost or repeated."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from numbered_samples import ids, label_of, toy

from clframe.data.benchmark import class_incremental
from clframe.data.protocol import ICARL_ORDER, class_order, classes_per_experience, hold_out
from clframe.errors import ConfigError, DataError


@pytest.mark.parametrize("classes", [1, 2, 7, 10, 12])
def test_deals_are_even_and_complete(classes):
    for experiences in range(1, classes + 1):
        dealt = classes_per_experience(classes, experiences)
        assert len(dealt) == experiences and sum(dealt) == classes
        assert max(dealt) - min(dealt) <= 1 and list(dealt) == sorted(dealt, reverse=True)
        for first in range(1, classes - experiences + 2):
            if experiences == 1 and first < classes:
                continue
            larger = classes_per_experience(classes, experiences, first=first)
            assert larger[0] == first and len(larger) == experiences and sum(larger) == classes
            assert larger[1:] == (classes_per_experience(classes - first, experiences - 1) if experiences > 1 else ())


def test_the_usual_splits():
    assert classes_per_experience(10, 5) == (2,) * 5 and classes_per_experience(100, 10) == (10,) * 10 and classes_per_experience(10, 3) == (4, 3, 3)
    assert classes_per_experience(100, 11, first=50) == (50, *(5,) * 10) and classes_per_experience(100, 6, first=50) == (50, *(10,) * 5)
    assert classes_per_experience(10, 4, first=2) == (2, 3, 3, 2)
    assert classes_per_experience(10, 5, counts=(1, 7, 2)) == (1, 7, 2)
    assert classes_per_experience(4, 1, first=4) == classes_per_experience(4, 9, counts=[4]) == (4,)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"experiences": 0}, "benchmark.experiences: found 0; give at least 1"),
        ({"experiences": 11}, "benchmark.experiences: found 11 for 10 classes; give at most 10"),
        ({"experiences": 5, "first": 0}, "benchmark.first: found 0 for 10 classes in 5 experiences; give 1 to 6"),
        ({"experiences": 5, "first": 7}, "benchmark.first: found 7 .* give 1 to 6"),
        ({"experiences": 1, "first": 7}, "benchmark.first: found 7 .* give 10$"),
        ({"experiences": 10, "first": 2}, "benchmark.first: found 2 .* give 1$"),
        ({"experiences": 3, "counts": (4, 4)}, "benchmark.counts: found 2 counts with sum 8 for 10 classes"),
        ({"experiences": 3, "counts": (10, 0)}, "benchmark.counts: found 0; give every experience at least 1"),
        ({"experiences": 3, "counts": (11, -1)}, "benchmark.counts: found -1; give every experience at least 1"),
        ({"experiences": 2, "counts": (5, 5), "first": 5}, "benchmark.first: found 5 together with benchmark.counts"),
    ],
)
def test_deals_that_do_not_add_up(options, message):
    with pytest.raises(ConfigError, match=message):
        classes_per_experience(10, **options)


def test_the_order_of_icarl_is_numpys_permutation_of_seed_1993():
    assert tuple(np.random.RandomState(1993).permutation(100).tolist()) == ICARL_ORDER
    assert class_order(100, order="icarl", seed=7) == ICARL_ORDER
    assert ICARL_ORDER[:5] == (68, 56, 78, 8, 23) and ICARL_ORDER[-3:] == (49, 57, 33)
    with pytest.raises(ConfigError, match="found 'icarl', which orders 100 classes, for 10 classes; use 'seeded'"):
        class_order(10, order="icarl", seed=0)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"experiences": 1},
        {"experiences": 3},
        {"experiences": 7, "order": "sorted"},
        {"experiences": 3, "first": 4},
        {"experiences": 2, "counts": (1, 4, 2), "order": (6, 5, 4, 3, 2, 1, 0)},
        {"experiences": 3, "validation": 0.3},
        {"experiences": 4, "validation": 0.3, "first": 1, "task_labels": True},
    ],
)
def test_every_sample_has_one_place_and_its_own_label(options, lazy):
    source = toy(7, lazy=lazy)
    benchmark = class_incremental(source, seed=3, **options)
    dealt = classes_per_experience(7, options["experiences"], first=options.get("first"), counts=options.get("counts", ()))
    assert tuple(map(len, benchmark.classes)) == dealt and len(benchmark) == len(dealt)
    assert [c for classes in benchmark.classes for c in classes] == list(range(7))
    original = label_of(source)
    for whole, parts in (
        (source.train, [*benchmark.train, *benchmark.validation]),
        (source.test, benchmark.test),
    ):
        found = [i for part in parts for i in ids(part)]
        assert sorted(found) == sorted(ids(whole)) and len(set(found)) == len(found)
        labels = [benchmark.class_order[int(c)] for part in parts for c in part.y]
        assert labels == [original[i] for i in found]
    for part, classes in zip(benchmark.train, benchmark.classes, strict=True):
        assert set(part.y.tolist()) == set(classes)
    again = class_incremental(source, seed=3, **options)
    assert again.class_order == benchmark.class_order
    assert [ids(part) for part in again.train] == [ids(part) for part in benchmark.train]


def test_uneven_parts_are_said(caplog):
    with caplog.at_level(logging.INFO, logger="clframe"):
        class_incremental(toy(10), experiences=3)
        assert caplog.messages == ["toy: 10 classes in 3 experiences = 4 + 3 + 3"]
        caplog.clear()
        class_incremental(toy(10), experiences=3, first=4)  # asked for, and the rest is even
        class_incremental(toy(10), experiences=3, counts=(1, 2, 7))
        assert not caplog.messages


@pytest.mark.parametrize("share, counts", [(0.0, (0, 0, 0, 0)), (0.01, (1, 1, 1, 1)), (0.25, (1, 1, 1, 2)),
                                           (0.5, (2, 2, 3, 3)), (0.99, (2, 3, 4, 5))])  # fmt: skip
def test_each_class_gives_its_share(share, counts):
    y = torch.tensor([c for c in range(4) for _ in range(3 + c)])[torch.randperm(18)]
    train, held = hold_out(y, share, seed=0)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(18))
    assert tuple(torch.bincount(y[held], minlength=4).tolist()) == counts
    assert train.tolist() == sorted(train.tolist()) and held.tolist() == sorted(held.tolist())


def test_validation_data_depends_on_the_seed_alone():
    source = toy(6)

    def held(**options):
        return {i for part in class_incremental(source, validation=0.4, **options).validation for i in ids(part)}

    first = held(experiences=3, seed=1)
    assert first == held(experiences=2, order="sorted", seed=1) == held(experiences=6, seed=1)
    assert first != held(experiences=3, seed=2)
    assert first <= set(ids(source.train)) and not first & set(ids(source.test))


def test_impossible_validation():
    lonely = torch.tensor([0, 0, 3])
    assert [len(part) for part in hold_out(lonely, 0.0, seed=0)] == [3, 0]
    with pytest.raises(DataError, match="benchmark.validation: found 1 training sample of class 3"):
        hold_out(lonely, 0.1, seed=0)
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="benchmark.validation: found"):
            hold_out(lonely, share, seed=0)


def test_evaluating_on_validation_data():
    benchmark = class_incremental(toy(4), experiences=2, validation=0.3)
    assert benchmark.evaluation is benchmark.test
    assert benchmark.evaluation_stream is benchmark.avalanche.streams["test"]
    chosen = replace(benchmark, evaluate="validation")
    assert chosen.evaluation is benchmark.validation
    assert chosen.evaluation_stream is chosen.avalanche.streams["valid"]
    with pytest.raises(ConfigError, match="benchmark.evaluate: found 'validation' without validation data"):
        replace(class_incremental(toy(4), experiences=2), evaluate="validation")
