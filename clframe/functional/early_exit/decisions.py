"""Who answers: early exit by thresholds, computed on stored confidences.

The plain reference for inference that really skips computation, and what thresholds are judged by.

Shape suffixes: K exits in order of depth, N samples, P choices of thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clframe.errors import ConfigError
from clframe.functional.early_exit.answers import ExitAnswers, counts, first_N, ratio

Fallback = Literal["last", "confident"]
"""Who answers where no exit before the last was sure: the last exit, or the most confident of all."""

ALWAYS, NEVER = -math.inf, math.inf
"""Thresholds that every confidence reaches and that none does, whatever the measure."""


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """Where each sample stops, which is what it costs, and which exit's answer it is given."""

    stop_N: Tensor
    answer_N: Tensor
    """``stop_N``, but the most confident exit where none was sure and that is the fallback."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Who answers under one choice of thresholds, how well, and at which cost."""

    thresholds: tuple[float, ...]
    fallback: Fallback
    samples: int
    accuracy: float
    cost: float
    """Mean MACs a sample, in the unit of ``cost_K``: ``mean_n cost_K[stop_n]``."""
    share_K: tuple[float, ...]
    """Samples that each exit answers."""
    accuracy_K: tuple[float, ...]
    """Accuracy on the samples that each exit answers; NaN where it answers none."""
    stop_share_K: tuple[float, ...]
    """Samples that stop at each exit. With the fallback ``confident`` an early exit may answer what went on to
    the last exit, at full cost; otherwise this is ``share_K``."""


def decide(answers: ExitAnswers, thresholds: Sequence[float], *, fallback: Fallback = "last") -> Decision:
    """The rule: a sample stops at the first exit whose confidence is at least its threshold, else at the last.

    This is the plain reference for everything that skips computation. ``thresholds`` holds one for each exit
    before the last. Raises :class:`ConfigError` for another number of them, or NaN.
    """
    if len(thresholds) != answers.exits - 1 or any(math.isnan(threshold) for threshold in thresholds):
        raise ConfigError(
            f"thresholds: {list(thresholds)} for {answers.exits} exits; give a number for each but the last"
        )
    early_KN = answers.confidence_KN[:-1]
    sure_KN = (early_KN >= torch.tensor(thresholds, dtype=torch.float64)[:, None]) & (early_KN > ALWAYS)
    stop_N = first_N(torch.cat((sure_KN, torch.ones(1, answers.samples, dtype=torch.bool))))
    if fallback == "last":
        return Decision(stop_N, stop_N)
    return Decision(stop_N, torch.where(sure_KN.any(dim=0), stop_N, answers.most_confident_N()))


def who_answers(answers: ExitAnswers, thresholds: Sequence[float], *, fallback: Fallback = "last") -> Outcome:
    """What comes of :func:`decide` on these samples.

    >>> answers = ExitAnswers(confidence_KN=torch.tensor([[0.9, 0.4], [0.8, 0.7]]),
    ...                       correct_KN=torch.tensor([[True, False], [True, True]]), cost_K=(10, 40))
    >>> outcome = who_answers(answers, [0.5])
    >>> outcome.cost, outcome.accuracy, outcome.share_K
    (25.0, 1.0, (0.5, 0.5))
    """
    decision = decide(answers, thresholds, fallback=fallback)
    at_KN = torch.arange(answers.exits)[:, None]
    right_N = answers.right_N(decision.answer_N)
    answered_K = counts(decision.answer_N == at_KN)
    right_K = counts((decision.answer_N == at_KN) & right_N)
    stopped_K = (decision.stop_N == at_KN).sum(dim=1)
    return Outcome(
        thresholds=tuple(float(threshold) for threshold in thresholds), fallback=fallback, samples=answers.samples,
        accuracy=int(right_N.sum()) / answers.samples,
        cost=float(mean_cost(stopped_K[:, None], answers.cost_K)),
        share_K=tuple(answered / answers.samples for answered in answered_K),
        accuracy_K=tuple(ratio(right, answered) for right, answered in zip(right_K, answered_K, strict=True)),
        stop_share_K=tuple(stopped / answers.samples for stopped in stopped_K.tolist()),
    )  # fmt: skip


def mean_cost(stopped_KP: Tensor, cost_K: Sequence[float]) -> Tensor:
    """Mean cost of a sample, for P choices: ``stopped_KP`` of the samples stop at exit k.

    Whole costs are added exactly, and one exit alone costs exactly what it does, so a budget met to the last unit
    is met; the same counts give the same number wherever they come from.
    """
    samples_P = stopped_KP.sum(dim=0)
    total_P = torch.zeros(stopped_KP.shape[1], dtype=torch.float64)
    for stopped_P, cost in zip(stopped_KP, cost_K, strict=True):
        total_P += stopped_P.double() * float(cost)
    mean_P = total_P / samples_P
    for stopped_P, cost in zip(stopped_KP, cost_K, strict=True):
        mean_P[stopped_P == samples_P] = float(cost)  # 3 * 0.7 / 3 is not 0.7
    return mean_P
