"""Selection of the samples that a replay buffer stores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn.functional import normalize, pad


def quotas(size: int, classes: Sequence[int], *, salt: int = 0) -> dict[int, int]:
    """Divide a buffer of ``size`` samples among ``classes``: equal shares, the remainder to the first ones.

    Of more classes than samples, ``size`` have a share of 1: each with the same probability, whether it is early or
    late in a stream. A class without a share has none either when more classes follow, so buffers remain full.

    Args:
        size: Number of samples.
        classes: The classes, or other owners of samples, in the order of the stream.
        salt: Number that changes which of too many classes have a share.

    >>> quotas(7, [3, 5, 8])
    {3: 3, 5: 2, 8: 2}
    """
    share, rest = divmod(size, len(classes))
    if share:
        return {c: share + (i < rest) for i, c in enumerate(classes)}
    found = dict.fromkeys(classes, 0)
    for place in np.argsort(_mixed(salt, len(classes)), kind="stable")[:rest].tolist():
        found[classes[place]] = 1
    return found


def _mixed(salt: int, count: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """``count`` numbers of 64 bits that look random, the same in every process: SplitMix64 of Steele et al. (2014)."""
    first = ((salt << 32) + 1) % 2**64
    bits = (np.uint64(first) + np.arange(count, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ bits >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ bits >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return bits ^ bits >> np.uint64(31)


def balanced_choice(y_N: Tensor, quota: dict[int, int], *, generator: Generator) -> Tensor:
    """index_M: a random subset with at most ``quota[c]`` samples of each class, in order of class.

    Of a class with fewer samples than its quota, all are chosen.
    """
    chosen = []
    for c, count in quota.items():
        index = (y_N == c).nonzero().flatten()
        chosen.append(index[torch.randperm(len(index), generator=generator)[:count]])
    return torch.cat(chosen) if chosen else torch.empty(0, dtype=torch.long)


def balanced_trim(y_N: Tensor, quota: dict[int, int]) -> Tensor:
    """index_M: the first ``quota[c]`` samples of each class, in order of class.

    Trimming a list that was filled in random order keeps a random subset.
    """
    if not quota:
        return torch.empty(0, dtype=torch.long)
    # Without a loop over the classes: a long stream has hundreds of them, after every experience.
    class_C, order_C = torch.tensor(list(quota), dtype=y_N.dtype, device=y_N.device).sort()
    count_C = torch.tensor([*quota.values(), 0], device=y_N.device)
    at_N = torch.searchsorted(class_C, y_N).clamp(max=len(class_C) - 1)
    place_N = torch.where(class_C[at_N] == y_N, order_C[at_N], len(class_C))
    place_N, index_N = place_N.sort(stable=True)
    rank_N = torch.arange(len(y_N), device=y_N.device) - torch.searchsorted(place_N, place_N)
    return index_N[rank_N < count_C[place_N]]


def herding(features_NF: Tensor, count: int) -> Tensor:
    """index_K: samples whose running mean stays nearest to the mean of all, in order of selection.

    Sample k minimizes ``|| mu - (f_1 + ... + f_k) / k ||`` over the remaining samples, with f the features divided by
    their length and mu their mean; a shorter list is the start of a longer one. For features of length 1 it is the
    sample of the largest ``f . (k mu - f_1 - ... - f_{k-1})``. Algorithm 4 of Rebuffi et al., "iCaRL: Incremental
    Classifier and Representation Learning" (2017).

    Args:
        features_NF: Features of one class.
        count: Number of samples; all of a class with fewer.

    >>> herding(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]), 2).tolist()
    [1, 0]
    """
    unit_NF = normalize(features_NF.double(), dim=1)
    mean_F = unit_NF.mean(dim=0)
    free_N = torch.zeros(len(unit_NF), dtype=torch.float64, device=unit_NF.device)
    wanted_F = mean_F.clone()
    picked = []
    for _ in range(min(count, len(unit_NF))):
        pick = (unit_NF @ wanted_F + free_N).argmax()
        free_N[pick] = -torch.inf
        wanted_F += mean_F - unit_NF[pick]
        picked.append(pick)
    return torch.stack(picked) if picked else torch.empty(0, dtype=torch.long, device=unit_NF.device)


def reservoir(key_M: Tensor, key_N: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Choose among M stored and N new samples: those with the ``size`` smallest random keys, drawn once per sample.

    The keys are stored with their samples. So every sample ever seen is stored with the same probability, however the
    samples are grouped, as in Vitter, "Random Sampling with a Reservoir" (1985).

    Returns:
        Indices into the stored and into the new samples, ascending.

    >>> [part.tolist() for part in reservoir(torch.tensor([0.1, 0.7]), torch.tensor([0.9, 0.2, 0.8]), 3)]
    [[0, 1], [1]]
    """
    kept = len(key_M)
    stays = torch.cat([key_M, key_N]).argsort()[:size].sort().values
    return stays[stays < kept], stays[stays >= kept] - kept


def append_rows(old: Tensor, new: Tensor) -> Tensor:
    """Concatenate rows, with the last dimension of the narrower ones padded by ``-inf``.

    Logits that were stored before a class was learned have no value for it.

    >>> append_rows(torch.tensor([[1.0]]), torch.tensor([[2.0, 3.0]])).tolist()
    [[1.0, -inf], [2.0, 3.0]]
    """
    if old.ndim > 1 and old.shape[-1] != new.shape[-1]:
        width = max(old.shape[-1], new.shape[-1])
        old, new = (pad(rows, (0, width - rows.shape[-1]), value=-torch.inf) for rows in (old, new))
    return torch.cat([old, new])
