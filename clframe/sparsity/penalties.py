"""Penalties on activations as they pass, handed on with the output of the pass they belong to.

Stages do not return what happens inside them, so the activations are watched by forward hooks; what they measure
leaves the network in ``output.taps`` beside the stages' outputs. So it stays with its pass whatever else runs the
network between, and nothing is kept: no state, nothing in ``state_dict``; copies of the network watch for
themselves. Passes without gradient and passes in evaluation mode are not watched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clframe.errors import UnsupportedError
from clframe.nn.network import Network
from clframe.nn.types import Output
from clframe.sparsity.ffn import FFN
from clframe.sparsity.sites import Site, find_sites

MEASURED = "sparsity"
"""The name in ``output.taps`` of value_L, one for each site in order."""

Measure = Callable[[Tensor, Tensor], Tensor]
"""A scalar of (pre-activations, activations), both with the neurons last."""


class Watch:
    """Measures every site of a network in each training pass.

    Args:
        measure: What to measure.
        sites: How many sites there are.
    """

    def __init__(self, measure: Measure, sites: int) -> None:
        self.measure = measure
        self.values: list[list[Tensor]] = [[] for _ in range(sites)]
        self.open = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        """Another watch for the copied network: values of a pass under way have a graph, which is not copied."""
        memo[id(self)] = other = Watch(self.measure, len(self.values))
        return other

    def begin(self, network: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Before the network runs."""
        self._clear()
        self.open = network.training and torch.is_grad_enabled()

    def see(self, at: int, site: Site, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """After a site has run."""
        if self.open:
            self.values[at].append(self.measure(*fired(site, inputs[0], output)))

    def end(self, network: nn.Module, inputs: tuple[Any, ...], output: Output) -> Output:
        """After the network has run: its output, with what was measured. A site that did not run measures 0."""
        if not self.open:
            return output
        zero = output.last.new_zeros((), dtype=torch.float32)
        value_L = torch.stack([torch.stack(seen).mean() if seen else zero for seen in self.values])
        self._clear()
        return output._replace(taps={**output.taps, MEASURED: value_L})

    def _clear(self) -> None:
        self.open = False
        for seen in self.values:
            seen.clear()


def watch(network: Network, sites: Sequence[Site], measure: Measure) -> None:
    """Have every training pass of ``network`` hand on what ``measure`` gives at each of its ``sites``.

    >>> from clframe.sparsity.functional import hoyer
    >>> from clframe.nn.backbones import mlp
    >>> network = Network(mlp((1, 2, 2), width=8))
    >>> watch(network, find_sites(network.backbone), lambda pre, fired: hoyer(fired))
    >>> network(torch.zeros(5, 1, 2, 2)).taps[MEASURED].tolist()
    [0.0, 0.0]
    """
    eye = Watch(measure, len(sites))
    network.register_forward_pre_hook(eye.begin)
    for at, site in enumerate(sites):
        hooked(site).register_forward_hook(partial(eye.see, at, site))
    network.register_forward_hook(eye.end)


def hooked(site: Site) -> nn.Module:
    """The module whose passing tells what a site does: the activation, or the layer before it."""
    if site.module is not None:
        return site.module
    assert site.ffn is not None
    return site.ffn.gate or site.ffn.up


def fired(site: Site, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """(pre-activations, activations) of a site, neurons last, from what went into and came out of ``hooked(site)``.

    Of a layer that ends in an activation only what comes out is known, and stands for both.
    """
    if site.module is None:
        assert site.ffn is not None
        pre = _gate_half(site.ffn, output)
        return pre, site.ffn.activation(pre)
    pre = output if site.fused else x
    if site.ffn is None and output.ndim == 4:  # maps of a convolution: channels are the neurons
        return pre.movedim(1, -1), output.movedim(1, -1)
    return pre, output


def swap_for_relu(module: nn.Module) -> tuple[str, ...]:
    """Put ReLU in place of every site's activation, under all of its names; returns those that changed.

    Raises:
        UnsupportedError: An activation that ``forward`` calls by itself and that is no ReLU.
    """
    names: list[str] = []
    for site in find_sites(module):
        activation = site.module if site.ffn is None else site.ffn.activation
        if site.fused or isinstance(activation, nn.ReLU) or activation is F.relu:
            continue
        if isinstance(activation, nn.Module):
            same = [name for name, part in module.named_modules(remove_duplicate=False) if part is activation]
        else:
            same = [name] if (name := _kept_name(site)) else []
        for name in same:
            owner, _, key = name.rpartition(".")
            setattr(module.get_submodule(owner), key, nn.ReLU() if isinstance(activation, nn.Module) else F.relu)
        names += same
    return tuple(names)


def _kept_name(site: Site) -> str | None:
    assert site.ffn is not None
    name, owner = site.ffn.activation_name, site.ffn.owner
    if name is None or hasattr(owner, "activation_relu_or_gelu"):  # torch's encoder layer keeps its choice twice
        raise UnsupportedError(
            f"sparsity: found an activation in {site.name or type(owner).__name__} that is no module; its forward "
            f"would go on calling it: leave relu=false, or build the model with ReLU"
        )
    return name


def _gate_half(ffn: FFN, output: Tensor) -> Tensor:
    if ffn.fused is None:
        return output
    first, second = output.chunk(2, dim=-1)
    return first if ffn.fused == "first" else second
