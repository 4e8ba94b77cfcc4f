"""From a dense model to one of experts: every feed-forward network found by its role is replaced.

The answers stay the same, to rounding, until a gate leaves something out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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

TOKENS = 4096
"""Tokens that the split by co-activation looks at, at most."""

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
    most: int | None = None,
    split: Split | None = "kmeans",
    router: RouterKind = "norm",
    router_width: int | None = 128,
    batches: Sequence[Any] = (),
    call: Call = plain_call,
    seed: int = 0,
) -> dict[str, RoutedExperts]:
    """Replace every feed-forward network of ``model``, in place; nothing is trained and all experts run.

    Nothing has changed where an error is raised. Of a :class:`~clframe.nn.network.Network` the backbone is converted,
    and the heads stay as they are.

    Args:
        model: Any module with networks of two linear layers, or three where gated.
        experts: Experts of a network, or
        expert_size: neurons of an expert. The published choices are 24 x 128 for speed, 512 x 6 for accuracy; or
        most: as many experts of each network as divide its neurons evenly, but no more than this.
        split: How neurons are grouped; None leaves them as they lie, until :func:`regroup`.
        router: What routers foresee.
        router_width: Of their hidden layer; None takes a twenty-fourth of the network's, at least 16.
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
        expert_count(
            len(n.up[0]), experts=experts, expert_size=expert_size, most=most, where=f"moe: {n.name or 'the model'}"
        )
        for n in networks
    ]
    layers = []
    for number, (network, count) in enumerate(zip(networks, counts, strict=True)):
        generator = generator_for(seed, "moe", "split", number)
        order_F = None
        if split is not None and split != "coactivation":
            order_F = _order(network, count, split, generator)
        layer = ExpertLayer(
            network.up,
            network.down,
            activation=network.activation,
            experts=count,
            gate=network.gate,
            order_F=order_F,
            dropout=network.inner_dropout,
        )
        width = max(16, len(network.up[0]) // 24) if router_width is None else router_width
        made = ROUTERS[router](
            layer.inputs, count, width=width, generator=generator_for(seed, "moe", "router", number)
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
        generator = generator_for(seed, "moe", "split")
        regroup(model, split=split, generator=generator, batches=batches, call=call)
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


def regroup(
    model: nn.Module,
    *,
    split: Split,
    generator: Generator,
    batches: Sequence[Any] = (),
    call: Call = plain_call,
) -> None:
    """Make other experts of the same neurons in every layer of a converted model; its answers with all on stay.

    Parameters are written in place, their rows in another order; :mod:`clframe.nn.moe.order` helps whoever has kept
    something for each of them. Routers foresee the experts that were and have to be trained anew.

    Args:
        model: Converted.
        split: How neurons are grouped.
        generator: On the CPU.
        batches: What ``coactivation`` looks at, all experts running: of so many tokens as they hold, up to 4096 spread
            evenly.
        call: Runs the model on one of them.
    """
    layers = routed_layers(model)
    seen = _seen(model, batches, call) if split == "coactivation" else {}
    for name, layer in layers.items():
        experts = layer.experts
        if split == "coactivation":
            x_ND = seen[name]
            features = experts.hidden(x_ND[:: -(-len(x_ND) // TOKENS)]).flatten(1).t()
        else:
            features = (experts.up if experts.gate is None else experts.gate).detach().flatten(0, 1)
        experts.regroup(split_neurons(features, experts=experts.experts, split=split, generator=generator))


def _check(
    model: nn.Module, *, split: str | None, router: str, router_width: int | None, batches: Sequence[Any]
) -> None:
    if split is not None and split not in SPLITS:
        raise ConfigError(f"moe.split: found '{split}'; choose from {', '.join(SPLITS)}")
    if router not in ROUTERS:
        raise ConfigError(f"moe.router: found '{router}'; choose from {', '.join(ROUTERS)}")
    if router_width is not None and router_width < 1:
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


def _seen(model: nn.Module, batches: Sequence[Any], call: Call) -> dict[str, Tensor]:
    """x_ND of every layer on all batches, in evaluation mode with all experts running."""
    seen: dict[str, list[Tensor]] = {}
    with all_running(model):
        for batch in batches:
            for name, x_ND in layer_inputs(model, batch, call=call).items():
                seen.setdefault(name, []).append(x_ND)
    return {name: torch.cat(xs) for name, xs in seen.items()}


@contextmanager
def all_running(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with all experts on and routers learning; everything is put back."""
    layers = routed_layers(model).values()
    gates = [layer.gate for layer in layers]
    training = {part: part.training for part in model.modules()}
    wanted = {p: p.requires_grad for layer in layers for p in layer.router.parameters()}
    model.eval()
    try:
        for layer in layers:
            layer.gate = ALL
            layer.router.requires_grad_(True)
        yield
    finally:
        for layer, gate in zip(layers, gates, strict=True):
            layer.gate = gate
        for part, flag in training.items():
            part.training = flag
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)
