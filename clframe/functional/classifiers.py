"""What becomes of the rows of a linear classifier between experiences.

Shape suffixes: C classes, F features, N new classes, O old classes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def alignment(old_OF: Tensor, new_NF: Tensor) -> Tensor:
    """``mean_o |old_o| / mean_n |new_n|``: what to scale new rows by, to be as long as the old ones on average.

    Zhao et al., "Maintaining Discrimination and Fairness in Class Incremental Learning" (2020), equation 7. One
    where there are no rows on a side, or the new ones are all zero.

    >>> alignment(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 8.0], [12.0, 0.0]])).item()
    0.5
    """
    if not len(old_OF) or not len(new_NF):
        return new_NF.new_ones(())
    length = new_NF.norm(dim=1).mean()
    scale: Tensor = torch.where(length > 0, old_OF.norm(dim=1).mean() / length, torch.ones_like(length))
    return scale


def consolidated_rows(kept_CF: Tensor, kept_C: Tensor, fresh_CF: Tensor, fresh_C: Tensor) -> tuple[Tensor, Tensor]:
    """CWR*'s consolidated weights and sample counts after an experience.

    ``w = (w sqrt(past / now) + t - mean(t)) / (sqrt(past / now) + 1)`` for the classes of the experience, ``t`` the
    weights just trained and ``mean(t)`` one number over all of them; other classes stay. Lomonaco et al.,
    "Rehearsal-Free Continual Learning over Small Non-I.I.D. Batches" (2020), algorithm 1.

    Args:
        kept_CF: Consolidated weights so far.
        kept_C: Samples behind each of them.
        fresh_CF: Weights just trained.
        fresh_C: Samples of the experience; 0 for classes that it does not have.

    Returns:
        weights_CF, count_C.

    >>> kept, fresh = torch.tensor([[2.0]]), torch.tensor([[5.0], [9.0]])
    >>> padded = torch.cat([kept, torch.zeros(1, 1)])
    >>> consolidated_rows(padded, torch.tensor([4, 0]), fresh, torch.tensor([1, 1]))[0].flatten().tolist()
    [0.6666666865348816, 2.0]
    """
    now_C = fresh_C > 0
    mean = fresh_CF[now_C].mean() if bool(now_C.any()) else fresh_CF.new_zeros(())
    past_C1 = (kept_C / fresh_C.clamp_min(1)).to(fresh_CF).sqrt().unsqueeze(1)
    merged_CF = (kept_CF * past_C1 + fresh_CF - mean) / (past_C1 + 1)
    return torch.where(now_C.unsqueeze(1), merged_CF, kept_CF), kept_C + fresh_C
