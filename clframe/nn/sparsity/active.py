"""Which hidden neurons are active on given inputs, and how far two sets of them overlap.

Shape suffixes: T tokens, N neurons, E sets of inputs, or experts; H neurons of an expert, D inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clframe.errors import UnsupportedError
from clframe.nn.moe.native import MixtureOfExperts
from clframe.nn.moe.routed import RoutedExperts, routed_layers
from clframe.nn.sparsity.sites import Site, find_sites
from clframe.nn.sparsity.watch import fired

LEAST = 0.01
"""A neuron is active from this share of its token's largest activation."""


def active(x_TN: Tensor) -> Tensor:
    """active_TN: not zero and at least :data:`LEAST` of the token's largest magnitude.

    With ReLU these are, but for faint ones, the neurons that fire; with GELU, whose tail is never exactly zero, those
    that matter.

    >>> active(torch.tensor([[4.0, -0.5, 0.03, 0.0], [0.0, 0.0, 0.0, 0.0]])).int().tolist()
    [[1, 1, 0, 0], [0, 0, 0, 0]]
    """
    size_TN = x_TN.abs()
    return (size_TN > 0) & (size_TN >= LEAST * size_TN.amax(-1, keepdim=True))


def active_rates(module: nn.Module, batches: Iterable[Any], *, call: Callable[[Any], Any]) -> dict[str, Tensor]:
    """rate_N of every layer: the share of tokens in which each hidden neuron is active, float64 on the CPU.

    Looked at is what enters the last layer of each feed-forward network of ``module``, or the output of each activation
    where it has none; of maps every position is a token. An activation that a pass uses several times is as many
    layers, ``relu``, ``relu#2`` and so on. Of a feed-forward network made into experts, neurons lie as they did before,
    and those of experts that do not run for a token are inactive in it. Nothing where there is neither, of layers that
    do not run, and of mixtures of experts trained from scratch, whose neurons are those of other experts in each token.

    Args:
        module: Where to look.
        batches: What to call with, one after the other.
        call: Runs one batch through ``module``, or through a model that holds it; modes are the caller's business.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> _ = net[0].weight.data.copy_(torch.eye(2)), net[0].bias.data.zero_()
    >>> active_rates(net, [torch.tensor([[1.0, -1.0], [1.0, 2.0]])], call=net)["1"].tolist()
    [1.0, 0.5]
    """
    counts: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    calls: dict[str, int] = {}

    def see(name: str, x: Tensor) -> None:
        calls[name] = nth = calls.get(name, 0) + 1
        layer = name if nth == 1 else f"{name}#{nth}"
        x_TN = x.detach().reshape(-1, x.shape[-1])
        count_N = active(x_TN).sum(0)
        counts[layer] = counts[layer] + count_N if layer in counts else count_N
        tokens[layer] = tokens.get(layer, 0) + len(x_TN)

    with ExitStack() as stack:
        for site in _sites(module):
            stack.callback(_watch(site, partial(see, site.name)).remove)
        for name, layer in routed_layers(module).items():
            stack.callback(layer.register_forward_pre_hook(partial(_see_experts, partial(see, name))).remove)
        for batch in batches:
            calls.clear()
            call(batch)
    order = {name: place for place, (name, _) in enumerate(module.named_modules())}
    found = sorted(counts, key=lambda layer: order[layer.partition("#")[0]])
    return {layer: counts[layer].cpu().double() / max(tokens[layer], 1) for layer in found}


def overlaps(rate_EN: Tensor) -> Tensor:
    """jaccard_EE between each two rows: ``sum min(a, b) / sum max(a, b)``, 1 where neither has any.

    The same as :func:`~clframe.functional.sparsity.jaccard` of each pair, all at once: with d the distance
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
    """Places where neurons fire, those inside experts left out: their activations see what an executor makes of it."""
    try:
        sites = find_sites(module)
    except UnsupportedError:
        return []
    parts = [part for part in module.modules() if isinstance(part, (RoutedExperts, MixtureOfExperts))]
    inside = {id(inner) for part in parts for inner in part.modules()}
    return [site for site in sites if id(site.module if site.ffn is None else site.ffn.owner) not in inside]


def _see_experts(see: Callable[[Tensor], None], layer: RoutedExperts, inputs: tuple[Tensor, ...]) -> None:
    """The hidden neurons of all experts in the order of the dense network, zero where an expert does not run."""
    x_TD = inputs[0].reshape(-1, inputs[0].shape[-1])
    hidden_TEH = layer.experts.hidden(x_TD)
    if layer.routes:
        hidden_TEH = hidden_TEH * layer.keep(x_TD)[..., None]
    see(hidden_TEH.flatten(1)[:, layer.experts.order_F.argsort()])


def _watch(site: Site, see: Callable[[Tensor], None]) -> Any:
    """A hook on what the hidden neurons of a site hand on, neurons last."""
    if site.ffn is not None:
        return site.ffn.down.register_forward_pre_hook(lambda _, inputs: see(inputs[0]))
    assert site.module is not None
    return site.module.register_forward_hook(lambda _, inputs, output: see(fired(site, inputs[0], output)[1]))
