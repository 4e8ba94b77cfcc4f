"""Checks of the options and input shapes of backbones."""

from __future__ import annotations

from clframe.errors import ConfigError

MOST_LAYERS = 1000
"""Bound on options that count layers, so that a typing error is refused instead of building layers for hours."""


def require_at_least(value: int, minimum: int, *, where: str) -> None:
    """Raise :class:`ConfigError` if ``value`` is below ``minimum``.

    >>> require_at_least(0, 1, where="mlp.width")
    Traceback (most recent call last):
    clframe.errors.ConfigError: mlp.width: found 0; give 1 or more
    """
    if value < minimum:
        raise ConfigError(f"{where}: found {value}; give {minimum} or more")


def require_depth(depth: int, *, where: str, least: int = 1) -> None:
    """Raise :class:`ConfigError` if a number of layers is below ``least`` or above :data:`MOST_LAYERS`.

    >>> require_depth(10**9, where="mlp.depth")
    Traceback (most recent call last):
    clframe.errors.ConfigError: mlp.depth: found 1000000000; give 1000 or less
    """
    require_at_least(depth, least, where=where)
    if depth > MOST_LAYERS:
        raise ConfigError(f"{where}: found {depth}; give {MOST_LAYERS} or less")


def require_image(input_shape: tuple[int, ...], minimum: int, *, where: str) -> tuple[int, int, int]:
    """Return the input shape as (channels, height, width); both sides need ``minimum`` pixels.

    Raises:
        ConfigError: Not an image, no channels, or an image too small for the backbone.
    """
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise ConfigError(f"{where}: found inputs of shape {input_shape}; give (channels, height, width)")
    channels, height, width = input_shape
    if min(height, width) < minimum:
        # Of a network that halves images at each of many layers, the number would have dozens of digits.
        size = f"{minimum}x{minimum}" if minimum < 10**6 else f"2^{minimum.bit_length() - 1} pixels a side"
        raise ConfigError(f"{where}: found images of {height}x{width}; use at least {size} or another backbone")
    return channels, height, width
