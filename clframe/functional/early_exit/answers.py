"""The answers of every exit on every sample of one evaluation.

Shape suffixes: K exits in order of depth (the last is the backbone's own), N samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from clframe.errors import ClframeError


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
