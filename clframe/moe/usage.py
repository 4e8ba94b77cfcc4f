"""Usage of experts, activity of neurons, and permutation of values stored per neuron.

Shape suffixes: T tokens, E experts, N and F neurons, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clframe.errors import UnsupportedError
from clframe.moe.convert import Call, plain_call
from clframe.moe.native import MixtureOfExperts
from clframe.moe.routed import RoutedExperts, Usage, override, routed_layers
from clframe.nn.frozen import evaluating
from clframe.sparsity.penalties import site_activations
from clframe.sparsity.sites import Site, find_sites


@contextmanager
def count_usage(model: nn.Module) -> Iterator[Callable[[], dict[str, Usage]]]:
    """Context that counts the usage of experts; yields a function that returns the current usage by layer.

    Synchronizes with the device only when that function is called, while the gate that was counted is still set. Layers
    note the share of experts that their gate kept (:attr:`RoutedExperts.counted <clframe.moe.RoutedExperts>`).
    """
    layers = routed_layers(model)
    counters = {
        name: torch.zeros(layer.experts.experts + 3, dtype=torch.long, device=layer.experts.order_F.device)
        for name, layer in layers.items()
    }

    def usage() -> dict[str, Usage]:
        found = {}
        for name, layer in layers.items():
            *ran, tokens, routed, computed = counters[name].tolist()
            found[name] = Usage(tokens=tokens, ran_E=tuple(ran), macs=layer.macs(), routed=routed, computed=computed)
            if tokens and routed == tokens:
                layer.counted[layer.gate] = sum(ran) / (tokens * len(ran))
        return found

    with override(layers, "ran", counters.__getitem__):
        yield usage


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerUsage:
    """Usage of one layer for one batch.

    Attributes:
        experts_T: Number of experts the gate chose for each token, in the shape of the tokens: (batch, tokens) in a
            transformer, (batch,) if a sample is one token.
        experts: Number of experts of the layer.
        router_macs: MACs of the router for all tokens; 0 if the gate keeps all and does not evaluate it.
        routed_macs: MACs of the (token, expert) pairs the gate chose, and of the router.
        executed_macs: MACs of the pairs that were computed, and of the router; larger where dense execution with
            masking is faster, or where small experts are executed in groups.
        dense_macs: MACs of the dense network for the same tokens.
    """

    experts_T: Tensor
    experts: int
    router_macs: int
    routed_macs: int
    executed_macs: int
    dense_macs: int

    @property
    def experts_per_token(self) -> float:
        """Mean of ``experts_T``."""
        return float(self.experts_T.float().mean())

    @property
    def share(self) -> float:
        """``routed_macs`` as a fraction of ``dense_macs``; NaN without tokens."""
        return self.routed_macs / self.dense_macs if self.dense_macs else float("nan")


def expert_usage(network: nn.Module, x: Any, *, call: Call = plain_call) -> dict[str, LayerUsage]:
    """Usage of each layer of experts for one batch, by name in order of depth.

    One pass in evaluation mode without gradients; modes are restored.

    Args:
        network: Model; without experts the result is empty.
        x: Prepared inputs.
        call: Runs the model on them.

    >>> from clframe.moe import set_gate, to_experts, TopK
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
    observing = override(layers, "chosen", lambda name: counts[name].append)
    with evaluating(network), observing, count_usage(network) as usage:
        call(network, x)
        found = usage()
    return {
        name: LayerUsage(
            experts_T=_concatenate(counts[name]),
            experts=own.macs.experts,
            router_macs=own.router_macs,
            routed_macs=own.total_macs,
            executed_macs=own.executed_macs,
            dense_macs=own.dense_macs,
        )
        for name, own in found.items()
        if counts[name]
    }


def _concatenate(counts: list[Tensor]) -> Tensor:
    """One tensor, also for a layer that runs several times in a pass."""
    if len(counts) == 1:
        return counts[0]
    return torch.cat([count.flatten() for count in counts])


ROWS = ("up", "up_bias", "gate", "gate_bias", "down")
"""Parameters of experts with one row per neuron."""


def neuron_orders(model: nn.Module) -> dict[str, Tensor]:
    """Current order_F of each parameter with one row per neuron, by parameter name."""
    return {
        f"{name}.experts.{row}": layer.experts.order_F.clone()
        for name, layer in routed_layers(model).items()
        for row in ROWS
        if getattr(layer.experts, row) is not None
    }


def reorder_values(
    model: nn.Module, names: Sequence[str], values_P: Tensor, before: Mapping[str, Tensor]
) -> Tensor:
    """Permute values stored per weight to the current order of neurons; returns values_P.

    Args:
        model: Holds the parameters.
        names: Names of the parameters, in the order of the values.
        values_P: One value per weight, in the layout of :func:`~clframe.regularization.importance.flatten`.
        before: :func:`neuron_orders` at the time the values were stored.
    """
    if not before:
        return values_P
    now = neuron_orders(model)
    parameters = [model.get_parameter(name) for name in names]
    parts = []
    for name, part_P in zip(names, values_P.split([p.numel() for p in parameters]), strict=True):
        if name in before and not torch.equal(before[name], now[name]):
            former_F = before[name].argsort()[now[name]]  # former position of each neuron
            part_P = part_P.view(len(former_F), -1)[former_F].flatten()
        parts.append(part_P)
    return torch.cat(parts)


ACTIVE_FRACTION = 0.01
"""Fraction of the token's largest activation from which a neuron counts as active."""


def active_mask(x_TN: Tensor) -> Tensor:
    """Mask of nonzero activations with at least :data:`ACTIVE_FRACTION` of the token's largest magnitude, active_TN.

    For ReLU these are nearly all firing neurons; for GELU, whose tail is never exactly zero, those that contribute.

    >>> active_mask(torch.tensor([[4.0, -0.5, 0.03, 0.0], [0.0, 0.0, 0.0, 0.0]])).int().tolist()
    [[1, 1, 0, 0], [0, 0, 0, 0]]
    """
    size_TN = x_TN.abs()
    return (size_TN > 0) & (size_TN >= ACTIVE_FRACTION * size_TN.amax(-1, keepdim=True))


def active_rates(
    module: nn.Module,
    batches: Iterable[Any],
    *,
    call: Callable[[Any], Any],
    mask: Callable[[Any], Tensor | None] | None = None,
) -> dict[str, Tensor]:
    """Fraction of tokens in which each hidden neuron is active, rate_N by layer, float64 on the CPU.

    Uses the input of the last layer of each feed-forward network of ``module``, or the output of each activation if
    there is none; each position of a map is a token. An activation that runs several times per pass gives several
    layers, ``relu``, ``relu#2`` and so on. In a converted network neurons are in the order of the dense network, and
    neurons of inactive experts are inactive. Layers that do not run, and mixtures of experts trained from scratch,
    whose neurons differ from token to token, are omitted.

    Args:
        module: Module to observe.
        batches: Inputs of ``call``.
        call: Runs one batch through ``module``, or through a model that contains it; the caller sets modes.
        mask: Maps a batch to the mask of the tokens that count, None for all. Layers with another number of tokens,
            such as one for each text, count all.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> _ = net[0].weight.data.copy_(torch.eye(2)), net[0].bias.data.zero_()
    >>> active_rates(net, [torch.tensor([[1.0, -1.0], [1.0, 2.0]])], call=net)["1"].tolist()
    [1.0, 0.5]
    """
    # Counts are accumulated on the device and read once at the end.
    counts: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    calls: dict[str, int] = {}
    counted: Tensor | None = None

    def add(name: str, x: Tensor) -> None:
        calls[name] = nth = calls.get(name, 0) + 1
        layer = name if nth == 1 else f"{name}#{nth}"
        x_TN = x.detach().reshape(-1, x.shape[-1])
        if counted is not None and counted.numel() == len(x_TN):
            x_TN = x_TN[counted.reshape(-1)]
        count_N = active_mask(x_TN).sum(0)
        counts[layer] = counts[layer] + count_N if layer in counts else count_N
        tokens[layer] = tokens.get(layer, 0) + len(x_TN)

    with ExitStack() as stack:
        for site in _sites(module):
            stack.callback(_hook_hidden(site, partial(add, site.name)).remove)
        for name, layer in routed_layers(module).items():
            stack.callback(layer.register_forward_pre_hook(partial(_add_expert_neurons, partial(add, name))).remove)
        for batch in batches:
            calls.clear()
            counted = None if mask is None else mask(batch)
            call(batch)
    order = {name: place for place, (name, _) in enumerate(module.named_modules())}
    found = sorted(counts, key=lambda layer: order[layer.partition("#")[0]])
    return {layer: counts[layer].cpu().double() / max(tokens[layer], 1) for layer in found}


def overlaps(rate_EN: Tensor) -> Tensor:
    """Weighted Jaccard overlap of each pair of rows, jaccard_EE: ``sum min(a, b) / sum max(a, b)``, 1 if both are zero.

    Equals :func:`~clframe.sparsity.functional.jaccard` of each pair, computed together: with d the distance
    ``sum |a - b|``, twice the sums of minima and maxima are ``sum a + sum b -/+ d``.

    >>> overlaps(torch.tensor([[1.0, 0.5, 0.0], [0.5, 0.5, 0.5]]))[0].tolist()
    [1.0, 0.5]
    """
    rate_EN = rate_EN.double()
    sum_E = rate_EN.sum(1)
    both_EE = sum_E[:, None] + sum_E[None, :]
    apart_EE = torch.cdist(rate_EN, rate_EN, p=1)
    return torch.where(both_EE > 0, (both_EE - apart_EE) / (both_EE + apart_EE), 1.0)


def _sites(module: nn.Module) -> list[Site]:
    """Sites of hidden neurons outside experts.

    Activations inside experts receive values that depend on the executor.
    """
    try:
        sites = find_sites(module)
    except UnsupportedError:
        return []
    parts = [part for part in module.modules() if isinstance(part, (RoutedExperts, MixtureOfExperts))]
    inside = {id(inner) for part in parts for inner in part.modules()}
    return [site for site in sites if id(site.module if site.ffn is None else site.ffn.owner) not in inside]


def _add_expert_neurons(add: Callable[[Tensor], None], layer: RoutedExperts, inputs: tuple[Tensor, ...]) -> None:
    """Add the hidden neurons of all experts in the dense network's order, zero for inactive experts."""
    x_TD = inputs[0].reshape(-1, inputs[0].shape[-1])
    hidden_TEH = layer.experts.hidden(x_TD)
    if layer.routes:
        hidden_TEH = hidden_TEH * layer.keep(x_TD)[..., None]
    add(hidden_TEH.flatten(1)[:, layer.experts.order_F.argsort()])


def _hook_hidden(site: Site, add: Callable[[Tensor], None]) -> Any:
    """Register a hook that receives the hidden neurons of a site, neurons last."""
    if site.ffn is not None:
        return site.ffn.down.register_forward_pre_hook(lambda _, inputs: add(inputs[0]))
    assert site.module is not None

    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        add(site_activations(site, inputs[0], output)[1])

    return site.module.register_forward_hook(hook)
