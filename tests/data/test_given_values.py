"""Samples and sources made in Python: values that could not be trained on are refused, equal ones are converted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from clframe.data import SOURCES, Source, TensorSamples, class_incremental
from clframe.data.lazy import DatasetSamples
from clframe.data.streams import permuted_stream
from clframe.errors import ConfigError, DataError
from clframe.stream import build_source

X, Y = torch.randn(12, 3, 4, 4), torch.arange(12) % 3


def source(**changes):
    parts = {"name": "own", "train": TensorSamples(X, Y), "test": TensorSamples(X, Y), "classes": 3}
    return Source(**{**parts, **changes})


def test_arrays_of_numpy_are_the_same_samples_as_tensors():
    found = TensorSamples(X.numpy(), Y.numpy().astype(np.int32), (0.5,), (2.0,))
    assert found.y.dtype == torch.int64 and torch.equal(found.y, Y)
    (x, y), = found.batches(torch.arange(12), 12)
    assert torch.allclose(x, (X - 0.5) / 2) and torch.equal(y, Y)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int16])
def test_labels_of_any_type_of_whole_numbers_are_int64(dtype):
    assert TensorSamples(X, Y.to(dtype)).y.dtype == DatasetSamples.of(X, Y.to(dtype)).y.dtype == torch.int64


def test_inputs_that_require_a_gradient_are_stored_without():
    assert not TensorSamples(X.clone().requires_grad_(), Y).x.requires_grad


@pytest.mark.parametrize(
    "x, y, mean, std, message",
    [
        (X, Y.float(), (0.0,), (1.0,), "found labels of type torch.float32; give whole numbers, as by y.long()"),
        (X, Y > 0, (0.0,), (1.0,), "found labels of type torch.bool; give whole numbers, as by y.long()"),
        (X, Y[:, None], (0.0,), (1.0,), "found labels of shape [12, 1]; give one class for each sample, as [12]"),
        (X, Y.tolist(), (0.0,), (1.0,), "found a list as labels; give a tensor or an array, with a row for each sample"),
        (X.tolist(), Y, (0.0,), (1.0,), "found a list as inputs; give a tensor or an array, with a row for each sample"),
        (torch.tensor(1.0), Y, (0.0,), (1.0,), "found a single number as inputs; give a tensor or an array, with a row"),
        (np.array([None] * 12), Y, (0.0,), (1.0,), "found inputs in an array that torch cannot read"),
        (X, Y, (0.0,), (0.0,), "found the standard deviation 0.0; give finite numbers above 0"),
        (X, Y, (0.0,), (float("nan"),), "found the standard deviation nan; give finite numbers above 0"),
        (X, Y, (float("inf"),), (1.0,), "found the mean inf; give finite numbers"),
        (X, Y, (0.0,) * 2, (1.0,) * 2, "found 2 mean(s) and 2 standard deviation(s) for inputs with 3 channel(s); give 1 or 3"),
        (X.to(torch.complex64), Y, (0.0,), (1.0,), "found complex numbers as inputs; give a dense tensor of whole or real"),
        (X.to_sparse(), Y, (0.0,), (1.0,), "found a tensor of layout torch.sparse_coo as inputs; give a dense tensor"),
        (X.double() * 1e300, Y, (0.0,), (1.0,), "found inputs that overflow float32, in which batches are; scale them"),
        (X, Y, 0.5, (1.0,), "found 0.5 as mean; give a tuple of numbers such as (0.5,)"),
        (X, Y, (0.0,), ("1",), "found ['1'] (a list) as standard deviation; give a tuple of numbers such as (0.5,)"),
        (X, Y, (0.0,), (1.0,) * 3, "found 1 mean(s) and 3 standard deviation(s) for inputs with 3 channel(s); give 1 or 3"),
    ],
)
def test_samples_that_could_not_be_trained_on_are_refused(x, y, mean, std, message):
    with pytest.raises(DataError) as caught:
        TensorSamples(x, y, mean, std)
    assert str(caught.value).startswith(f"data: {message}")


def test_arrays_that_tensors_cannot_share_are_copied():
    reverse, big = X.numpy()[::-1], X.numpy().astype(">f8")
    assert torch.equal(TensorSamples(reverse, Y).x, X.flip(0))
    assert torch.equal(TensorSamples(big, Y.numpy()[::-1]).x, X.double())


@pytest.mark.parametrize("change", [{"augment": ("flip",)}, {"augment": 3}, {"view": 3}])
def test_augmentations_and_views_are_functions(change):
    with pytest.raises(DataError, match=r"^data: found .* as (augment|view); give a "):
        TensorSamples(X, Y, **change)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"name": 3}, ConfigError, "3: name: found 3; give text, in quotes"),
        ({"class_names": "abc"}, ConfigError, "own: class_names: found 'abc' (text); give a list"),
        ({"class_names": (0, 1, 2)}, ConfigError, "own: class_names[0]: found 0; give text, in quotes"),
        (
            {"test": TensorSamples((X * 9).byte(), Y)}, DataError,
            "own: found training inputs of type torch.float32 and test inputs of type torch.uint8; give both the same type",
        ),
        ({"classes": 3.0}, ConfigError, "own: classes: found 3.0; give a whole number of at least 1"),
        ({"test": (X, Y)}, DataError, "own/test: found a tuple; give TensorSamples, or DatasetSamples.of()"),
        (
            {"train": TensorSamples(X, Y, (5.0,), (0.1,))}, DataError,
            "own: found mean (5.0,) of the training samples and (0.0,) of the test samples; normalize both by the same",
        ),
        (
            {"test": TensorSamples(X, Y, (0.0,), (2.0,))}, DataError,
            "own: found std (1.0,) of the training samples and (2.0,) of the test samples; normalize both by the same",
        ),
    ],
)  # fmt: skip
def test_a_source_whose_parts_do_not_fit_is_refused(changes, error, message):
    with pytest.raises(error) as caught:
        source(**changes)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("split", [class_incremental, permuted_stream])
@pytest.mark.parametrize("kind", [TensorSamples, DatasetSamples.of])
def test_test_inputs_of_another_shape_are_refused_before_training(split, kind):
    found = source(train=kind(X, Y), test=kind(X[:, :, :2], Y))
    expected = r"^own: found training inputs of shape \[3, 4, 4\] and test inputs of shape \[3, 2, 4\]; give both the same"
    with pytest.raises(DataError, match=expected):
        split(found, experiences=1)


@pytest.mark.parametrize("split", [class_incremental, permuted_stream])
@pytest.mark.parametrize("experiences", [2.5, True, "3"])
def test_a_number_of_experiences_is_a_whole_number(split, experiences):
    with pytest.raises(ConfigError, match=r"^benchmark.experiences: found .*; give a whole number of at least 1$"):
        split(source(), experiences=experiences)


@pytest.mark.parametrize("value, found", [(None, "null"), ((1, 2), "[1, 2] (a list)")])
def test_a_registered_function_that_returns_no_source_is_refused(monkeypatch, value, found):
    from clframe.config.schema import BenchmarkConfig

    monkeypatch.setattr(SOURCES, "_entries", {**SOURCES._entries, "own": lambda: value})
    with pytest.raises(ConfigError) as caught:
        build_source(BenchmarkConfig(name="own"))
    assert str(caught.value) == f"benchmark.name: found own, which returns {found}; return a Source"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"first": "2"}, "benchmark.first: found '2' (text); give a whole number or null"),
        ({"first": True}, "benchmark.first: found true; give a whole number or null"),
        ({"counts": "12"}, "benchmark.counts: found '12' (text); give a list or null"),
        ({"counts": [1.0, 2.0]}, "benchmark.counts[0]: found 1.0; give a whole number"),
        ({"order": None}, "benchmark.class_order: found null; give text or a list"),
        ({"order": [0.0, 1.0, 2.0]}, "benchmark.class_order[0]: found 0.0; give a whole number"),
        ({"seed": "3"}, "class_incremental: seed: found '3' (text); give a whole number"),
        ({"seed": None}, "class_incremental: seed: found null; give a whole number"),
        ({"validation": "0.1"}, "benchmark.validation: found '0.1' (text); give a number"),
        ({"task_labels": "no"}, "benchmark.task_labels: found 'no' (text); give true or false"),
    ],
)
def test_arguments_of_a_split_have_their_types(options, message):
    with pytest.raises(ConfigError) as caught:
        class_incremental(source(), experiences=2, **options)
    assert str(caught.value) == message


def test_numbers_of_numpy_split_as_those_of_python():
    plain = class_incremental(source(), experiences=2, seed=3, validation=0.25)
    drawn = class_incremental(source(), experiences=np.int64(2), seed=np.int64(3), validation=np.float64(0.25))
    given = class_incremental(source(), experiences=2, order=np.array(plain.class_order), counts=np.array([2, 1]))
    assert drawn.class_order == given.class_order == plain.class_order and given.classes == plain.classes
    assert [part.y.tolist() for part in drawn.validation] == [part.y.tolist() for part in plain.validation]


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"evaluate": "tets"}, ConfigError, "benchmark.evaluate: found 'tets' (text); did you mean 'test'? (known: test, validation)"),
        ({"task_labels": "no"}, ConfigError, "benchmark.task_labels: found 'no' (text); give true or false"),
        ({"test": ()}, DataError, "benchmark own: found 0 entries of test for 3 experiences; give one for each"),
        ({"train": (TensorSamples(X, Y),)}, DataError, "benchmark own: found 1 entries of train for 3 experiences; give one for each"),
        ({"domains": ("a",)}, DataError, "benchmark own: found 1 entries of domains for 3 experiences; give one for each"),
        ({"validation": (TensorSamples(X, Y),)}, DataError, "benchmark own: found 1 entries of validation for 3 experiences; give one for each"),
        ({"class_order": (0, 1)}, DataError, "benchmark own: found labels from 2 to 2 for 2 classes; give labels in learning order, 0..1"),
        ({"classes": ((0,), (1,), (3,))}, DataError, "benchmark own: found an experience with a class outside 0..2; number them in learning order"),
        ({"class_names": ("a",)}, DataError, "benchmark own: found 1 class names for class ids up to 2; give one for each id"),
        ({"test": (X, X, X)}, DataError, "benchmark own: found a Tensor as samples; give TensorSamples"),
    ],
)
def test_a_benchmark_whose_parts_do_not_fit_is_refused(changes, error, message):
    benchmark = class_incremental(source(), experiences=3, order="sorted")
    with pytest.raises(error) as caught:
        replace(benchmark, **changes)
    assert str(caught.value) == message


@pytest.mark.parametrize("count", [0, -1, "2", 1.5])
def test_a_benchmark_is_cut_off_after_at_least_one_experience(count):
    with pytest.raises(ConfigError, match=r"^benchmark.first_experiences: found "):
        class_incremental(source(), experiences=3).first_experiences(count)
