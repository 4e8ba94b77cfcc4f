"""A learned measure of confidence: how likely an exit's answer is right.

Shape suffixes: B batch, C classes, D signs, K exits, N samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from clframe.errors import DataError
from clframe.nn.exits.ensemble import Carried
from clframe.nn.exits.policies import entropy, margin, max_probability

SIGNS = (max_probability, entropy, margin)


class Gate(nn.Module):
    """``sigmoid(w_k . signs + b_k)``, the signs being maximum probability, entropy and margin of exit k.

    It is a measure like those in :mod:`clframe.nn.exits.policies`; :func:`fit_gate` makes one. Its state is
    two tensors, and loading takes the number of exits from them.

    Args:
        exits: Number of exits K, the last included.

    >>> gate = Gate(2)
    >>> gate(0, torch.zeros(3, 4), ())[0]
    tensor([0.5000, 0.5000, 0.5000])
    """

    weight_KD: Tensor
    bias_K: Tensor

    def __init__(self, exits: int) -> None:
        super().__init__()
        self.register_buffer("weight_KD", torch.zeros(exits, len(SIGNS)))
        self.register_buffer("bias_K", torch.zeros(exits))

    def forward(self, exit: int, scores_BC: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
        """confidence_B of one exit; nothing is carried."""
        signs_BD = signs(exit, scores_BC)
        return torch.addmv(self.bias_K[exit], signs_BD, self.weight_KD[exit].to(signs_BD)).sigmoid_(), ()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        saved = state_dict.get(f"{prefix}weight_KD")
        if saved is not None and saved.shape != self.weight_KD.shape:
            self.weight_KD = self.weight_KD.new_zeros(saved.shape)
            self.bias_K = self.bias_K.new_zeros(saved.shape[0])
        super()._load_from_state_dict(state_dict, prefix, *rest)


def signs(exit: int, scores_BC: Tensor) -> Tensor:
    """signs_BD: what a gate looks at."""
    return torch.stack([sign(exit, scores_BC, ())[0] for sign in SIGNS], 1)


def fit_gate(scores: Sequence[Tensor], targets_N: Tensor, *, decay: float = 1e-3) -> Gate:
    """Logistic regression, exit by exit, of whether the answer is right.

    Minimizes mean cross-entropy + decay / 2 * |weights of the standardized signs|^2 with L-BFGS in double
    precision; nothing is drawn at random. Fit it on held-out data: on training data every exit is right.

    Args:
        scores: K tensors scores_NC, what each exit answers with.
        targets_N: The right classes.
        decay: Weight of the penalty; above 0, since exits that are always right have no other minimum.

    Raises:
        DataError: No samples.

    >>> scores_NC = torch.tensor([[3.0, 0.0], [0.2, 0.0], [0.0, 3.0], [0.0, 0.1]])
    >>> gate = fit_gate([scores_NC], torch.tensor([0, 1, 1, 0]))
    >>> gate(0, scores_NC, ())[0] > 0.5
    tensor([ True, False,  True, False])
    """
    if not len(targets_N):
        raise DataError("fit_gate: found no samples; give held-out scores and targets")
    signs_KND = torch.stack([signs(exit, scores_NC) for exit, scores_NC in enumerate(scores)]).detach().double()
    right_KN = torch.stack([scores_NC.argmax(1) == targets_N for scores_NC in scores]).double()
    mean_KD, spread_KD = signs_KND.mean(1), signs_KND.std(1, correction=0).clamp(min=1e-6)
    standard_KND = (signs_KND - mean_KD[:, None]) / spread_KD[:, None]
    weight_KD, bias_K = _logistic(standard_KND, right_KN, decay=decay)
    weight_KD = weight_KD / spread_KD
    gate = Gate(len(scores)).to(targets_N.device)
    gate.weight_KD.copy_(weight_KD)
    gate.bias_K.copy_(bias_K - (weight_KD * mean_KD).sum(1))
    return gate


def _logistic(signs_KND: Tensor, right_KN: Tensor, *, decay: float) -> tuple[Tensor, Tensor]:
    """weights_KD and biases_K of K regressions at once; their losses add up and share no parameter."""
    exits, samples, width = signs_KND.shape
    parameters_KD = signs_KND.new_zeros(exits, width + 1, requires_grad=True)
    search = torch.optim.LBFGS(
        [parameters_KD], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        search.zero_grad()
        logits_KN = (signs_KND * parameters_KD[:, None, 1:]).sum(2) + parameters_KD[:, :1]
        fit = binary_cross_entropy_with_logits(logits_KN, right_KN, reduction="sum") / samples
        total = fit + decay / 2 * parameters_KD.square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        search.step(loss)
    fitted_KD = parameters_KD.detach()
    return fitted_KD[:, 1:], fitted_KD[:, 0]
