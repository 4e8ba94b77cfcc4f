"""Taps as the exits of a network see them, for losses on features.

Shape suffixes: B batch, F features.
"""

from __future__ import annotations

from torch import Tensor

from clframe.core.types import Output
from clframe.functional.exits import scale_gradient
from clframe.nn.features import embedded
from clframe.nn.network import Network


def exit_branches(network: Network, output: Output) -> tuple[Tensor, ...]:
    """The tap of every exit, with the gradient that ``network.gradient`` lets its losses send to the backbone.

    Args:
        network: Whose exits.
        output: Of ``network``, or of a frozen copy, with the taps of all exits.

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
    """features_BF of every exit: its tap embedded; see :func:`exit_branches` for what it takes and for gradients."""
    return tuple(embedded(tap) for tap in exit_branches(network, output))
