"""Experts with their router and gate: what stands in a converted model where a feed-forward network stood.

Shape suffixes: N tokens, D inputs, O outputs, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clframe.functional.routing import expert_macs, router_macs
from clframe.nn.moe.experts import ExpertLayer
from clframe.nn.moe.router import DynamicK, Gate, Router


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
        observer: Called with each x_ND before it is routed; None for nobody.
        ran: Where usage is counted, pairs by expert, behind them tokens and those that the router
            saw; None where it is not.
    """

    def __init__(self, experts: ExpertLayer, router: Router, *, gate: Gate, dropout: float = 0.0) -> None:
        super().__init__()
        self.experts = experts
        self.router = router
        self.gate = gate
        self.dropout = dropout
        self.observer: Callable[[Tensor], None] | None = None
        self.ran: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Any number of leading dimensions; tokens are routed one by one."""
        x_ND = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        if self.observer is not None:
            self.observer(x_ND)
        if len(x_ND) == 1 and self.ran is None and self.experts.takes_one(x_ND) and not self.gate.keeps_all:
            y_1O = self.experts.one(x_ND, self.gate.row(self.router(x_ND)[0]))
            return y_1O if x.dim() == 2 else y_1O.reshape(*x.shape[:-1], -1)
        keep_NE = None if self.gate.keeps_all else self.keep(x_ND)
        if self.ran is not None:
            self._count(len(x_ND), keep_NE)
        y_NO: Tensor = self.experts(x_ND, keep_NE)
        if self.dropout:
            y_NO = nn.functional.dropout(y_NO, self.dropout, self.training)
        return y_NO if x.dim() == 2 else y_NO.reshape(*x.shape[:-1], y_NO.shape[-1])

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

    def _count(self, tokens: int, keep_NE: Tensor | None) -> None:
        assert self.ran is not None
        self.ran[:-2] += tokens if keep_NE is None else keep_NE.sum(0)
        self.ran[-2] += tokens
        self.ran[-1] += 0 if keep_NE is None else tokens


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
    """

    tokens: int
    ran_E: tuple[int, ...]
    macs: Macs
    routed: int

    @property
    def experts_per_token(self) -> float:
        """Mean number of experts that ran; NaN before any token."""
        return sum(self.ran_E) / self.tokens if self.tokens else float("nan")

    @property
    def total_macs(self) -> int:
        """Of all (token, expert) pairs that ran and of the router."""
        return sum(self.ran_E) * self.macs.expert + self.routed * self.macs.router

    @property
    def share(self) -> float:
        """``total_macs`` over the dense network's; NaN before any token."""
        return self.total_macs / (self.tokens * self.macs.dense) if self.tokens else float("nan")


def routed_layers(model: nn.Module) -> dict[str, RoutedExperts]:
    """All converted networks of a model by name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, RoutedExperts)}


@contextmanager
def counting(model: nn.Module) -> Iterator[Callable[[], dict[str, Usage]]]:
    """Count usage; yields a function for what it is so far, by layer.

    Nothing waits for the device before that function is called.
    """
    layers = routed_layers(model)
    before = {name: layer.ran for name, layer in layers.items()}
    for layer in layers.values():
        device = layer.experts.order_F.device
        layer.ran = torch.zeros(layer.experts.experts + 2, dtype=torch.long, device=device)
    counted = {name: layer.ran for name, layer in layers.items()}

    def usage() -> dict[str, Usage]:
        found = {}
        for name, layer in layers.items():
            own = counted[name]
            assert own is not None
            *ran, tokens, routed = own.tolist()
            found[name] = Usage(tokens=tokens, ran_E=tuple(ran), macs=layer.macs(), routed=routed)
        return found

    try:
        yield usage
    finally:
        for name, layer in layers.items():
            layer.ran = before[name]


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
