"""Seeds of the command line."""

from __future__ import annotations

import pytest

from clframe.cli.context import parse_seed, parse_seeds
from clframe.errors import ConfigError
from clframe.sweep.values import MOST_SEEDS


@pytest.mark.parametrize(
    "text, seeds",
    [("0..0", [0]), ("3..5", [3, 4, 5]), ("7", [7]), ("5,1,3", [5, 1, 3]), (" 0 .. 2 ", [0, 1, 2]), ("1, 2", [1, 2]),
     ("0..1,4", [0, 1, 4])],
)
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    "text",
    ["", ",", "..", "1..", "..1", "a", "1,a", "-1", "-1..1", "1.5", "0...3", "0..1..2", "0..1,", "٣", "0x1", "1e3",
     "9" * 5000],
)  # fmt: skip
def test_what_is_no_list_of_seeds_is_shown(text):
    with pytest.raises(
        ConfigError, match=r"^--seeds: found '.*'; give a range such as 0\.\.4 or a list such as 0,3,7$"
    ):
        parse_seeds(text)


def test_ranges_that_count_down_or_never_end():
    with pytest.raises(ConfigError, match=r"^--seeds: found '4\.\.0', which counts down; write 0\.\.4$"):
        parse_seeds("4..0")
    assert len(parse_seeds(f"1..{MOST_SEEDS}")) == MOST_SEEDS
    with pytest.raises(ConfigError, match=r"give at most 10,000 seeds$"):
        parse_seeds(f"0..{MOST_SEEDS}")


def test_a_seed_twice():
    with pytest.raises(ConfigError, match=r"^--seeds: found '3,1,3', a seed twice; give each once$"):
        parse_seeds("3,1,3")


def test_one_seed():
    assert (parse_seed("0"), parse_seed("42"), parse_seed("007")) == (0, 42, 7)
    for text in ("", "x", "-1", "1.5", "1 2", "²", "9" * 20):
        with pytest.raises(ConfigError, match=r"^--seed: found '.*'; give a whole number from 0$"):
            parse_seed(text)
    for text in ("0..2", "1,2"):
        with pytest.raises(ConfigError, match="; give a whole number from 0, or several seeds with --seeds$"):
            parse_seed(text)
