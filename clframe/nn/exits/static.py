"""Answers from the scores of all exits, everything computed.

:func:`select` is the plain reference of dynamic inference: same rule, nothing skipped.

Shape suffixes: B batch, C classes, K exits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from clframe.nn.exits.ensemble import Carried
from clframe.nn.exits.policies import ExitPolicy, Measure, max_probability


class Answer(NamedTuple):
    """What a network with exits answers."""

    scores_BC: Tensor
    """Their arg-max is the class, their softmax its probability."""
    exit_B: Tensor
    """Number of the exit that answers; the last where all of them do together."""


def last(scores: Sequence[Tensor]) -> Answer:
    """The last exit."""
    return _together(scores[-1], exits=len(scores))


def confident(scores: Sequence[Tensor], *, measure: Measure = max_probability) -> Answer:
    """The most confident exit, the first of equals (Szatkowski et al., auxiliary classifiers, 2024).

    >>> confident([torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])]).exit_B
    tensor([0])
    """
    return select(scores, ExitPolicy(measure=measure, thresholds=float("inf"), fallback="confident"))


def mean(scores: Sequence[Tensor]) -> Answer:
    """The logarithm of the mean of the exits' probabilities.

    >>> mean([torch.zeros(1, 2), torch.tensor([[float("-inf"), 0.0]])]).scores_BC.exp()
    tensor([[0.2500, 0.7500]])
    """
    return _together(torch.stack([s.softmax(1) for s in scores]).mean(0).log(), exits=len(scores))


def vote(scores: Sequence[Tensor]) -> Answer:
    """The class that most exits name.

    Of classes with as many votes, the one that an exit named with the highest probability, then the lowest.
    The scores are logarithms of the votes, each class with half that probability on top for the ties.

    >>> left, right = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    >>> vote([left, right]).scores_BC.argmax(1), vote([left, left, right]).scores_BC.argmax(1)
    (tensor([1]), tensor([0]))
    """
    sure = [scores_BC.softmax(1).max(1, keepdim=True) for scores_BC in scores]
    probability_BK = torch.cat([probability_B1 for probability_B1, _ in sure], 1)
    class_BK = torch.cat([class_B1 for _, class_B1 in sure], 1)
    none_BC = probability_BK.new_zeros(scores[-1].shape)
    votes_BC = none_BC.scatter_add(1, class_BK, torch.ones_like(probability_BK))
    surest_BC = none_BC.scatter_reduce(1, class_BK, probability_BK, reduce="amax")
    return _together((votes_BC + surest_BC / 2).log(), exits=len(scores))


STATIC: Mapping[str, Callable[[Sequence[Tensor]], Answer]] = MappingProxyType(
    {"last": last, "confident": confident, "mean": mean, "vote": vote}
)
"""Decisions from the scores of all exits, by name."""


def oracle(scores: Sequence[Tensor], targets_B: Tensor) -> Answer:
    """The first exit that is right, else the last: a bound for analysis, since it looks at the targets.

    >>> oracle([torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])], torch.tensor([1])).exit_B
    tensor([1])
    """
    right_KB = torch.stack([scores_BC.argmax(1) == targets_B for scores_BC in scores])
    right_KB[-1] = True
    return _pick(scores, right_KB.int().argmax(0))


def select(scores: Sequence[Tensor], policy: ExitPolicy, *, exits: Collection[int] | None = None) -> Answer:
    """The answers of a policy when all exits have been computed.

    Args:
        scores: K tensors scores_BC, what each exit answers with.
        policy: Which exit answers.
        exits: Numbers of the exits that are asked, all if not given; the last always is.

    Raises:
        ConfigError: As many thresholds as there are exits to check were not given.

    >>> scores = [torch.tensor([[2.0, 0.0], [0.1, 0.0]]), torch.zeros(2, 2)]
    >>> select(scores, ExitPolicy(thresholds=0.8)).exit_B
    tensor([0, 1])
    """
    count = len(scores)
    thresholds = policy.of_exits(count)
    carried: Carried = ()
    exit_B = scores[-1].new_full(scores[-1].shape[:1], count - 1, dtype=torch.long)
    best_B = scores[-1].new_full(exit_B.shape, -1.0, dtype=torch.float64)
    done_B = torch.zeros_like(exit_B, dtype=torch.bool)
    for exit in policy.asked(count, among=exits):
        confidence_B, carried = policy.measure(exit, scores[exit], carried)
        takes_B = torch.zeros_like(done_B)
        if policy.fallback == "confident":
            takes_B = confidence_B > best_B
            best_B = torch.where(takes_B, confidence_B.double(), best_B)
        fires_B = confidence_B >= thresholds[exit] if exit < count - 1 else takes_B
        exit_B = torch.where((takes_B | fires_B) & ~done_B, exit, exit_B)
        done_B |= fires_B
    return _pick(scores, exit_B)


def _pick(scores: Sequence[Tensor], exit_B: Tensor) -> Answer:
    """The scores of each sample's exit."""
    scores_KBC = torch.stack(list(scores))
    return Answer(scores_KBC[exit_B, torch.arange(len(exit_B), device=exit_B.device)], exit_B)


def _together(scores_BC: Tensor, *, exits: int) -> Answer:
    return Answer(scores_BC, scores_BC.new_full(scores_BC.shape[:1], exits - 1, dtype=torch.long))
