"""Predictions from the scores of all exits: the early-exit rule, its cost, and rules that use every exit.

Shape suffixes: B batch, C classes, K exits, N samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clframe.errors import ClframeError, ConfigError
from clframe.exits.policies import ConfidenceMeasure, ExitPolicy, Fallback, max_probability
from clframe.nn.exit_ensemble import Carried
from clframe.options import format_value


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExitEvaluation:
    """Confidence, correctness and cost of every exit on the samples of one evaluation.

    Tensors are on the CPU. Confidences are float64, so that a threshold taken from them is compared exactly; NaN
    becomes ``-inf``, which reaches no threshold, as NaN does in the network.

    Raises :class:`ClframeError` for arrays of different sizes, empty arrays, or costs that do not rise.

    >>> evaluation = ExitEvaluation(confidence_KN=torch.tensor([[0.9, 0.4], [0.8, 0.7]]),
    ...                             correct_KN=torch.tensor([[True, False], [True, True]]), cost_K=(10, 40))
    >>> evaluation.exits, evaluation.samples
    (2, 2)
    """

    confidence_KN: Tensor
    """Confidence of each exit's prediction under any measure that grows with certainty."""
    correct_KN: Tensor
    """Whether each exit's prediction is right."""
    cost_K: tuple[float, ...]
    """MACs of one sample up to and including exit k, with the heads passed on the way."""
    experience_N: Tensor | None = None
    """Test experience of each sample."""
    nll_KN: Tensor | None = None
    """Negative log-likelihood of each sample at each exit, in nats; None where it was not recorded."""
    brier_KN: Tensor | None = None
    """Brier score of each sample at each exit; None where it was not recorded."""

    def __post_init__(self) -> None:
        confidence_KN = torch.as_tensor(self.confidence_KN, dtype=torch.float64, device="cpu").detach()
        object.__setattr__(self, "confidence_KN", confidence_KN.nan_to_num(-math.inf, math.inf, -math.inf))
        object.__setattr__(self, "correct_KN", torch.as_tensor(self.correct_KN, dtype=torch.bool, device="cpu"))
        object.__setattr__(self, "cost_K", tuple(self.cost_K))
        if self.experience_N is not None:
            object.__setattr__(self, "experience_N", torch.as_tensor(self.experience_N, device="cpu").long())
        self._check()

    @property
    def exits(self) -> int:
        """Number of exits, K."""
        return len(self.cost_K)

    @property
    def samples(self) -> int:
        """Number of samples, N."""
        return self.correct_KN.shape[1]

    def of(self, experience: int) -> ExitEvaluation:
        """The samples of one test experience; raises :class:`ClframeError` where there are none."""
        if self.experience_N is None:
            raise ClframeError("exit evaluation: found no experience_N; give each sample's test experience")
        of_N = self.experience_N == experience
        return ExitEvaluation(
            confidence_KN=self.confidence_KN[:, of_N], correct_KN=self.correct_KN[:, of_N], cost_K=self.cost_K,
            experience_N=self.experience_N[of_N],
            nll_KN=None if self.nll_KN is None else self.nll_KN[:, of_N],
            brier_KN=None if self.brier_KN is None else self.brier_KN[:, of_N],
        )  # fmt: skip

    def most_confident_N(self) -> Tensor:
        """Index of the most confident exit of each sample, the earliest of equals."""
        highest_KN = self.confidence_KN == self.confidence_KN.amax(dim=0)
        return first_N(highest_KN)

    def correct_at(self, exit_N: Tensor) -> Tensor:
        """correct_N: whether the prediction of exit ``exit_N`` is right, for each sample."""
        return self.correct_KN.gather(0, exit_N[None])[0]

    def _check(self) -> None:
        shapes = tuple(self.confidence_KN.shape), tuple(self.correct_KN.shape)
        if len(shapes[0]) != 2 or shapes[0] != shapes[1] or 0 in shapes[0]:
            raise ClframeError(
                f"exit evaluation: found confidence_KN {shapes[0]}, correct_KN {shapes[1]}; "
                f"give both for every exit and sample"
            )
        exits, samples = shapes[0]
        if self.experience_N is not None and tuple(self.experience_N.shape) != (samples,):
            raise ClframeError(
                f"exit evaluation: found experience_N of shape {tuple(self.experience_N.shape)}; "
                f"give one number for each of {samples} samples"
            )
        if len(self.cost_K) != exits:
            raise ClframeError(f"exit evaluation: found {len(self.cost_K)} costs for {exits} exits; give one each")
        rising = all(a <= b for a, b in zip(self.cost_K, self.cost_K[1:], strict=False))
        if not (rising and self.cost_K[0] > 0 and self.cost_K[-1] < math.inf):
            raise ClframeError(
                f"exit evaluation: found costs {list(self.cost_K)}; give cumulative MACs, which rise with depth"
            )


def first_N(flags_KN: Tensor) -> Tensor:
    """Index of the first exit whose flag is set, for each sample; K where none is."""
    exits = flags_KN.shape[0]
    # not argmax, which promises no order among equal values
    return torch.where(flags_KN, torch.arange(exits)[:, None], exits).amin(dim=0)


def counts(flags_KN: Tensor) -> list[int]:
    """Number of flags set at each exit."""
    set_K: list[int] = flags_KN.sum(dim=1).tolist()
    return set_K


def ratio(part: int, whole: int) -> float:
    """``part / whole``; NaN where ``whole`` is 0."""
    return part / whole if whole else math.nan


ALWAYS, NEVER = -math.inf, math.inf
"""Thresholds that every confidence reaches, and that none reaches, under any measure."""


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """Exit at which each sample stops, which sets its cost, and exit whose prediction it receives."""

    stop_N: Tensor
    exit_N: Tensor
    """Equal to ``stop_N``, except with the fallback ``confident`` where no exit fired: the most confident exit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Accuracy, cost and exit usage under one choice of thresholds."""

    thresholds: tuple[float, ...]
    fallback: Fallback
    samples: int
    accuracy: float
    cost: float
    """Mean MACs per sample, in the unit of ``cost_K``: ``mean_n cost_K[stop_n]``."""
    share_K: tuple[float, ...]
    """Share of samples that each exit predicts."""
    accuracy_K: tuple[float, ...]
    """Accuracy of each exit on the samples that it predicts; NaN where there are none."""
    stop_share_K: tuple[float, ...]
    """Share of samples that stop at each exit. Differs from ``share_K`` with the fallback ``confident`` only, where
    an early exit may predict samples that reached the last exit at full cost."""


def decide(evaluation: ExitEvaluation, thresholds: Sequence[float], *, fallback: Fallback = "last") -> Decision:
    """Apply the rule: a sample stops at the first exit whose confidence is at least its threshold, else at the last.

    Reference for everything that skips computation. ``thresholds`` has one for each exit before the last. Raises
    :class:`ConfigError` where their number does not match, for NaN, or for an unknown fallback.
    """
    if fallback not in ("last", "confident"):
        raise ConfigError(f"fallback: found {format_value(fallback)}; give 'last' or 'confident'")
    if not isinstance(thresholds, (Sequence, Tensor, np.ndarray)):
        raise ConfigError(f"thresholds: found {format_value(thresholds)}; give a list, one for each exit but the last")
    if len(thresholds) != evaluation.exits - 1 or any(math.isnan(threshold) for threshold in thresholds):
        raise ConfigError(
            f"thresholds: found {list(thresholds)} for {evaluation.exits} exits; give a number for each but the last"
        )
    early_KN = evaluation.confidence_KN[:-1]
    fires_KN = (early_KN >= torch.tensor(thresholds, dtype=torch.float64)[:, None]) & (early_KN > ALWAYS)
    stop_N = first_N(torch.cat((fires_KN, torch.ones(1, evaluation.samples, dtype=torch.bool))))
    if fallback == "last":
        return Decision(stop_N, stop_N)
    return Decision(stop_N, torch.where(fires_KN.any(dim=0), stop_N, evaluation.most_confident_N()))


def evaluate_thresholds(
    evaluation: ExitEvaluation, thresholds: Sequence[float], *, fallback: Fallback = "last"
) -> Outcome:
    """Accuracy, cost and exit usage of :func:`decide` on these samples.

    >>> evaluation = ExitEvaluation(confidence_KN=torch.tensor([[0.9, 0.4], [0.8, 0.7]]),
    ...                             correct_KN=torch.tensor([[True, False], [True, True]]), cost_K=(10, 40))
    >>> outcome = evaluate_thresholds(evaluation, [0.5])
    >>> outcome.cost, outcome.accuracy, outcome.share_K
    (25.0, 1.0, (0.5, 0.5))
    """
    decision = decide(evaluation, thresholds, fallback=fallback)
    at_KN = torch.arange(evaluation.exits)[:, None]
    right_N = evaluation.correct_at(decision.exit_N)
    predicted_K = counts(decision.exit_N == at_KN)
    right_K = counts((decision.exit_N == at_KN) & right_N)
    stopped_K = (decision.stop_N == at_KN).sum(dim=1)
    return Outcome(
        thresholds=tuple(float(threshold) for threshold in thresholds), fallback=fallback, samples=evaluation.samples,
        accuracy=int(right_N.sum()) / evaluation.samples,
        cost=float(mean_cost(stopped_K[:, None], evaluation.cost_K)),
        share_K=tuple(predicted / evaluation.samples for predicted in predicted_K),
        accuracy_K=tuple(ratio(right, predicted) for right, predicted in zip(right_K, predicted_K, strict=True)),
        stop_share_K=tuple(stopped / evaluation.samples for stopped in stopped_K.tolist()),
    )  # fmt: skip


def mean_cost(stopped_KP: Tensor, cost_K: Sequence[float]) -> Tensor:
    """Mean cost of a sample for P choices of thresholds, of which ``stopped_KP`` samples stop at exit k.

    Integer costs are added exactly, and where all samples stop at one exit the mean is exactly its cost, so a budget
    met to the last unit counts as met. Equal counts give equal numbers.
    """
    samples_P = stopped_KP.sum(dim=0)
    total_P = torch.zeros(stopped_KP.shape[1], dtype=torch.float64)
    for stopped_P, cost in zip(stopped_KP, cost_K, strict=True):
        total_P += stopped_P.double() * float(cost)
    mean_P = total_P / samples_P
    for stopped_P, cost in zip(stopped_KP, cost_K, strict=True):
        mean_P[stopped_P == samples_P] = float(cost)  # 3 * 0.7 / 3 is not 0.7
    return mean_P


class Prediction(NamedTuple):
    """Scores that a policy or static rule selects, and the exit they are from."""

    scores_BC: Tensor
    """Arg-max is the predicted class, softmax its probability."""
    exit_B: Tensor
    """Index of the exit that predicts; the last one where a rule combines all exits."""


def last(scores: Sequence[Tensor]) -> Prediction:
    """The last exit."""
    return _together(scores[-1], exits=len(scores))


def confident(scores: Sequence[Tensor], *, measure: ConfidenceMeasure = max_probability) -> Prediction:
    """The most confident exit, the first of equals (Szatkowski et al., auxiliary classifiers, 2024).

    >>> confident([torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])]).exit_B
    tensor([0])
    """
    return select(scores, ExitPolicy(measure=measure, thresholds=float("inf"), fallback="confident"))


def mean(scores: Sequence[Tensor]) -> Prediction:
    """The logarithm of the mean of the exits' probabilities.

    >>> mean([torch.zeros(1, 2), torch.tensor([[float("-inf"), 0.0]])]).scores_BC.exp()
    tensor([[0.2500, 0.7500]])
    """
    return _together(torch.stack([s.softmax(1) for s in scores]).mean(0).log(), exits=len(scores))


def vote(scores: Sequence[Tensor]) -> Prediction:
    """The class that most exits predict.

    Ties are resolved by the highest probability that an exit gave the class, then by the lowest class index. The
    scores are logarithms of the votes plus half that probability.

    >>> left, right = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    >>> vote([left, right]).scores_BC.argmax(1), vote([left, left, right]).scores_BC.argmax(1)
    (tensor([1]), tensor([0]))
    """
    top = [scores_BC.softmax(1).max(1, keepdim=True) for scores_BC in scores]
    probability_BK = torch.cat([probability_B1 for probability_B1, _ in top], 1)
    class_BK = torch.cat([class_B1 for _, class_B1 in top], 1)
    none_BC = probability_BK.new_zeros(scores[-1].shape)
    votes_BC = none_BC.scatter_add(1, class_BK, torch.ones_like(probability_BK))
    highest_BC = none_BC.scatter_reduce(1, class_BK, probability_BK, reduce="amax")
    return _together((votes_BC + highest_BC / 2).log(), exits=len(scores))


STATIC: Mapping[str, Callable[[Sequence[Tensor]], Prediction]] = MappingProxyType(
    {"last": last, "confident": confident, "mean": mean, "vote": vote}
)
"""Rules that combine the scores of all exits, by name."""


def oracle(scores: Sequence[Tensor], targets_B: Tensor) -> Prediction:
    """The first exit that is right, else the last: an upper bound for analysis, since it uses the targets.

    >>> oracle([torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])], torch.tensor([1])).exit_B
    tensor([1])
    """
    right_KB = torch.stack([scores_BC.argmax(1) == targets_B for scores_BC in scores])
    right_KB[-1] = True
    return _pick(scores, right_KB.int().argmax(0))


def select(scores: Sequence[Tensor], policy: ExitPolicy, *, exits: Collection[int] | None = None) -> Prediction:
    """Predictions of an exit policy from the scores of all exits.

    Args:
        scores: K tensors scores_BC, the logits of each exit after corrections and ensembles.
        policy: The exit policy.
        exits: Indices of the exits that may stop a sample, all if not given; the last always may.

    Raises:
        ConfigError: The number of thresholds does not match the number of exits.

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
    answering = policy.answering_exits(count, among=exits)
    for exit in policy.confidence_exits(count, among=exits):
        confidence_B, carried = policy.measure(exit, scores[exit], carried)
        if exit not in answering:
            continue
        takes_B = torch.zeros_like(done_B)
        if policy.fallback == "confident":
            takes_B = confidence_B > best_B
            best_B = torch.where(takes_B, confidence_B.double(), best_B)
        fires_B = confidence_B >= thresholds[exit] if exit < count - 1 else takes_B
        exit_B = torch.where((takes_B | fires_B) & ~done_B, exit, exit_B)
        done_B |= fires_B
    return _pick(scores, exit_B)


def _pick(scores: Sequence[Tensor], exit_B: Tensor) -> Prediction:
    """The scores of each sample at its exit."""
    scores_KBC = torch.stack(list(scores))
    return Prediction(scores_KBC[exit_B, torch.arange(exit_B.shape[0], device=exit_B.device)], exit_B)


def _together(scores_BC: Tensor, *, exits: int) -> Prediction:
    return Prediction(scores_BC, scores_BC.new_full(scores_BC.shape[:1], exits - 1, dtype=torch.long))
