"""Samples and sources made in Python: values that could not be trained on are refused, equal ones are converted."""

from __future__ import annotations

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
        (X, Y, (0.0,), (1.0,) * 3, "found 1 mean(s) and 3 standard deviation(s) for inputs with 3 channel(s); give 1 or 3"),
    ],
)
def test_samples_that_could_not_be_trained_on_are_refused(x, y, mean, std, message):
    with pytest.raises(DataError) as caught:
        TensorSamples(x, y, mean, std)
    assert str(caught.value).startswith(f"data: {message}")


@pytest.mark.parametrize(
    "changes, error, message",
    [
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
