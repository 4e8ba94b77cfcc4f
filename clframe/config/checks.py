"""Checks of a config's values, which report all problems of a block together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, TypeVar

from clframe.errors import ConfigError, Problems
from clframe.options import convert_fields, format_value, option_types

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


Block = TypeVar("Block")


def typed_block(where: str) -> Callable[[Callable[[Block], None]], Callable[[Block], None]]:
    """Decorator of the ``__post_init__`` of a block: convert its fields first, as those of a file, then run the checks.

    A nested block that can be written as one value, such as ``trainer.ema``, may be given as that value.

    Args:
        where: Key of the block, such as ``trainer``; empty for the whole config.

    Raises:
        ConfigError: Values of another type than declared, or else all problems that the checks have found.
    """

    def decorate(check: Callable[[Block], None]) -> Callable[[Block], None]:
        @wraps(check)
        def convert_and_check(block: Block) -> None:
            for name, (kind, _) in option_types(type(block)).items():
                value, shorthand = getattr(block, name), getattr(kind, "shorthand", None)
                if shorthand is not None and type(value) is not kind:
                    object.__setattr__(block, name, kind(**{shorthand: value}))
            convert_fields(block, where=where)
            with every_check():
                check(block)

        return convert_and_check

    return decorate


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
