"""Fusion of operations for inference: equal outputs up to rounding, in less time.

In evaluation, batch normalization is a fixed scale and shift of every channel, which the preceding convolution can
absorb: ``w' = w g / sqrt(v + eps)`` and ``b' = (b - m) g / sqrt(v + eps) + c``.

In channels-last layout on a CPU, torch's pooling of 2x2 windows takes two to three times as long as the maximum of
slices and a convolution, because max pooling also computes the indices of the maxima.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.fusion import fuse_conv_bn_eval

from clframe.exits.layers import MaxAveragePool, Pair
from clframe.nn.frozen import freeze
from clframe.nn.network import Network


def fuse_batch_norm(
    network: Network, *, memory_format: Literal["contiguous", "channels_last"] = "contiguous"
) -> Network:
    """Fuse batch normalization into convolutions in a frozen copy for inference.

    Pairs are found by tracing each stage and head with ``torch.fx``: a normalization whose input is the output of a
    convolution that nothing else uses. All other normalizations remain. The copy cannot be trained or load a state.

    Args:
        network: The network, which is not changed.
        memory_format: Layout of convolution weights. With ``channels_last``, which is faster on most processors, taps
            have that layout too, and 2x2 poolings of heads are replaced.

    >>> from clframe.nn.backbones import resnet20
    >>> fast = fuse_batch_norm(Network(resnet20((3, 32, 32))), memory_format="channels_last")
    >>> any(isinstance(part, nn.BatchNorm2d) for part in fast.modules())
    False
    """
    frozen = freeze(network)
    for part in (*frozen.backbone.stages, *frozen.heads):
        _fuse(part)
    if memory_format == "channels_last":
        frozen.to(memory_format=torch.channels_last)
        for head in frozen.heads:
            for name, part in list(head.named_modules()):
                if isinstance(part, MaxAveragePool) and part.size is None and part.window == 2:
                    _replace(head, name, SlicedMaxAverage())
    frozen.eval().requires_grad_(False)  # the new modules are in training mode and require gradients
    return frozen


class SlicedMaxAverage(nn.Module):
    """Max and average pooling of 2x2 windows by slices and a convolution; see ``MaxAveragePool``.

    Args:
        least: Smallest number of values for which slices are used; with fewer, calling more operators takes longer.

    >>> x = torch.randn(2, 3, 5, 4)
    >>> maximum, average = SlicedMaxAverage(least=0)(x)
    >>> torch.equal(maximum, nn.functional.max_pool2d(x, 2))
    True
    """

    def __init__(self, *, least: int = 1 << 18) -> None:
        super().__init__()
        self.least = least
        self.plain = MaxAveragePool()

    def forward(self, x: Tensor) -> Pair:
        """x_BCHW pooled by the maximum, and by the average."""
        if x.numel() < self.least:
            pooled: Pair = self.plain(x)
            return pooled
        channels, rows, columns = x.shape[1:]
        kernel = (min(2, rows), min(2, columns))
        weight = x.new_full((channels, 1, *kernel), 1 / (kernel[0] * kernel[1]))
        average = nn.functional.conv2d(x, weight, stride=kernel, groups=channels)
        for dim, size in ((2, kernel[0]), (3, kernel[1])):
            if size == 2:
                end = x.shape[dim] // 2 * 2
                x = torch.maximum(_every_second(x, dim, 0, end), _every_second(x, dim, 1, end))
        return x, average


def _every_second(x: Tensor, dim: int, start: int, end: int) -> Tensor:
    return x[:, :, start:end:2] if dim == 2 else x[:, :, :, start:end:2]


def _fuse(part: nn.Module) -> None:
    """Fuse within ``part``, or within each of its children where it cannot be traced as a whole."""
    if not any(isinstance(module, _BatchNorm) for module in part.modules()):
        return
    try:
        graph = fx.Tracer().trace(part)
    except Exception:  # tracing arbitrary modules raises arbitrary errors; their children may be traceable
        for child in part.children():
            _fuse(child)
        return
    for conv, norm in _pairs(part, graph):
        fused = fuse_conv_bn_eval(cast(_ConvNd, part.get_submodule(conv)), cast(_BatchNorm, part.get_submodule(norm)))
        _replace(part, conv, fused)
        _replace(part, norm, nn.Identity())


def _pairs(part: nn.Module, graph: fx.Graph) -> list[tuple[str, str]]:
    """Names of the convolutions and normalizations to fuse."""
    calls = [node for node in graph.nodes if node.op == "call_module"]
    times = Counter(id(part.get_submodule(node.target)) for node in calls)
    pairs = []
    for node in calls:
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        conv, norm = part.get_submodule(str(before.target)), part.get_submodule(node.target)
        if not isinstance(conv, _ConvNd) or isinstance(conv, _ConvTransposeNd) or not isinstance(norm, _BatchNorm):
            continue
        if times[id(conv)] == times[id(norm)] == 1 and norm.running_mean is not None:
            pairs.append((str(before.target), str(node.target)))
    return pairs


def _replace(part: nn.Module, name: str, by: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(part.get_submodule(parent), own, by)
