"""Statistics of a report.

Over seeds: means, sample standard deviations (n - 1), paired differences with Student's t intervals. Over operating
points, which are pairs of cost and accuracy: the Pareto front and the cost at a given accuracy.
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
    """An operating point: mean MACs per sample, and accuracy."""

    cost: float
    accuracy: float
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A paired difference over common seeds; NaN where undefined."""

    seeds: tuple[int, ...]
    base: float
    """Mean of the first group over these seeds."""
    mean: float
    half_width: float
    """Half width of the 95 % confidence interval around ``mean``."""
    undefined: str = ""

    @property
    def relative(self) -> float:
        """``mean / base``; NaN for a base of 0."""
        return self.mean / self.base if self.base else NAN


def mean(values: Sequence[float]) -> float:
    """Compute the arithmetic mean; NaN if any value is NaN or there are none.

    >>> mean([0.5, 0.25]), mean([0.5, float("nan")])
    (0.375, nan)
    """
    return math.fsum(values) / len(values) if values else NAN


def deviation(values: Sequence[float]) -> float:
    """Compute the sample standard deviation, ``sqrt(sum (x - mean)^2 / (n - 1))``; NaN for fewer than two values."""
    if len(values) < 2 or any(math.isnan(value) for value in values):
        return NAN
    return statistics.stdev(values)


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Difference:
    """Compute ``second - first`` over common seeds.

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
    """Return the points that no other dominates in cost and accuracy, in order of cost.

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
    """Compute the lowest mean cost at which these operating points reach ``accuracy``; NaN where they cannot.

    Assigning a random share w of the samples to one point and the others to another costs ``w c + (1 - w) c'`` with
    accuracy ``w a + (1 - w) a'``, so every point on the straight line between two points is reached too.

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
