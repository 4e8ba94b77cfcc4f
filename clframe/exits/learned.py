"""A learned exit policy, motivated by early-exit failure prediction.

A small head per exit predicts whether stopping there is right or continuing is futile, the target of
:func:`~clframe.exits.failure.failure_targets`, from the scores of the exit and from the value at the exit before. The
network is frozen; heads are fitted on held-out data. The procedure follows the idea of "Failure Prediction Is a Better
Performance Proxy for Early-Exit Networks Than Calibration"; the authors' own procedure could not be read.

Shape suffixes: B batch, C classes, D features, H hidden units, K exits, N samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from clframe.errors import DataError
from clframe.exits.failure import failure_targets
from clframe.exits.policies import FittedConfidence, entropy, margin, register_confidence
from clframe.nn.network import Carried

TOP: Final = 3
"""Largest probabilities, sorted, among the features; 0 where there are fewer classes."""

FEATURES: Final = TOP + 3
"""The largest probabilities, entropy, margin, and the value at the exit asked before (0.5 at the first)."""

HIDDEN: Final = 8
DECAY: Final = 1e-3
"""Penalty on squared weights; above 0, because a target with one value only has no minimum without it."""


@register_confidence("failure")
class FailureConfidence(FittedConfidence):
    """Probability that stopping at an exit is right or continuing is futile, from one hidden layer per exit.

    ``sigmoid(v_k . tanh(W_k f + b_k) + c_k)`` with features f of the exit, see :data:`FEATURES`. The value is carried
    to the next exit as one of its features.

    Args:
        exits: Number of exits K, the last included.
    """

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
        x_ND, t_N = features_ND.detach().double(), stop_N.double()
        mean_D, deviation_D = x_ND.mean(0), x_ND.std(0, correction=0).clamp(min=1e-6)
        generator = torch.Generator().manual_seed(exit)
        start_HD = torch.randn(HIDDEN, FEATURES, generator=generator, dtype=torch.float64) / FEATURES**0.5
        weight_HD = start_HD.to(x_ND.device).requires_grad_()
        rest = [torch.zeros(size, dtype=torch.float64, device=x_ND.device) for size in (HIDDEN, HIDDEN, 1)]
        bias_H, out_H, offset_1 = (tensor.requires_grad_() for tensor in rest)
        search = torch.optim.LBFGS(
            [weight_HD, bias_H, out_H, offset_1],
            max_iter=500, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe",
        )  # fmt: skip
        standard_ND = (x_ND - mean_D) / deviation_D

        def loss() -> Tensor:
            search.zero_grad()
            logits_N = torch.tanh(F.linear(standard_ND, weight_HD, bias_H)) @ out_H + offset_1
            squares = weight_HD.square().sum() + out_H.square().sum()
            total = F.binary_cross_entropy_with_logits(logits_N, t_N) + DECAY / 2 * (squares + offset_1.square().sum())
            total.backward()
            return total

        with torch.enable_grad():
            search.step(loss)
        raw_HD = weight_HD.detach() / deviation_D  # undo the standardization
        self.weight_KHD[exit].copy_(raw_HD)
        self.bias_KH[exit].copy_(bias_H.detach() - raw_HD @ mean_D)
        self.out_KH[exit].copy_(out_H.detach())
        self.offset_K[exit].copy_(offset_1.detach()[0])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        stored = state_dict.get(f"{prefix}offset_K")
        if stored is not None and stored.shape != self.offset_K.shape:
            fresh = FailureConfidence(len(stored))
            for name, buffer in fresh.named_buffers():
                setattr(self, name, buffer.to(self.offset_K.device))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _features(scores_BC: Tensor, carried: Carried) -> Tensor:
    """features_BD of one exit."""
    p_BC = scores_BC.softmax(1) if scores_BC.dtype == torch.float64 else scores_BC.float().softmax(1)
    top_BT = p_BC.topk(min(TOP, p_BC.shape[1]), dim=1).values
    top_BT = F.pad(top_BT, (0, TOP - top_BT.shape[1]))
    before_B = carried[0].to(p_BC) if carried else p_BC.new_full((len(p_BC),), 0.5)
    others = [measure(0, scores_BC, ())[0].to(p_BC) for measure in (entropy, margin)]
    return torch.cat([top_BT, torch.stack([*others, before_B], 1)], 1)
