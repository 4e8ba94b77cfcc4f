"""Dividing the neurons of a feed-forward network into experts of equal size.

Shape suffixes: F neurons, E experts, D features of a neuron, N tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from clframe.errors import ConfigError

Split = Literal["kmeans", "random", "coactivation"]
"""By similar weights; at random; by firing for the same tokens."""

SPLITS: tuple[Split, ...] = ("kmeans", "random", "coactivation")


def expert_count(
    neurons: int, *, experts: int | None, expert_size: int | None, most: int | None = None, where: str = "moe"
) -> int:
    """How many experts ``neurons`` make, given their number, their size or the most there may be.

    Raises:
        ConfigError: Two of them given, or none, or experts that are not equal.

    >>> expert_count(3072, experts=None, expert_size=128), expert_count(400, experts=None, expert_size=None, most=24)
    (24, 20)
    """
    if most is not None and experts is None and expert_size is None:
        return max(count for count in range(1, most + 1) if neurons % count == 0)
    if (experts is None) == (expert_size is None):
        found = "neither experts nor expert_size" if experts is None else "both experts and expert_size"
        raise ConfigError(f"{where}: found {found}; give one of them")
    option, value = ("experts", experts) if experts is not None else ("expert_size", expert_size)
    assert value is not None
    if value < 1 or neurons % value:
        raise ConfigError(f"{where}.{option}: found {value}; give a divisor of the {neurons} hidden neurons")
    return value if option == "experts" else neurons // value


def split_neurons(features_FD: Tensor, *, experts: int, split: Split, generator: Generator) -> Tensor:
    """order_F: neurons expert by expert, each expert's in ascending order.

    Args:
        features_FD: What tells neurons apart: their rows of the input weights, of the gate's where there is one; for
            ``coactivation`` each neuron's activations on a set of tokens (transposed).
        experts: Number of experts; it must divide F.
        split: How.
        generator: On the CPU; draws the order, or the first centers.

    Raises:
        ConfigError: Experts that are not equal, or an unknown split.
    """
    neurons = len(features_FD)
    expert_count(neurons, experts=experts, expert_size=None)
    if split not in SPLITS:
        raise ConfigError(f"moe.split: found '{split}'; choose from {', '.join(SPLITS)}")
    if split == "random":
        drawn_F = torch.randperm(neurons, generator=generator)
        return drawn_F.view(experts, -1).sort(1).values.flatten()
    if split == "coactivation":
        features_FD = features_FD > 0
    expert_F = balanced_kmeans(features_FD.float(), clusters=experts, generator=generator)
    return expert_F.argsort(stable=True)


def balanced_kmeans(
    features_FD: Tensor, *, clusters: int, generator: Generator, iterations: int = 20
) -> Tensor:
    """cluster_F of rows on the unit sphere, all clusters of one size.

    Lloyd's algorithm with an assignment that no row and cluster would both rather change: each row asks for its
    nearest center, which keeps the closest ones and sends the rest to their next. The assignment with the largest
    similarity of rows to their centers is returned, on the CPU.

    Args:
        features_FD: Rows; they are normalized.
        clusters: A divisor of F.
        generator: Draws the rows that are the first centers.
        iterations: At most; it ends when nothing moves.

    >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.1], [0.1, 3.0]])
    >>> cluster = balanced_kmeans(rows, clusters=2, generator=torch.Generator().manual_seed(0))
    >>> bool(cluster[0] == cluster[2]), bool(cluster[1] == cluster[3]), int((cluster == 0).sum())
    (True, True, 2)
    """
    rows_FD = F.normalize(features_FD.detach().float(), dim=1)
    count = len(rows_FD)
    first = torch.randperm(count, generator=generator)[:clusters].to(rows_FD.device)
    centers_ED = rows_FD[first]
    best, best_F, previous_F = -float("inf"), None, None
    for _ in range(iterations):
        cluster_F = assign_evenly(rows_FD @ centers_ED.t())
        members_EF = cluster_F.argsort(stable=True).view(clusters, -1)
        centers_ED = F.normalize(rows_FD[members_EF].mean(1), dim=1)
        reached = float((rows_FD * centers_ED[cluster_F]).sum())
        if reached > best:
            best, best_F = reached, cluster_F
        if previous_F is not None and torch.equal(cluster_F, previous_F):
            break
        previous_F = cluster_F
    assert best_F is not None
    return best_F.cpu()


def assign_evenly(similarity_FE: Tensor) -> Tensor:
    """cluster_F: a stable matching of rows with clusters that each take F / E of them.

    Similarities rank rows and clusters alike, so ties apart the result is unique. The earlier row wins a tie.
    """
    count, clusters = similarity_FE.shape
    left_FE = similarity_FE.clone()
    while True:
        most_F, choice_F = left_FE.max(1)
        order_F = most_F.argsort(descending=True, stable=True)
        order_F = order_F[choice_F[order_F].argsort(stable=True)]  # cluster by cluster, the most similar first
        asked_E = torch.bincount(choice_F, minlength=clusters)
        place_F = torch.arange(count, device=choice_F.device) - (asked_E.cumsum(0) - asked_E)[choice_F[order_F]]
        rejected = order_F[place_F >= count // clusters]
        if not len(rejected):
            return choice_F
        left_FE[rejected, choice_F[rejected]] = -float("inf")
