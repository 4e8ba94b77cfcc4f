"""Features of every exit, and rows of its classifiers by class."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from clframe.exits.heads import ExitHead, PerExperienceHead
from clframe.nn.features import embed_tap
from clframe.nn.heads import GrowingLinear, Head
from clframe.nn.network import Network, scale_gradient
from clframe.nn.types import Output


def exit_branches(network: Network, output: Output) -> tuple[Tensor, ...]:
    """The tap of every exit, with the gradient that ``network.gradient`` lets its losses send to the backbone.

    Args:
        network: The network with the exits.
        output: Output of ``network`` or of a frozen copy, with the taps of all exits.

    >>> import torch
    >>> from clframe.nn import GrowingLinear
    >>> from clframe.nn.backbones import mlp
    >>> network = Network(mlp((4,), width=3), exits=[("layer1", GrowingLinear(3))])
    >>> network.gradient = "detached"
    >>> [tap.requires_grad for tap in exit_branches(network, network(torch.ones(2, 4), taps=network.exit_taps))]
    [False, True]
    """
    taps = [output.taps[name] for name in network.exit_taps]
    if network.gradient == "detached":
        return (*(tap.detach() for tap in taps[:-1]), taps[-1])
    if network.gradient == "equilibrium":
        return tuple(scale_gradient(tap, 1 / (len(taps) - exit)) for exit, tap in enumerate(taps))
    return tuple(taps)


def exit_embeddings(network: Network, output: Output) -> tuple[Tensor, ...]:
    """features_BF of every exit, its embedded tap; arguments and gradients as in :func:`exit_branches`."""
    return tuple(embed_tap(tap) for tap in exit_branches(network, output))


def classifiers(head: Head) -> tuple[tuple[GrowingLinear, tuple[int, ...]], ...]:
    """The linear layers of a head, each with the classes of its rows.

    Empty for other kinds of heads, such as cosine classifiers, where only the direction of a row matters.

    >>> head = GrowingLinear(4)
    >>> head.grow([0, 1])
    True
    >>> [classes for _, classes in classifiers(head)]
    [(0, 1)]
    """
    if isinstance(head, GrowingLinear):
        return ((head, tuple(range(head.classes))),)
    if isinstance(head, ExitHead):
        return classifiers(head.classifier)
    if isinstance(head, PerExperienceHead):
        head_of = head.head_of.tolist()
        layers = [part.classifier for part in head.heads if isinstance(part, ExitHead)]
        owned = [tuple(c for c, owner in enumerate(head_of) if owner == number) for number in range(len(layers))]
        pairs = zip(layers, owned, strict=True)
        return tuple((layer, classes) for layer, classes in pairs if isinstance(layer, GrowingLinear))
    return ()


def heads_with_rows(network: Network) -> tuple[tuple[int, Head], ...]:
    """The exits whose heads have linear layers, with their indices."""
    heads = ((exit, head) for exit, head in enumerate(network.heads) if isinstance(head, Head))
    return tuple((exit, head) for exit, head in heads if classifiers(head))


def rows_and_fresh(head: Head, past: Iterable[int]) -> Iterator[nn.Parameter]:
    """Parameters of a head's linear layers, and all parameters added for classes that are not in ``past``."""
    for classifier, _ in classifiers(head):
        yield from classifier.parameters()
    if isinstance(head, PerExperienceHead):
        head_of = head.head_of.tolist()
        old = {head_of[c] for c in past}
        yield from (p for number, part in enumerate(head.heads) if number not in old for p in part.parameters())


@torch.no_grad()
def read_rows(head: Head) -> tuple[Tensor, Tensor]:
    """Copies of weight_CF and bias_C by class, of a head with linear layers; zero for classes without parameters."""
    parts = classifiers(head)
    like, classes = parts[0][0].weight, 1 + max((c for _, rows in parts for c in rows), default=-1)
    weight_CF, bias_C = like.new_zeros(classes, like.shape[1]), like.new_zeros(classes)
    for classifier, rows in parts:
        weight_CF[list(rows)] = classifier.weight
        bias_C[list(rows)] = classifier.bias
    return weight_CF, bias_C


@torch.no_grad()
def write_rows(head: Head, weight_CF: Tensor, bias_C: Tensor) -> None:
    """Write weights and biases by class in place; parameters remain the same objects."""
    for classifier, rows in classifiers(head):
        classifier.weight.copy_(weight_CF[list(rows)])
        classifier.bias.copy_(bias_C[list(rows)])
