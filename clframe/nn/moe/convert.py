"""From a dense model to one of experts: every feed-forward network found by its role is replaced.

The answers stay the same, to rounding, until a gate leaves something out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from clframe.errors import ConfigError, UnsupportedError
from clframe.functional.seeding import generator_for
from clframe.nn.moe.experts import ExpertLayer
from clframe.nn.moe.place import Dense, dense_networks
from clframe.nn.moe.routed import RoutedExperts, routed_layers
from clframe.nn.moe.router import ALL, ROUTERS, RouterKind
from clframe.nn.moe.split import SPLITS, Split, expert_count, split_neurons

Call = Callable[[nn.Module, Any], Any]
"""Runs a model on one batch."""


def plain_call(model: nn.Module, batch: Any) -> Any:
    """``model(batch)``."""
    return model(batch)


def to_experts(
    model: nn.Module,
    *,
    experts: int | None = None,
    expert_size: int | None = None,
    split: Split = "kmeans",
    router: RouterKind = "norm",
    router_width: int = 128,
    batches: Sequence[Any] = (),
    call: Call = plain_call,
    seed: int = 0,
) -> dict[str, RoutedExperts]:
    """Replace every feed-forward network of ``model``, in place; nothing is trained and all experts run.

    Nothing has changed where an error is raised.

    Args:
        model: Any module with networks of two linear layers, or three where gated.
        experts: Experts of a network, or
        expert_size: neurons of an expert. The published choices are 24 x 128 for speed, 512 x 6 for accuracy.
        split: How neurons are grouped.
        router: What routers foresee.
        router_width: Of their hidden layer.
        batches: What ``coactivation`` looks at.
        call: Runs the model on one of them.
        seed: Of the split and the routers' weights.

    Returns:
        The new layers by name.

    Raises:
        UnsupportedError: No feed-forward network, one that cannot be replaced, a model converted before, or
            weights that are not there (meta device).
        ConfigError: An expert size that does not divide the hidden neurons, or an option out of range.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> model = nn.Sequential(net)
    >>> to_experts(model, experts=4)["0"].experts
    ExpertLayer(
      4, 4, experts=4x2
      (activation): ReLU()
    )
    """
    _check(model, split=split, router=router, router_width=router_width, batches=batches)
    networks = dense_networks(model)
    counts = [
        expert_count(len(n.up[0]), experts=experts, expert_size=expert_size, where=f"moe: {n.name or 'the model'}")
        for n in networks
    ]
    layers = []
    for number, (network, count) in enumerate(zip(networks, counts, strict=True)):
        generator = generator_for(seed, "moe", "split", number)
        order_F = None if split == "coactivation" else _order(network, count, split, generator)
        layer = ExpertLayer(
            network.up,
            network.down,
            activation=network.activation,
            experts=count,
            gate=network.gate,
            order_F=order_F,
            dropout=network.inner_dropout,
        )
        made = ROUTERS[router](
            layer.inputs, count, width=router_width, generator=generator_for(seed, "moe", "router", number)
        )
        weight = network.up[0]
        layers.append(
            RoutedExperts(
                layer,
                made.to(weight.device, weight.dtype),
                gate=ALL,
                dropout=network.outer_dropout,
            ).train(model.training)
        )
    for network, routed in zip(networks, layers, strict=True):
        network.put(routed)
    if split == "coactivation":
        _regroup(model, layers, batches, call, seed)
    names = {id(layer): name for name, layer in routed_layers(model).items()}
    return {names[id(layer)]: layer for layer in layers}


def layer_inputs(model: nn.Module, batch: Any, *, call: Call = plain_call) -> dict[str, Tensor]:
    """x_ND of every converted network of a model, by name, as the model runs on one batch without gradients."""
    found: dict[str, list[Tensor]] = {}
    layers = routed_layers(model)
    before = {name: layer.observer for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.observer = found.setdefault(name, []).append
        with torch.no_grad():
            call(model, batch)
    finally:
        for name, layer in layers.items():
            layer.observer = before[name]
    return {name: torch.cat(xs) for name, xs in found.items() if xs}


def _check(model: nn.Module, *, split: str, router: str, router_width: int, batches: Sequence[Any]) -> None:
    if split not in SPLITS:
        raise ConfigError(f"moe.split: found '{split}'; choose from {', '.join(SPLITS)}")
    if router not in ROUTERS:
        raise ConfigError(f"moe.router: found '{router}'; choose from {', '.join(ROUTERS)}")
    if router_width < 1:
        raise ConfigError(f"moe.router_width: found {router_width}; give 1 or more")
    if split == "coactivation" and not len(batches):
        raise ConfigError("moe.split: found 'coactivation' without batches; give some inputs to look at")
    if any(p.is_meta for p in model.parameters()):
        raise UnsupportedError(
            f"moe: found {type(model).__name__} on the meta device, without weights; load them first"
        )
    if routed_layers(model):
        raise UnsupportedError(
            f"moe: found {type(model).__name__} converted already; convert a dense model, or change gates with set_tau"
        )


def _order(network: Dense, experts: int, split: Split, generator: Generator) -> Tensor:
    """By the rows of the input weights, or of the gate's."""
    rows_FD = (network.up if network.gate is None else network.gate)[0]
    return split_neurons(rows_FD, experts=experts, split=split, generator=generator)


def _regroup(
    model: nn.Module, layers: Sequence[RoutedExperts], batches: Sequence[Any], call: Call, seed: int
) -> None:
    """Neurons that fire for the same tokens become one expert; all experts run meanwhile."""
    names = {id(layer): name for name, layer in routed_layers(model).items()}
    seen: dict[str, list[Tensor]] = {}
    training = {part: part.training for part in model.modules()}
    model.eval()
    try:
        for batch in batches:
            for name, x_ND in layer_inputs(model, batch, call=call).items():
                seen.setdefault(name, []).append(x_ND)
    finally:
        for part, flag in training.items():
            part.training = flag
    for number, layer in enumerate(layers):
        x_ND = torch.cat(seen[names[id(layer)]])
        fires_FN = layer.experts.hidden(x_ND).flatten(1).t() > 0
        generator = generator_for(seed, "moe", "split", number)
        layer.experts.regroup(
            split_neurons(fires_FN, experts=layer.experts.experts, split="coactivation", generator=generator)
        )


