"""The values of a sweep and their combinations."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from clframe.errors import ConfigError, nearest

MOST_SETTINGS: Final = 20_000
"""Bound on the number of combinations: a file of a few lines may name billions."""

Axes = Mapping[str, tuple[str, ...]]
"""Values by key, as texts of overrides."""
Setting = dict[str, str]
"""One value for each key: one combination."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """A range of numbers that a sampler draws from."""

    low: float
    high: float
    log: bool = False
    """Whether logarithms are uniform."""
    step: float | None = None
    """Distance of the values; with whole numbers all values are whole."""

    @property
    def whole(self) -> bool:
        """Whether all values are whole numbers."""
        step = 1 if self.step is None else self.step
        return all(isinstance(value, int) for value in (self.low, self.high, step))


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Hyper-parameters that are chosen on validation data, before any test seed runs."""

    over: Mapping[str, tuple[str, ...] | Range]
    """Candidates by key."""
    seeds: tuple[int, ...]
    """Seeds of the runs that are compared; test seeds are different ones."""
    metric: str = "final_average_accuracy"
    sampler: Literal["grid", "optuna"] = "grid"
    trials: int | None = None
    """Number of candidates that ``optuna`` draws for each combination of the other values."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Values of a selection, with their validation metric."""

    setting: Setting
    """All values."""
    chosen: Setting
    """Those of the selection."""
    value: float
    """Mean over the seeds; NaN where a run diverged or has no number."""
    reason: str = ""
    """Why there is no number."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """A sweep: a config, values and seeds."""

    config: str
    grid: Axes = field(default_factory=dict)
    """All combinations of these."""
    rows: tuple[Axes, ...] = ()
    """Each of these with every combination of ``grid``; the key ``list`` of a file."""
    strategies: Mapping[str, Axes] = field(default_factory=dict)
    """Values for one strategy only, which replace those of other places; by the strategy's expression."""
    seeds: tuple[int, ...] = (0,)
    select: Selection | None = None

    def settings(self) -> list[Setting]:
        """Return all combinations, without seeds and without the keys of the selection.

        Raises:
            ConfigError: Too many, or values for a strategy that is in no combination.
        """
        count, found = 0, list[Setting]()
        used = set[str]()
        for row in self.rows or ({},):
            for base in combinations({**self.grid, **row}):
                name = same_expression(base.get("strategy", ""))
                own = {s: axes for s, axes in self.strategies.items() if same_expression(s) == name}
                used |= set(own)
                replaced = {key: values for axes in own.values() for key, values in axes.items()}
                for setting in combinations({**_fixed(base), **replaced}):
                    count += 1
                    if count > MOST_SETTINGS:
                        raise ConfigError(f"sweep: more than {MOST_SETTINGS:,} combinations; give fewer values")
                    found.append(setting)
        for strategy in self.strategies:
            if strategy not in used:
                known = sorted({setting["strategy"] for setting in found if "strategy" in setting})
                close = nearest(strategy, known)
                advice = f"did you mean '{close}'?" if close else "add it to the values of strategy, or leave it out"
                raise ConfigError(f"strategies.{strategy}: found values for a strategy that no cell has; {advice}")
        return found

    def varied(self) -> tuple[str, ...]:
        """Return the keys with more than one value, in order, which tell cells apart."""
        values: dict[str, set[str]] = {}
        settings = self.settings()
        for setting in settings:
            for key, value in setting.items():
                values.setdefault(key, set()).add(value)
        absent = {key for key in values if any(key not in setting for setting in settings)}
        return tuple(key for key, found in values.items() if len(found) > 1 or key in absent)


def _fixed(setting: Setting) -> dict[str, tuple[str, ...]]:
    return {key: (value,) for key, value in setting.items()}


def combinations(axes: Axes) -> Iterator[Setting]:
    """Yield every combination of values, the last key fastest.

    >>> list(combinations({"a": ("1", "2"), "b": ("x",)}))
    [{'a': '1', 'b': 'x'}, {'a': '2', 'b': 'x'}]
    """
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def same_expression(strategy: str) -> str:
    """Return an expression without spaces, equal for two that differ in nothing else.

    >>> same_expression("er + exits") == same_expression("er+exits")
    True
    """
    return "".join(strategy.split())


def overrides_of(setting: Setting) -> list[str]:
    """Return a combination as overrides of a config.

    >>> overrides_of({"strategy": "er", "optimizer.lr": "0.1"})
    ['strategy=er', 'optimizer.lr=0.1']
    """
    return [f"{key}={value}" for key, value in setting.items()]


def label_of(setting: Setting, keys: Sequence[str]) -> str:
    """Return the values of ``keys`` in one line, for people.

    >>> label_of({"strategy": "er + exits", "optimizer.lr": "0.1", "trainer.epochs": "2"}, ["strategy", "optimizer.lr"])
    'er + exits, lr 0.1'
    """
    parts = [value if key == "strategy" else f"{key.rpartition('.')[2]} {value}" for key, value in setting.items()
             if key in keys]  # fmt: skip
    return ", ".join(parts)
