"""Experts with their router and gate, in place of a feed-forward network, and their cost in MACs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from clframe.moe.experts import ExpertLayer
from clframe.moe.router import DynamicK, Gate, Router
from clframe.moe.routing import expert_macs, router_macs


@dataclass(frozen=True, kw_only=True)
class Macs:
    """MACs of a token.

    Attributes:
        expert: Of one expert.
        experts: How many there are.
        router: Of the router.
    """

    expert: int
    experts: int
    router: int

    @property
    def dense(self) -> int:
        """Of all experts, without a router: of the dense network."""
        return self.expert * self.experts

    @property
    def router_share(self) -> float:
        """The router's part of the dense network's."""
        return self.router / self.dense


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What one layer did while it was counted.

    Attributes:
        tokens: How many it saw.
        ran_E: How often each expert ran.
        macs: Of one token.
        routed: For how many of them the router was asked.
        computed: How many (token, expert) pairs were computed, those that the gate had left out among them: all where
            that is faster, and neighbors of those that run where experts are too small to be run one by one.
    """

    tokens: int
    ran_E: tuple[int, ...]
    macs: Macs
    routed: int
    computed: int

    @property
    def experts_per_token(self) -> float:
        """Mean number of experts that ran; NaN before any token."""
        return sum(self.ran_E) / self.tokens if self.tokens else float("nan")

    @property
    def router_macs(self) -> int:
        """Of the router."""
        return self.routed * self.macs.router

    @property
    def total_macs(self) -> int:
        """Of all (token, expert) pairs that the gate let run, and of the router: what routing promises."""
        return sum(self.ran_E) * self.macs.expert + self.router_macs

    @property
    def executed_macs(self) -> int:
        """Of all pairs that were computed, and of the router: what was paid."""
        return self.computed * self.macs.expert + self.router_macs

    @property
    def dense_macs(self) -> int:
        """Of the dense network for the same tokens."""
        return self.tokens * self.macs.dense

    @property
    def share(self) -> float:
        """``total_macs`` over the dense network's; NaN before any token."""
        return self.total_macs / self.dense_macs if self.tokens else float("nan")


When = Literal["always", "evaluation"]
"""When a gate acts: whenever the layer runs, or in evaluation mode only, all experts running in training."""


class RoutedExperts(nn.Module):
    """Experts of which, for each token, those run that the gate keeps by the router's scores.

    Outputs are added up unweighted; what a gate leaves out is what the answer lacks of the dense network's. A gate that
    keeps all does not ask the router.

    Args:
        experts: The network's neurons.
        router: Foresees what each expert contributes.
        gate: Who runs; may be changed at any time.
        dropout: Of the outputs, in training.

    Attributes:
        when: When the gate acts.
        ready: Whether the router may be asked yet: all experts run until it has been fitted. Part of the state
            dict, so that a model that is loaded routes as the one that was saved.
        observer: Called with each x_ND before it is routed; None for nobody.
        ran: Where usage is counted: pairs by expert, behind them tokens, those that the router saw, and pairs that
            were really computed; None where it is not.
        chosen: Takes how many experts each token has, in the shape of the tokens; None for nobody.
    """

    def __init__(self, experts: ExpertLayer, router: Router, *, gate: Gate, dropout: float = 0.0) -> None:
        super().__init__()
        self.experts = experts
        self.router = router
        self.gate = gate
        self.dropout = dropout
        self.when: When = "always"
        self.ready = True
        self.observer: Callable[[Tensor], None] | None = None
        self.ran: Tensor | None = None
        self.chosen: Callable[[Tensor], None] | None = None

    @property
    def routes(self) -> bool:
        """Whether the gate acts, as things are."""
        return self.ready and not self.gate.keeps_all and (self.when == "always" or not self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Any number of leading dimensions; tokens are routed one by one."""
        x_ND = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        if self.observer is not None:
            self.observer(x_ND)
        watched = self.ran is not None or self.chosen is not None
        routes = self.routes
        if routes and not watched and len(x_ND) == 1 and self.experts.takes_one(x_ND):
            y_1O = self.experts.one(x_ND, self.gate.best(self.router(x_ND)[0]))
            return y_1O if x.dim() == 2 else y_1O.reshape(*x.shape[:-1], -1)
        keep_NE = self.keep(x_ND) if routes else None
        if watched:
            self._count(x_ND, keep_NE, x.shape[:-1])
        y_NO: Tensor = self.experts(x_ND, keep_NE)
        if self.dropout:
            y_NO = nn.functional.dropout(y_NO, self.dropout, self.training)
        return y_NO if x.dim() == 2 else y_NO.reshape(*x.shape[:-1], y_NO.shape[-1])

    def get_extra_state(self) -> Tensor:
        """Whether the router is ready."""
        return torch.tensor(self.ready)

    def set_extra_state(self, state: Tensor) -> None:
        """As :meth:`get_extra_state` gave it."""
        self.ready = bool(state)

    def keep(self, x_ND: Tensor) -> Tensor:
        """keep_NE: the experts that the gate chooses."""
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.keep(x_ND)
        keep_NE: Tensor = self.gate(self.router(x_ND))
        return keep_NE

    def macs(self) -> Macs:
        """What one token costs, by arithmetic."""
        e = self.experts
        return Macs(
            expert=expert_macs(
                inputs=e.inputs, outputs=e.outputs, neurons=e.expert_size, gated=e.gate is not None
            ),
            experts=e.experts,
            router=router_macs(
                inputs=e.inputs, width=len(self.router.hidden), experts=e.experts
            ),
        )

    def _count(self, x_ND: Tensor, keep_NE: Tensor | None, shape: Sequence[int]) -> None:
        if self.chosen is not None:
            all_N = torch.full((len(x_ND),), self.experts.experts, device=x_ND.device)
            self.chosen((all_N if keep_NE is None else keep_NE.sum(1)).view(shape))
        if self.ran is not None:
            tokens = len(x_ND)
            self.ran[:-3] += tokens if keep_NE is None else keep_NE.sum(0)
            self.ran[-3] += tokens
            self.ran[-2] += 0 if keep_NE is None else tokens
            self.ran[-1] += self.experts.computed(x_ND, keep_NE)


def routed_layers(model: nn.Module) -> dict[str, RoutedExperts]:
    """All converted networks of a model by name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, RoutedExperts)}


def set_gate(model: nn.Module, gate: Gate) -> None:
    """The same gate for all layers: one trained model, the whole curve of accuracy against cost."""
    for layer in routed_layers(model).values():
        layer.gate = gate


def set_tau(model: nn.Module, tau: float) -> None:
    """Dynamic-k gates with this tau for all layers.

    Raises:
        ConfigError: tau outside [0, 1].
    """
    set_gate(model, DynamicK(tau=tau))
