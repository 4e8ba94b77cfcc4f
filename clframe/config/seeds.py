"""Lists of seeds as the command line takes them."""

from __future__ import annotations

from clframe.errors import ConfigError


def parse_seeds(text: str) -> list[int]:
    """The seeds of ``"0..4"`` (both ends included) or ``"0,3,7"``.

    >>> parse_seeds("0..2"), parse_seeds("5,1")
    ([0, 1, 2], [5, 1])
    """
    first, dots, last = text.partition("..")
    try:
        seeds = list(range(int(first), int(last) + 1)) if dots else [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0:
        raise ConfigError(f"--seeds: found '{text}'; give a range such as 0..4 or a list such as 0,3,7")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds: '{text}' names a seed twice; give each once")
    return seeds
