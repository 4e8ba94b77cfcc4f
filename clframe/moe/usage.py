"""Expert usage, active neurons, and where the neurons of experts are."""

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
from clframe.moe.routed import RoutedExperts, Usage, routed_layers
from clframe.sparsity.penalties import fired
from clframe.sparsity.sites import Site, find_sites


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


ROWS = ("up", "up_bias", "gate", "gate_bias", "down")
"""Parameters of experts that hold one row for each neuron."""


def neuron_orders(model: nn.Module) -> dict[str, Tensor]:
    """order_F of every parameter with a row for each neuron of experts, by its name, as it is now."""
    return {
        f"{name}.experts.{row}": layer.experts.order_F.clone()
        for name, layer in routed_layers(model).items()
        for row in ROWS
        if getattr(layer.experts, row) is not None
    }


def followed(
    model: nn.Module, names: Sequence[str], values_P: Tensor, before: Mapping[str, Tensor]
) -> Tensor:
    """values_P of some parameters in the order in which their neurons lie now.

    Args:
        model: Holds the parameters.
        names: Of the parameters, in the order of the values.
        values_P: One value for each weight, as :func:`~clframe.regularization.importance.flat` lays them out.
        before: :func:`neuron_orders` when the values were as they are.
    """
    if not before:
        return values_P
    now = neuron_orders(model)
    parameters = [model.get_parameter(name) for name in names]
    parts = []
    for name, part_P in zip(names, values_P.split([p.numel() for p in parameters]), strict=True):
        if name in before and not torch.equal(before[name], now[name]):
            place_F = before[name].argsort()[now[name]]  # where the neuron that lies here now lay before
            part_P = part_P.view(len(place_F), -1)[place_F].flatten()
        parts.append(part_P)
    return torch.cat(parts)


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

    The same as :func:`~clframe.sparsity.functional.jaccard` of each pair, all at once: with d the distance
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
