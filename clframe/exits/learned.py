"""A learned exit policy, motivated by early-exit failure prediction.

A small head per exit predicts whether stopping there is right or continuing is futile, the target of
:func:`~clframe.exits.failure.failure_targets`, from the scores of the exit and from the value at the exit before. The
network is frozen; heads are fitted on held-out data, and thresholds that are chosen by accuracy are solved on
out-of-fold confidences.
The procedure follows the idea of "Failure Prediction Is a Better Performance Proxy for Early-Exit
Networks Than Calibration"; the authors' own procedure could not be read.

Shape suffixes: B batch, C classes, D features, H hidden units, K exits, N samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from clframe.errors import DataError
from clframe.exits.budgets import Method
from clframe.exits.failure import failure_targets
from clframe.exits.policies import ConfidenceMeasure, FittedConfidence, entropy, margin, register_confidence
from clframe.nn.exit_ensemble import Carried

Floats = NDArray[np.float64]

TOP: Final = 3
"""Largest probabilities, sorted, among the features; 0 where there are fewer classes."""

FEATURES: Final = TOP + 3
"""The largest probabilities, entropy, margin, and the value at the exit asked before (0.5 at the first)."""

HIDDEN: Final = 8
DECAY: Final = 1e-2
"""Penalty on squared weights; above 0, because a target with one value only has no minimum without it.

Of 0.001, 0.003, 0.01, 0.03 and 0.1, this one has the lowest cross-entropy on held-out folds of 200 samples of digits.
"""

FOLDS: Final = 5
"""Folds of :func:`out_of_fold`."""


@register_confidence("failure")
class FailureConfidence(FittedConfidence):
    """Probability that stopping at an exit is right or continuing is futile, from one hidden layer per exit.

    ``sigmoid(v_k . tanh(W_k f + b_k) + c_k)`` with features f of the exit, see :data:`FEATURES`. The value is carried
    to the next exit as one of its features.

    Args:
        exits: Number of exits K, the last included.
    """

    overfits = True

    weight_KHD: Tensor
    bias_KH: Tensor
    out_KH: Tensor
    offset_K: Tensor

    def __init__(self, exits: int) -> None:
        super().__init__(exits)
        self.register_buffer("weight_KHD", torch.zeros(exits, HIDDEN, FEATURES))
        self.register_buffer("bias_KH", torch.zeros(exits, HIDDEN))
        self.register_buffer("out_KH", torch.zeros(exits, HIDDEN))
        self.register_buffer("offset_K", torch.zeros(exits))

    @classmethod
    def fit(cls, scores: Sequence[Tensor], targets_N: Tensor) -> FailureConfidence:
        """Fit exit by exit with L-BFGS in double precision; initial weights are fixed, so the result is deterministic.

        Args:
            scores: K tensors scores_NC of held-out samples, after corrections and ensemble.
            targets_N: Their classes.

        Raises:
            DataError: No samples, or scores that are NaN or +inf.
        """
        if not len(targets_N):
            raise DataError("early_exit.measure: found no held-out samples; set benchmark.validation=0.1")
        # -inf is the score of a class that is not learned yet.
        if any(bool((scores_NC.isnan() | scores_NC.isposinf()).any()) for scores_NC in scores):
            raise DataError(
                "early_exit.measure: found NaN or infinite scores; lower optimizer.lr, training has diverged"
            )
        confidence = cls(len(scores)).to(targets_N.device)
        correct_KN = torch.stack([scores_NC.argmax(1) == targets_N for scores_NC in scores])
        stop_KN = torch.as_tensor(failure_targets(correct_KN.cpu().numpy()), device=targets_N.device)
        carried: Carried = ()
        for exit, scores_NC in enumerate(scores):
            features_ND = _features(scores_NC, carried)
            confidence._fit_exit(exit, features_ND, stop_KN[exit])
            _, carried = confidence(exit, scores_NC, carried)
        return confidence

    def forward(self, exit: int, scores_BC: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
        """confidence_B of one exit, which is carried to the next one."""
        features_BD = _features(scores_BC, carried)
        weight_HD, bias_H = self.weight_KHD[exit].to(features_BD), self.bias_KH[exit].to(features_BD)
        hidden_BH = torch.tanh(F.linear(features_BD, weight_HD, bias_H))
        value_B = (hidden_BH @ self.out_KH[exit].to(features_BD) + self.offset_K[exit]).sigmoid()
        return value_B, (value_B,)

    def _fit_exit(self, exit: int, features_ND: Tensor, stop_N: Tensor) -> None:
        from scipy.optimize import minimize

        x_ND, t_N = (tensor.detach().cpu().double().numpy() for tensor in (features_ND, stop_N))
        mean_D, deviation_D = x_ND.mean(0), x_ND.std(0).clip(min=1e-6)
        standard_ND = (x_ND - mean_D) / deviation_D
        generator = torch.Generator().manual_seed(exit)
        start_HD = torch.randn(HIDDEN, FEATURES, generator=generator, dtype=torch.float64) / FEATURES**0.5
        start = np.concatenate([start_HD.numpy().ravel(), np.zeros(2 * HIDDEN + 1)])
        found = minimize(
            _loss_and_gradient, start, args=(standard_ND, t_N), jac=True, method="L-BFGS-B",
            options={"maxiter": 500, "gtol": 1e-7, "ftol": 1e-12},
        ).x  # fmt: skip
        weight_HD, bias_H, out_H, offset = _unpack(found)
        raw_HD = weight_HD / deviation_D  # undo the standardization
        for buffer, value in (
            (self.weight_KHD, raw_HD), (self.bias_KH, bias_H - raw_HD @ mean_D), (self.out_KH, out_H),
            (self.offset_K, np.asarray(offset)),
        ):  # fmt: skip
            buffer[exit].copy_(torch.from_numpy(value))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        stored = state_dict.get(f"{prefix}offset_K")
        if stored is not None and stored.shape != self.offset_K.shape:
            fresh = FailureConfidence(len(stored))
            for name, buffer in fresh.named_buffers():
                setattr(self, name, buffer.to(self.offset_K.device))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def out_of_fold(
    kind: type[FittedConfidence], scores: Sequence[Tensor], targets_N: Tensor, *, folds: int = FOLDS
) -> Tensor:
    """Confidences of held-out samples under measures that were fitted without them.

    A measure is too confident on the samples it was fitted on: thresholds that are solved on the same samples need its
    confidences on samples it has not seen. Sample i belongs to fold ``i mod folds``; each fold's confidences come from
    a measure fitted on the other folds.

    Args:
        kind: The measure.
        scores: K tensors scores_NC of held-out samples, after corrections and ensemble.
        targets_N: Their classes.
        folds: Number of folds, at most N. A single sample has the confidence of the measure fitted on it.

    Returns:
        confidence_KN in double precision.

    Raises:
        DataError: As :meth:`FittedConfidence.fit`.
    """
    samples = len(targets_N)
    fold_N = torch.arange(samples, device=targets_N.device) % min(folds, max(samples, 1))
    found_KN = torch.zeros(len(scores), samples, dtype=torch.float64, device=targets_N.device)
    for fold in range(int(fold_N.max()) + 1 if samples else 1):
        inside_N = fold_N == fold
        fitting_N = ~inside_N if samples > 1 else inside_N
        measure = kind.fit([scores_NC[fitting_N] for scores_NC in scores], targets_N[fitting_N])
        found_KN[:, inside_N] = confidences(measure, [scores_NC[inside_N] for scores_NC in scores]).double()
    return found_KN


def held_out_confidences(
    measure: ConfidenceMeasure, scores: Sequence[Tensor], targets_N: Tensor, *, method: Method = "shared"
) -> Tensor:
    """confidence_KN of the samples that a measure was fitted on, if any, to solve thresholds on.

    Out of fold for a measure that overfits, see :attr:`FittedConfidence.overfits`. Not so for thresholds that are
    quantiles: they are chosen by the distribution of the confidences, which is that of no single fold's measure, and
    not by how many predictions are right.

    Args:
        measure: The measure that decides.
        scores: K tensors scores_NC of held-out samples, after corrections and ensemble.
        targets_N: Their classes.
        method: How thresholds are solved.
    """
    if method != "quantiles" and isinstance(measure, FittedConfidence) and measure.overfits:
        return out_of_fold(type(measure), scores, targets_N)
    return confidences(measure, scores)


def confidences(measure: ConfidenceMeasure, scores: Sequence[Tensor]) -> Tensor:
    """confidence_KN of all exits, in order of depth because a measure carries values from exit to exit."""
    found, carried = list[Tensor](), cast(Carried, ())
    for exit, scores_NC in enumerate(scores):
        confidence_N, carried = measure(exit, scores_NC, carried)
        found.append(confidence_N)
    return torch.stack(found)


def _unpack(parameters: Floats) -> tuple[Floats, Floats, Floats, float]:
    """weight_HD, bias_H, out_H and the offset of one exit, from one vector."""
    weight, bias_H, out_H, offset = np.split(parameters, np.cumsum([HIDDEN * FEATURES, HIDDEN, HIDDEN]))
    return weight.reshape(HIDDEN, FEATURES), bias_H, out_H, float(offset[0])


def _loss_and_gradient(parameters: Floats, x_ND: Floats, t_N: Floats) -> tuple[float, Floats]:
    """Mean binary cross-entropy with the penalty, and its gradient; biases of hidden units are not penalized.

    Written out in NumPy: a fit takes hundreds of steps on few samples, where automatic differentiation is 20 times
    slower.
    """
    weight_HD, bias_H, out_H, offset = _unpack(parameters)
    hidden_NH = np.tanh(x_ND @ weight_HD.T + bias_H)
    z_N = hidden_NH @ out_H + offset
    loss = float(np.mean(np.logaddexp(0, z_N) - t_N * z_N))
    penalty = DECAY / 2 * float((weight_HD**2).sum() + (out_H**2).sum() + offset**2)
    slope_N = (0.5 * (1 + np.tanh(z_N / 2)) - t_N) / len(t_N)
    inner_NH = np.outer(slope_N, out_H) * (1 - hidden_NH**2)
    gradient = np.concatenate([
        (inner_NH.T @ x_ND + DECAY * weight_HD).ravel(), inner_NH.sum(0), hidden_NH.T @ slope_N + DECAY * out_H,
        [slope_N.sum() + DECAY * offset],
    ])  # fmt: skip
    return loss + penalty, gradient


def _features(scores_BC: Tensor, carried: Carried) -> Tensor:
    """features_BD of one exit."""
    p_BC = scores_BC.softmax(1) if scores_BC.dtype == torch.float64 else scores_BC.float().softmax(1)
    top_BT = p_BC.topk(min(TOP, p_BC.shape[1]), dim=1).values
    top_BT = F.pad(top_BT, (0, TOP - top_BT.shape[1]))
    before_B = carried[0].to(p_BC) if carried else p_BC.new_full((p_BC.shape[0],), 0.5)
    others = [measure(0, scores_BC, ())[0].to(p_BC) for measure in (entropy, margin)]
    return torch.cat([top_BT, torch.stack([*others, before_B], 1)], 1)
