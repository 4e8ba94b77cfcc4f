"""Shipped experiments build and run, on small files in place of what they download."""

from __future__ import annotations

import numpy as np
import pytest

import clframe
from clframe.build import build
from clframe.config.files import known_configs
from clframe.config.load import load_config

SETS = {"mnist": (10, (28, 28)), "cifar10": (10, (32, 32, 3)), "cifar100": (100, (32, 32, 3))}
EXPERIMENTS = [name.split("/")[1] for name in known_configs("experiment")]


@pytest.fixture
def data_dir(tmp_path):
    """A folder of the sets as arrays, two training images and a test image of each class."""
    rng = np.random.default_rng(0)
    for name, (classes, shape) in SETS.items():
        y = np.arange(3 * classes) % classes
        x = rng.integers(0, 256, (len(y), *shape), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", x_train=x[classes:], y_train=y[classes:], x_test=x[:classes], y_test=y[:classes])
    return tmp_path


def test_there_is_one_of_each_kind():
    assert {"quickstart", "split_mnist", "split_cifar100"} <= set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_it_builds_from_files_that_are_there(name, data_dir):
    downloaded = load_config(name).benchmark.name in SETS
    overrides = [f"benchmark.data_dir={data_dir}", "benchmark.download=false"] if downloaded else []
    parts = build(load_config(name, overrides))
    assert parts.benchmark.input_shape == parts.network.input_shape
    assert len(parts.benchmark) * len(parts.benchmark.classes[0]) == len(parts.benchmark.class_order)


@pytest.mark.parametrize("strategy", ["naive", "er", "joint"])
def test_split_mnist_runs(strategy, data_dir, tmp_path):
    result = clframe.run(
        "split_mnist",
        [f"benchmark.data_dir={data_dir}", "trainer.fast_dev_run=true", "trainer.progress=false", f"strategy={strategy}"],
        output=tmp_path / "runs",
    )
    assert len(result.accuracy_matrix) == 5 and result.benchmark == "mnist"


def test_split_cifar100_joins_a_memory_of_2000_to_augmented_images(data_dir):
    config = load_config("split_cifar100", [f"benchmark.data_dir={data_dir}"])
    parts = build(config)
    (er,) = parts.composition
    assert (er.memory, er.replay, config.trainer.channels_last) == (2000, "concatenate", True)
    assert [type(a).__name__ for a in parts.benchmark.train[9].augment] == ["PadCrop", "Flip"]


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "tiny_imagenet"])
def test_photographs_are_cropped_and_mirrored(name, tmp_path):
    file = tmp_path / "experiment.yaml"
    file.write_text(f"defaults: [benchmark/{name}, backbone/resnet20]\n")
    assert load_config(str(file)).benchmark.augment == "cifar"
