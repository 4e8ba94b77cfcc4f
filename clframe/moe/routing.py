"""Gates: which experts run for which token, from the scores of a router."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def dynamic_k(scores_NE: Tensor, tau: float) -> Tensor:
    """keep_NE: experts whose score is at least ``(1 - tau)`` of the token's highest one.

    tau = 1 keeps all, tau = 0 the best and its equals; no token is left without, and one whose scores are all zero,
    which says nothing, keeps all. Szatkowski et al., "Exploiting Activation Sparsity with Dense to Dynamic-k
    Mixture-of-Experts Conversion" (2024).

    Args:
        scores_NE: From 0 up.
        tau: From 0 to 1.

    >>> dynamic_k(torch.tensor([[4.0, 1.0, 2.0], [0.0, 3.0, 1.0]]), 0.5).tolist()
    [[True, False, True], [False, True, False]]
    """
    return scores_NE >= scores_NE.amax(1, keepdim=True) * (1 - tau)


def cumulative_share(scores_NE: Tensor, tau: float) -> Tensor:
    """keep_NE: the smallest set of best experts whose shares of the token's total score reach ``tau``.

    tau = 1 keeps all with a score above 0; the best one always runs.

    >>> cumulative_share(torch.tensor([[1.0, 5.0, 4.0], [0.0, 0.0, 0.0]]), 0.9).tolist()
    [[False, True, True], [True, False, False]]
    """
    sorted_NE, order_NE = scores_NE.sort(dim=1, descending=True, stable=True)
    share_NE = sorted_NE / sorted_NE.sum(1, keepdim=True).clamp_min(torch.finfo(scores_NE.dtype).tiny)
    before_NE = share_NE.cumsum(1) - share_NE  # the sum of those ahead: not yet enough, so this one runs too
    # Rounding must not drop the last experts where everything is wanted.
    runs_NE = sorted_NE > 0 if tau == 1 else before_NE < tau
    first_NE = torch.arange(scores_NE.shape[1], device=scores_NE.device) == 0
    runs_NE = (runs_NE & (sorted_NE > 0)) | first_NE
    return torch.zeros_like(runs_NE).scatter_(1, order_NE, runs_NE)


def top_k(scores_NE: Tensor, k: int) -> Tensor:
    """keep_NE: the ``k`` experts with the highest scores, all where there are fewer.

    >>> top_k(torch.tensor([[4.0, 1.0, 2.0]]), 2).tolist()
    [[True, False, True]]
    """
    best_Nk = scores_NE.topk(min(k, scores_NE.shape[1]), 1).indices
    return torch.zeros_like(scores_NE, dtype=torch.bool).scatter_(1, best_Nk, True)


def share_loss(logits_NE: Tensor, sums_NE: Tensor) -> Tensor:
    """MoEfication's loss: binary cross-entropy against summed activations over the largest sum of the batch.

    Zhang et al., "MoEfication: Transformer Feed-forward Layers are Mixtures of Experts" (2022).

    Args:
        logits_NE: Of the router.
        sums_NE: Each expert's positive activations, summed over its neurons.
    """
    target_NE = sums_NE / sums_NE.amax().clamp_min(torch.finfo(sums_NE.dtype).tiny)
    return F.binary_cross_entropy_with_logits(logits_NE, target_NE)


def load_balance(probabilities_NE: Tensor, keep_NE: Tensor) -> Tensor:
    """``E * sum over experts of (share of pairs it runs) * (mean probability)``: 1 where all are used alike.

    Fedus et al., "Switch Transformers" (2022), eq. 4, with shares of (token, expert) pairs where several run. Gradients
    reach the probabilities only.

    >>> load_balance(torch.full((4, 2), 0.5), torch.tensor([[True, False], [False, True]]).repeat(2, 1))
    tensor(1.)
    """
    pairs_E = keep_NE.sum(0).to(probabilities_NE.dtype)
    share_E = pairs_E / pairs_E.sum().clamp_min(1)
    return keep_NE.shape[1] * (share_E * probabilities_NE.mean(0)).sum()


def pairs_by_expert(keep_NE: Tensor) -> tuple[Tensor, Tensor]:
    """(expert_P, token_P) of all pairs that run, expert by expert, tokens in order."""
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
