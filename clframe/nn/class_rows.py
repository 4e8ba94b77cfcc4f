"""The linear classifiers of a head, class by class, whether it grows or has one for each experience.

Shape suffixes: C classes, F features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from clframe.nn.exits.heads import ExitHead, PerExperience
from clframe.nn.heads import GrowingLinear, Head
from clframe.nn.network import Network


def classifiers(head: Head) -> tuple[tuple[GrowingLinear, tuple[int, ...]], ...]:
    """The linear layers of a head, each with the class of every one of its rows.

    None for heads of another kind, such as cosine classifiers, whose rows count by direction alone.

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
    if isinstance(head, PerExperience):
        head_of = head.head_of.tolist()
        parts = [part.classifier for part in head.heads if isinstance(part, ExitHead)]
        owned = [tuple(c for c, owner in enumerate(head_of) if owner == number) for number in range(len(parts))]
        pairs = zip(parts, owned, strict=True)
        return tuple((part, classes) for part, classes in pairs if isinstance(part, GrowingLinear))
    return ()


def heads_with_rows(network: Network) -> tuple[tuple[int, Head], ...]:
    """The exits, by number, whose heads have linear layers."""
    heads = ((exit, head) for exit, head in enumerate(network.heads) if isinstance(head, Head))
    return tuple((exit, head) for exit, head in heads if classifiers(head))


def rows_and_fresh(head: Head, past: Iterable[int]) -> Iterator[nn.Parameter]:
    """Parameters of a head's linear layers, and all of what was added for classes that are not ``past``."""
    for classifier, _ in classifiers(head):
        yield from classifier.parameters()
    if isinstance(head, PerExperience):
        head_of = head.head_of.tolist()
        old = {head_of[c] for c in past}
        yield from (p for number, part in enumerate(head.heads) if number not in old for p in part.parameters())


@torch.no_grad()
def read_rows(head: Head) -> tuple[Tensor, Tensor]:
    """Copies of weight_CF and bias_C by class, of a head that has some; zero for classes without parameters."""
    parts = classifiers(head)
    like, classes = parts[0][0].weight, 1 + max((c for _, rows in parts for c in rows), default=-1)
    weight_CF, bias_C = like.new_zeros(classes, like.shape[1]), like.new_zeros(classes)
    for classifier, rows in parts:
        weight_CF[list(rows)] = classifier.weight
        bias_C[list(rows)] = classifier.bias
    return weight_CF, bias_C


@torch.no_grad()
def write_rows(head: Head, weight_CF: Tensor, bias_C: Tensor) -> None:
    """Put weights and biases in place, by class; parameters stay the same objects."""
    for classifier, rows in classifiers(head):
        classifier.weight.copy_(weight_CF[list(rows)])
        classifier.bias.copy_(bias_C[list(rows)])
