"""Every shipped benchmark config loads, and says in one line what it misses."""

from __future__ import annotations

import inspect

import pytest

from clframe.build import build
from clframe.config.files import known_configs
from clframe.config.load import load_config
from clframe.data import SOURCES
from clframe.errors import ConfigError, DataError
from clframe.options import option_types

CONFIGS = {name.split("/")[1]: path.resolve() for name, path in known_configs("benchmark").items()}
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
def test_it_loads_and_begins_with_a_comment_for_the_listing(experiment, name):
    assert experiment(name).benchmark.name == name
    assert CONFIGS[name].read_text().startswith("# ")


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
