"""Frozen copies of a network: teachers and reference models."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from clframe.nn.network import Network


def freeze(network: Network) -> Network:
    """An independent copy in eval mode whose parameters need no gradient and hold none.

    >>> from clframe.nn.backbones import mlp
    >>> teacher = freeze(Network(mlp((1, 8, 8))))
    >>> teacher.training, any(p.requires_grad for p in teacher.parameters())
    (False, False)
    """
    return copy.deepcopy(network).eval().requires_grad_(False)  # a parameter's copy has no gradient


def restore(network: Network, state_dict: Mapping[str, Any]) -> Network:
    """A frozen copy of ``network``'s architecture with the weights of ``state_dict``.

    Heads take the sizes of the saved state, so a teacher with fewer classes comes back from the network
    that has grown since. ``network`` itself is left alone.
    """
    frozen = freeze(network)
    frozen.load_state_dict(state_dict)
    return frozen
