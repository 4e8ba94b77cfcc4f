"""Policies: how sure an exit is, and from when on that is enough.

A measure of confidence works exit by exit and carries what it needs from one to the next, batch first, so
the same code serves cached scores and a batch that shrinks while it runs. Every confidence lies in [0, 1].

Shape suffixes: B batch, C classes, K exits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import isnan
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from clframe.errors import ConfigError
from clframe.nn.exits.ensemble import Carried

Measure = Callable[[int, Tensor, Carried], tuple[Tensor, Carried]]
"""``(exit, scores_BC, carried) -> (confidence_B, carried)``, with what the call at the exit before returned,
empty at first. Only exits that are asked are passed through it, see :meth:`ExitPolicy.asked`."""

Fallback = Literal["last", "confident"]


def max_probability(exit: int, scores_BC: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
    """Probability of the likeliest class (Kaya et al., "Shallow-Deep Networks", 2019).

    >>> max_probability(0, torch.tensor([[0.0, 0.0], [0.0, float("-inf")]]), ())[0]
    tensor([0.5000, 1.0000])
    """
    return _probabilities(scores_BC).amax(1), ()


def entropy(exit: int, scores_BC: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
    """``1 - H(p) / log C``, C the classes met; 1 is certain, 0 all alike (Teerapittayanon et al., "BranchyNet", 2016).

    >>> entropy(0, torch.tensor([[0.0, 0.0], [0.0, float("-inf")]]), ())[0]
    tensor([0., 1.])
    """
    met_B = scores_BC.isneginf().logical_not_().sum(1).clamp_(min=2)  # one class: H is 0 whatever it is divided by
    entropy_B = torch.special.entr(_probabilities(scores_BC)).sum(1)
    return (1 - entropy_B / met_B.log()).clamp_(0, 1), ()


def margin(exit: int, scores_BC: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
    """Probability of the likeliest class minus that of the next; 1 where there is only one class.

    >>> margin(0, torch.tensor([[0.0, 0.0], [0.0, float("-inf")]]), ())[0]
    tensor([0., 1.])
    """
    top = _probabilities(scores_BC).topk(min(2, scores_BC.shape[1]), dim=1).values
    return (top[:, 0] - top[:, 1] if top.shape[1] > 1 else top[:, 0]), ()


def patience(exit: int, scores_BC: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
    """``(n - 1) / n``, n the length of the run of exits, up to this one, that name one and the same class.

    To wait until p exits agree with the one before them (Zhou et al., "BERT loses patience", 2020) is the
    threshold ``p / (p + 1)``, see :func:`patience_threshold`. No run of exits reaches 1.

    >>> first, carried = patience(0, torch.tensor([[2.0, 1.0], [2.0, 1.0]]), ())
    >>> first, patience(1, torch.tensor([[2.0, 1.0], [1.0, 2.0]]), carried)[0]
    (tensor([0., 0.]), tensor([0.5000, 0.0000]))
    """
    class_B = scores_BC.argmax(1)
    run_B = torch.ones_like(class_B)
    if carried:
        before_B, length_B = carried
        run_B += length_B * (class_B == before_B)
    return (run_B - 1).float() / run_B, (class_B, run_B)


def patience_threshold(agreements: int) -> float:
    """Threshold at which :func:`patience` has seen ``agreements`` exits agree with the one before.

    >>> patience_threshold(0), patience_threshold(1)
    (0.0, 0.5)
    """
    return agreements / (agreements + 1)


MEASURES: Mapping[str, Measure] = MappingProxyType(
    {"max_probability": max_probability, "entropy": entropy, "margin": margin, "patience": patience}
)
"""Measures without parameters, by name. :class:`clframe.nn.exits.gate.Gate` is fitted first."""


@dataclass(frozen=True, kw_only=True)
class ExitPolicy:
    """Who answers: the first exit whose confidence reaches its threshold.

    Threshold 0 makes the first exit answer. A threshold above 1 never fires; where the last exit answers for
    those left over, such an exit is not even asked.

    Args:
        measure: What confidence is.
        thresholds: One for all exits before the last, or one for each of them.
        fallback: What answers where no exit fires: the ``last`` exit, or the most ``confident`` of all, the last
            among them; of equally confident ones the first.

    Raises:
        ConfigError: A threshold that is not a number, or an unknown fallback.

    >>> ExitPolicy(thresholds=0.9).of_exits(3)
    (0.9, 0.9)
    """

    measure: Measure = max_probability
    thresholds: float | tuple[float, ...]
    fallback: Fallback = "last"

    def __post_init__(self) -> None:
        thresholds = self.thresholds if isinstance(self.thresholds, tuple) else (self.thresholds,)
        if any(isnan(threshold) for threshold in thresholds):
            raise ConfigError(f"policy: found thresholds {self.thresholds}; give numbers")
        if self.fallback not in ("last", "confident"):
            raise ConfigError(f"policy: found fallback {self.fallback!r}; give 'last' or 'confident'")

    def of_exits(self, exits: int) -> tuple[float, ...]:
        """The threshold of each of ``exits`` exits but the last.

        Raises:
            ConfigError: Another number of thresholds.
        """
        if not isinstance(self.thresholds, tuple):
            return (float(self.thresholds),) * (exits - 1)
        if len(self.thresholds) != exits - 1:
            raise ConfigError(
                f"policy: found {len(self.thresholds)} thresholds for {exits} exits; give one, or one for each "
                "exit but the last"
            )
        return self.thresholds

    def asked(self, exits: int, *, among: Collection[int] | None = None) -> tuple[int, ...]:
        """Numbers of the exits whose confidence counts, in order.

        These are the exits whose threshold can fire; with the fallback ``confident`` they are all exits, the
        last too.

        Args:
            exits: Number of exits K, the last included.
            among: Exits that may be asked, all if not given; the last always may.

        >>> policy = ExitPolicy(thresholds=(0.5, 2.0, 0.5))
        >>> policy.asked(4), policy.asked(4, among=[0, 1])
        ((0, 2), (0,))
        """
        thresholds, last = self.of_exits(exits), exits - 1
        every = self.fallback == "confident"
        allowed = [exit for exit in range(last) if among is None or exit in among]
        return (*(exit for exit in allowed if every or thresholds[exit] <= 1), *((last,) if every else ()))


def _probabilities(scores_BC: Tensor) -> Tensor:
    """probabilities_BC in single precision at least: half precision could not tell 0.999 from 1."""
    return scores_BC.softmax(1) if scores_BC.dtype == torch.float64 else scores_BC.float().softmax(1)
