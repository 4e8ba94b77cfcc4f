"""Losses of prompts: keys drawn to queries, and samples that compete within their experience.

Shape suffixes: B batch, C classes, N prompts selected.
"""

from __future__ import annotations

from math import inf

from torch import Tensor


def pull(similarity_BN: Tensor) -> Tensor:
    """``mean_b sum_n (1 - cos(q_b, key_n))``, of shape []: how far queries are from the keys they select.

    Wang et al., "Learning to Prompt for Continual Learning" (2022), equation 5, with the cosine distance.

    Args:
        similarity_BN: Cosines of queries and selected keys.
    """
    return (1 - similarity_BN).sum(1).mean()


def among(logits_BC: Tensor, y_B: Tensor, *, outside_C: Tensor) -> Tensor:
    """The logits with ``-inf`` for the classes outside, but for samples that are of such a class themselves.

    >>> import torch
    >>> among(torch.zeros(2, 2), torch.tensor([0, 1]), outside_C=torch.tensor([True, False])).tolist()
    [[0.0, 0.0], [-inf, 0.0]]
    """
    hidden_BC = outside_C & ~outside_C[y_B][:, None]
    return logits_BC.masked_fill(hidden_BC, -inf)
