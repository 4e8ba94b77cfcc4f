"""Values of a sweep as texts: ``optimizer.lr=0.03,0.1`` and ``seed=0..4`` on the command line, lists in a file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Final

from clframe.errors import ConfigError

MOST_SEEDS: Final = 10_000
"""Bound on the number of seeds in one call."""
NAMED: Final = ("strategy", "backbone", "benchmark")
"""Keys whose values are names or expressions, which need no quotes in a config."""
_OPENING, _CLOSING = "([{", ")]}"
_BEFORE_QUOTE = (*_OPENING, ",", ":", "=", " ", "")


def split_values(text: str, *, where: str) -> list[str]:
    """Split a text at commas that are outside of brackets and quotes.

    Args:
        text: The values, separated by commas.
        where: Key that they belong to, for messages.

    Raises:
        ConfigError: Brackets or quotes that do not close, or an empty value between commas.

    >>> split_values("er(memory=5, at=(1, 2)),'er + exits'", where="strategy")
    ['er(memory=5, at=(1, 2))', "'er + exits'"]
    >>> split_values("[2, 3],[5]", where="benchmark.counts")
    ['[2, 3]', '[5]']
    """
    values, start, quote, before = [], 0, "", ""
    open_brackets: list[str] = []
    for i, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and before in _BEFORE_QUOTE:  # an apostrophe inside a word is a letter
            quote = letter
        elif letter in _OPENING:
            open_brackets.append(_CLOSING[_OPENING.index(letter)])
        elif letter in _CLOSING:
            if not open_brackets or open_brackets.pop() != letter:
                raise _unbalanced(text, where)
        elif letter == "," and not open_brackets:
            values.append(text[start:i])
            start, letter = i + 1, ""
        before = letter
    if quote or open_brackets:
        raise _unbalanced(text, where)
    values = [value.strip() for value in (*values, text[start:])]
    if "" in values and len(values) > 1:
        raise ConfigError(f"{where}: found '{text}', which has an empty value; give values such as 1,2 or one value")
    return values


def _unbalanced(text: str, where: str) -> ConfigError:
    return ConfigError(
        f"{where}: found '{text}', whose brackets or quotes do not match; close them, and quote values with commas"
    )


def parse_words(words: Iterable[str]) -> tuple[dict[str, tuple[str, ...]], tuple[int, ...]]:
    """Parse ``key=value,value`` words; returns the values of each key, and the seeds, empty if none are given.

    Raises:
        ConfigError: A word that is not ``key=values``, or a key or value given twice.

    >>> parse_words(["strategy=er,'er + exits'", "optimizer.lr=0.1", "seed=0..2"])
    ({'strategy': ('er', 'er + exits'), 'optimizer.lr': ('0.1',)}, (0, 1, 2))
    """
    axes: dict[str, tuple[str, ...]] = {}
    seeds: tuple[int, ...] = ()
    for word in words:
        key, equals, text = (part.strip() for part in word.partition("="))
        if not equals or not key:
            raise ConfigError(f"sweep: found '{word}', not key=values; write it like optimizer.lr=0.03,0.1")
        if key in axes or (key == "seed" and seeds):
            raise ConfigError(f"{key}: is given twice; write its values in one word, such as {key}=A,B")
        if key == "seed":
            seeds = tuple(parse_seeds(text, where="seed"))
            continue
        axes[key] = distinct([_unquote(key, value) for value in split_values(text, where=key)], where=key)
    return axes, seeds


def distinct(values: Sequence[str], *, where: str) -> tuple[str, ...]:
    """Return the values; refuses one that is given twice."""
    twice = next((value for i, value in enumerate(values) if value in values[:i]), None)
    if twice is not None:
        raise ConfigError(f"{where}: found '{twice}' twice; give each value once")
    return tuple(values)


def _unquote(key: str, value: str) -> str:
    """Remove the quotes around a name or an expression; YAML reads those of other values."""
    quoted = len(value) > 1 and value[0] in "'\"" and value.find(value[0], 1) == len(value) - 1
    return value[1:-1].strip() if quoted and key in NAMED else value


def parse_seeds(text: str, *, where: str) -> list[int]:
    """Parse seeds: ``"0..4"`` (both ends included), ``"0,3,7"``, or both, ``"0..2,7"``.

    Raises:
        ConfigError: Anything else, more than :data:`MOST_SEEDS`, or a seed twice.

    >>> parse_seeds("0..2", where="seed"), parse_seeds("5,1", where="seed")
    ([0, 1, 2], [5, 1])
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dots, last = part.partition("..")
        numbers = [number.strip() for number in ([first, last] if dots else [part])]
        if not all(is_seed(number) for number in numbers):
            raise ConfigError(f"{where}: found '{text}'; give a range such as 0..4 or a list such as 0,3,7")
        low, high = int(numbers[0]), int(numbers[-1])
        if low > high:
            raise ConfigError(f"{where}: found '{text}', which counts down; write {high}..{low}")
        if high - low + len(seeds) >= MOST_SEEDS:
            raise ConfigError(f"{where}: found '{text}'; give at most {MOST_SEEDS:,} seeds")
        seeds += range(low, high + 1)
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"{where}: found '{text}', a seed twice; give each once")
    return seeds


def is_seed(text: str) -> bool:
    """Whether a text is a whole number from 0 that fits 64 bits."""
    return text.isascii() and text.isdecimal() and len(text) < 20


def as_text(value: Any, *, where: str) -> str:
    """Return a value of a YAML file as the text of an override, which reads it back with the same type.

    >>> as_text([2, 3], where="k"), as_text("er + exits", where="k"), as_text("1", where="k"), as_text(1e-3, where="k")
    ('[2, 3]', 'er + exits', '"1"', '0.001')
    """
    if not isinstance(value, str):
        try:
            return json.dumps(value)
        except (TypeError, ValueError):  # a date, say
            raise ConfigError(f"{where}: found {value!r}; give numbers, texts, lists or mappings") from None
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:  # as an override would be read, which differs from YAML in numbers such as 1e-8
        same = OmegaConf.to_container(OmegaConf.from_dotlist([f"k={value}"])) == {"k": value}
    except (OmegaConfBaseException, yaml.YAMLError):
        same = False
    return value if same or where.rpartition(".")[2] in NAMED else json.dumps(value)
