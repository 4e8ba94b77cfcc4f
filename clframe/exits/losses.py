"""Losses of exits: weights by epoch, and distillation from the last exit.

Shape suffixes: B batch, C classes, K exits.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clframe.errors import ConfigError

Ramp = Literal["ramp", "linear", "constant"]
"""Schedule of the exits' loss weights over the epochs of an experience."""

RAMP_START = 0.01
"""First weight of every exit under ``ramp``."""


def exit_weights(kind: Ramp, final_weights: Sequence[float], *, epoch: int, epochs: int) -> tuple[float, ...]:
    """Loss weights of the exits before the last in one epoch; the weight of the last exit is always 1.

    ``ramp``: ``w_k(e) = 0.01 + e / (E - 1) * (w_k - 0.01)``, the schedule of Kaya et al., "Shallow-Deep Networks"
    (2019), which Szatkowski et al., "Improving Continual Learning Performance and Efficiency with Auxiliary
    Classifiers" (2025), restart with every experience. ``linear``: ``e / (E - 1) * w_k``, the same from 0.
    ``constant``: ``w_k``. With one epoch (E = 1) all three are w_k.

    Args:
        kind: Name of the schedule.
        final_weights: w_k, the weights of the exits before the last in the last epoch.
        epoch: e, counted from 0 inside the experience.
        epochs: E, the number of epochs of one experience.

    Returns:
        One weight for each of ``final_weights``.

    Raises:
        ConfigError: An unknown kind, a weight below 0 or not finite, or an epoch outside 0 to E - 1.

    >>> exit_weights("ramp", [0.45, 0.9], epoch=0, epochs=3), exit_weights("linear", [0.4, 0.9], epoch=1, epochs=3)
    ((0.01, 0.01), (0.2, 0.45))
    """
    if kind not in ("ramp", "linear", "constant"):
        raise ConfigError(f"exit weights: found {kind!r}; give 'ramp', 'linear' or 'constant'")
    if not 0 <= epoch < epochs:
        raise ConfigError(f"exit weights: found epoch {epoch} of {epochs}; count epochs from 0 inside the experience")
    for weight in final_weights:
        if weight < 0 or not isfinite(weight):
            raise ConfigError(f"exit weights: found {weight}; give finite numbers of at least 0")
    if kind == "constant" or epoch == epochs - 1:  # also E = 1, where the formula would divide by 0
        return tuple(float(weight) for weight in final_weights)
    start, share = RAMP_START if kind == "ramp" else 0.0, epoch / (epochs - 1)
    return tuple(start + share * (weight - start) for weight in final_weights)


def log_probabilities(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Log-softmax of ``logits / temperature`` over the last dimension, in at least single precision.

    Under autocast logits are in half precision, and on CPU their softmax would be too.

    >>> log_probabilities(torch.zeros(1, 2, dtype=torch.bfloat16)).exp()
    tensor([[0.5000, 0.5000]])
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.log_softmax(logits / temperature if temperature != 1 else logits, dim=-1)


def self_distillation(logits: Sequence[Tensor], *, temperature: float) -> Tensor:
    """Distillation from the last exit, without its gradient, into each exit before it.

    ``loss_K[k] = T^2 * mean_b KL(softmax(logits[-1][b] / T) || softmax(logits[k][b] / T))`` and 0 for the last
    exit. Zhang et al., "Be Your Own Teacher" (2019), with the factor T^2 of Hinton et al. (2015), which keeps the
    gradient's size independent of T.

    Args:
        logits: K tensors logits_BC. A column of ``-inf`` in all of them, a class not met, adds nothing.
        temperature: T > 0.

    Returns:
        loss_K, in nats times T^2.
    """
    teacher_BC = log_probabilities(logits[-1].detach(), temperature=temperature)
    p_BC, unmet = teacher_BC.exp(), teacher_BC == -torch.inf
    teacher_BC = teacher_BC.masked_fill(unmet, 0.0)  # 0 * (-inf + inf) would be NaN
    losses = []
    for logits_BC in logits[:-1]:
        student_BC = log_probabilities(logits_BC, temperature=temperature).masked_fill(unmet, 0.0)
        losses.append((p_BC * (teacher_BC - student_BC)).sum(1).mean() * temperature**2)
    return torch.stack([*losses, teacher_BC.new_zeros(())])
