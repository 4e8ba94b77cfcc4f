"""Conversion of feed-forward networks to experts: grouping of neurons and replacement of modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from clframe.errors import ConfigError, DivergenceError, UnsupportedError
from clframe.moe.analytical import most_active
from clframe.moe.dense import find_dense_ffns
from clframe.moe.experts import ExpertLayer
from clframe.moe.routed import RoutedExperts, override, routed_layers
from clframe.moe.router import ALL, ROUTERS, RouterKind, make_router
from clframe.options import convert_argument
from clframe.seeding import generator_for

Split = Literal["kmeans", "random", "coactivation"]
"""Grouping of neurons by similar weights, at random, or by activity on the same tokens."""

SPLITS: tuple[Split, ...] = ("kmeans", "random", "coactivation")


def expert_count(
    neurons: int, *, experts: int | None, expert_size: int | None, most: int | None = None, where: str = "moe"
) -> int:
    """Number of experts of a network of ``neurons``, from their number, their size or an upper limit.

    Raises:
        ConfigError: Both or none of ``experts`` and ``expert_size`` given, or a value that does not divide ``neurons``.

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
    convert_argument(value, int, where=f"{where}.{option}")
    if value < 1 or neurons % value:
        raise ConfigError(f"{where}.{option}: found {value}; give a divisor of the {neurons} hidden neurons")
    return value if option == "experts" else neurons // value


def split_neurons(
    features_FD: Tensor, *, experts: int, split: Split, generator: Generator, where: str = "moe"
) -> Tensor:
    """Group neurons into experts; returns order_F, the neurons sorted by expert and by index within an expert.

    Args:
        features_FD: Features to group by: rows of the input weights (of the gate in a gated network), or for
            ``coactivation`` the activations of each neuron on a set of tokens (transposed).
        experts: Number of experts; a divisor of F.
        split: Grouping method.
        generator: CPU generator for the random order or the initial centers.
        where: Name of the layer for error messages.

    Raises:
        ConfigError: ``experts`` does not divide F, or an unknown split.
        DivergenceError: Features that are not finite.
    """
    neurons = len(features_FD)
    expert_count(neurons, experts=experts, expert_size=None)
    if split not in SPLITS:
        raise ConfigError(f"moe.split: found '{split}'; choose from {', '.join(SPLITS)}")
    if not features_FD.isfinite().all():
        kind = "activations" if split == "coactivation" else "weights"
        raise DivergenceError(f"{where}: found {kind} that are not finite, training diverged; lower the learning rate")
    if split == "random":
        order_F = torch.randperm(neurons, generator=generator)
        return order_F.view(experts, -1).sort(1).values.flatten()
    if split == "coactivation":
        features_FD = features_FD > 0
    expert_F = balanced_kmeans(features_FD.float(), clusters=experts, generator=generator)
    return expert_F.argsort(stable=True)


def balanced_kmeans(
    features_FD: Tensor, *, clusters: int, generator: Generator, iterations: int = 20
) -> Tensor:
    """Cluster rows on the unit sphere into clusters of equal size; returns cluster_F on the CPU.

    Lloyd's algorithm with a stable matching as the assignment step, see :func:`assign_evenly`. Returns the assignment
    with the largest total similarity of rows to their centers.

    Args:
        features_FD: Finite rows; normalized here.
        clusters: A divisor of F.
        generator: Draws the rows used as initial centers.
        iterations: Maximum number of iterations; stops earlier when the assignment does not change.

    >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.1], [0.1, 3.0]])
    >>> cluster = balanced_kmeans(rows, clusters=2, generator=torch.Generator().manual_seed(0))
    >>> bool(cluster[0] == cluster[2]), bool(cluster[1] == cluster[3]), int((cluster == 0).sum())
    (True, True, 2)
    """
    rows_FD = F.normalize(features_FD.detach().float(), dim=1)
    count = len(rows_FD)
    first = torch.randperm(count, generator=generator)[:clusters].to(rows_FD.device)
    centers_ED = rows_FD[first]
    # The objective can fall: a stable matching is not the best assignment. So the best iteration is returned.
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
    """Assign F rows to E clusters of F / E rows each by a stable matching; returns cluster_F.

    Each row proposes to its most similar cluster, which accepts the most similar rows and rejects the rest (deferred
    acceptance). Rows and clusters rank by the same similarities, so the matching is unique except for ties, which the
    earlier row wins.
    """
    count, clusters = similarity_FE.shape
    left_FE = similarity_FE.clone()
    while True:
        most_F, choice_F = left_FE.max(1)
        order_F = most_F.argsort(descending=True, stable=True)
        order_F = order_F[choice_F[order_F].argsort(stable=True)]  # cluster by cluster, the most similar first
        proposals_E = torch.bincount(choice_F, minlength=clusters)
        rank_F = torch.arange(count, device=choice_F.device) - (proposals_E.cumsum(0) - proposals_E)[choice_F[order_F]]
        rejected = order_F[rank_F >= count // clusters]
        if not len(rejected):
            return choice_F
        left_FE[rejected, choice_F[rejected]] = -float("inf")


TOKENS = 4096
"""Maximum number of tokens on which activations are recorded."""

Call = Callable[[nn.Module, Any], Any]
"""Function that runs a model on one batch."""


def plain_call(model: nn.Module, batch: Any) -> Any:
    """Return ``model(batch)``; named inputs, such as those of a tokenizer of transformers, become keyword arguments."""
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def to_experts(
    model: nn.Module,
    *,
    experts: int | None = None,
    expert_size: int | None = None,
    most: int | None = None,
    split: Split | None = "kmeans",
    router: RouterKind = "norm",
    router_width: int | None = 128,
    shared: int = 0,
    batches: Sequence[Any] = (),
    call: Call = plain_call,
    seed: int = 0,
) -> dict[str, RoutedExperts]:
    """Replace every feed-forward network of ``model`` by experts, in place; nothing is trained, all experts are active.

    The model is unchanged if an error is raised. In a :class:`~clframe.nn.network.Network` only the backbone is
    converted.

    Args:
        model: Module with feed-forward networks of two linear layers (three if gated).
        experts: Experts of each network. Exactly one of this, ``expert_size`` and ``most`` applies.
        expert_size: Neurons of an expert. Published choices are 24 x 128 for speed, 512 x 6 for accuracy.
        most: Upper limit: each network gets the largest number of equal experts up to this.
        split: Grouping of neurons; None keeps their order, until :func:`regroup`.
        router: Kind of router; :func:`~clframe.moe.pipeline.fit_experts` trains it, or reads it from activations.
        router_width: Width of a router's hidden layer; None takes a twenty-fourth of the network's, at least 16.
        shared: Number of experts that always run, made of the neurons that are active in most tokens.
        batches: Inputs for ``coactivation`` and for shared experts.
        call: Runs the model on one of them.
        seed: Seed of the split and the routers' weights.

    Returns:
        The new layers by name.

    Raises:
        UnsupportedError: No feed-forward network, one that cannot be replaced, a converted model, or weights on the
            meta device.
        ConfigError: An expert size that does not divide the hidden neurons, or an option out of range.
        DivergenceError: Weights that are not finite, so that neurons cannot be grouped.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> model = nn.Sequential(net)
    >>> to_experts(model, experts=4)["0"].experts
    ExpertLayer(
      4, 4, experts=4x2
      (activation): ReLU()
    )
    """
    _check(model, split=split, router=router, router_width=router_width, shared=shared, batches=batches)
    networks = find_dense_ffns(model)
    counts = [
        expert_count(
            len(n.up[0]), experts=experts, expert_size=expert_size, most=most, where=f"moe: {n.name or 'the model'}"
        )
        for n in networks
    ]
    wrong = next((n for n, count in zip(networks, counts, strict=True) if not 0 <= shared < count), None)
    if wrong is not None:
        count = counts[networks.index(wrong)]
        raise ConfigError(
            f"moe.shared: found {shared} of the {count} experts of {wrong.name or 'the model'}; give fewer than experts"
        )
    # Activations are recorded on the installed experts.
    after = split is not None and (split == "coactivation" or shared > 0)
    layers = []
    # Everything that can fail comes before the first installation, so that an error leaves the model unchanged.
    for number, (network, count) in enumerate(zip(networks, counts, strict=True)):
        layer = ExpertLayer(
            network.up,
            network.down,
            activation=network.activation,
            experts=count,
            gate=network.gate,
            dropout=network.inner_dropout,
        )
        if split is not None and not after:
            _regroup_layer(layer, split, generator_for(seed, "moe", "split", number), where=f"moe: {network.name}")
        weight = network.up[0]
        width = max(16, len(weight) // 24) if router_width is None else router_width
        generator = generator_for(seed, "moe", "router", number)
        new_router = make_router(router, layer, routed=count - shared, width=width, generator=generator)
        new_router.to(weight.device, weight.dtype)
        routed = RoutedExperts(layer, new_router, gate=ALL, dropout=network.outer_dropout, shared=shared)
        layers.append(routed.train(model.training))
    for network, routed in zip(networks, layers, strict=True):
        network.install(routed)
    if after:
        assert split is not None
        generator = generator_for(seed, "moe", "split")
        regroup(model, split=split, generator=generator, batches=batches, call=call)
    names = {id(layer): name for name, layer in routed_layers(model).items()}
    return {names[id(layer)]: layer for layer in layers}


def layer_inputs(model: nn.Module, batch: Any, *, call: Call = plain_call) -> dict[str, Tensor]:
    """Inputs x_ND of every converted network by name, recorded in one forward pass without gradients."""
    layers = routed_layers(model)
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    with override(layers, "observer", lambda name: found[name].append), torch.no_grad():
        call(model, batch)
    return {name: torch.cat(xs) for name, xs in found.items() if xs}


def regroup(
    model: nn.Module,
    *,
    split: Split,
    generator: Generator,
    batches: Sequence[Any] = (),
    call: Call = plain_call,
) -> None:
    """Regroup the neurons of every layer of a converted model; its output with all experts active does not change.

    Permutes the rows of the parameters in place; :func:`clframe.moe.usage.reorder_values` applies the same permutation
    to values stored per weight. Routers have to be trained again.

    Args:
        model: Converted model.
        split: Grouping of neurons.
        generator: On the CPU.
        batches: Inputs for ``coactivation`` and shared experts, run with all experts; at most 4096 of their tokens,
            evenly spaced, are used.
        call: Runs the model on one batch.

    Raises:
        DivergenceError: Weights that are not finite.
    """
    layers = routed_layers(model)
    needed = split == "coactivation" or any(layer.shared for layer in layers.values())
    seen = collect_inputs(model, batches, call=call) if needed else {}
    for name, layer in layers.items():
        _regroup_layer(layer.experts, split, generator, x_ND=seen.get(name), shared=layer.shared, where=f"moe: {name}")


def _regroup_layer(
    experts: ExpertLayer,
    split: Split,
    generator: Generator,
    *,
    x_ND: Tensor | None = None,
    shared: int = 0,
    where: str,
) -> None:
    """Regroup by activations on ``x_ND``, or by the rows of the gate (of the input weights without a gate).

    The neurons that are active in most tokens form the first ``shared`` experts.
    """
    hidden_NF = None if x_ND is None else experts.hidden(x_ND).flatten(1)
    if split == "coactivation" and hidden_NF is not None:
        features_FD = hidden_NF.t()
    else:
        features_FD = (experts.up if experts.gate is None else experts.gate).detach().flatten(0, 1)
    often_S = torch.empty(0, dtype=torch.long, device=features_FD.device)
    if shared and hidden_NF is not None:
        often_S = most_active(hidden_NF, shared * experts.expert_size)
    rest_F = torch.ones(len(features_FD), dtype=torch.bool, device=features_FD.device)
    rest_F[often_S] = False
    left_F = rest_F.nonzero().flatten()
    routed = experts.experts - shared
    order_F = split_neurons(features_FD[left_F], experts=routed, split=split, generator=generator, where=where)
    experts.regroup(torch.cat([often_S, left_F[order_F.to(left_F.device)]]))


def _check(
    model: nn.Module,
    *,
    split: str | None,
    router: str,
    router_width: int | None,
    shared: int,
    batches: Sequence[Any],
) -> None:
    if split is not None and split not in SPLITS:
        raise ConfigError(f"moe.split: found '{split}'; choose from {', '.join(SPLITS)}")
    if router not in ROUTERS:
        raise ConfigError(f"moe.router: found '{router}'; choose from {', '.join(ROUTERS)}")
    if router_width is not None and router_width < 1:
        raise ConfigError(f"moe.router_width: found {router_width}; give 1 or more")
    if split == "coactivation" and not len(batches):
        raise ConfigError("moe.split: found 'coactivation' without batches; give inputs to record activations on")
    if shared and split is not None and not len(batches):
        raise ConfigError(f"moe.shared: found {shared} without batches; give inputs to record activations on")
    if any(p.is_meta for p in model.parameters()):
        raise UnsupportedError(
            f"moe: found {type(model).__name__} on the meta device, without weights; load them first"
        )
    if routed_layers(model):
        raise UnsupportedError(
            f"moe: found {type(model).__name__} with experts; use a dense model, or change gates with set_tau"
        )
    require_finite_weights(model, where="moe")


def require_finite_weights(model: nn.Module, *, where: str) -> None:
    """Refuse a model after a diverged training.

    Its experts could not be grouped, and activations of its stages could not be recognized by their values.

    Raises:
        DivergenceError: Names the first parameter with a value that is not finite.
    """
    diverged = next((name for name, parameter in model.named_parameters() if not parameter.isfinite().all()), None)
    if diverged is not None:
        raise DivergenceError(
            f"{where}: found weights that are not finite in {diverged}, training diverged; lower the learning rate"
        )


def collect_inputs(model: nn.Module, batches: Sequence[Any], *, call: Call = plain_call) -> dict[str, Tensor]:
    """Inputs x_ND of every layer over all batches with all experts active: at most 4096 tokens, evenly spaced."""
    seen: dict[str, list[Tensor]] = {}
    with all_experts_on(model):
        for batch in batches:
            for name, x_ND in layer_inputs(model, batch, call=call).items():
                seen.setdefault(name, []).append(x_ND)
    joined = {name: torch.cat(xs) for name, xs in seen.items()}
    return {name: x_ND[:: -(-len(x_ND) // TOKENS)] for name, x_ND in joined.items() if len(x_ND)}


@contextmanager
def all_experts_on(model: nn.Module) -> Iterator[None]:
    """Context in evaluation mode with all experts active and trainable routers; restores everything on exit."""
    layers = routed_layers(model)
    # Not nn.frozen.evaluating: routers are trained in this context, so that it cannot disable gradients.
    training = {part: part.training for part in model.modules()}
    trainable = {p: p.requires_grad for layer in layers.values() for p in layer.router.parameters()}
    model.eval()
    try:
        for parameter in trainable:
            parameter.requires_grad_(True)
        with override(layers, "gate", lambda _: ALL):
            yield
    finally:
        for part, flag in training.items():
            part.training = flag
        for parameter, flag in trainable.items():
            parameter.requires_grad_(flag)
