"""Dense and effective MACs of a model by role, counted on samples.

An effective MAC is one whose input value is not zero. Zero padding of maps counts as zero input; zeros in weights are
not considered. The number estimates the savings on hardware that skips zeros, not those on this machine.
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

from clframe.accounting import Experts, Products, measure_cost
from clframe.accounting.macs import evaluation_mode
from clframe.errors import UnsupportedError
from clframe.moe.routed import RoutedExperts
from clframe.moe.usage import count_usage
from clframe.nn.heads import GrowingLinear
from clframe.nn.network import Network
from clframe.sparsity import find_ffns

_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


@dataclass(frozen=True, kw_only=True)
class ProductCounts:
    """MACs by role and usage of experts."""

    products: tuple[Products, ...]
    experts: tuple[Experts, ...]


def count_products(network: Network, x: Tensor) -> ProductCounts:
    """Dense and effective MACs of ``x`` by role, and the usage of each layer of experts; the network is unchanged.

    Roles: ``convolution``; ``up``, ``gate`` and ``down`` of feed-forward networks; other ``linear`` layers; ``head``;
    ``router``, absent in the dense network; ``experts`` (dense: all; effective: the (token, expert) pairs that ran);
    and ``other``, where zeros are not counted (attention, recurrent layers).

    Args:
        network: In any mode.
        x: Batch of prepared samples.
    """
    roles, samples = _roles(network), len(x)
    counted: dict[str, Tensor] = {}
    layers = {name: part for name, part in network.named_modules() if name in roles}
    with ExitStack() as stack:
        # Accelerators compute all heads in one fused call; with a hook they run, and are counted, module by module.
        for part in layers.values():
            stack.callback(part.register_forward_pre_hook(_no_op).remove)
        cost = measure_cost(network, x[:1])  # that of every sample, since shapes are equal
    with ExitStack() as stack:
        for name, part in layers.items():
            stack.callback(part.register_forward_pre_hook(partial(_add_count, name, counted)).remove)
        with evaluation_mode(network), torch.no_grad(), count_usage(network) as usage:
            network(x)
            used = usage()
    by_module = cost.by_module()
    dense: dict[str, int] = {}
    effective: dict[str, int] = {}
    for name in counted:
        dense[roles[name]] = dense.get(roles[name], 0) + samples * by_module[name]
        effective[roles[name]] = effective.get(roles[name], 0) + int(counted[name])
    experts = tuple(
        Experts(
            layer=name, experts=layer.macs.experts, samples=samples, tokens=layer.tokens, routed=layer.routed,
            pairs=sum(layer.ran_E), expert_macs=layer.macs.expert, router_macs=layer.macs.router,
            part=_stage_or_exit(network, network.get_submodule(name)),
        )
        for name, layer in used.items()
    )  # fmt: skip
    rest = samples * (cost.macs - sum(by_module[name] for name in (*counted, *used)))
    if experts:
        dense["router"], effective["router"] = 0, sum(row.routed * row.router_macs for row in experts)
        dense["experts"] = sum(row.dense_macs for row in experts)
        effective["experts"] = sum(row.pairs * row.expert_macs for row in experts)
    if rest:
        dense["other"] = effective["other"] = rest
    products = (
        Products(role=role, macs=macs, effective_macs=effective[role], samples=samples) for role, macs in dense.items()
    )
    return ProductCounts(products=tuple(products), experts=experts)


def _stage_or_exit(network: Network, layer: nn.Module) -> str:
    """Name of the stage or exit that contains a layer, as in the parts of a prediction."""
    for name, stage, exits in network.plan():
        if any(part is layer for part in stage.modules()):
            return name
        for exit_name, exit in exits:
            if any(part is layer for part in network.heads[exit].modules()):
                return f"exit/{exit_name}"
    return ""


def _roles(network: Network) -> dict[str, str]:
    """Role of every layer whose products are counted, by name."""
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
        if _product_counter(part) is None or id(part) in inside:
            continue
        kind = "linear" if isinstance(part, (nn.Linear, GrowingLinear)) else "convolution"
        found[name] = "head" if id(part) in heads else known.get(id(part), kind)
    return found


def _product_counter(part: nn.Module) -> Callable[[Any, Tensor], Tensor] | None:
    if isinstance(part, nn.Linear):
        return lambda layer, x: x.count_nonzero() * layer.out_features
    if isinstance(part, GrowingLinear):
        return lambda layer, x: x.count_nonzero() * layer.classes
    if isinstance(part, _Convolution):
        return _count_convolution
    if isinstance(part, _Transposed):
        # Every value of the input meets every window of its group.
        return lambda layer, x: x.count_nonzero() * (layer.out_channels // layer.groups * prod(layer.kernel_size))
    return None


def _no_op(part: nn.Module, inputs: tuple[Any, ...]) -> None:
    pass


def _add_count(name: str, counted: dict[str, Tensor], part: nn.Module, inputs: tuple[Any, ...]) -> None:
    count = _product_counter(part)
    assert count is not None
    macs = count(part, inputs[0])
    counted[name] = counted[name] + macs if name in counted else macs


def _count_convolution(layer: Any, x: Tensor) -> Tensor:
    """Pairs of a nonzero value and a window that contains it, times the outputs of the window."""
    size = len(layer.kernel_size)
    shape = x.shape if x.ndim == size + 2 else (1, *x.shape)
    # Of all samples and channels together: windows are the same for each, and grouped channels are independent.
    nonzero = (x != 0).reshape(shape).sum((0, 1), keepdim=True).double()
    padding = layer.padding
    if layer.padding_mode != "zeros":
        nonzero, padding = F.pad(nonzero, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
    window = torch.ones(1, 1, *layer.kernel_size, dtype=nonzero.dtype, device=nonzero.device)
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[size]
    met: Tensor = convolve(nonzero, window, stride=layer.stride, padding=padding, dilation=layer.dilation)
    outputs: int = layer.out_channels // layer.groups
    return met.sum().long() * outputs
