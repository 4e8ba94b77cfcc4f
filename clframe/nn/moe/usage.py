"""How many experts ran for which token, and what that cost.

Shape suffixes: T tokens in the shape in which a layer sees them, such as (batch, tokens of a sample).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clframe.nn.moe.convert import Call, plain_call
from clframe.nn.moe.macs import Usage
from clframe.nn.moe.routed import routed_layers


@contextmanager
def counting(model: nn.Module) -> Iterator[Callable[[], dict[str, Usage]]]:
    """Count usage; yields a function for what it is so far, by layer.

    Nothing waits for the device before that function is called.
    """
    layers = routed_layers(model)
    before = {name: layer.ran for name, layer in layers.items()}
    for layer in layers.values():
        device = layer.experts.order_F.device
        layer.ran = torch.zeros(layer.experts.experts + 3, dtype=torch.long, device=device)
    counted = {name: layer.ran for name, layer in layers.items()}

    def usage() -> dict[str, Usage]:
        found = {}
        for name, layer in layers.items():
            own = counted[name]
            assert own is not None
            *ran, tokens, routed, computed = own.tolist()
            found[name] = Usage(
                tokens=tokens, ran_E=tuple(ran), macs=layer.macs(), routed=routed, computed=computed
            )
        return found

    try:
        yield usage
    finally:
        for name, layer in layers.items():
            layer.ran = before[name]


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerUsage:
    """What one layer did with some tokens.

    Attributes:
        experts_T: How many experts the gate chose for each token, in the shape of the tokens: (batch, tokens) in a
            transformer, (batch,) where a sample is one token.
        experts: How many there are.
        router_macs: MACs of the router for all tokens; 0 where a gate that keeps all did not ask it.
        routed_macs: Of all (token, expert) pairs that the gate chose, and of the router: what routing promises.
        executed_macs: Of all pairs that were computed, and of the router; more where computing all and masking is
            faster, or where small experts run together.
        dense_macs: Of the dense network for the same tokens.
    """

    experts_T: Tensor
    experts: int
    router_macs: int
    routed_macs: int
    executed_macs: int
    dense_macs: int

    @property
    def experts_per_token(self) -> float:
        """The mean of ``experts_T``."""
        return float(self.experts_T.float().mean())

    @property
    def share(self) -> float:
        """``routed_macs`` over the dense network's; NaN before any token."""
        return self.routed_macs / self.dense_macs if self.dense_macs else float("nan")


def expert_usage(network: nn.Module, x: Any, *, call: Call = plain_call) -> dict[str, LayerUsage]:
    """What every layer of experts does with one batch, by the layer's name in order of depth.

    One pass in evaluation mode, without gradients; modes are put back.

    Args:
        network: A model; one without experts has nothing to tell.
        x: Prepared inputs.
        call: Runs the model on them.

    >>> from clframe.nn.moe import set_gate, to_experts, TopK
    >>> model = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)))
    >>> _ = to_experts(model, experts=4, router_width=3)
    >>> set_gate(model, TopK(k=1))
    >>> usage = expert_usage(model, torch.ones(2, 5, 4))["0"]
    >>> usage.experts_T.tolist(), usage.router_macs, usage.routed_macs, usage.dense_macs
    ([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]], 240, 400, 640)
    """
    layers = routed_layers(network)
    if not layers:
        return {}
    counts: dict[str, list[Tensor]] = {name: [] for name in layers}
    before = {name: layer.chosen for name, layer in layers.items()}
    training = {part: part.training for part in network.modules()}
    network.eval()
    try:
        for name, layer in layers.items():
            layer.chosen = counts[name].append
        with torch.no_grad(), counting(network) as usage:
            call(network, x)
            found = usage()
    finally:
        for name, layer in layers.items():
            layer.chosen = before[name]
        for part, flag in training.items():
            part.training = flag
    return {
        name: LayerUsage(
            experts_T=_joined(counts[name]),
            experts=own.macs.experts,
            router_macs=own.router_macs,
            routed_macs=own.total_macs,
            executed_macs=own.executed_macs,
            dense_macs=own.dense_macs,
        )
        for name, own in found.items()
        if counts[name]
    }


def _joined(counts: list[Tensor]) -> Tensor:
    """One tensor, also of a layer that a model runs more than once."""
    if len(counts) == 1:
        return counts[0]
    return torch.cat([count.flatten() for count in counts])
