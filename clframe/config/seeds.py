"""Seeds as the command line takes them."""

from __future__ import annotations

from clframe.errors import ConfigError

MOST = 10_000
"""Seeds of one call: more than anybody waits for."""


def parse_seed(text: str) -> int:
    """The seed of ``"3"``.

    >>> parse_seed("3")
    3
    """
    if not _is_seed(text):
        raise ConfigError(f"--seed: found '{text}'; give a whole number from 0")
    return int(text)


def parse_seeds(text: str) -> list[int]:
    """The seeds of ``"0..4"`` (both ends included) or ``"0,3,7"``.

    >>> parse_seeds("0..2"), parse_seeds("5,1")
    ([0, 1, 2], [5, 1])
    """
    first, dots, last = text.partition("..")
    parts = [first, last] if dots else text.split(",")
    if not all(_is_seed(part.strip()) for part in parts):
        raise ConfigError(f"--seeds: found '{text}'; give a range such as 0..4 or a list such as 0,3,7")
    seeds = [int(part) for part in parts]
    if dots and seeds[0] > seeds[1]:
        raise ConfigError(f"--seeds: found '{text}', which counts down; write {last}..{first}")
    if dots and seeds[1] - seeds[0] >= MOST:
        raise ConfigError(f"--seeds: found '{text}'; give at most {MOST:,} seeds")
    if dots:
        return list(range(seeds[0], seeds[1] + 1))
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds: found '{text}', a seed twice; give each once")
    return seeds


def _is_seed(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 20
