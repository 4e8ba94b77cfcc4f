"""Classifier of a language model: one row of logits for each token.

Shape suffixes: B windows, T tokens of a window, N = B T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clframe.errors import UnsupportedError
from clframe.nn.heads import Classifier, ClassifierKind, Head


class TokenLinear(Classifier):
    """Linear classifier ``W x`` of every token over a fixed vocabulary, without bias.

    All its rows exist from the start: growing changes nothing, since every domain has the same vocabulary. Its logits
    are flattened to one row per token, window by window, so that losses and confidence measures of classifiers apply.

    Args:
        features: Width D of a token.
        vocabulary: V.
        tied: An embedding weight_VD to use as W; None draws one from N(0, 0.02^2).

    >>> head = TokenLinear(8, vocabulary=50)
    >>> head.grow([0]), head.classes, tuple(head(torch.zeros(3, 4, 8)).shape)
    (False, 50, (12, 50))
    """

    def __init__(self, features: int, *, vocabulary: int, tied: nn.Parameter | None = None) -> None:
        super().__init__(features, row=(features,))
        self.weight = nn.Parameter(torch.empty(vocabulary, features)) if tied is None else tied
        if tied is None:
            nn.init.normal_(self.weight, std=0.02)
        self.seen = torch.ones(vocabulary, dtype=torch.bool)
        self.fixed = torch.zeros(vocabulary, dtype=torch.bool)

    def grow(self, classes: Iterable[int]) -> bool:
        """Change nothing; returns False."""
        return False

    def use(self, make: ClassifierKind) -> Head:
        """Refuse another kind of classifier (UnsupportedError)."""
        raise UnsupportedError(
            "classifiers: found a language model, whose logits are those of a vocabulary; leave out the component that "
            "replaces classifiers"
        )

    def forward(self, features: Tensor, previous_BC: Tensor | None = None) -> Tensor:
        """Compute logits_NV of features_BTD, or of features_ND."""
        return F.linear(features.flatten(0, -2), self.detach_fixed(self.weight))
