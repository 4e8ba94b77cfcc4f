"""Labels and normalization, as every source uses them."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from clframe.data import Source, TensorSamples
from clframe.data.sources.labels import (
    PUBLISHED,
    check_labels,
    evenly_spaced,
    measure_normalization,
    relabel,
    split_off_test,
    warn_of_duplicates,
)
from clframe.errors import ConfigError, DataError


@pytest.mark.parametrize(
    "given, expected",
    [
        ([3, 0, 7], [3, 0, 7]),
        ([3.0, 0.0], [3, 0]),
        (np.array([[1], [2]], dtype=np.uint8), [1, 2]),
        ([True, False], [1, 0]),
        (["b", "a"], ["b", "a"]),
        (np.array([b"x"]), ["x"]),
    ],
)
def test_labels_are_whole_numbers_or_names(given, expected):
    assert check_labels(given, where="y").tolist() == expected


@pytest.mark.parametrize(
    "given, message",
    [
        ([0, 1.5, 2], r"^y: label 1.5 of sample 1 is not an integer; give integers from 0$"),
        ([0.0, float("nan")], r"^y: label nan of sample 1 is not an integer"),
        ([0.0, float("inf")], r"^y: label inf of sample 1"),
        ([4, 2, -1], r"^y: label -1 of sample 2 is out of range; give integers from 0$"),
        ([[1, 0], [0, 1]], r"^y: found labels of shape \(2, 2\)"),
        (np.array([{}, {}]), r"^y: found labels of type object"),
        ([1j, 2j], r"^y: found labels of type complex128"),
    ],
)
def test_other_labels_are_refused(given, message):
    with pytest.raises(DataError, match=message):
        check_labels(given, where="y")


def test_labels_with_gaps_are_numbered_and_the_mapping_is_kept_and_said(caplog):
    caplog.set_level(logging.INFO, "clframe.data")
    train_y, test_y, names = relabel(np.array([9, 2, 5, 2]), np.array([5, 2, 9]), where="mine")
    assert train_y.tolist() == [2, 0, 1, 0] and test_y.tolist() == [1, 0, 2]
    assert train_y.dtype == torch.int64 and names == ("2", "5", "9")
    assert caplog.messages == ["mine: classes are numbered 2 -> 0, 5 -> 1, 9 -> 2"]


def test_labels_without_gaps_are_not_worth_a_word(caplog):
    caplog.set_level(logging.INFO, "clframe.data")
    assert relabel(np.array([1, 0]), np.array([0, 1]), where="mine")[2] == ("0", "1")
    assert not caplog.messages


def test_names_that_are_numbers_are_ordered_as_numbers():
    assert relabel(np.array(["10", "9", "2"]), np.array(["2", "9", "10"]), where="m")[2] == ("2", "9", "10")
    assert relabel(np.array(["10", "9", "b"]), np.array(["b", "9", "10"]), where="m")[2] == ("10", "9", "b")


@pytest.mark.parametrize(
    "train, test, message",
    [
        ([0, 1], [0, 1, 2], "mine: class '2' has test samples but no training samples"),
        ([0, 1, 3], [0, 1], "mine: class '3' has no test samples"),
        ([], [0], "mine: found no training samples"),
        ([0], [], "mine: found no test samples"),
    ],
)
def test_classes_that_one_part_lacks(train, test, message):
    with pytest.raises(DataError, match=message):
        relabel(np.array(train, dtype=int), np.array(test, dtype=int), where="mine")


def test_split_takes_the_share_of_each_class_and_nothing_twice():
    y = torch.tensor([0] * 10 + [1] * 5 + [2] * 2)
    train, test = split_off_test(y, fraction=0.2, name="mine")
    assert torch.bincount(y[test]).tolist() == [2, 1, 1]  # at least one, never all
    assert torch.bincount(y[train]).tolist() == [8, 4, 1]
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(17))
    assert torch.equal(test, split_off_test(y, fraction=0.2, name="mine")[1])
    train, greedy = split_off_test(y, fraction=0.95, name="mine")
    assert torch.bincount(y[train]).tolist() == [1, 1, 1] and len(greedy) == 14
    others = [split_off_test(y, fraction=0.2, name=name)[1] for name in "abcde"]
    assert any(not torch.equal(test, other) for other in others)


def test_split_of_a_single_sample_and_fractions_that_are_none():
    with pytest.raises(DataError, match="x.npz: class 'b' has one sample, too few to split"):
        split_off_test(torch.tensor([0, 0, 1]), fraction=0.5, name="n", where="x.npz", class_names=("a", "b"))
    for fraction in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="benchmark.test_fraction"):
            split_off_test(torch.tensor([0, 0]), fraction=fraction, name="n")


def test_duplicates_are_counted_and_said(caplog):
    train = torch.arange(12, dtype=torch.uint8).reshape(3, 1, 2, 2)
    test = torch.stack([train[2], train[0] + 100, train[2]])
    assert warn_of_duplicates(train, test, where="mine") == 2
    assert caplog.messages == [
        "mine: 2 of 3 test samples are also in the training data; accuracy will be overestimated"
    ]
    caplog.clear()
    assert warn_of_duplicates(train, test[1:2], where="mine") == 0 and not caplog.messages


@pytest.mark.parametrize("shape", [(7, 3, 5, 4), (1, 1, 2, 2), (9, 1, 3, 3), (5, 6), (3, 2, 4)])
def test_measured_is_mean_and_deviation_by_channel(shape):
    x = torch.randint(0, 256, shape, dtype=torch.uint8)
    mean, std = measure_normalization(x, chunk=30)
    columns = x.double().movedim(1, 0).flatten(1) if len(shape) > 2 else x.double().flatten()[None]
    assert mean == pytest.approx(columns.mean(1).tolist())
    assert std == pytest.approx(columns.std(1, unbiased=False).tolist())


def test_a_constant_channel_is_shifted_and_not_scaled():
    x = torch.full((4, 1, 2, 2), 200, dtype=torch.uint8)
    assert measure_normalization(x) == ((200.0,), (1.0,))


def test_evenly_spaced_covers_both_ends_without_repeats():
    for size, limit in ((5, 8), (8, 8), (9, 8), (1000, 7), (10**7, 8192)):
        index = evenly_spaced(size, limit=limit)
        assert len(set(index.tolist())) == len(index) == min(size, limit)
        assert int(index[0]) == 0 and int(index[-1]) == size - 1


def test_published_constants_are_in_units_of_bytes():
    for name, (mean, std) in PUBLISHED.items():
        assert len(mean) == len(std) in (1, 3), name
        assert all(20 < m < 140 for m in mean) and all(45 < s < 95 for s in std), name
    assert PUBLISHED["tiny_imagenet"] != PUBLISHED["cifar10"]
    assert PUBLISHED["imagenet"][0] == pytest.approx([255 * m for m in (0.485, 0.456, 0.406)])
    assert PUBLISHED["imagenet"][1] == pytest.approx([255 * s for s in (0.229, 0.224, 0.225)])


def test_class_names_name_every_class():
    samples = TensorSamples(torch.zeros(2, 1), torch.tensor([0, 1]))
    assert Source("s", samples, samples, classes=2, class_names=("a", "b")).class_names == ("a", "b")
    with pytest.raises(DataError, match="s: found 3 class names for 2 classes; give one per class"):
        Source("s", samples, samples, classes=2, class_names=("a", "b", "c"))
