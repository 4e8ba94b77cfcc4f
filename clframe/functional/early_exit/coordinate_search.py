"""Thresholds per exit, improved one at a time.

Shape suffixes: K exits, N samples, M samples that arrive at an exit, P choices for one threshold.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clframe.functional.early_exit.answers import ExitAnswers
from clframe.functional.early_exit.curves import Goal
from clframe.functional.early_exit.decisions import ALWAYS, NEVER, Fallback, decide, mean_cost

ROUNDS = 20
"""Bound on the passes over all exits; a few are usual."""


def coordinate_thresholds(
    answers: ExitAnswers, goal: Goal, start: Sequence[float], *, fallback: Fallback = "last", rounds: int = ROUNDS
) -> tuple[float, ...]:
    """From ``start``, exit by exit the best threshold with all others fixed, until a pass improves nothing.

    Every value that makes a difference is tried at each exit and taken only where it is strictly better for
    ``goal``, so the result is never worse than ``start``, which must satisfy the goal, and depends on nothing but
    the samples. It is a local optimum: no single threshold can be improved, several together perhaps.
    """
    thresholds = [float(threshold) for threshold in start]
    for _ in range(rounds):
        before = list(thresholds)
        for k in range(answers.exits - 1):
            thresholds[k] = _best_at(answers, goal, thresholds, k, fallback)
        if thresholds == before:
            break
    return tuple(thresholds)


def choices_at(
    answers: ExitAnswers, thresholds: Sequence[float], exit: int, *, fallback: Fallback = "last"
) -> tuple[Tensor, Tensor, Tensor]:
    """``(thresholds_P, cost_P, accuracy_P)`` of every threshold of one exit, the others fixed.

    In falling order from :data:`NEVER` to the lowest confidence, so that every choice lets a few more of the
    arriving samples leave: what they cost and got right behind this exit is replaced by what they do at it.
    """
    closed = [NEVER if k == exit else threshold for k, threshold in enumerate(thresholds)]
    behind = decide(answers, closed, fallback=fallback)
    stops_KN = behind.stop_N == torch.arange(answers.exits)[:, None]
    right_N = answers.right_N(behind.answer_N).long()
    confidence_N = answers.confidence_KN[exit]
    arriving_M = ((behind.stop_N > exit) & (confidence_N > ALWAYS)).nonzero()[:, 0]
    ordered_M, order_M = confidence_N[arriving_M].sort(descending=True, stable=True)
    arriving_M = arriving_M[order_M]

    last_of_equals_M = torch.ones(len(ordered_M), dtype=torch.bool)
    last_of_equals_M[:-1] = ordered_M[:-1] != ordered_M[1:]
    leaving_P = torch.cat((torch.zeros(1, dtype=torch.int64), last_of_equals_M.nonzero()[:, 0] + 1))
    thresholds_P = torch.cat((torch.tensor([NEVER], dtype=torch.float64), ordered_M[last_of_equals_M]))

    stopped_KP = stops_KN.sum(dim=1)[:, None] - _sums_up_to(stops_KN[:, arriving_M])[:, leaving_P]
    stopped_KP[exit] += leaving_P
    gain_M = answers.correct_KN[exit, arriving_M].long() - right_N[arriving_M]
    right_P = right_N.sum() + _sums_up_to(gain_M[None])[0, leaving_P]
    return thresholds_P, mean_cost(stopped_KP, answers.cost_K), right_P.double() / answers.samples


def _best_at(answers: ExitAnswers, goal: Goal, thresholds: list[float], exit: int, fallback: Fallback) -> float:
    current = thresholds[exit]
    thresholds_P, cost_P, accuracy_P = choices_at(answers, thresholds, exit, fallback=fallback)
    best = goal.best(cost_P, accuracy_P)
    now = int((thresholds_P >= current).sum()) - 1  # lets those leave who leave under the current threshold
    if best is None or (accuracy_P[best], cost_P[best]) == (accuracy_P[now], cost_P[now]):
        return current
    # all who arrive leave: nothing says below which confidence one should go on
    return ALWAYS if best > 0 and best == len(thresholds_P) - 1 else float(thresholds_P[best])


def _sums_up_to(values_KM: Tensor) -> Tensor:
    """Sums of the first 0, 1, ..., M values of each row."""
    zero_K1 = torch.zeros(len(values_KM), 1, dtype=torch.int64)
    return torch.cat((zero_K1, values_KM.long().cumsum(dim=1)), dim=1)
