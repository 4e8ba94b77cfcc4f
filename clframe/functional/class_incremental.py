"""Class-incremental losses, bias correction and nearest means, as used by BiC, SS-IL, LODE and iCaRL.

Losses take the logits of all exits and return one value per exit; -inf marks columns of unseen classes.

Shape suffixes: B batch, N samples, C classes, M new classes, K exits, F features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

NEWTON_STEPS = 50
"""Quadratic convergence takes under ten steps; more are for distant starting points."""


def separated_cross_entropy(
    logits: Sequence[Tensor],
    y_B: Tensor,
    *,
    new: Sequence[int],
    old: Sequence[int],
    weight_B: Tensor | None = None,
) -> Tensor:
    """Cross-entropy at each exit, with separate softmaxes over new and old classes.

    ``loss_K[k] = sum_b w_b (log sum_{c in S(b)} exp z_c - z_y) / sum_b w_b``, S(b) the new classes if the sample's
    class is new, else the old ones. So new samples never decrease the logits of old classes. Ahn et al., "SS-IL:
    Separated Softmax for Incremental Learning" (2021), equation 4.

    Args:
        logits: K tensors logits_BC.
        y_B: Targets.
        new: Classes of this experience.
        old: Classes of earlier experiences; if empty, this is the cross-entropy over the new ones.
        weight_B: Weight of each sample; None weighs all alike.

    Returns:
        loss_K, in nats.
    """
    new_B = among(y_B, new)
    losses = []
    for logits_BC in logits:
        own_B = _log_sum(logits_BC, new)
        if old:
            own_B = torch.where(new_B, own_B, _log_sum(logits_BC, old))
        losses.append(_mean(own_B - _target_logits(logits_BC, y_B), weight_B))
    return torch.stack(losses)


def decoupled_cross_entropy(
    logits: Sequence[Tensor],
    y_B: Tensor,
    *,
    new: Sequence[int],
    old: Sequence[int],
    inner: float,
    outer: float,
    weight_B: Tensor | None = None,
) -> Tensor:
    """Cross-entropy at each exit, with two weights for the two terms of new samples.

    With s(A) = log sum_{c in A} exp z_c, a sample's cross-entropy ``s(all) - z_y`` is ``s(new) - z_y``, which separates
    the new classes, plus ``s(all) - s(new)``, which separates new from old. ``loss_K[k]`` is the mean over new samples
    of ``inner * first + outer * second``, plus the mean over old samples of their cross-entropy. Liang and
    Li, "Loss Decoupling for Task-Agnostic Continual Learning" (2023), equations 3 to 5.

    Args:
        logits: K tensors logits_BC.
        y_B: Targets.
        new: Classes of this experience.
        old: Classes of earlier experiences.
        inner: Weight of the term among new classes.
        outer: Weight of the term between new and old.
        weight_B: Weight of each sample within its mean; None weighs all alike.

    Returns:
        loss_K, in nats.
    """
    new_B = among(y_B, new).to(logits[0].dtype)
    old_B = 1 - new_B
    share_B = new_B / new_B.sum().clamp(min=1) + old_B / old_B.sum().clamp(min=1)
    if weight_B is not None:
        share_B = share_B * weight_B
    losses = []
    for logits_BC in logits:
        all_B, inside_B = _log_sum(logits_BC, [*old, *new]), _log_sum(logits_BC, new)
        target_B = _target_logits(logits_BC, y_B)
        split_B = inner * (inside_B - target_B) + outer * (all_B - inside_B)
        losses.append((share_B * torch.where(new_B > 0, split_B, all_B - target_B)).sum())
    return torch.stack(losses)


def binary_cross_entropy(
    logits: Sequence[Tensor], y_B: Tensor, *, classes: Sequence[int], weight_B: Tensor | None = None
) -> Tensor:
    """One-against-all cross-entropy at each exit: ``mean_b sum_c -log sigmoid(+z_c or -z_c)``, + where c is y_b.

    The first sum of the loss of Rebuffi et al., "iCaRL" (2017), algorithm 3. A sample of a class that is not in
    ``classes`` is a negative for all of them.

    Args:
        logits: K tensors logits_BC.
        y_B: Targets.
        classes: Classes to sum over.
        weight_B: Weight of each sample; None weighs all alike.

    Returns:
        loss_K, in nats.
    """
    chosen = columns(classes)
    order_M = torch.arange(logits[0].shape[1], device=y_B.device)[chosen]
    target_BM = (y_B.unsqueeze(1) == order_M).to(logits[0].dtype)
    return torch.stack([_binary(logits_BC[:, chosen], target_BM, weight_B) for logits_BC in logits])


def binary_distillation(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    classes: Sequence[int],
    weight_B: Tensor | None = None,
) -> Tensor:
    """One-against-all cross-entropy at each exit with the teacher's sigmoids as targets.

    ``loss_K[k] = mean_b sum_c -(q log p + (1 - q) log(1 - p))``, p and q the sigmoids of student and teacher: the
    second sum of the loss of Rebuffi et al., "iCaRL" (2017), algorithm 3.

    Args:
        student: K tensors logits_BC; may have more classes than the teacher.
        teacher: K tensors logits_BC, without gradient.
        classes: Classes to sum over.
        weight_B: Weight of each sample; None weighs all alike.

    Returns:
        loss_K, in nats.
    """
    chosen = columns(classes)
    return torch.stack(
        [
            _binary(s_BC[:, chosen], t_BC[:, chosen].sigmoid(), weight_B)
            for s_BC, t_BC in zip(student, teacher, strict=True)
        ]
    )


def correct_bias(logits: Sequence[Tensor], alpha_KC: Tensor, beta_KC: Tensor) -> tuple[Tensor, ...]:
    """Return ``alpha z + beta`` for each column of each exit; (1, 0) is the identity, also for ``-inf``.

    Args:
        logits: K tensors logits_BC; may have fewer columns than corrections, or more, which are not corrected.
        alpha_KC: Factors.
        beta_KC: Offsets.

    >>> correct_bias([torch.ones(1, 3)], torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 5.0]]))
    (tensor([[1., 7., 1.]]),)
    """
    new = logits[0].shape[1] - alpha_KC.shape[1]
    if new:  # a negative number cuts
        device = logits[0].device
        alpha_KC = F.pad(alpha_KC.to(device), (0, new), value=1.0)
        beta_KC = F.pad(beta_KC.to(device), (0, new))
    return tuple(
        logits_BC * alpha_C + beta_C for logits_BC, alpha_C, beta_C in zip(logits, alpha_KC, beta_KC, strict=True)
    )


@torch.no_grad()
def fit_bias(logits_NC: Tensor, y_N: Tensor, *, new: Sequence[int], decay: float) -> tuple[float, float]:
    """Fit (alpha, beta) that make the logits of new classes comparable to those of old ones.

    Minimizes ``mean_n CE(q_n, y_n) + decay / 2 * ((alpha - 1)^2 + beta^2)``, q being ``alpha z + beta`` for the new
    classes and z for the others: Wu et al., "Large Scale Incremental Learning" (2019), equations 4 and 5. Strictly
    convex in the pair, so Newton's method finds the unique minimum, in double precision on the CPU: deterministic. The
    published code regularizes beta alone, by 0.1, and takes 200 epochs of SGD; alpha is regularized here as well,
    because separable samples leave no minimum in alpha.

    Args:
        logits_NC: Logits of held-out samples of old and new classes.
        y_N: Targets.
        new: Classes to correct.
        decay: Above 0.

    >>> new_is_2_too_high = torch.tensor([[0.0, 2.0], [0.0, 2.0]])
    >>> alpha, beta = fit_bias(new_is_2_too_high, torch.tensor([0, 1]), new=[1], decay=1e-6)
    >>> round(2 * alpha + beta, 4)
    0.0
    """
    logits_NC, y_N = logits_NC.detach().to("cpu", torch.float64), y_N.cpu()
    new_N = among(y_N, new)
    z_NM = logits_NC[:, columns(new)]
    rest_N = _log_sum(logits_NC, [c for c in range(logits_NC.shape[1]) if c not in set(new)])
    target_N, start_2 = _target_logits(logits_NC, y_N), torch.tensor([1.0, 0.0], dtype=torch.float64)

    def probabilities(pair_2: Tensor) -> tuple[Tensor, Tensor]:
        """Return p_NM of the new classes, and the objective."""
        q_NM = pair_2[0] * z_NM + pair_2[1]
        total_N = torch.logaddexp(rest_N, q_NM.logsumexp(1))
        own_N = torch.where(new_N, pair_2[0] * target_N + pair_2[1], target_N)
        value = (total_N - own_N).mean() + decay / 2 * (pair_2 - start_2).square().sum()
        return (q_NM - total_N.unsqueeze(1)).exp(), value

    pair_2 = start_2
    p_NM, value = probabilities(pair_2)
    for _ in range(NEWTON_STEPS):
        s0_N, s1_N, s2_N = p_NM.sum(1), (p_NM * z_NM).sum(1), (p_NM * z_NM.square()).sum(1)
        pull_2 = decay * (pair_2 - start_2)
        slope_2 = torch.stack([(s1_N - new_N * target_N).mean(), (s0_N - new_N.double()).mean()]) + pull_2
        mixed = (s1_N - s1_N * s0_N).mean()
        bend_22 = torch.stack(
            [(s2_N - s1_N.square()).mean() + decay, mixed, mixed, (s0_N - s0_N.square()).mean() + decay]
        ).reshape(2, 2)
        step_2 = torch.linalg.solve(bend_22, slope_2)
        gain, length = slope_2 @ step_2, 1.0  # gain is twice the decrease of a quadratic objective
        if gain < 1e-20:
            break
        while length > 1e-9:
            p_NM, after = probabilities(pair_2 - length * step_2)
            if after <= value - 1e-4 * length * gain:
                break
            length /= 2
        else:
            break  # rounding prevents a further decrease
        pair_2, value = pair_2 - length * step_2, after
    return float(pair_2[0]), float(pair_2[1])


def nearest_mean_scores(features_BF: Tensor, mean_CF: Tensor, known_C: Tensor, *, classes: int) -> Tensor:
    """Return scores_BC ``-|| f - mu_c ||^2`` of normalized f and mu_c; ``-inf`` for classes without a mean.

    Nearest-mean-of-exemplars, algorithm 1 of Rebuffi et al., "iCaRL" (2017), as logits: their softmax is the posterior
    of Gaussians of variance 1/2 around the means.

    Args:
        features_BF: Features, converted to single precision if below it.
        mean_CF: Means, or sums, of normalized features.
        known_C: Whether a class has a mean.
        classes: Columns of the result, at least C.

    >>> nearest_mean_scores(torch.tensor([[2.0, 0.0]]), torch.eye(2), torch.tensor([True, True]), classes=3)
    tensor([[-0., -2., -inf]])
    """
    unit_BF = F.normalize(features_BF.to(torch.promote_types(features_BF.dtype, mean_CF.dtype)), dim=1)
    unit_CF = F.normalize(mean_CF.to(unit_BF.dtype), dim=1)
    squared_BC = unit_BF.square().sum(1, keepdim=True) + unit_CF.square().sum(1) - 2 * unit_BF @ unit_CF.T
    scores_BC = (-squared_BC.clamp(min=0)).masked_fill(~known_C, -torch.inf)
    return F.pad(scores_BC, (0, classes - scores_BC.shape[1]), value=-torch.inf)


def among(y_B: Tensor, classes: Sequence[int]) -> Tensor:
    """Return whether each target is one of ``classes``; consecutive ones need no transfer to the device.

    >>> among(torch.tensor([0, 3, 2, 5]), [2, 3, 4]).tolist()
    [False, True, True, False]
    """
    first, last = min(classes), max(classes)
    if len(set(classes)) == last - first + 1:
        return (y_B >= first) & (y_B <= last)
    return torch.isin(y_B, torch.tensor(sorted(set(classes)), device=y_B.device))


def columns(classes: Sequence[int]) -> slice | list[int]:
    """Return ``classes`` in ascending order as an index; a slice if consecutive, which gives a view, not a copy.

    >>> columns([3, 2]), columns([1, 4])
    (slice(2, 4, None), [1, 4])
    """
    ordered = sorted(set(classes))
    if ordered and len(ordered) == ordered[-1] - ordered[0] + 1:
        return slice(ordered[0], ordered[-1] + 1)
    return ordered


def _log_sum(logits_BC: Tensor, classes: Sequence[int]) -> Tensor:
    return logits_BC[:, columns(classes)].logsumexp(1)


def _target_logits(logits_BC: Tensor, y_B: Tensor) -> Tensor:
    return logits_BC.gather(1, y_B.unsqueeze(1)).squeeze(1)


def _mean(loss_B: Tensor, weight_B: Tensor | None) -> Tensor:
    return loss_B.mean() if weight_B is None else (loss_B * weight_B).sum() / weight_B.sum()


def _binary(logits_BM: Tensor, target_BM: Tensor, weight_B: Tensor | None) -> Tensor:
    loss_BM = F.binary_cross_entropy_with_logits(logits_BM, target_BM, reduction="none")
    return _mean(loss_BM.sum(1), weight_B)
