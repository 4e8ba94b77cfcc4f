"""Losses on features, maps and prototypes, one value per exit.

Shape suffixes: B batch, C classes, F features, D pooled values of a map, K exits, J negatives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Pooling = Literal["spatial", "width", "height", "gap", "channels", "pixels"]
"""Dimensions over which a map is summed before it is compared; ``spatial`` concatenates ``width`` and ``height``."""

Scales = Sequence[Tensor | float]
"""Scale of each exit's logits: eta of a cosine classifier, or 1."""


def cosine_distance(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return ``loss_K[k] = mean_b (1 - cos(student[k][b], teacher[k][b]))``.

    The less-forget constraint of Hou et al., "Learning a Unified Classifier Incrementally via Rebalancing" (2019),
    equation 6, and POD-flat of Douillard et al., "PODNet" (2020), as in the authors' code; the paper has the
    squared distance of the normalized features, which is twice as much.

    Args:
        student: K tensors features_BF.
        teacher: K tensors features_BF, without gradient.

    >>> cosine_distance([torch.tensor([[0.0, 2.0]])], [torch.tensor([[3.0, 0.0]])])
    tensor([1.])
    """
    return torch.stack([(1 - F.cosine_similarity(s, t, dim=1)).mean() for s, t in zip(student, teacher, strict=True)])


def pool_squares(tap: Tensor, pooling: Pooling) -> Tensor:
    """Sum the squares of a tap to pooled_BD, which pooled output distillation compares after normalization.

    ``width`` sums a map_BCHW over its width, ``height`` over its height, ``gap`` over both, ``channels`` over the
    channels; ``pixels`` sums nothing. tokens_BTF have one such dimension: ``spatial``, ``width``, ``height`` and
    ``gap`` all sum over the tokens.

    >>> pool_squares(torch.tensor([[[[1.0, 2.0], [3.0, 0.0]]]]), "spatial")
    tensor([[ 5.,  9., 10.,  4.]])
    """
    squares = tap.square()
    if squares.dim() == 3:
        squares = squares.transpose(1, 2).unsqueeze(2)  # tokens as a map of one row
        pooling = "width" if pooling in ("spatial", "height", "gap") else pooling
    return _POOLED[pooling](squares).flatten(1)


_POOLED: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "spatial": lambda x: torch.cat([x.sum(3).flatten(1), x.sum(2).flatten(1)], 1),
        "width": lambda x: x.sum(3),
        "height": lambda x: x.sum(2),
        "gap": lambda x: x.sum((2, 3)),
        "channels": lambda x: x.sum(1),
        "pixels": lambda x: x,
    }
)


def pod(student: Tensor, teacher: Tensor, *, pooling: Pooling) -> Tensor:
    """Pooled output distillation of one tap: the mean over the batch of ``|p(student) / |p| - p(teacher) / |p||``.

    ``p`` is :func:`pool_squares`. Douillard et al., "PODNet: Pooled Outputs Distillation for Small-Tasks Incremental
    Learning" (2020), equations 3 to 6, on squares and with distances that are not squared, as the authors' code.

    Args:
        student: A map or tokens.
        teacher: The tap of the old network, without gradient.
        pooling: See :func:`pool_squares`.
    """
    student_BD, teacher_BD = (F.normalize(pool_squares(tap, pooling), dim=1) for tap in (student, teacher))
    distance_B: Tensor = torch.linalg.vector_norm(student_BD - teacher_BD, dim=1)
    return distance_B.mean()


def nca(
    logits: Sequence[Tensor], y_B: Tensor, *, margin: float, scales: Scales, weight_B: Tensor | None = None
) -> Tensor:
    """Neighborhood component analysis with a margin: ``[log sum_{i != y} exp(z_i) - (z_y - eta m)]_+``.

    ``z = eta * similarity`` are the logits, so the margin m applies to similarities. Douillard et al., "PODNet"
    (2020), equation 12, with the hinge per sample.

    Args:
        logits: K tensors logits_BC.
        y_B: Targets.
        margin: m.
        scales: eta of each exit.
        weight_B: Weight of each sample; None weighs all alike.

    Returns:
        loss_K.
    """
    share_B = _shares(y_B, weight_B, logits[0])
    losses = []
    for logits_BC, scale in zip(logits, scales, strict=True):
        own_B1 = y_B.unsqueeze(1)
        others_B = logits_BC.scatter(1, own_B1, -torch.inf).logsumexp(1)
        hinge_B = (others_B - (logits_BC.gather(1, own_B1).squeeze(1) - scale * margin)).clamp(min=0)
        losses.append((hinge_B * share_B).sum())
    return torch.stack(losses)


def separation(
    logits: Sequence[Tensor], y_B: Tensor, *, new: Tensor, margin: float, negatives: int, scales: Scales
) -> Tensor:
    """Inter-class separation: a ``margin`` between samples of old classes and the most similar new classes.

    ``mean over old samples b of sum_j max(m - s_by + s_bj, 0)``, ``s = z / eta`` the cosines and j the J new
    classes of highest cosine; 0 if the batch has no old sample. Hou et al., "Learning a Unified Classifier
    Incrementally via Rebalancing" (2019), equation 8. (The authors' code has the mean over j, 1/J of this.)

    Args:
        logits: K tensors logits_BC.
        y_B: Targets.
        new: Ids of the new classes, on the device of the logits.
        margin: m.
        negatives: J, at most the number of new classes.
        scales: eta of each exit.

    Returns:
        loss_K.
    """
    old_B = ~torch.isin(y_B, new)
    count = old_B.sum().clamp(min=1)
    losses = []
    for logits_BC, scale in zip(logits, scales, strict=True):
        score_BC = logits_BC / scale
        own_B1 = score_BC.gather(1, y_B.unsqueeze(1))
        hardest_BJ = score_BC.index_select(1, new).topk(min(negatives, len(new)), dim=1).values
        hinge_B = (margin - own_B1 + hardest_BJ).clamp(min=0).sum(1)
        losses.append((hinge_B * old_B).sum() / count)
    return torch.stack(losses)


def contrastive(
    features: Sequence[Tensor], y_B: Tensor, *, temperature: float, weight_B: Tensor | None = None
) -> Tensor:
    """Supervised contrastive loss: pulls samples of a class together and apart from all others.

    ``-1/|P(b)| sum_{p in P(b)} log(exp(z_b z_p / T) / sum_{a != b} exp(z_b z_a / T))``, z the normalized
    features and P(b) the other samples of b's class; the mean over the samples that have some, else 0. Khosla
    et al., "Supervised Contrastive Learning" (2020), equation 2.

    Args:
        features: K tensors features_BF.
        y_B: Targets.
        temperature: T > 0.
        weight_B: Weight of each sample as anchor; None weighs all alike.

    Returns:
        loss_K, in nats.
    """
    self_BB = torch.eye(len(y_B), dtype=torch.bool, device=y_B.device)
    positive_BB = (y_B.unsqueeze(0) == y_B.unsqueeze(1)) & ~self_BB
    count_B = positive_BB.sum(1)
    weight_B = (count_B > 0).to(features[0].dtype) * (1 if weight_B is None else weight_B)
    share_B = weight_B / weight_B.sum().clamp(min=torch.finfo(weight_B.dtype).tiny)
    losses = []
    for features_BF in features:
        z_BF = F.normalize(features_BF, dim=1)
        similar_BB = z_BF @ z_BF.T / temperature
        log_p_BB = similar_BB - similar_BB.masked_fill(self_BB, -torch.inf).logsumexp(1, keepdim=True)
        loss_B = -log_p_BB.masked_fill(~positive_BB, 0.0).sum(1) / count_B.clamp(min=1)
        losses.append((loss_B * share_B).sum())
    return torch.stack(losses)


def attraction(cosines: Sequence[Tensor], y_B: Tensor) -> Tensor:
    """Return ``loss_K[k] = mean_b (1 - cosines[k][b, y_b])``, which pulls prototypes to the samples of their class.

    Args:
        cosines: K tensors cosine_BC of samples and prototypes.
        y_B: Targets.
    """
    return torch.stack([(1 - cosine_BC.gather(1, y_B.unsqueeze(1))).mean() for cosine_BC in cosines])


def relation(student: Sequence[Tensor], teacher: Sequence[Tensor], *, share_C: Tensor, temperature: float) -> Tensor:
    """Prototype-sample relation distillation: preserves the similarities of old prototypes to the samples of a batch.

    ``sum_c share_c KL(softmax_b(teacher[k][b, c] / T) || softmax_b(student[k][b, c] / T))``: for each old class, a
    softmax over the batch. Asadi et al., "Prototype-Sample Relation Distillation: Towards Replay-Free Continual
    Learning" (2023).

    Args:
        student: K tensors scores_BC of samples and prototypes, of at least as many classes as the teacher's.
        teacher: K tensors scores_BC, without gradient.
        share_C: Weight of each of the teacher's classes; 0 for columns without a class.
        temperature: T > 0.

    Returns:
        loss_K, in nats.
    """
    none_C, losses = share_C == 0, []
    for student_BC, teacher_BC in zip(student, teacher, strict=True):
        old_BC = student_BC[:, : len(share_C)].masked_fill(none_C, 0.0)
        log_q_BC = F.log_softmax(old_BC / temperature, dim=0)
        log_p_BC = F.log_softmax(teacher_BC.masked_fill(none_C, 0.0) / temperature, dim=0)
        losses.append((share_C * (log_p_BC.exp() * (log_p_BC - log_q_BC))).sum())
    return torch.stack(losses)


def _shares(y_B: Tensor, weight_B: Tensor | None, like: Tensor) -> Tensor:
    """Return the share of each sample in a mean."""
    if weight_B is None:
        return like.new_full(y_B.shape, 1 / len(y_B))
    return weight_B / weight_B.sum()
