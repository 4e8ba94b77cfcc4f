"""A smaller problem out of a data set: its first classes, and nothing of the others."""

from __future__ import annotations

import pytest

from clframe.build import build
from clframe.config.load import load_config
from clframe.data import digits
from clframe.errors import ConfigError


def test_the_first_classes_bring_all_their_samples_and_no_others():
    whole, part = digits(), digits().first_classes(3)
    assert part.classes == 3 and part.class_names == whole.class_names[:3]
    for name in ("train", "test"):
        expected = whole.__getattribute__(name)
        found = part.__getattribute__(name)
        assert len(found) == int((expected.y < 3).sum()) and int(found.y.max()) == 2
    assert whole.first_classes(None) is whole and whole.first_classes(10) is whole


def test_a_config_asks_for_them():
    parts = build(load_config("quickstart", ["benchmark.classes=4", "benchmark.experiences=2"]))
    assert sorted(parts.benchmark.class_order) == [0, 1, 2, 3]


@pytest.mark.parametrize("count", [0, 11])
def test_a_number_that_cannot_be_is_one_line(count):
    with pytest.raises(ConfigError, match=rf"^benchmark\.classes: found {count} for 10 classes; give 1 to 10$"):
        build(load_config("quickstart", [f"benchmark.classes={count}"]))
