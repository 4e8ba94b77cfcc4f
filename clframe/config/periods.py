"""Periods of training, counted in steps or in time."""

from __future__ import annotations

import re
from dataclasses import dataclass

from clframe.errors import ConfigError
from clframe.options import format_value

_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}
_TIME = re.compile(r"(\d+(?:\.\d+)?) ?(s|min|h)", re.ASCII)


@dataclass(frozen=True)
class Period:
    """A number of training steps or of seconds; the other one is None."""

    steps: int | None = None
    seconds: float | None = None


def parse_period(value: int | str | None, *, where: str) -> Period | None:
    """Read a number of steps, or a time in ``s``, ``min`` or ``h``; None for never.

    Raises:
        ConfigError: Anything else, or a period of length 0.

    >>> parse_period(20, where="every"), parse_period("5min", where="every")
    (Period(steps=20, seconds=None), Period(steps=None, seconds=300.0))
    """
    if value is None:
        return None
    if type(value) is int and value >= 1:
        return Period(steps=value)
    found = _TIME.fullmatch(value.strip()) if isinstance(value, str) else None
    seconds = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if seconds <= 0:
        raise ConfigError(
            f"{where}: found {format_value(value)}; give a number of steps such as 200, a time such as 5min (s, min, "
            f"h), or null for none but when a signal ends the run"
        )
    return Period(seconds=seconds)
