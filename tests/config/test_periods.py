"""Periods in steps and in time."""

from __future__ import annotations

import pytest

from clframe.config.load import load_config
from clframe.config.periods import Period, parse_period
from clframe.errors import ConfigError


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, Period(steps=1)), ("90s", Period(seconds=90)), ("1.5 h", Period(seconds=5400)), ("5min", Period(seconds=300)),
     (None, None)],
)  # fmt: skip
def test_steps_times_and_never(value, expected):
    assert parse_period(value, where="every") == expected


@pytest.mark.parametrize("value", [0, -1, True, "", "5", "0min", "min", "5 parsecs", "-5s", "1e3s", "inf h", "\u0665s"])
def test_anything_else_is_refused(value):
    with pytest.raises(ConfigError, match="every: found .*; give a number of steps such as 200, a time such as 5min"):
        parse_period(value, where="every")


def test_the_block_of_the_config():
    assert load_config("quickstart").trainer.checkpoint.period == Period(seconds=300)
    assert load_config("quickstart", ["trainer.checkpoint.every=20"]).trainer.checkpoint.period == Period(steps=20)
    assert load_config("quickstart", ["trainer.checkpoint.every=null"]).trainer.checkpoint.period is None
    with pytest.raises(ConfigError, match=r"unknown key 'trainer\.checkpoint\.evry'; did you mean 'trainer\.checkpoint\.every'"):
        load_config("quickstart", ["trainer.checkpoint.evry=20"])
    with pytest.raises(ConfigError, match=r"trainer\.checkpoint: found 20; give a mapping"):
        load_config("quickstart", ["trainer.checkpoint=20"])
