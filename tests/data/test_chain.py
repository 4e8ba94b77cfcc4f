"""Later data of a stream: classes are matched by name, and one scale holds for all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from extended_runs import part_of_digits

import clframe
from clframe.data import digits
from clframe.data.chain import Stored, extend_benchmark, match_classes
from clframe.errors import ConfigError, DataError


def test_classes_are_matched_by_name() -> None:
    assert match_classes(["a", "b"], ["c", "b", "d"], where="x") == (2, 1, 3)
    assert match_classes(["0", "1"], ["1", "cat"], where="x") == (1, 2)
    with pytest.raises(DataError, match=r"^x: found the class 'Cat', but the run knows 'cat'; name it 'cat' if"):
        match_classes(["cat"], ["Cat"], where="x")
    with pytest.raises(DataError, match=r"^x: found the class '3', a number, but the classes of the run have names"):
        match_classes(["cat"], ["3"], where="x")


def test_held_out_samples_are_those_of_one_source() -> None:
    whole = clframe.class_incremental(digits(), experiences=2, order="sorted", validation=0.2, seed=3)
    first = clframe.class_incremental(
        part_of_digits(only=(0, 1, 2, 3, 4)), experiences=1, order="sorted", validation=0.2, seed=3
    )
    joined = extend_benchmark(first, part_of_digits(only=(5, 6, 7, 8, 9)), validation=0.2, seed=3)
    for ours, theirs in zip(joined.validation, whole.validation, strict=True):
        assert torch.equal(ours.x, theirs.x) and torch.equal(ours.y, theirs.y)  # type: ignore[union-attr]


def test_later_data_are_normalized_as_the_first() -> None:
    first = clframe.class_incremental(part_of_digits(only=(0, 1)), experiences=1)
    source = part_of_digits(only=(2,))
    other = {"mean": (1.0,), "std": (2.0,)}
    source = replace(source, train=replace(source.train, **other), test=replace(source.test, **other))
    joined = extend_benchmark(first, source)
    assert joined.train[1].mean == joined.train[0].mean == Stored.of(first).mean == (4.884,)
    with pytest.raises(ConfigError, match=r"^benchmark.validation: found 0.1, unlike the data before; give 0"):
        extend_benchmark(first, source, validation=0.1)
