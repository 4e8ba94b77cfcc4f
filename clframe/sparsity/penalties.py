"""Measures of activations for penalties, returned with the output of the forward pass.

Forward hooks measure the activations, because stages do not return them; the values are part of ``output.taps``. So
they belong to their pass even if the network runs again before the loss is computed, and nothing is stored in the
module or its ``state_dict``. Copies of the network measure independently. Passes without gradient or in evaluation
mode are not measured.
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
"""Name of value_L in ``output.taps``: one value per site, in order."""

Measure = Callable[[Tensor, Tensor], Tensor]
"""Maps (pre-activations, activations), neurons last, to a scalar."""


class SiteRecorder:
    """Hooks that measure every site of a network in each training pass.

    Args:
        measure: The function to compute at each site.
        sites: Number of sites.
    """

    def __init__(self, measure: Measure, sites: int) -> None:
        self.measure = measure
        self.values: list[list[Tensor]] = [[] for _ in range(sites)]
        self.open = False

    def __deepcopy__(self, memo: dict[int, Any]) -> SiteRecorder:
        """Return an empty recorder for the copied network: values of an unfinished pass have a graph."""
        memo[id(self)] = other = SiteRecorder(self.measure, len(self.values))
        return other

    def begin(self, network: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Start recording, before the network runs."""
        self._clear()
        self.open = network.training and torch.is_grad_enabled()

    def see(self, at: int, site: Site, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Measure one site after it has run."""
        if self.open:
            self.values[at].append(self.measure(*site_activations(site, inputs[0], output)))

    def end(self, network: nn.Module, inputs: tuple[Any, ...], output: Output) -> Output:
        """Return the output with the measured values after the network has run; 0 for a site that did not run."""
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


def measure_sites(network: Network, sites: Sequence[Site], measure: Measure) -> None:
    """Add hooks so that every training pass of ``network`` returns ``measure`` of each of its ``sites``.

    >>> from clframe.sparsity.functional import hoyer
    >>> from clframe.nn.backbones import mlp
    >>> network = Network(mlp((1, 2, 2), width=8))
    >>> measure_sites(network, find_sites(network.backbone), lambda pre, fired: hoyer(fired))
    >>> network(torch.zeros(5, 1, 2, 2)).taps[MEASURED].tolist()
    [0.0, 0.0]
    """
    recorder = SiteRecorder(measure, len(sites))
    network.register_forward_pre_hook(recorder.begin)
    for at, site in enumerate(sites):
        hooked_module(site).register_forward_hook(partial(recorder.see, at, site))
    network.register_forward_hook(recorder.end)


def hooked_module(site: Site) -> nn.Module:
    """Return the module to hook at a site: the activation, or the layer before it where others call that as well."""
    if site.module is not None:
        return site.module
    assert site.ffn is not None
    return site.ffn.gate or site.ffn.up


def site_activations(site: Site, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """Return (pre-activations, activations), neurons last, from input and output of ``hooked_module(site)``.

    For a layer that ends in an activation only the output is known and is returned for both.
    """
    if site.module is None:
        assert site.ffn is not None
        pre = _gate_half(site.ffn, output)
        return pre, site.ffn.activation(pre.clone() if site.overwrites else pre)
    pre = output if site.fused else x
    if site.ffn is None and output.ndim == 4:  # maps of a convolution: channels are the neurons
        return pre.movedim(1, -1), output.movedim(1, -1)
    return pre, output


def swap_for_relu(module: nn.Module) -> tuple[str, ...]:
    """Replace every site's activation by ReLU under all of its names; returns the changed names.

    Raises:
        UnsupportedError: An activation that ``forward`` calls as a function and that is not ReLU.
    """
    names: list[str] = []
    for site in find_sites(module):
        activation = site.module if site.ffn is None else site.ffn.activation
        if site.fused or isinstance(activation, nn.ReLU) or activation is F.relu:
            continue
        if isinstance(activation, nn.Module):
            same = [name for name, part in module.named_modules(remove_duplicate=False) if part is activation]
        else:
            same = [name] if (name := _attribute_name(site)) else []
        for name in same:
            owner, _, key = name.rpartition(".")
            setattr(module.get_submodule(owner), key, nn.ReLU() if isinstance(activation, nn.Module) else F.relu)
        names += same
    return tuple(names)


def _attribute_name(site: Site) -> str | None:
    assert site.ffn is not None
    name, owner = site.ffn.activation_name, site.ffn.owner
    if name is None or hasattr(owner, "activation_relu_or_gelu"):  # torch's encoder layer stores it twice
        raise UnsupportedError(
            f"sparsity: found an activation in {site.name or type(owner).__name__} that is not a module; its forward "
            f"would still call it: set relu=false, or build the model with ReLU"
        )
    return name


def _gate_half(ffn: FFN, output: Tensor) -> Tensor:
    if ffn.fused is None:
        return output
    first, second = output.chunk(2, dim=-1)
    return first if ffn.fused == "first" else second
