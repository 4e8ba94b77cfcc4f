"""Which samples a memory keeps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor


def quotas(size: int, classes: Sequence[int]) -> dict[int, int]:
    """A memory of ``size`` samples shared by ``classes``: equal parts, leftovers to the first classes.

    >>> quotas(7, [3, 5, 8])
    {3: 3, 5: 2, 8: 2}
    """
    share, rest = divmod(size, len(classes))
    return {c: share + (i < rest) for i, c in enumerate(classes)}


def balanced_choice(y_N: Tensor, quota: dict[int, int], *, generator: Generator) -> Tensor:
    """index_M: a random subset with at most ``quota[c]`` samples of each class, in order of class.

    A class with fewer samples than its quota gives all it has.
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
    chosen = [(y_N == c).nonzero().flatten()[:count] for c, count in quota.items()]
    return torch.cat(chosen) if chosen else torch.empty(0, dtype=torch.long)
