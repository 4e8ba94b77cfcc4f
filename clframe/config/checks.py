"""Checks of a config's values, which report all problems of a block together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from clframe.errors import ConfigError, Problems
from clframe.options import format_value

LARGEST_FLOAT = 3.4e38
"""Larger numbers overflow in float32."""
_PROBLEMS: ContextVar[Problems | None] = ContextVar("problems", default=None)


@contextmanager
def every_check() -> Iterator[None]:
    """Collect the problems that :func:`require` finds in the block, and raise them together at its end."""
    problems = Problems()
    token = _PROBLEMS.set(problems)
    try:
        with problems.attempt():
            yield
    finally:
        _PROBLEMS.reset(token)
    problems.raise_found()


def require(ok: bool, key: str, found: Any, advice: str) -> None:
    """Raise ConfigError, at the end of a block of :func:`every_check`, unless a value is allowed."""
    if ok:
        return
    error, problems = ConfigError(f"{key}: found {format_value(found)}; {advice}"), _PROBLEMS.get()
    if problems is None:
        raise error
    if not any(str(other).startswith(f"{key}: ") for other in problems.found):  # one problem of a key is enough
        problems.add(error)


def require_at_least(low: float, key: str, found: float) -> None:
    """Raise ConfigError, as :func:`require`, for a value below ``low``."""
    require(found >= low, key, found, f"give at least {low}")
