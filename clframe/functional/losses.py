"""Losses at every exit: cross-entropy, distillation, losses on replayed samples, and the sum of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

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


def total(terms: Mapping[str, Tensor]) -> Tensor:
    """Sum all terms over exits, in the order given: the default of the slot ``loss_mix``.

    The result has shape [], or [1] if there is one exit: summing a single number would only add to the graph.
    """
    parts = [term if term.numel() == 1 else term.sum() for term in terms.values()]
    result = parts[0]
    for part in parts[1:]:
        result = result + part
    return result


def distillation(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    groups: Sequence[Sequence[int]],
    temperature: float,
) -> Tensor:
    """Knowledge distillation at each exit, with a separate softmax for each group of classes.

    ``loss_K[k] = T^2 * sum_g mean_b KL(softmax(teacher[k][b, g] / T) || softmax(student[k][b, g] / T))``

    Li and Hoiem, "Learning without Forgetting" (2016), equation 2, with the factor T^2 of Hinton et al.
    (2015), which makes the gradient's size independent of T; the entropy of the teacher, which has no
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
    """Return a slice if class ids are consecutive: a view instead of a copy."""
    first, last = min(group), max(group)
    if list(group) == list(range(first, last + 1)):
        return slice(first, last + 1)
    return list(group)


def _stack(values: list[Tensor]) -> Tensor:
    return values[0].unsqueeze(0) if len(values) == 1 else torch.stack(values)


Columns = Literal["stored", "padded"]


def logit_matching(logits: Sequence[Tensor], stored_RKW: Tensor, *, columns: Columns = "stored") -> Tensor:
    """Mean squared distance between the logits of replayed samples and those stored with them, at each exit.

    ``loss_K[k] = mean over (r, c) of (logits[k][r, c] - stored[r, k, c])^2``, over the columns that were stored
    with sample r; later classes have no stored logits. Buzzega et al., "Dark
    Experience for General Continual Learning" (2020), equation 5, divided by the number of columns as in the
    authors' code.

    Args:
        logits: K tensors logits_RC, C >= W.
        stored_RKW: Stored logits; ``-inf`` for classes unseen at that time.
        columns: ``padded`` compares all C columns and takes 0 for logits that were not stored.

    >>> logit_matching([torch.tensor([[1.0, 5.0]])], torch.tensor([[[3.0, -torch.inf]]])).tolist()
    [4.0]
    """
    return torch.stack([_distance(l_RC, stored_RKW[:, k], columns) for k, l_RC in enumerate(logits)])


def _distance(logits_RC: Tensor, stored_RW: Tensor, columns: Columns) -> Tensor:
    width = stored_RW.shape[1]
    known_RC = stored_RW.isfinite()
    if columns == "padded":
        stored_RW = F.pad(stored_RW.masked_fill(~known_RC, 0.0), (0, logits_RC.shape[1] - width))
        known_RC = logits_RC.isfinite()  # unseen classes have no logits
    else:
        logits_RC = logits_RC[:, :width]
    difference_RC = torch.where(known_RC, logits_RC - stored_RW, 0.0)
    return difference_RC.square().sum() / known_RC.sum()


def asymmetric_cross_entropy(
    logits: Sequence[Tensor],
    y_B: Tensor,
    *,
    new_B: Tensor,
    present_C: Tensor,
    share: float = 0.0,
    weight_B: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of new samples among the classes present, plus that of replayed ones among all, at each exit.

    ``loss_K[k] = mean_{b new} CE(logits[k][b, present]) + (1 - s) mean_{b replayed} CE(logits[k][b]) + s mean_{b new}
    CE(logits[k][b])``: new samples decrease the logits of old classes by at most their share s of the buffer. Caccia et
    al., "New Insights on Reducing Abrupt Representation Change in Online Continual Learning" (2022), equation 3,
    with the expectation over new samples instead of those drawn from the buffer.

    Args:
        logits: K tensors logits_BC.
        y_B: Targets; those of new samples are present.
        new_B: Whether a sample is new; no new, or no replayed, samples add 0.
        present_C: Whether a class is in the softmax of new samples.
        share: s, the share of new samples in the buffer; 0 if it has none.
        weight_B: Weight of each sample; None weighs all alike.
    """
    hidden_BC = new_B.unsqueeze(1) & ~present_C
    side_B = torch.where(new_B, new_B.sum(), (~new_B).sum())  # number of new, or of replayed, samples
    values = []
    for logits_BC in logits:
        loss_B = F.cross_entropy(logits_BC.masked_fill(hidden_BC, -torch.inf), y_B, reduction="none")
        if share:
            all_B = F.cross_entropy(logits_BC, y_B, reduction="none")
            loss_B = torch.where(new_B, loss_B + share * all_B, (1 - share) * all_B)
        values.append(((loss_B if weight_B is None else loss_B * weight_B) / side_B).sum())
    return torch.stack(values)


def smoothed_cross_entropy(
    logits: Sequence[Tensor], y_B: Tensor, *, smoothing: float, weight_B: Tensor | None = None
) -> Tensor:
    """Cross-entropy with smoothed labels at each exit, over the classes seen.

    ``loss_K[k] = sum_b w_b * (-(1 - s) log p_b[y_b] - s / C sum_c log p_b[c]) / sum_b w_b``, C the classes whose
    logits are finite. Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (2016).

    Args:
        logits: K tensors logits_BC, ``-inf`` for unseen classes.
        y_B: Targets.
        smoothing: s, from 0 to below 1.
        weight_B: Weight of each sample; None weighs all alike.

    >>> smoothed_cross_entropy([torch.zeros(1, 4)], torch.tensor([2]), smoothing=0.1).exp()
    tensor([4.])
    """
    values = []
    for logits_BC in logits:
        log_p_BC, met_BC = F.log_softmax(logits_BC, dim=1), logits_BC.isfinite()
        all_B = log_p_BC.masked_fill(~met_BC, 0.0).sum(1) / met_BC.sum(1)
        loss_B = (1 - smoothing) * F.nll_loss(log_p_BC, y_B, reduction="none") - smoothing * all_B
        values.append(loss_B.mean() if weight_B is None else (loss_B * weight_B).sum() / weight_B.sum())
    return torch.stack(values)


@torch.no_grad()
def project_gradient(gradients: Sequence[Tensor], references: Sequence[Tensor | None]) -> None:
    """Project the gradient, in place, so that it does not increase the loss of the reference.

    ``g <- g - min(g . r, 0) / (r . r) * r``: unchanged if g . r >= 0, else the nearest gradient orthogonal to r.
    Chaudhry et al., "Efficient Lifelong Learning with A-GEM" (2019), equation 11. Does not synchronize with the device.

    Args:
        gradients: The tensors of g.
        references: The tensors of r, in the same order; None for zeros.

    >>> g = torch.tensor([1.0, -1.0])
    >>> project_gradient([g], [torch.tensor([0.0, 2.0])])
    >>> g
    tensor([1., 0.])
    """
    pairs = [(g, r) for g, r in zip(gradients, references, strict=True) if r is not None]
    if not pairs:
        return
    dot = torch.stack([(g * r).sum() for g, r in pairs]).sum()
    square = torch.stack([r.square().sum() for _, r in pairs]).sum()
    share = dot.clamp(max=0) / square.clamp(min=torch.finfo(square.dtype).tiny)
    for g, r in pairs:
        g.addcmul_(r, share, value=-1)
