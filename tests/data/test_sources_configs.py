"""Every registered data set is a benchmark config, with or without a file, and reports missing data in one line."""

from __future__ import annotations

import importlib.metadata
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch

from clframe.build import build
from clframe.config.files import known_configs
from clframe.config.load import load_config
from clframe.config.schema import BenchmarkConfig
from clframe.data import SOURCES, Source, TensorSamples, from_datasets
from clframe.errors import ConfigError, DataError, UnknownNameError
from clframe.options import option_types
from clframe.registry import Registry

CONFIGS = {name.split("/")[1]: config for name, config in known_configs("benchmark").items()}
FILES = {name: path.resolve() for name, path in CONFIGS.items() if isinstance(path, Path)}
DOWNLOADED = sorted(name for name in CONFIGS if "download" in option_types(SOURCES.get(name)))


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """An experiment on a benchmark config, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def load(name, *overrides):
        path = tmp_path / "experiment.yaml"
        path.write_text(f"defaults: [benchmark/{name}, backbone/mlp]\n")
        return load_config(str(path), overrides)

    return load


def test_every_source_has_a_config_and_no_option_without_a_default():
    assert set(CONFIGS) == set(SOURCES.names())
    for name, source in SOURCES.items():
        for option, (annotation, default) in option_types(source).items():
            assert default is not inspect.Parameter.empty and annotation is not None, (name, option)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_loads_and_a_file_begins_with_a_comment_for_the_listing(experiment, name):
    config = experiment(name).benchmark
    assert config.name == name
    if name in FILES:
        assert FILES[name].read_text().startswith("# ")
    else:
        assert config == BenchmarkConfig(name=name)


@pytest.mark.parametrize("name", FILES)
def test_a_file_sets_more_than_a_name(experiment, name):
    assert experiment(name).benchmark != BenchmarkConfig(name=name)


def squares(*, count: int = 4, side: int = 3) -> Source:
    """A data set of a third party."""
    pairs = [(torch.full((1, side, side), 10 * i, dtype=torch.uint8), i % count) for i in range(3 * count)]
    return from_datasets(pairs, [(x + 1, y) for x, y in pairs], name="squares")


@pytest.mark.parametrize("door", ["script", "entry point"])
def test_a_source_of_a_third_party_is_a_benchmark_by_its_name(tmp_path, monkeypatch, door):
    """Neither way needs a YAML file; options come from the signature, and a wrong one names the nearest."""
    monkeypatch.chdir(tmp_path)
    if door == "script":
        monkeypatch.setattr(SOURCES, "_entries", dict(SOURCES._entries))
        SOURCES.add("squares", squares)
    else:
        point = importlib.metadata.EntryPoint("squares", f"{__name__}:squares", "clframe.benchmarks")
        monkeypatch.setattr(importlib.metadata.EntryPoint, "load", lambda self: squares)
        found = Registry("benchmark", group="clframe.benchmarks", load=SOURCES._load)
        monkeypatch.setattr("clframe.registry.entry_points", lambda group: [point])
        assert found.names() == ("squares",)
        monkeypatch.setattr(SOURCES, "_entries", {**SOURCES._entries, **dict(found.items())})
    overrides = ["benchmark=squares", "benchmark.count=6", "benchmark.experiences=3", "backbone=mlp"]
    benchmark = build(load_config("quickstart", overrides)).benchmark
    assert (benchmark.name, benchmark.input_shape, len(benchmark)) == ("squares", (1, 3, 3), 3)
    assert [len(classes) for classes in benchmark.classes] == [2, 2, 2]
    with pytest.raises(ConfigError, match=r"benchmark.cont: unknown option; did you mean 'count'\?"):
        build(load_config("quickstart", ["benchmark=squares", "benchmark.cont=6"]))
    with pytest.raises(UnknownNameError, match="did you mean 'squares'"):
        load_config("quickstart", ["benchmark=squars"])


def text_config(tmp_path, x, *overrides):
    path = tmp_path / "texts.npz"
    y = torch.arange(len(x)).numpy() % 2
    np.savez(path, x=x, y=y)
    return load_config("quickstart", [
        "benchmark=npz", f"benchmark.path={path}", "benchmark.experiences=1", "strategy=naive",
        *overrides,
    ])  # fmt: skip


TEXT = ["backbone=bert", "backbone.vocabulary=200", "backbone.width=16", "backbone.heads=2", "backbone.depth=1"]


def test_token_ids_of_an_npz_reach_a_text_backbone_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = torch.randint(1, 200, (20, 6), generator=torch.Generator().manual_seed(0))
    x[3, 4:] = 0
    built = build(text_config(tmp_path, x.numpy(), *TEXT, "benchmark.kind=tokens"))
    (train,), (test,) = built.benchmark.train, built.benchmark.test
    ids = torch.cat([part.prepare(part.raw(torch.arange(len(part)))) for part in (train, test)])
    assert ids.dtype == torch.int64 and sorted(ids.tolist()) == sorted(x.tolist())
    assert isinstance(train, TensorSamples) and train.std == ()


def test_a_text_backbone_refuses_what_are_no_token_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = torch.randint(1, 200, (20, 6), generator=torch.Generator().manual_seed(0)).numpy()
    with pytest.raises(ConfigError, match=r"^backbone.name: found a text backbone for texts, .* benchmark.kind=tokens"):
        build(text_config(tmp_path, x, *TEXT))
    build(text_config(tmp_path, x.astype("float32"), *TEXT))  # whole numbers that nothing normalizes are ids
    x[17, 2] = 200
    with pytest.raises(ConfigError, match="^backbone.vocabulary: found token id 200 in texts for a vocabulary of 200"):
        build(text_config(tmp_path, x, *TEXT, "benchmark.kind=tokens"))


@pytest.mark.parametrize("name", DOWNLOADED)
def test_missing_data_is_one_line_when_it_is_built(experiment, tmp_path, name):
    config = experiment(name, "benchmark.download=false")
    with pytest.raises(DataError, match=r"^data: holds no .* is missing\) and download is off; set") as error:
        build(config)
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["experiment.yaml"]


@pytest.mark.parametrize("name", ["npz", "csv", "image_folder"])
def test_your_own_data_asks_for_its_path(experiment, name):
    with pytest.raises(ConfigError, match="^benchmark.path: found nothing; give the path of a fi?"):
        build(experiment(name))


@pytest.mark.parametrize("name", ["imagenet", "imagenet_subset"])
def test_imagenet_says_where_it_belongs(experiment, name):
    with pytest.raises(DataError, match="^data/imagenet: holds no ImageNet"):
        build(experiment(name))
