"""Scores of a model in a sweep of masks: values of samples or tokens, and the loss of score that is tolerated.

Shape suffixes: N scored tokens or samples, V vocabulary or classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from clframe.data.choices import Choices, right_choices
from clframe.data.target import IGNORED
from clframe.errors import ConfigError, DivergenceError
from clframe.functional.chance import above_chance, chance_limit
from clframe.functional.language import Likelihood, perplexity, token_nll

ScoreName = Literal["accuracy", "perplexity", "agreement", "choices", "choices_normalized"]
SCORES: tuple[ScoreName, ...] = get_args(ScoreName)

NEAR_CHANCE = 0.25
"""Nats per token: a perplexity is near the vocabulary size if its logarithm is at most this below the size's."""


ROWS = 1024
"""Tokens whose log-likelihoods are computed together."""


def token_values(score: ScoreName, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Value of each token, higher is better: 1 if its target has the largest logit, else 0; or its log-likelihood."""
    if score != "perplexity":
        return (logits_NV.argmax(-1) == targets_N).float()
    # In parts: the softmax in float32 needs twice the memory of the logits, which may be several GB.
    parts = zip(logits_NV.split(ROWS), targets_N.split(ROWS), strict=True)
    return -torch.cat([token_nll(own_NV, own_N) for own_NV, own_N in parts])


def choice_values(logits_NV: Tensor, targets_BT: Tensor, choices: Choices, *, normalized: bool) -> Tensor:
    """Value of each question, see :func:`~clframe.data.choices.right_choices`, from logits at all targets."""
    valid_BT = targets_BT != IGNORED
    values_N = token_values("perplexity", logits_NV, targets_BT[valid_BT]).double()
    sum_B = values_N.new_zeros(len(targets_BT)).index_add_(0, valid_BT.nonzero()[:, 0], values_N)
    return right_choices(sum_B, choices, normalized=normalized)


def choice_note(accuracy: float, counts: Sequence[int]) -> str:
    """Warning that an accuracy on questions is not significantly above that of guessing; empty if it is.

    See :func:`~clframe.functional.chance.chance_limit`.

    >>> choice_note(0.9, [2] * 50), choice_note(0.5, [2] * 50)[:50]
    ('', 'the dense model answers 50.0 % of 50 questions rig')
    """
    guess = sum(1 / count for count in counts) / len(counts)
    limit = chance_limit(guess, len(counts))
    if accuracy > limit:
        return ""
    return (
        f"the dense model answers {100 * accuracy:.1f} % of {len(counts)} questions right, not clearly above "
        f"the {100 * guess:.1f} % of guessing (clear is more than {100 * limit:.1f} %, one-sided at 95 %): scores of "
        f"changed models may have no meaning"
    )


def reported_score(score: ScoreName, mean: float) -> float:
    """Score of a mean of :func:`token_values`.

    >>> reported_score("perplexity", 0.0), reported_score("accuracy", 0.5)
    (1.0, 0.5)
    """
    return perplexity(-mean) if score == "perplexity" else mean


def lowest_mean(score: ScoreName, dense: float, *, share: float) -> float:
    """The lowest mean of :func:`token_values` within the tolerance, a loss of ``1 - share`` relative to the dense one.

    Accuracy must be at least ``share * dense``, perplexity at most ``(2 - share) * dense``.

    Args:
        score: Its name.
        dense: Mean of the dense model.
        share: 1 minus the tolerance.

    Raises:
        ConfigError: An accuracy of 0, of which no share can be lost.
        DivergenceError: A likelihood that is not finite.

    >>> round(math.exp(-lowest_mean("perplexity", -math.log(20), share=0.99)), 6)
    20.2
    """
    if score == "perplexity":
        if not math.isfinite(dense):
            raise DivergenceError(f"--score: found {-dense} nats per token of the dense model; check its weights")
        return dense - math.log(2 - share)
    if not dense > 0:
        raise ConfigError(
            f"--score: found {dense} for the dense model's {score}, of which no share can be kept; use another score "
            f"(perplexity of a language model, or agreement), or check model and data"
        )
    return share * dense


@dataclass(frozen=True, kw_only=True)
class LanguageScores:
    """Both scores of a language model on the same tokens.

    Attributes:
        perplexity: ``exp`` of the mean negative log-likelihood in nats, all scored tokens weighed alike.
        accuracy: Share of scored tokens that have the largest logit.
        tokens: Number of scored tokens.
        note: Warning that the model is near chance; empty if it is not.
    """

    perplexity: float
    accuracy: float
    tokens: int
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class TokenSums:
    """Sums over scored tokens, from which :func:`language_scores` computes scores."""

    likelihood: Likelihood
    right: int
    targets_N: Tensor
    vocabulary: int


def token_sums(logits_NV: Tensor, targets_N: Tensor) -> TokenSums:
    """Sum likelihoods and right predictions of tokens."""
    nll_N = -token_values("perplexity", logits_NV, targets_N)
    right_N = token_values("accuracy", logits_NV, targets_N)
    return TokenSums(
        likelihood=Likelihood.of(nll_N), right=int(right_N.sum()), targets_N=targets_N.cpu(),
        vocabulary=logits_NV.shape[-1],
    )  # fmt: skip


def language_scores(parts: Sequence[TokenSums], *, accuracy_matters: bool = True) -> LanguageScores:
    """Compute both scores of a dense model.

    Args:
        parts: Sums over the scored tokens.
        accuracy_matters: Whether the note is about the accuracy too.

    Raises:
        DivergenceError: Logits that contain NaN.
        ConfigError: No scored token.
    """
    likelihood, targets_N = Likelihood.joined(one.likelihood for one in parts), torch.cat([p.targets_N for p in parts])
    if not likelihood.tokens:
        raise ConfigError("--data: found no token that can be scored; give longer texts")
    if math.isnan(likelihood.nats):
        raise DivergenceError("logits: found NaN in the dense model's; check its weights")
    accuracy = sum(one.right for one in parts) / likelihood.tokens
    note = _perplexity_note(likelihood, vocabulary=parts[0].vocabulary)
    if not note and accuracy_matters:
        note = accuracy_note(accuracy, targets_N, kind="tokens")
    return LanguageScores(perplexity=likelihood.perplexity, accuracy=accuracy, tokens=likelihood.tokens, note=note)


def _perplexity_note(likelihood: Likelihood, *, vocabulary: int) -> str:
    if likelihood.mean < math.log(vocabulary) - NEAR_CHANCE:
        return ""
    return (
        f"the dense model has perplexity {likelihood.perplexity:,.1f}, near that of chance (its vocabulary of "
        f"{vocabulary:,}): scores of changed models have no meaning"
    )


def accuracy_note(accuracy: float, targets_N: Tensor, *, kind: str) -> str:
    """Warning that an accuracy is not significantly above chance; empty if it is.

    See :func:`~clframe.functional.chance.above_chance`.

    Args:
        accuracy: Of the dense model.
        targets_N: Right answers.
        kind: Word for these, such as ``tokens``.
    """
    chance, count = above_chance(accuracy, targets_N), len(targets_N)
    if chance is None:
        return ""
    limit = chance_limit(chance, count)
    return (
        f"the dense model has {100 * accuracy:.1f} % accuracy on {count} {kind}, not clearly above the "
        f"{100 * chance:.1f} % of always predicting the most frequent one (clear is more than {100 * limit:.1f} %, "
        f"one-sided at 95 %): accuracies of changed models may have no meaning"
    )
