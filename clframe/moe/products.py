"""How many multiply-adds of a model have a zero in them, by role, counted on real samples.

An effective multiply-add is one whose input is not zero; zeros that padding puts around a map are such, weights are not
looked at. It says what hardware that skips zeros could save, not what this machine does.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clframe.accounting import Experts, Products, measure
from clframe.accounting.macs import as_found
from clframe.errors import UnsupportedError
from clframe.moe.routed import RoutedExperts
from clframe.moe.usage import counting
from clframe.nn.heads import GrowingLinear
from clframe.nn.network import Network
from clframe.sparsity import find_ffns

_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


@dataclass(frozen=True, kw_only=True)
class Looked:
    """What one look at a model found."""

    products: tuple[Products, ...]
    experts: tuple[Experts, ...]


def products_of(network: Network, x: Tensor) -> Looked:
    """Dense and effective MACs of ``x`` by role, and what each layer of experts did; the network is left as found.

    Roles: ``convolution``; ``up``, ``gate`` and ``down`` of feed-forward networks; other ``linear`` layers; ``head``;
    ``router``, which the dense network does not have, and ``experts``, all of them or the (token, expert) pairs that
    ran; ``other``, where nobody looks for zeros (attention, recurrent layers).

    Args:
        network: In any mode.
        x: Prepared samples as a batch.
    """
    roles, samples = _roles(network), len(x)
    counted: dict[str, Tensor] = {}
    layers = {name: part for name, part in network.named_modules() if name in roles}
    with ExitStack() as stack:
        # On accelerators heads are computed one by one, and so counted by module, only where somebody looks.
        for part in layers.values():
            stack.callback(part.register_forward_pre_hook(_look_away).remove)
        cost = measure(network, x)
    with ExitStack() as stack:
        for name, part in layers.items():
            stack.callback(part.register_forward_pre_hook(partial(_see, name, counted)).remove)
        with as_found(network), torch.no_grad(), counting(network) as usage:
            network(x)
            used = usage()
    by_module = cost.by_module()
    dense: dict[str, int] = {}
    effective: dict[str, int] = {}
    for name in counted:
        dense[roles[name]] = dense.get(roles[name], 0) + by_module[name]
        effective[roles[name]] = effective.get(roles[name], 0) + int(counted[name])
    experts = tuple(
        Experts(
            layer=name, experts=layer.macs.experts, samples=samples, tokens=layer.tokens, routed=layer.routed,
            pairs=sum(layer.ran_E), expert_macs=layer.macs.expert, router_macs=layer.macs.router,
            part=_part(network, network.get_submodule(name)),
        )
        for name, layer in used.items()
    )  # fmt: skip
    rest = cost.macs - sum(by_module[name] for name in (*counted, *used))
    if experts:
        dense["router"], effective["router"] = 0, sum(row.routed * row.router_macs for row in experts)
        dense["experts"] = sum(row.dense_macs for row in experts)
        effective["experts"] = sum(row.pairs * row.expert_macs for row in experts)
    if rest:
        dense["other"] = effective["other"] = rest
    products = (
        Products(role=role, macs=macs, effective_macs=effective[role], samples=samples) for role, macs in dense.items()
    )
    return Looked(products=tuple(products), experts=experts)


def _part(network: Network, layer: nn.Module) -> str:
    """The stage or head that a layer is in, as the parts of a prediction are named."""
    for name, stage, exits in network.plan():
        if any(part is layer for part in stage.modules()):
            return name
        for exit_name, exit in exits:
            if any(part is layer for part in network.heads[exit].modules()):
                return f"exit/{exit_name}"
    return ""


def _roles(network: Network) -> dict[str, str]:
    """The role of every layer whose products are looked at, by its name."""
    known: dict[int, str] = {}
    try:
        for ffn in find_ffns(network.backbone):
            known |= {id(ffn.up): "up", id(ffn.gate): "gate", id(ffn.down): "down"}
    except UnsupportedError:
        pass
    heads = {id(part) for head in network.heads for part in head.modules()}
    inside = {id(part) for layer in network.modules() if isinstance(layer, RoutedExperts) for part in layer.modules()}
    found = {}
    for name, part in network.named_modules():
        if _counter(part) is None or id(part) in inside:
            continue
        kind = "linear" if isinstance(part, (nn.Linear, GrowingLinear)) else "convolution"
        found[name] = "head" if id(part) in heads else known.get(id(part), kind)
    return found


def _counter(part: nn.Module) -> Callable[[Any, Tensor], Tensor] | None:
    if isinstance(part, nn.Linear):
        return lambda layer, x: x.count_nonzero() * layer.out_features
    if isinstance(part, GrowingLinear):
        return lambda layer, x: x.count_nonzero() * layer.classes
    if isinstance(part, _Convolution):
        return _convolution
    if isinstance(part, _Transposed):
        # Every value of the input meets every window of its group.
        return lambda layer, x: x.count_nonzero() * (layer.out_channels // layer.groups * prod(layer.kernel_size))
    return None


def _look_away(part: nn.Module, inputs: tuple[Any, ...]) -> None:
    pass


def _see(name: str, counted: dict[str, Tensor], part: nn.Module, inputs: tuple[Any, ...]) -> None:
    count = _counter(part)
    assert count is not None
    macs = count(part, inputs[0])
    counted[name] = counted[name] + macs if name in counted else macs


def _convolution(layer: Any, x: Tensor) -> Tensor:
    """Pairs of a value that is not zero and a window that it is in, times the outputs that the window makes."""
    size = len(layer.kernel_size)
    shape = x.shape if x.ndim == size + 2 else (1, *x.shape)
    there = (x != 0).reshape(shape).sum(1, keepdim=True).double()  # channels of a group meet outputs of their own
    padding = layer.padding
    if layer.padding_mode != "zeros":
        there, padding = F.pad(there, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
    window = torch.ones(1, 1, *layer.kernel_size, dtype=there.dtype, device=there.device)
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[size]
    met: Tensor = convolve(there, window, stride=layer.stride, padding=padding, dilation=layer.dilation)
    outputs: int = layer.out_channels // layer.groups
    return met.sum().long() * outputs
