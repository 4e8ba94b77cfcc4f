"""Functional routing: selection of experts from a router's scores, losses, and MACs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def dynamic_k(scores_NE: Tensor, tau: float) -> Tensor:
    """Mask of experts whose score is at least ``(1 - tau)`` of the token's highest score, keep_NE.

    tau = 1 keeps all, tau = 0 the best one and ties. At least one expert is kept; a token with all scores zero keeps
    all, because they do not rank the experts. Szatkowski et al., "Exploiting Activation Sparsity with Dense to
    Dynamic-k Mixture-of-Experts Conversion" (2024).

    Args:
        scores_NE: Nonnegative.
        tau: In [0, 1].

    >>> dynamic_k(torch.tensor([[4.0, 1.0, 2.0], [0.0, 3.0, 1.0]]), 0.5).tolist()
    [[True, False, True], [False, True, False]]
    """
    return scores_NE >= scores_NE.amax(1, keepdim=True) * (1 - tau)


def cumulative_share(scores_NE: Tensor, tau: float) -> Tensor:
    """Mask of the smallest set of best experts whose fraction of the token's total score reaches ``tau``, keep_NE.

    tau = 1 keeps all with a positive score; the best expert is always kept.

    >>> cumulative_share(torch.tensor([[1.0, 5.0, 4.0], [0.0, 0.0, 0.0]]), 0.9).tolist()
    [[False, True, True], [True, False, False]]
    """
    sorted_NE, order_NE = scores_NE.sort(dim=1, descending=True, stable=True)
    mass_NE = sorted_NE.to(torch.promote_types(sorted_NE.dtype, torch.float32))
    sums_NE = mass_NE.cumsum(1)
    # Not the sum less the expert's own score, whose rounding could let one expert too many run.
    before_NE = F.pad(sums_NE[:, :-1], (1, 0))
    # Rounding must not drop the last experts where everything is wanted.
    runs_NE = mass_NE > 0 if tau == 1 else before_NE < tau * sums_NE[:, -1:]
    first_NE = torch.arange(scores_NE.shape[1], device=scores_NE.device) == 0
    runs_NE = (runs_NE & (sorted_NE > 0)) | first_NE
    return torch.zeros_like(runs_NE).scatter_(1, order_NE, runs_NE)


def top_k(scores_NE: Tensor, k: int) -> Tensor:
    """Mask of the ``k`` experts with the highest scores, keep_NE; all if there are fewer.

    >>> top_k(torch.tensor([[4.0, 1.0, 2.0]]), 2).tolist()
    [[True, False, True]]
    """
    best_Nk = scores_NE.topk(min(k, scores_NE.shape[1]), 1).indices
    return torch.zeros_like(scores_NE, dtype=torch.bool).scatter_(1, best_Nk, True)


def share_loss(logits_NE: Tensor, sums_NE: Tensor) -> Tensor:
    """Router loss of MoEfication: binary cross-entropy with summed activations divided by the largest sum of the batch.

    Zhang et al., "MoEfication: Transformer Feed-forward Layers are Mixtures of Experts" (2022).

    Args:
        logits_NE: Logits of the router.
        sums_NE: Positive activations summed over each expert's neurons.
    """
    target_NE = sums_NE / sums_NE.amax().clamp_min(torch.finfo(sums_NE.dtype).tiny)
    return F.binary_cross_entropy_with_logits(logits_NE, target_NE)


def load_balance(probabilities_NE: Tensor, keep_NE: Tensor) -> Tensor:
    """Load-balancing loss ``E * sum over experts of (fraction of pairs) * (mean probability)``; 1 for uniform use.

    Fedus et al., "Switch Transformers" (2022), eq. 4, with fractions of (token, expert) pairs where several experts are
    active. Gradients reach the probabilities only.

    >>> load_balance(torch.full((4, 2), 0.5), torch.tensor([[True, False], [False, True]]).repeat(2, 1))
    tensor(1.)
    """
    pairs_E = keep_NE.sum(0).to(probabilities_NE.dtype)
    share_E = pairs_E / pairs_E.sum().clamp_min(1)
    return keep_NE.shape[1] * (share_E * probabilities_NE.mean(0)).sum()


def pairs_by_expert(keep_NE: Tensor) -> tuple[Tensor, Tensor]:
    """(expert_P, token_P) of all active pairs, sorted by expert, then token."""
    expert_P, token_P = keep_NE.t().nonzero(as_tuple=True)
    return expert_P, token_P


def expert_macs(*, inputs: int, outputs: int, neurons: int, gated: bool) -> int:
    """MACs of one expert for one token.

    >>> expert_macs(inputs=10, outputs=10, neurons=3, gated=True)
    90
    """
    return neurons * (inputs * (2 if gated else 1) + outputs)


def router_macs(*, inputs: int, width: int, experts: int) -> int:
    """MACs of a router with one hidden layer for one token.

    >>> router_macs(inputs=768, width=128, experts=24)
    101376
    """
    return width * (inputs + experts)
