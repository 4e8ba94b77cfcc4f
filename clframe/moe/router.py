"""Routers, which predict the contribution of each expert, and gates, which select experts by these scores.

Shape suffixes: N tokens, D inputs, E experts, W width of a router's hidden layer.
"""

from __future__ import annotations

from ctypes import c_float
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar, Literal, get_args

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from clframe.errors import ConfigError
from clframe.moe.analytical import RepresentativeRouter
from clframe.moe.experts import ExpertLayer
from clframe.moe.routing import cumulative_share, dynamic_k, router_macs, share_loss, top_k
from clframe.options import format_value

RouterKind = Literal["norm", "activation", "analytical"]
"""Kind of router: predicts the norm of an expert's output (D2DMoE) or its summed activations (MoEfication), or computes
one neuron of each expert, without training (CMoE)."""

ROUTERS: tuple[RouterKind, ...] = get_args(RouterKind)


class _TwoLayers(nn.Module):
    """Weights of a router.

    Args:
        inputs: D.
        experts: E.
        width: W, of the hidden layer.
        generator: CPU generator for the weights.

    Attributes:
        hidden: U, [W, D].
        score: V, [E, W].
    """

    def __init__(self, inputs: int, experts: int, *, width: int, generator: Generator | None = None) -> None:
        super().__init__()
        self.hidden = nn.Parameter(torch.empty(width, inputs))
        self.score = nn.Parameter(torch.empty(experts, width))
        self.draw(generator)

    @property
    def macs(self) -> int:
        """MACs per token."""
        width, inputs = self.hidden.shape
        return router_macs(inputs=inputs, width=width, experts=len(self.score))

    @torch.no_grad()
    def draw(self, generator: Generator | None) -> None:
        """Reinitialize the weights like PyTorch's linear layers.

        Drawn on the CPU, which gives the same values on every device.
        """
        for weight_OI in (self.hidden, self.score):
            bound = weight_OI.shape[1] ** -0.5
            drawn_OI = torch.empty(weight_OI.shape, dtype=weight_OI.dtype).uniform_(-bound, bound, generator=generator)
            weight_OI.copy_(drawn_OI)


class NormRouter(_TwoLayers):
    """``|V relu(U x)|``, trained to predict the norm of each expert's output; Szatkowski et al. (2024)."""

    def forward(self, x_ND: Tensor) -> Tensor:
        """Nonnegative scores_NE."""
        if x_ND.shape[0] == 1:  # matrix times vector, which is quicker than a matrix of one row
            return torch.mv(self.score, torch.mv(self.hidden, x_ND[0]).relu_()).abs()[None]
        return F.linear(F.linear(x_ND, self.hidden).relu_(), self.score).abs()

    def targets(self, experts: ExpertLayer, x_ND: Tensor) -> Tensor:
        """Norms of the experts' outputs, target_NE, without gradient."""
        return experts.norms(x_ND)

    def loss(self, x_ND: Tensor, target_NE: Tensor) -> Tensor:
        """Mean squared error."""
        return F.mse_loss(self(x_ND), target_NE)


class ActivationRouter(_TwoLayers):
    """Linear, tanh, linear, sigmoid, trained to predict summed activations; Zhang et al., "MoEfication" (2022)."""

    def forward(self, x_ND: Tensor) -> Tensor:
        """scores_NE in (0, 1)."""
        return self._logits(x_ND).sigmoid()

    def targets(self, experts: ExpertLayer, x_ND: Tensor) -> Tensor:
        """Positive activations summed over each expert's neurons, target_NE."""
        return experts.hidden(x_ND).clamp_min(0).sum(2)

    def loss(self, x_ND: Tensor, target_NE: Tensor) -> Tensor:
        """Binary cross-entropy, see :func:`~clframe.moe.routing.share_loss`."""
        return share_loss(self._logits(x_ND), target_NE)

    def _logits(self, x_ND: Tensor) -> Tensor:
        return F.linear(F.linear(x_ND, self.hidden).tanh(), self.score)


FEW = 64
"""Number of experts up to which Python lists are faster than tensor operators."""

TrainedRouter = NormRouter | ActivationRouter
Router = TrainedRouter | RepresentativeRouter


def make_router(
    kind: RouterKind, experts: ExpertLayer, *, routed: int, width: int, generator: Generator | None
) -> Router:
    """Create a router.

    Args:
        kind: Its kind.
        experts: Layer to route to.
        routed: Number of experts with a score.
        width: Width of the hidden layer of a router that is trained.
        generator: CPU generator for its weights.
    """
    if kind == "analytical":
        return RepresentativeRouter(experts, routed)
    make = NormRouter if kind == "norm" else ActivationRouter
    return make(experts.inputs, routed, width=width, generator=generator)


@dataclass(frozen=True, kw_only=True)
class DynamicK:
    """Select experts with at least ``1 - tau`` of the token's top score; see :func:`~clframe.moe.routing.dynamic_k`.

    Args:
        tau: From 0 (best expert only) to 1 (all experts).
    """

    name: ClassVar[str] = "dynamic_k"
    tau: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a tau outside [0, 1]."""
        _check_tau(self.tau)

    @property
    def keeps_all(self) -> bool:
        """Whether all experts are selected independent of the scores."""
        return self.tau == 1

    def __call__(self, scores_NE: Tensor) -> Tensor:
        """keep_NE."""
        return dynamic_k(scores_NE, self.tau)

    def select(self, scores_E: Tensor) -> list[int]:
        """Selected experts of one token; avoids a dozen microseconds of small operators."""
        if scores_E.dtype != torch.float32 or len(scores_E) > FEW:
            return _numbers(self(scores_E[None]))
        scores: list[float] = scores_E.tolist()
        # Rounded as the operators round: a product of two float32 is exact in Python's floats.
        least = c_float(max(scores) * c_float(1 - self.tau).value).value
        return [expert for expert, score in enumerate(scores) if score >= least]


@dataclass(frozen=True, kw_only=True)
class CumulativeShare:
    """Select the best experts until their fraction of the total score reaches ``tau``.

    Args:
        tau: From 0 (best expert only) to 1 (all experts with a positive score).
    """

    name: ClassVar[str] = "cumulative_share"
    tau: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a tau outside [0, 1]."""
        _check_tau(self.tau)

    @property
    def keeps_all(self) -> bool:
        """Whether all experts are selected independent of the scores."""
        return self.tau == 1

    def __call__(self, scores_NE: Tensor) -> Tensor:
        """keep_NE."""
        return cumulative_share(scores_NE, self.tau)

    def select(self, scores_E: Tensor) -> list[int]:
        """Selected experts of one token."""
        return _numbers(self(scores_E[None]))


@dataclass(frozen=True, kw_only=True)
class TopK:
    """Select the ``k`` best experts, the gate of MoEfication.

    Args:
        k: Number of experts.
    """

    name: ClassVar[str] = "top_k"
    k: int

    def __post_init__(self) -> None:
        """Refuse ``k`` below 1."""
        if self.k < 1:
            raise ConfigError(f"moe.k: found {self.k}; give 1 or more")

    @property
    def keeps_all(self) -> bool:
        """False: depends on the number of experts, which the gate does not store."""
        return False

    def __call__(self, scores_NE: Tensor) -> Tensor:
        """keep_NE."""
        return top_k(scores_NE, self.k)

    def select(self, scores_E: Tensor) -> list[int]:
        """Selected experts of one token, in any order."""
        if scores_E.dtype != torch.float32 or len(scores_E) > FEW:
            chosen: list[int] = scores_E.topk(min(self.k, len(scores_E))).indices.tolist()
            return chosen  # half precision has ties, which the operator breaks in its own way
        scores: list[float] = scores_E.tolist()
        return sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[: self.k]


Gate = DynamicK | CumulativeShare | TopK


def _numbers(keep_1E: Tensor) -> list[int]:
    numbers: list[int] = keep_1E[0].nonzero().flatten().tolist()
    return numbers


def _check_tau(tau: float) -> None:
    if isinstance(tau, bool) or not isinstance(tau, Real) or not 0 <= float(tau) <= 1:
        raise ConfigError(
            f"moe.tau: found {format_value(tau)}; give a number from 0 (one expert a token) to 1 (all of them)"
        )


ALL = DynamicK(tau=1.0)
"""Gate that keeps all experts."""
