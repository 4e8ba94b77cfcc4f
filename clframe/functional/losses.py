"""Losses at every exit.

Shape suffixes: B batch, C classes, K exits. Each function takes the logits of all exits and returns one
value per exit, so a plain network (K = 1) is no special case.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Sequence[Tensor], y_B: Tensor, *, weight_B: Tensor | None = None) -> Tensor:
    """Cross-entropy at each exit: ``loss_K[k] = sum_b w_b * -log softmax(logits[k][b])[y_b] / sum_b w_b``.

    Args:
        logits: K tensors logits_BC.
        y_B: Targets, each below C.
        weight_B: Weight of each sample; None weighs all alike.

    Returns:
        loss_K, in nats.
    """
    if weight_B is None:
        return _stack([F.cross_entropy(logits_BC, y_B) for logits_BC in logits])
    share_B = weight_B / weight_B.sum()
    return _stack([(F.cross_entropy(l_BC, y_B, reduction="none") * share_B).sum() for l_BC in logits])


def distillation(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    groups: Sequence[Sequence[int]],
    temperature: float,
) -> Tensor:
    """Knowledge distillation at each exit, each group of classes under a softmax of its own.

    ``loss_K[k] = T^2 * sum_g mean_b KL(softmax(teacher[k][b, g] / T) || softmax(student[k][b, g] / T))``

    Li and Hoiem, "Learning without Forgetting" (2016), equation 2, with the factor T^2 of Hinton et al.
    (2015), which keeps the gradient's size independent of T; the entropy of the teacher, which has no
    gradient, is subtracted so that equal logits give zero. A group is the classes of one old experience.

    Args:
        student: K tensors logits_BC; may have more classes than the teacher.
        teacher: K tensors logits_BC, without gradient.
        groups: Class ids of each group.
        temperature: T > 0.

    Returns:
        loss_K, in nats times T^2.
    """
    return _stack(
        [
            torch.stack([_divergence(s_BC, t_BC, group, temperature) for group in groups]).sum()
            for s_BC, t_BC in zip(student, teacher, strict=True)
        ]
    )


def _divergence(student_BC: Tensor, teacher_BC: Tensor, group: Sequence[int], temperature: float) -> Tensor:
    columns = _columns(group)
    log_student = F.log_softmax(student_BC[:, columns] / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_BC[:, columns] / temperature, dim=1)
    kl = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return kl * temperature**2


def _columns(group: Sequence[int]) -> slice | list[int]:
    """A slice where class ids are consecutive: a view instead of a copy."""
    first, last = min(group), max(group)
    if list(group) == list(range(first, last + 1)):
        return slice(first, last + 1)
    return list(group)


def _stack(values: list[Tensor]) -> Tensor:
    return values[0].unsqueeze(0) if len(values) == 1 else torch.stack(values)
