"""Numbers given as options of verbs."""

from __future__ import annotations

from clframe.errors import ConfigError


def whole_number(option: str, given: str) -> int:
    """Parse a whole number of at least 1.

    >>> whole_number("--top", "5")
    5
    """
    if not given.isascii() or not given.isdigit() or not 1 <= int(given) < 2**31:
        raise ConfigError(f"{option}: found '{given}'; give a whole number of at least 1")
    return int(given)


def decimal(option: str, given: str | None) -> float | None:
    """Parse a number; None where the option is not given.

    >>> decimal("--threshold", "0.5")
    0.5
    """
    if given is None:
        return None
    try:
        return float(given)
    except ValueError:
        raise ConfigError(f"{option}: found '{given}'; give a number") from None
