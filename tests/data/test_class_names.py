"""Class names and the format of inputs reach the benchmark; names that collide and options in the way are refused."""

from __future__ import annotations

import pytest
import torch

from clframe.build import build
from clframe.config.load import load_config
from clframe.config.typed import block_keys
from clframe.data.inputs import InputFormat
from clframe.data.samples import TensorSamples
from clframe.data.source import RESERVED, SOURCES, Source
from clframe.errors import ConfigError, DataError


def source(names):
    samples = TensorSamples(torch.zeros(2, 3), torch.tensor([0, 1]))
    return Source("m", samples, samples, classes=2, class_names=names)


@pytest.mark.parametrize("protocol", ["class_incremental", "permuted"])
def test_names_and_formats_reach_the_benchmark(protocol):
    overrides = [f"benchmark.protocol={protocol}", "benchmark.classes=4", "benchmark.experiences=2"]
    benchmark = build(load_config("quickstart", overrides)).benchmark
    assert benchmark.class_names == ("0", "1", "2", "3")
    assert benchmark.inputs == InputFormat(kind="image", largest=16)


def test_two_classes_of_one_name_are_refused():
    assert source(("a", "A")).class_names == ("a", "A")
    with pytest.raises(DataError, match=r"^m: found the class name 'a' twice; give each class its own name$"):
        source(("a", "a"))


def test_a_class_name_that_is_not_utf8_is_refused():
    """The name of a folder may be any bytes; configs of extensions and results are UTF-8."""
    with pytest.raises(DataError, match="^m: the class name 'a\udcff' is not UTF-8 text; rename it$"):
        source(("a\udcff", "b"))


def test_a_format_survives_a_checkpoint_and_later_fields():
    form = InputFormat(kind="tokens", tokenizer="bert", max_length=9)
    assert InputFormat.of({**form.as_tree(), "added_later": 1}) == form
    assert InputFormat.of({"kind": "image"}) == InputFormat(kind="image")


def test_options_that_the_config_block_takes_are_refused():
    def mine(*, experiences: int = 3) -> Source:
        raise NotImplementedError

    with pytest.raises(ConfigError, match=r"^benchmark 'mine': option 'experiences' is a key of the config block benchm"):
        SOURCES.register("mine")(mine)
    assert "mine" not in SOURCES
    assert {*block_keys("benchmark"), "options"} == RESERVED
