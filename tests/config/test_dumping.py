"""Plain values as YAML: the text that OmegaConf writes, and values that a config cannot hold."""

from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from clframe.config.dumping import dump_yaml
from clframe.config.files import parse_yaml
from clframe.errors import ConfigError

TEXTS = [
    "y", "n", "Y", "N", "no", "True", "on", "1e3", "1", "1.5", "+1", "1.", ".5", "1_000", " 5 ", "0x1F", "nan", "inf", "-.inf",
    "infinity", "", "null", "~", "a: b", "# x", "é", "two\nlines", " before", "after ", "'q'", '"q"', "2020-01-01", "12:30:00",
    "!tag", "*a", "&b", "[1]", "{a}", "a" * 200, "word " * 40, "${a}", "%", "@x", "08", "=", "<<", "-", "?", "|", ">",
]  # fmt: skip
TREE = {
    "texts": TEXTS, "keys": {text: text for text in TEXTS if text}, "a": 1,
    "others": [1, 2.5, 1e-05, 1e20, None, True, [], {}, [[1], [2, [3]]], {"x": {}}], "path": Path("/a/b"), 1: 2, 2.5: True,
}  # fmt: skip


def test_the_text_is_that_of_omegaconf_and_is_read_back():
    text = dump_yaml(TREE)
    wanted = OmegaConf.to_yaml(OmegaConf.create(TREE))
    assert text == wanted.replace("- /\n- a\n- b\n", "- /a/b\n")  # before 2.4 it writes a path as its parts
    assert parse_yaml(text) == TREE


@pytest.mark.parametrize("value", [np.float64(0.5), np.int64(3), {1, 2}, datetime.date(2020, 1, 1), object])
def test_a_value_that_could_not_be_read_back_is_refused(value):
    with pytest.raises(ConfigError, match="which a config cannot hold"):
        dump_yaml({"optimizer": {"lr": value}})


def test_a_path_that_is_not_utf8_is_refused():
    with pytest.raises(ConfigError, match=r"^config: found the text photos/a\\udcff, which is not UTF-8; rename the"):
        dump_yaml({"benchmark": {"path": "photos/a\udcff"}})
