"""Confidence measures and exit policies, and a learned confidence measure.

Shape suffixes: B batch, C classes, K exits, N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from clframe.errors import ConfigError, DataError
from clframe.nn.network import Carried

Measure = Callable[[int, Tensor, Carried], tuple[Tensor, Carried]]
"""``(exit, scores_BC, carried) -> (confidence_B, carried)``, with what the call at the exit before returned,
empty at first. Only exits that are asked are passed through it, see :meth:`ExitPolicy.asked`."""

Fallback = Literal["last", "confident"]


def max_probability(exit: int, scores_BC: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
    """Probability of the likeliest class (Kaya et al., "Shallow-Deep Networks", 2019).

    >>> max_probability(0, torch.tensor([[0.0, 0.0], [0.0, float("-inf")]]), ())[0]
    tensor([0.5000, 1.0000])
    """
    return _probabilities(scores_BC).amax(1), ()


def entropy(exit: int, scores_BC: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
    """``1 - H(p) / log C``, C the classes met; 1 is certain, 0 all alike (Teerapittayanon et al., "BranchyNet", 2016).

    >>> entropy(0, torch.tensor([[0.0, 0.0], [0.0, float("-inf")]]), ())[0]
    tensor([0., 1.])
    """
    met_B = scores_BC.isneginf().logical_not_().sum(1).clamp_(min=2)  # one class: H is 0 whatever it is divided by
    entropy_B = torch.special.entr(_probabilities(scores_BC)).sum(1)
    return (1 - entropy_B / met_B.log()).clamp_(0, 1), ()


def margin(exit: int, scores_BC: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
    """Probability of the likeliest class minus that of the next; 1 where there is only one class.

    >>> margin(0, torch.tensor([[0.0, 0.0], [0.0, float("-inf")]]), ())[0]
    tensor([0., 1.])
    """
    top = _probabilities(scores_BC).topk(min(2, scores_BC.shape[1]), dim=1).values
    return (top[:, 0] - top[:, 1] if top.shape[1] > 1 else top[:, 0]), ()


def patience(exit: int, scores_BC: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
    """``(n - 1) / n``, n the length of the run of exits, up to this one, that name one and the same class.

    To wait until p exits agree with the one before them (Zhou et al., "BERT loses patience", 2020) is the
    threshold ``p / (p + 1)``, see :func:`patience_threshold`. No run of exits reaches 1.

    >>> first, carried = patience(0, torch.tensor([[2.0, 1.0], [2.0, 1.0]]), ())
    >>> first, patience(1, torch.tensor([[2.0, 1.0], [1.0, 2.0]]), carried)[0]
    (tensor([0., 0.]), tensor([0.5000, 0.0000]))
    """
    class_B = scores_BC.argmax(1)
    run_B = torch.ones_like(class_B)
    if carried:
        before_B, length_B = carried
        run_B += length_B * (class_B == before_B)
    return (run_B - 1).float() / run_B, (class_B, run_B)


def patience_threshold(agreements: int) -> float:
    """Threshold at which :func:`patience` has seen ``agreements`` exits agree with the one before.

    >>> patience_threshold(0), patience_threshold(1)
    (0.0, 0.5)
    """
    return agreements / (agreements + 1)


MEASURES: Mapping[str, Measure] = MappingProxyType(
    {"max_probability": max_probability, "entropy": entropy, "margin": margin, "patience": patience}
)
"""Measures without parameters, by name. :class:`clframe.exits.policies.Gate` is fitted first."""


@dataclass(frozen=True, kw_only=True)
class ExitPolicy:
    """Who answers: the first exit whose confidence reaches its threshold.

    Threshold 0 makes the first exit answer. A threshold above 1 never fires; where the last exit answers for
    those left over, such an exit is not even asked.

    Args:
        measure: What confidence is.
        thresholds: One for all exits before the last, or one for each of them.
        fallback: What answers where no exit fires: the ``last`` exit, or the most ``confident`` of all, the last
            among them; of equally confident ones the first.

    Raises:
        ConfigError: A threshold that is not a number, or an unknown fallback.

    >>> ExitPolicy(thresholds=0.9).of_exits(3)
    (0.9, 0.9)
    """

    measure: Measure = max_probability
    thresholds: float | tuple[float, ...]
    fallback: Fallback = "last"

    def __post_init__(self) -> None:
        thresholds = self.thresholds if isinstance(self.thresholds, tuple) else (self.thresholds,)
        if any(isnan(threshold) for threshold in thresholds):
            raise ConfigError(f"policy: found thresholds {self.thresholds}; give numbers")
        if self.fallback not in ("last", "confident"):
            raise ConfigError(f"policy: found fallback {self.fallback!r}; give 'last' or 'confident'")

    def of_exits(self, exits: int) -> tuple[float, ...]:
        """The threshold of each of ``exits`` exits but the last.

        Raises:
            ConfigError: Another number of thresholds.
        """
        if not isinstance(self.thresholds, tuple):
            return (float(self.thresholds),) * (exits - 1)
        if len(self.thresholds) != exits - 1:
            raise ConfigError(
                f"policy: found {len(self.thresholds)} thresholds for {exits} exits; give one, or one for each "
                "exit but the last"
            )
        return self.thresholds

    def asked(self, exits: int, *, among: Collection[int] | None = None) -> tuple[int, ...]:
        """Numbers of the exits whose confidence counts, in order.

        These are the exits whose threshold can fire; with the fallback ``confident`` they are all exits, the
        last too.

        Args:
            exits: Number of exits K, the last included.
            among: Exits that may be asked, all if not given; the last always may.

        >>> policy = ExitPolicy(thresholds=(0.5, 2.0, 0.5))
        >>> policy.asked(4), policy.asked(4, among=[0, 1])
        ((0, 2), (0,))
        """
        thresholds, last = self.of_exits(exits), exits - 1
        every = self.fallback == "confident"
        allowed = [exit for exit in range(last) if among is None or exit in among]
        return (*(exit for exit in allowed if every or thresholds[exit] <= 1), *((last,) if every else ()))


def _probabilities(scores_BC: Tensor) -> Tensor:
    """probabilities_BC in single precision at least: half precision could not tell 0.999 from 1."""
    return scores_BC.softmax(1) if scores_BC.dtype == torch.float64 else scores_BC.float().softmax(1)


SIGNS = (max_probability, entropy, margin)


class Gate(nn.Module):
    """``sigmoid(w_k . signs + b_k)``, the signs being maximum probability, entropy and margin of exit k.

    It is a measure like those in :mod:`clframe.exits.policies`; :func:`fit_gate` makes one. Its state is
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
