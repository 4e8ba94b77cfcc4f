"""Decisions from all exits: early exit by thresholds, and decisions that compute every exit.

Shape suffixes: B batch, C classes, K exits, N samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from clframe.errors import ClframeError, ConfigError
from clframe.exits.policies import ExitPolicy, Measure, max_probability
from clframe.nn.network import Carried


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExitAnswers:
    """How sure and how right every exit was on every sample of one evaluation, and what its answer costs.

    Kept on the CPU; confidences as float64, so that a threshold taken from them is compared exactly. A
    confidence that is NaN becomes ``-inf``, which reaches no threshold, as NaN would in the network.

    Raises :class:`ClframeError` for arrays of different sizes, none at all, or costs that do not rise.

    >>> answers = ExitAnswers(confidence_KN=torch.tensor([[0.9, 0.4], [0.8, 0.7]]),
    ...                       correct_KN=torch.tensor([[True, False], [True, True]]), cost_K=(10, 40))
    >>> answers.exits, answers.samples
    (2, 2)
    """

    confidence_KN: Tensor
    """Of each exit's own answer, under any measure that grows with certainty."""
    correct_KN: Tensor
    """Whether each exit's answer is right."""
    cost_K: tuple[float, ...]
    """MACs spent on one sample to answer at exit k, the heads passed on the way included."""
    experience_N: Tensor | None = None
    """Test experience of each sample."""

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

    def of(self, experience: int) -> ExitAnswers:
        """The samples of one test experience; raises :class:`ClframeError` where there are none."""
        if self.experience_N is None:
            raise ClframeError("exit answers: experience_N was not given; give each sample's test experience")
        of_N = self.experience_N == experience
        return ExitAnswers(
            confidence_KN=self.confidence_KN[:, of_N], correct_KN=self.correct_KN[:, of_N], cost_K=self.cost_K,
            experience_N=self.experience_N[of_N],
        )  # fmt: skip

    def most_confident_N(self) -> Tensor:
        """The most confident exit of each sample, the earliest of equals."""
        highest_KN = self.confidence_KN == self.confidence_KN.amax(dim=0)
        return first_N(highest_KN)

    def right_N(self, answer_N: Tensor) -> Tensor:
        """Whether the answer of exit ``answer_N`` is right, for each sample."""
        return self.correct_KN.gather(0, answer_N[None])[0]

    def _check(self) -> None:
        shapes = tuple(self.confidence_KN.shape), tuple(self.correct_KN.shape)
        if len(shapes[0]) != 2 or shapes[0] != shapes[1] or 0 in shapes[0]:
            raise ClframeError(
                f"exit answers: confidence_KN {shapes[0]}, correct_KN {shapes[1]}; give both for every exit and sample"
            )
        exits, samples = shapes[0]
        if self.experience_N is not None and tuple(self.experience_N.shape) != (samples,):
            raise ClframeError(f"exit answers: experience_N is not one number for each of {samples} samples; give it")
        if len(self.cost_K) != exits:
            raise ClframeError(f"exit answers: {len(self.cost_K)} costs for {exits} exits; give one each")
        rising = all(a <= b for a, b in zip(self.cost_K, self.cost_K[1:], strict=False))
        if not (rising and self.cost_K[0] > 0 and self.cost_K[-1] < math.inf):
            raise ClframeError(f"exit answers: costs {list(self.cost_K)}; give cumulative MACs, which rise with depth")


def first_N(flags_KN: Tensor) -> Tensor:
    """The first exit whose flag is set, for each sample; K where none is.

    (``Tensor.argmax`` promises no order among equals.)
    """
    exits = flags_KN.shape[0]
    return torch.where(flags_KN, torch.arange(exits)[:, None], exits).amin(dim=0)


def counts(flags_KN: Tensor) -> list[int]:
    """How many flags are set at each exit."""
    set_K: list[int] = flags_KN.sum(dim=1).tolist()
    return set_K


def ratio(part: int, whole: int) -> float:
    """``part / whole``; NaN where there is no whole."""
    return part / whole if whole else math.nan


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
