"""Extension by data in memory: every override takes effect or is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import clframe
from clframe.data import Benchmark, Source, digits
from clframe.data.augmentation import PadCrop
from clframe.errors import ConfigError
from clframe.targets.extension import plan_extension


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    overrides = ["strategy=naive", "backbone=mlp", "trainer.epochs=1", "trainer.figures=none", "benchmark.augment=crop"]
    result = clframe.run("quickstart", overrides, output=tmp_path_factory.mktemp("parent"))
    return Path(result.run_folder)


def stream(run: Path, data: Source | Benchmark, *overrides: str) -> Benchmark:
    return plan_extension(run, overrides, data=data).setup.benchmark


def test_only_the_first_classes_are_learned(run: Path) -> None:
    assert stream(run, digits()).classes[5:] == (tuple(range(10)),)
    extended = stream(run, digits(), "benchmark.classes=3")
    order = extended.class_order
    assert [sorted(order[c] for c in classes) for classes in extended.classes[5:]] == [[0, 1, 2]]
    assert sorted(set(extended.train[5].y.tolist())) == sorted(order.index(c) for c in (0, 1, 2))


def test_augmentation_continues_unless_the_data_have_their_own(run: Path) -> None:
    source = digits()
    own = replace(source, train=replace(source.train, augment=(PadCrop(padding=1),)))
    parent = stream(run, source).train[0].augment
    assert [type(part) for part in parent] == [PadCrop] and parent != own.train.augment
    assert stream(run, source).train[5].augment == parent
    assert stream(run, source, "benchmark.augment=null").train[5].augment == ()
    assert stream(run, own).train[5].augment == own.train.augment


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("benchmark.size=3", "benchmark.size: is an option of a data set, but the data are in memory; leave it out"),
        ("benchmark=mnist", "benchmark.name: found mnist and data in memory, digits; give one of them"),
    ],
)
def test_a_data_set_next_to_data_in_memory_is_refused(run: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        stream(run, digits(), override)
    assert str(refused.value) == message


@pytest.mark.parametrize("override", ["experiences=2", "first=3", "counts=[5, 5]", "class_order=sorted", "classes=4"])
def test_a_benchmark_in_memory_is_not_split_again(run: Path, override: str) -> None:
    benchmark: Any = clframe.class_incremental(digits(), experiences=2)
    with pytest.raises(ConfigError) as refused:
        stream(run, benchmark, f"benchmark.{override}")
    assert str(refused.value) == (
        f"benchmark.{override.partition('=')[0]}: is set, but the benchmark in memory is split already; give its "
        f"Source, or leave it out"
    )
