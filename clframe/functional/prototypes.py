"""Closed-form classifiers on fixed features, and consolidation of the rows of linear classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor
from torch.nn import functional as F


def alignment(old_OF: Tensor, new_NF: Tensor) -> Tensor:
    """Return ``mean_o |old_o| / mean_n |new_n|``, the factor that gives new rows the mean norm of old ones.

    Zhao et al., "Maintaining Discrimination and Fairness in Class Incremental Learning" (2020), equation 7. One
    without old or without new rows, or if the new ones are all zero.

    >>> alignment(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 8.0], [12.0, 0.0]])).item()
    0.5
    """
    if not len(old_OF) or not len(new_NF):
        return new_NF.new_ones(())
    length = new_NF.norm(dim=1).mean()
    scale: Tensor = torch.where(length > 0, old_OF.norm(dim=1).mean() / length, torch.ones_like(length))
    return scale


def consolidate_rows(kept_CF: Tensor, kept_C: Tensor, fresh_CF: Tensor, fresh_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return the consolidated weights and sample counts of CWR* after an experience.

    ``w = (w sqrt(past / now) + t - mean(t)) / (sqrt(past / now) + 1)`` for the classes of the experience, ``t`` the
    trained weights and ``mean(t)`` one number over all of them; other classes do not change. Lomonaco et al.,
    "Rehearsal-Free Continual Learning over Small Non-I.I.D. Batches" (2020), algorithm 1.

    Args:
        kept_CF: Consolidated weights so far.
        kept_C: Samples of each class so far.
        fresh_CF: Trained weights.
        fresh_C: Samples of the experience; 0 for classes that it does not have.

    Returns:
        weights_CF, count_C.

    >>> kept, fresh = torch.tensor([[2.0]]), torch.tensor([[5.0], [9.0]])
    >>> padded = torch.cat([kept, torch.zeros(1, 1)])
    >>> consolidate_rows(padded, torch.tensor([4, 0]), fresh, torch.tensor([1, 1]))[0].flatten().tolist()
    [0.6666666865348816, 2.0]
    """
    now_C = fresh_C > 0
    mean = fresh_CF[now_C].mean() if bool(now_C.any()) else fresh_CF.new_zeros(())
    past_C1 = (kept_C / fresh_C.clamp_min(1)).to(fresh_CF).sqrt().unsqueeze(1)
    merged_CF = (kept_CF * past_C1 + fresh_CF - mean) / (past_C1 + 1)
    return torch.where(now_C.unsqueeze(1), merged_CF, kept_CF), kept_C + fresh_C


def to_single(x: Tensor) -> Tensor:
    """Convert half to single precision; others stay. Sums over many samples do not grow any more in half precision.

    >>> to_single(torch.zeros(2, dtype=torch.bfloat16)).dtype, to_single(torch.zeros(2, dtype=torch.float64)).dtype
    (torch.float32, torch.float64)
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def to_double(values: Tensor) -> Tensor:
    """Convert to double precision, on the CPU if the device has none (MPS)."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def pad_classes(values_C: Tensor, classes: int) -> Tensor:
    """Pad the first dimension with zeros up to ``classes``.

    >>> pad_classes(torch.ones(1), 3)
    tensor([1., 0., 0.])
    """
    missing = classes - len(values_C)
    if missing <= 0:
        return values_C
    return torch.cat([values_C, values_C.new_zeros(missing, *values_C.shape[1:])])


def update_means(mean_CF: Tensor, count_C: Tensor, features_BF: Tensor, y_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return class means and counts after a batch: ``mu_c + sum_b [y_b = c] (f_b - mu_c) / (n_c + m_c)``.

    Args:
        mean_CF: Means so far, double; zeros for an unseen class.
        count_C: Samples so far, double.
        features_BF: New samples, double.
        y_B: Their classes.

    >>> mean_CF, count_C = torch.tensor([[1.0], [0.0]]), torch.tensor([1.0, 0.0])
    >>> mean_CF, count_C = update_means(mean_CF, count_C, torch.tensor([[3.0], [5.0]]), torch.tensor([0, 1]))
    >>> mean_CF.tolist(), count_C.tolist()
    ([[2.0], [5.0]], [2.0, 1.0])
    """
    member_BC = F.one_hot(y_B, len(count_C)).to(features_BF.dtype)
    count = count_C + member_BC.sum(0)
    moved_CF = member_BC.T @ (features_BF - mean_CF[y_B])
    return mean_CF + moved_CF / count.clamp(min=1)[:, None], count


def scatter_update(
    features_BF: Tensor, y_B: Tensor, mean_CF: Tensor, count_C: Tensor, *, total: Tensor | None = None
) -> Tensor:
    """Return the increment of the scatter matrix by a batch, sample by sample: ``sum_t n_t / (n_t + 1) d_t d_t'``.

    ``d_t = f_t - mu`` with mu the mean of the sample's class before it, zero for a new class.

    With ``total`` None, n_t counts the earlier samples of that class: the sum over a stream is exactly the scatter
    within the classes, ``sum_t (f_t - mu_y)(f_t - mu_y)'`` with the final means, in any order (Welford, "Note on a
    Method for Calculating Corrected Sums of Squares and Products", 1962). With ``total``, n_t counts all earlier
    samples, as in Hayes and Kanan, "Lifelong Machine Learning with Deep Streaming Linear Discriminant
    Analysis" (2020): their covariance after T samples is the sum divided by T. It depends on the order, and the
    first sample of a class adds its square.

    Args:
        features_BF: New samples in the order of the stream, double.
        y_B: Their classes.
        mean_CF: Class means before the batch.
        count_C: Samples of each class before the batch.
        total: Samples of all classes before the batch.

    Returns:
        scatter_FF.
    """
    earlier_BB = (y_B[:, None] == y_B[None, :]).to(features_BF.dtype).tril(-1)
    before_B = count_C[y_B] + earlier_BB.sum(1)
    sums_BF = count_C[y_B, None] * mean_CF[y_B] + earlier_BB @ features_BF
    away_BF = features_BF - sums_BF / before_B.clamp(min=1)[:, None]
    seen_B = before_B if total is None else total + torch.arange(len(y_B), device=y_B.device)
    return (away_BF * (seen_B / (seen_B + 1))[:, None]).T @ away_BF


def discriminant(mean_CF: Tensor, covariance_FF: Tensor, count_C: Tensor, *, shrinkage: float) -> tuple[Tensor, Tensor]:
    """Return weights and biases of linear discriminant analysis with equal priors.

    ``score_c(f) = f' L mu_c - mu_c' L mu_c / 2`` with ``L = ((1 - e) S + e I)^-1``, up to a constant common to all
    classes: relative to the center m of the means, ``w_c = L (mu_c - m)`` and ``b_c = -(mu_c + m)' L (mu_c - m) / 2``,
    which loses fewer digits.

    Args:
        mean_CF: Class means, double.
        covariance_FF: S, shared by all classes.
        count_C: Samples of each class; a class without any is left out of the center.
        shrinkage: e, above 0 and at most 1.

    Returns:
        weight_CF and bias_C, double.
    """
    met_C = (count_C > 0).to(mean_CF.dtype)
    center_F = met_C @ mean_CF / met_C.sum().clamp(min=1)
    identity_FF = torch.eye(len(covariance_FF), dtype=covariance_FF.dtype, device=covariance_FF.device)
    shrunk_FF = (1 - shrinkage) * covariance_FF + shrinkage * identity_FF
    weight_CF = _solve(shrunk_FF, (mean_CF - center_F).T).T
    return weight_CF, -0.5 * ((mean_CF + center_F) * weight_CF).sum(1)


def cosines(features_BF: Tensor, prototypes_CF: Tensor) -> Tensor:
    """Return cosine_BC of every feature vector and prototype; 0 if one of them is zero."""
    return F.normalize(features_BF, dim=1) @ F.normalize(prototypes_CF, dim=1).T


def random_features(features_BF: Tensor, projection_FM: Tensor) -> Tensor:
    """Return ``relu(f' W)``, of shape [B, M]."""
    return F.relu(features_BF @ projection_FM)


def ridge_regression(gram_MM: Tensor, cross_MC: Tensor, *, ridge: float) -> Tensor:
    """Return weight_MC that minimizes ``|H W - Y|^2 + ridge |W|^2``, with ``gram = H'H`` and ``cross = H'Y``.

    ``W = (H'H + ridge I)^-1 H'Y``, in the precision of its arguments.
    """
    return _solve(gram_MM + ridge * torch.eye(len(gram_MM), dtype=gram_MM.dtype, device=gram_MM.device), cross_MC)


def held_out_errors(
    fit_NM: Tensor, y_N: Tensor, held_HM: Tensor, held_y_H: Tensor, *, classes: int, ridges: Sequence[float]
) -> Tensor:
    """Return error_R, the mean squared error on one-hot targets of ridge regressions with each of the parameters.

    All share one eigendecomposition: ``W = H' (H H' + r I)^-1 Y`` with ``H H' = U diag(e) U'``. It costs
    N^3 for any M: for fewer samples than features.

    Args:
        fit_NM: Features of the samples to fit, double.
        y_N: Their classes.
        held_HM: Features of the samples held out.
        held_y_H: Their classes.
        classes: Number of classes C.
        ridges: Parameters above 0.
    """
    targets_NC = F.one_hot(y_N, classes).to(fit_NM.dtype)
    held_HC = F.one_hot(held_y_H, classes).to(fit_NM.dtype)
    values_N, vectors_NN = torch.linalg.eigh(fit_NM @ fit_NM.T)
    values_N, turned_NC = values_N.clamp(min=0), vectors_NN.T @ targets_NC
    kernel_HN = held_HM @ fit_NM.T @ vectors_NN
    errors = [(kernel_HN @ (turned_NC / (values_N + ridge)[:, None]) - held_HC).square().mean() for ridge in ridges]
    return torch.stack(errors)


def mask_unmet_classes(scores_BC: Tensor, met_C: Tensor, *, classes: int) -> Tensor:
    """Set the scores of unseen classes to ``-inf`` and pad to ``classes`` columns.

    >>> mask_unmet_classes(torch.zeros(1, 2), torch.tensor([True, False]), classes=3).tolist()
    [[0.0, -inf, -inf]]
    """
    masked_BC = scores_BC.masked_fill(~met_C, -inf)
    return F.pad(masked_BC, (0, max(classes - masked_BC.shape[1], 0)), value=-inf)


def _solve(matrix_FF: Tensor, right_FC: Tensor) -> Tensor:
    """Solve for a positive definite matrix; the least-norm solution if rounding makes it indefinite."""
    factor_FF, failed = torch.linalg.cholesky_ex(matrix_FF)
    if bool(failed):
        shortest_FC: Tensor = torch.linalg.pinv(matrix_FF, hermitian=True) @ right_FC
        return shortest_FC
    return torch.cholesky_solve(right_FC, factor_FF)
