"""From a dense model to experts: division of neurons, and replacement of the feed-forward networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from clframe.errors import ConfigError, UnsupportedError
from clframe.moe.dense import Dense, dense_networks
from clframe.moe.experts import ExpertLayer
from clframe.moe.routed import RoutedExperts, routed_layers
from clframe.moe.router import ALL, ROUTERS, RouterKind
from clframe.seeding import generator_for

Split = Literal["kmeans", "random", "coactivation"]
"""By similar weights; at random; by firing for the same tokens."""

SPLITS: tuple[Split, ...] = ("kmeans", "random", "coactivation")


def expert_count(
    neurons: int, *, experts: int | None, expert_size: int | None, most: int | None = None, where: str = "moe"
) -> int:
    """How many experts ``neurons`` make, given their number, their size or the most there may be.

    Raises:
        ConfigError: Two of them given, or none, or experts that are not equal.

    >>> expert_count(3072, experts=None, expert_size=128), expert_count(400, experts=None, expert_size=None, most=24)
    (24, 20)
    """
    if most is not None and experts is None and expert_size is None:
        return max(count for count in range(1, most + 1) if neurons % count == 0)
    if (experts is None) == (expert_size is None):
        found = "neither experts nor expert_size" if experts is None else "both experts and expert_size"
        raise ConfigError(f"{where}: found {found}; give one of them")
    option, value = ("experts", experts) if experts is not None else ("expert_size", expert_size)
    assert value is not None
    if value < 1 or neurons % value:
        raise ConfigError(f"{where}.{option}: found {value}; give a divisor of the {neurons} hidden neurons")
    return value if option == "experts" else neurons // value


def split_neurons(features_FD: Tensor, *, experts: int, split: Split, generator: Generator) -> Tensor:
    """order_F: neurons expert by expert, each expert's in ascending order.

    Args:
        features_FD: What tells neurons apart: their rows of the input weights, of the gate's where there is one; for
            ``coactivation`` each neuron's activations on a set of tokens (transposed).
        experts: Number of experts; it must divide F.
        split: How.
        generator: On the CPU; draws the order, or the first centers.

    Raises:
        ConfigError: Experts that are not equal, or an unknown split.
    """
    neurons = len(features_FD)
    expert_count(neurons, experts=experts, expert_size=None)
    if split not in SPLITS:
        raise ConfigError(f"moe.split: found '{split}'; choose from {', '.join(SPLITS)}")
    if split == "random":
        drawn_F = torch.randperm(neurons, generator=generator)
        return drawn_F.view(experts, -1).sort(1).values.flatten()
    if split == "coactivation":
        features_FD = features_FD > 0
    expert_F = balanced_kmeans(features_FD.float(), clusters=experts, generator=generator)
    return expert_F.argsort(stable=True)


def balanced_kmeans(
    features_FD: Tensor, *, clusters: int, generator: Generator, iterations: int = 20
) -> Tensor:
    """cluster_F of rows on the unit sphere, all clusters of one size.

    Lloyd's algorithm with an assignment that no row and cluster would both rather change: each row asks for its
    nearest center, which keeps the closest ones and sends the rest to their next. The assignment with the largest
    similarity of rows to their centers is returned, on the CPU.

    Args:
        features_FD: Rows; they are normalized.
        clusters: A divisor of F.
        generator: Draws the rows that are the first centers.
        iterations: At most; it ends when nothing moves.

    >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.1], [0.1, 3.0]])
    >>> cluster = balanced_kmeans(rows, clusters=2, generator=torch.Generator().manual_seed(0))
    >>> bool(cluster[0] == cluster[2]), bool(cluster[1] == cluster[3]), int((cluster == 0).sum())
    (True, True, 2)
    """
    rows_FD = F.normalize(features_FD.detach().float(), dim=1)
    count = len(rows_FD)
    first = torch.randperm(count, generator=generator)[:clusters].to(rows_FD.device)
    centers_ED = rows_FD[first]
    best, best_F, previous_F = -float("inf"), None, None
    for _ in range(iterations):
        cluster_F = assign_evenly(rows_FD @ centers_ED.t())
        members_EF = cluster_F.argsort(stable=True).view(clusters, -1)
        centers_ED = F.normalize(rows_FD[members_EF].mean(1), dim=1)
        reached = float((rows_FD * centers_ED[cluster_F]).sum())
        if reached > best:
            best, best_F = reached, cluster_F
        if previous_F is not None and torch.equal(cluster_F, previous_F):
            break
        previous_F = cluster_F
    assert best_F is not None
    return best_F.cpu()


def assign_evenly(similarity_FE: Tensor) -> Tensor:
    """cluster_F: a stable matching of rows with clusters that each take F / E of them.

    Similarities rank rows and clusters alike, so ties apart the result is unique. The earlier row wins a tie.
    """
    count, clusters = similarity_FE.shape
    left_FE = similarity_FE.clone()
    while True:
        most_F, choice_F = left_FE.max(1)
        order_F = most_F.argsort(descending=True, stable=True)
        order_F = order_F[choice_F[order_F].argsort(stable=True)]  # cluster by cluster, the most similar first
        asked_E = torch.bincount(choice_F, minlength=clusters)
        place_F = torch.arange(count, device=choice_F.device) - (asked_E.cumsum(0) - asked_E)[choice_F[order_F]]
        rejected = order_F[place_F >= count // clusters]
        if not len(rejected):
            return choice_F
        left_FE[rejected, choice_F[rejected]] = -float("inf")


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

    Parameters are written in place, their rows in another order; :mod:`clframe.moe.usage` helps whoever has kept
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
