"""The few statistics of a report, each with one definition.

Everything over seeds: means, sample deviations (n - 1), paired differences with Student's t intervals; and over
operating points, which are pairs of cost and accuracy: the Pareto front and the cost at a given accuracy.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

NAN = float("nan")
CONFIDENCE = 0.95


class Point(NamedTuple):
    """One way to predict: what a sample costs on average in MACs, and the accuracy."""

    cost: float
    accuracy: float
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A paired difference over the seeds that both have; NaN where undefined."""

    seeds: tuple[int, ...]
    base: float
    """Mean of the first over these seeds."""
    mean: float
    half_width: float
    """Of the 95 % confidence interval around ``mean``."""
    undefined: str = ""

    @property
    def relative(self) -> float:
        """``mean / base``; NaN for a base of 0."""
        return self.mean / self.base if self.base else NAN


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; NaN where any value is, or where there is none.

    >>> mean([0.5, 0.25]), mean([0.5, float("nan")])
    (0.375, nan)
    """
    return math.fsum(values) / len(values) if values else NAN


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation, ``sqrt(sum (x - mean)^2 / (n - 1))``; NaN for fewer than two values."""
    if len(values) < 2 or any(math.isnan(value) for value in values):
        return NAN
    return statistics.stdev(values)


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Difference:
    """``second - first`` over the seeds that both have.

    ``mean(d) ± t(0.975, n - 1) s(d) / sqrt(n)`` with d the differences seed by seed, s their sample deviation:
    the interval of the paired t-test. Source: Student, "The Probable Error of a Mean" (1908).

    >>> found = paired({0: 0.5, 1: 0.6}, {0: 0.6, 1: 0.8, 2: 0.1})
    >>> found.seeds, round(found.mean, 6)
    ((0, 1), 0.15)
    """
    seeds = tuple(sorted(set(first) & set(second)))
    if not seeds:
        return Difference(seeds=(), base=NAN, mean=NAN, half_width=NAN, undefined="no seed in common")
    bases, others = [first[seed] for seed in seeds], [second[seed] for seed in seeds]
    differences = [other - base for base, other in zip(bases, others, strict=True)]
    center, spread, count = mean(differences), deviation(differences), len(seeds)
    half = _t_quantile(count - 1) * spread / math.sqrt(count) if count > 1 else NAN
    missing = next((s for s, d in zip(seeds, differences, strict=True) if math.isnan(d)), None)
    return Difference(
        seeds=seeds, base=mean(bases), mean=center, half_width=half,
        undefined="" if missing is None else f"seed {missing} has no number",
    )  # fmt: skip


def _t_quantile(freedom: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.5 + CONFIDENCE / 2))


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Points that no other beats: none costs at most as much and is at least as accurate. In order of cost.

    >>> pareto_front([Point(1, 0.5), Point(2, 0.4), Point(3, 0.9)])
    [Point(cost=1, accuracy=0.5, name=''), Point(cost=3, accuracy=0.9, name='')]
    """
    front: list[Point] = []
    defined = [p for p in points if not math.isnan(p.cost) and not math.isnan(p.accuracy)]
    for point in sorted(defined, key=lambda p: (p.cost, -p.accuracy)):
        if not front or point.accuracy > front[-1].accuracy:
            front.append(point)
    return front


def cost_at(points: Sequence[Point], accuracy: float) -> float:
    """The least mean cost at which these operating points reach ``accuracy``; NaN where they cannot.

    Sending a share w of the samples, drawn by lot, through one point and the others through another costs
    ``w c + (1 - w) c'`` and is right ``w a + (1 - w) a'`` of the time, so between two points the straight line is
    reached too. Nothing beyond the points is assumed.

    >>> cost_at([Point(10, 0.5), Point(20, 0.9)], 0.7)
    15.0
    """
    if math.isnan(accuracy):
        return NAN
    front = pareto_front(points)
    best = min((p.cost for p in front if p.accuracy >= accuracy), default=NAN)
    for low in front:
        for high in front:
            if low.accuracy < accuracy < high.accuracy:
                share = (accuracy - low.accuracy) / (high.accuracy - low.accuracy)
                best = min(best, low.cost + share * (high.cost - low.cost))
    return float(best)
