"""Score of a causal language model: negative log-likelihood in nats per token, and perplexity.

Shape suffixes: B windows, S ids of a window, N tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from clframe.errors import ConfigError, DataError


class Window(NamedTuple):
    """A part of a text that a model reads in one pass: ids ``start`` to ``stop - 1``."""

    start: int
    stop: int
    first: int
    """The first id that is scored; those from ``start`` to ``first - 1`` are context only."""


def strided_windows(tokens: int, *, window: int, stride: int) -> tuple[Window, ...]:
    """Divide a text into windows in which every token but the first is scored exactly once.

    Windows begin at ids 0, ``stride``, ``2 stride``, ...; the last one ends with the text and may be shorter. A window
    scores what no window before it has scored. So the tokens of the first window have all that precedes them as
    context, and every later token has at least ``window - stride`` ids of context. The first token of a text has no
    context and is not scored. With ``stride = window - 1`` windows overlap by one id: the least work and the least
    context.

    Args:
        tokens: Ids of the text.
        window: Ids of a window, at least 2.
        stride: From 1 to ``window - 1``.

    Raises:
        ConfigError: A window or stride out of range.
        DataError: A text of fewer than two tokens, in which nothing can be scored.

    >>> strided_windows(10, window=5, stride=3)
    (Window(start=0, stop=5, first=1), Window(start=3, stop=8, first=5), Window(start=6, stop=10, first=8))
    """
    if window < 2:
        raise ConfigError(f"window: found {window}; give at least 2 ids, one of context and one to predict")
    if not 1 <= stride < window:
        raise ConfigError(f"stride: found {stride} for windows of {window} ids; give 1 to {window - 1}")
    if tokens < 2:
        raise DataError(f"text: found {tokens} tokens; give at least 2, since the first cannot be predicted")
    found, scored, start = [], 1, 0
    while scored < tokens:
        stop = min(start + window, tokens)
        found.append(Window(start, stop, scored))
        start, scored = start + stride, stop
    return tuple(found)


def next_token_targets(ids_BS: Tensor) -> Tensor:
    """Return targets_N of windows of ids: of each id but the last the one after it, window by window.

    >>> import torch
    >>> next_token_targets(torch.tensor([[5, 6, 7], [8, 9, 3]])).tolist()
    [6, 7, 9, 3]
    """
    return ids_BS[:, 1:].reshape(-1).long()


def token_nll(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Negative log-likelihood of each target in nats, in float32: ``nll_n = -log softmax(logits_n)[target_n]``.

    >>> import torch
    >>> token_nll(torch.zeros(1, 4), torch.tensor([2])).exp().tolist()
    [4.0]
    """
    return F.cross_entropy(logits_NV.float(), targets_N, reduction="none")


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Negative log-likelihood of texts under a model.

    ``mean = nats / tokens`` weighs every scored token alike, so a long text counts more than a short one;
    ``perplexity = exp(mean)``. Both depend on the tokenizer: models with different ones cannot be compared by them.

    >>> (Likelihood(2.0, 2) + Likelihood(1.0, 4)).mean
    0.5
    """

    nats: float = 0.0
    """Sum over scored tokens."""
    tokens: int = 0
    """Number of scored tokens."""

    def __add__(self, other: Likelihood) -> Likelihood:
        """Join the scored tokens of both."""
        return Likelihood(self.nats + other.nats, self.tokens + other.tokens)

    @classmethod
    def of(cls, nll_N: Tensor) -> Likelihood:
        """Return the likelihood of tokens whose negative log-likelihoods are ``nll_N``; the sum is in float64."""
        return cls(float(nll_N.double().sum()), nll_N.numel())

    @classmethod
    def joined(cls, parts: Iterable[Likelihood]) -> Likelihood:
        """Return the sum of ``parts``."""
        return sum(parts, cls())

    @property
    def mean(self) -> float:
        """Nats per token; NaN without tokens."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """The exponential of :attr:`mean`."""
        return perplexity(self.mean)


def perplexity(nats_per_token: float) -> float:
    """Return ``exp(nats_per_token)``; infinite beyond the range of a float.

    >>> perplexity(0.0), perplexity(1e4)
    (1.0, inf)
    """
    try:
        return math.exp(nats_per_token)
    except OverflowError:
        return math.inf
