"""The confidence measure ``gate``: a logistic regression per exit, fitted on held-out data.

Shape suffixes: B batch, C classes, D features of an exit, K exits, N samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from clframe.errors import DataError
from clframe.exits.policies import FittedConfidence, entropy, margin, max_probability, register_confidence
from clframe.nn.exit_ensemble import Carried

FEATURES = (max_probability, entropy, margin)


@register_confidence("gate")
class LearnedConfidence(FittedConfidence):
    """Logistic regression per exit: ``sigmoid(w_k . features + b_k)`` of maximum probability, entropy and margin.

    The state is two tensors; loading a state takes the number of exits from them.

    Args:
        exits: Number of exits K, the last included.

    >>> confidence = LearnedConfidence(2)
    >>> confidence(0, torch.zeros(3, 4), ())[0]
    tensor([0.5000, 0.5000, 0.5000])
    """

    weight_KD: Tensor
    bias_K: Tensor

    def __init__(self, exits: int) -> None:
        super().__init__(exits)
        self.register_buffer("weight_KD", torch.zeros(exits, len(FEATURES)))
        self.register_buffer("bias_K", torch.zeros(exits))

    @classmethod
    def fit(cls, scores: Sequence[Tensor], targets_N: Tensor) -> LearnedConfidence:
        """Fit with the default penalty; see :func:`fit_learned_confidence`."""
        return fit_learned_confidence(scores, targets_N)

    def forward(self, exit: int, scores_BC: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
        """confidence_B of one exit; nothing is carried."""
        features_BD = confidence_features(exit, scores_BC)
        return torch.addmv(self.bias_K[exit], features_BD, self.weight_KD[exit].to(features_BD)).sigmoid_(), ()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        saved = state_dict.get(f"{prefix}weight_KD")
        if saved is not None and saved.shape != self.weight_KD.shape:
            self.weight_KD = self.weight_KD.new_zeros(saved.shape)
            self.bias_K = self.bias_K.new_zeros(saved.shape[0])
        super()._load_from_state_dict(state_dict, prefix, *rest)


def confidence_features(exit: int, scores_BC: Tensor) -> Tensor:
    """features_BD of :class:`LearnedConfidence`."""
    return torch.stack([measure(exit, scores_BC, ())[0] for measure in FEATURES], 1)


def fit_learned_confidence(
    scores: Sequence[Tensor], targets_N: Tensor, *, decay: float = 1e-3
) -> LearnedConfidence:
    """Logistic regression, exit by exit, of whether the exit's prediction is right.

    Minimizes mean cross-entropy + decay / 2 * |weights of the standardized features|^2 with L-BFGS in double
    precision; no random numbers are drawn. Fit it on held-out data: on training data every exit is right.

    Args:
        scores: K tensors scores_NC, the logits of each exit after corrections and ensembles.
        targets_N: The right classes.
        decay: Weight of the penalty; above 0, since exits that are always right have no minimum without it.

    Raises:
        DataError: No samples.

    >>> scores_NC = torch.tensor([[3.0, 0.0], [0.2, 0.0], [0.0, 3.0], [0.0, 0.1]])
    >>> confidence = fit_learned_confidence([scores_NC], torch.tensor([0, 1, 1, 0]))
    >>> confidence(0, scores_NC, ())[0] > 0.5
    tensor([ True, False,  True, False])
    """
    if not len(targets_N):
        raise DataError("fit_learned_confidence: found no samples; give held-out scores and targets")
    per_exit = [confidence_features(exit, scores_NC) for exit, scores_NC in enumerate(scores)]
    features_KND = torch.stack(per_exit).detach().double()
    right_KN = torch.stack([scores_NC.argmax(1) == targets_N for scores_NC in scores]).double()
    mean_KD, deviation_KD = features_KND.mean(1), features_KND.std(1, correction=0).clamp(min=1e-6)
    standard_KND = (features_KND - mean_KD[:, None]) / deviation_KD[:, None]
    weight_KD, bias_K = _fit_logistic(standard_KND, right_KN, decay=decay)
    weight_KD = weight_KD / deviation_KD  # undo the standardization, so that the measure takes raw features
    confidence = LearnedConfidence(len(scores)).to(targets_N.device)
    confidence.weight_KD.copy_(weight_KD)
    confidence.bias_K.copy_(bias_K - (weight_KD * mean_KD).sum(1))
    return confidence


def _fit_logistic(features_KND: Tensor, right_KN: Tensor, *, decay: float) -> tuple[Tensor, Tensor]:
    """weights_KD and biases_K of K independent regressions, fitted together because their losses add up."""
    exits, samples, width = features_KND.shape
    parameters_KD = features_KND.new_zeros(exits, width + 1, requires_grad=True)
    search = torch.optim.LBFGS(
        [parameters_KD], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        search.zero_grad()
        logits_KN = (features_KND * parameters_KD[:, None, 1:]).sum(2) + parameters_KD[:, :1]
        fit = binary_cross_entropy_with_logits(logits_KN, right_KN, reduction="sum") / samples
        total = fit + decay / 2 * parameters_KD.square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        search.step(loss)
    fitted_KD = parameters_KD.detach()
    return fitted_KD[:, 1:], fitted_KD[:, 0]
