"""Layers between a tap and the classifier of its exit: pooling, and the cascade from the exit before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.torch_version import TorchVersion

from clframe.errors import ConfigError
from clframe.nn.heads import sort_classes

EXPORTS_LERP: Final = TorchVersion(torch.__version__) >= "2.7"
"""Whether ``torch.export`` can decompose ``torch.lerp`` with a dynamic batch: torch 2.6 fails."""
Pair = tuple[Tensor, Tensor]
"""A map after max pooling, and after average pooling."""


class MaxAveragePool(nn.Module):
    """Max pooling and average pooling of a map, both returned; no parameters.

    Args:
        size: None pools windows of ``window`` x ``window`` and drops an incomplete last row or column, as torch does;
            a side shorter than the window is pooled to 1. A number n, or (rows, columns), pools to that size with the
            windows of adaptive pooling, [floor(i H / n), ceil((i + 1) H / n)) for row i.
        window: Side of the windows where ``size`` is None.
        upsample: Whether a side shorter than ``size`` is repeated to fill it, as torch's adaptive pooling does;
            otherwise it keeps its length.

    >>> [tuple(pooled.shape) for pooled in MaxAveragePool()(torch.zeros(2, 3, 7, 1))]
    [(2, 3, 3, 1), (2, 3, 3, 1)]
    >>> [tuple(pooled.shape) for pooled in MaxAveragePool(size=4)(torch.zeros(2, 3, 7, 3))]
    [(2, 3, 4, 3), (2, 3, 4, 3)]
    """

    def __init__(
        self, *, size: int | tuple[int, int] | None = None, window: int = 2, upsample: bool = False
    ) -> None:
        super().__init__()
        self.size = (size, size) if isinstance(size, int) else size
        self.window = window
        self.upsample = upsample

    def forward(self, x: Tensor) -> Pair:
        """x_BCHW pooled by the maximum, and by the average."""
        if self.size is None:
            kernel = (min(self.window, x.shape[2]), min(self.window, x.shape[3]))
            return F.max_pool2d(x, kernel), F.avg_pool2d(x, kernel)
        size = self.size if self.upsample else (min(self.size[0], x.shape[2]), min(self.size[1], x.shape[3]))
        return _pool_to(size, F.max_pool2d, x), _pool_to(size, F.avg_pool2d, x)

    def extra_repr(self) -> str:
        """The size for ``print``."""
        return f"{self.window}x{self.window} windows" if self.size is None else f"size={self.size}"


class Blend(nn.Module):
    """``a * max + (1 - a) * average`` of two pooled maps.

    Attributes:
        a: One learnable scalar, initialized from U[0, 1) and not constrained; at 0 the blend is exactly the average,
            at 1 exactly the maximum.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.rand(()))

    def forward(self, pooled: Pair) -> Tensor:
        """The blended map, of the same shape."""
        maximum, average = pooled
        return _interpolate(average, maximum, self.a.to(average.dtype))  # maps may be bfloat16 under autocast


def blend_all(blends: Sequence[Blend], pooled: Pair) -> Tensor:
    """Outputs of T ``blends`` for the same two maps, stacked, by one operation."""
    maximum, average = pooled
    a_T = torch.stack([blend.a for blend in blends]).to(average.dtype)
    return _interpolate(average, maximum, a_T.reshape(-1, *(1,) * average.dim()))


def _interpolate(start: Tensor, end: Tensor, a: Tensor) -> Tensor:
    """``start + a (end - start)``."""
    if EXPORTS_LERP or not torch.compiler.is_compiling():
        return torch.lerp(start, end, a)
    return start + a * (end - start)


class SDNPool(nn.Module):
    """Learnable mix of max and average pooling (Kaya et al., "Shallow-Deep Networks", 2019).

    ``a * max_pool(x) + (1 - a) * average_pool(x)``, ``a`` one learnable scalar for all channels.

    Args:
        size: None for windows of 2x2, n for a map of n x n; see :class:`MaxAveragePool`.
        upsample: Whether maps smaller than ``size`` are repeated to fill it.

    >>> tuple(SDNPool(size=4)(torch.zeros(2, 16, 32, 32)).shape)
    (2, 16, 4, 4)
    """

    def __init__(self, *, size: int | None = None, upsample: bool = False) -> None:
        super().__init__()
        self.pools = MaxAveragePool(size=size, upsample=upsample)
        self.blend = Blend()

    @property
    def a(self) -> nn.Parameter:
        """Weight of the maximum."""
        return self.blend.a

    def forward(self, x: Tensor) -> Tensor:
        """The pooled map."""
        blended: Tensor = self.blend(self.pools(x))
        return blended


class FlattenTo(nn.Module):
    """Flatten, then resize to F features by adaptive average pooling; no parameters.

    Feature i is the mean of the flat features [floor(i N / F), ceil((i + 1) N / F)) of N: neighbors are averaged where
    N is larger than F, features are repeated where it is smaller.

    Args:
        features: Output width F.
        inputs: Width N of the flattened tap.

    >>> FlattenTo(4, inputs=2)(torch.tensor([[1.0, 2.0]]))
    tensor([[1., 1., 2., 2.]])
    """

    index: Tensor
    length_F: Tensor
    outside_FL: Tensor

    def __init__(self, features: int, *, inputs: int) -> None:
        super().__init__()
        self.features = features
        first_F, end_F = (torch.tensor(ends) for ends in zip(*_windows(inputs, features), strict=True))
        offset_L = torch.arange(int((end_F - first_F).max()))
        index_FL = first_F[:, None] + offset_L
        outside_FL = index_FL >= end_F[:, None]
        self.register_buffer("index", index_FL.clamp(max=inputs - 1).flatten(), persistent=False)
        self.register_buffer("length_F", end_F - first_F, persistent=False)
        self.register_buffer("outside_FL", outside_FL, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """features_BF of a tap of any shape."""
        windows_BFL = x.flatten(1).index_select(1, self.index).unflatten(1, self.outside_FL.shape)
        features_BF: Tensor = windows_BFL.masked_fill(self.outside_FL, 0).sum(2) / self.length_F
        return features_BF

    def extra_repr(self) -> str:
        """The width for ``print``."""
        return f"features={self.features}"


def _windows(side: int, size: int) -> list[tuple[int, int]]:
    """Start and end of each of the ``size`` windows of adaptive pooling over ``side``."""
    return [(i * side // size, -(-(i + 1) * side // size)) for i in range(size)]


def _pool_to(size: tuple[int, int], pool: Callable[..., Tensor], x: Tensor) -> Tensor:
    """x_BCHW pooled to ``size`` rows and columns."""
    # Not torch's adaptive pooling: its max pooling has no deterministic backward pass on GPUs.
    (height, width), (rows, columns) = x.shape[2:], size
    if height % rows == 0 and width % columns == 0:
        return pool(x, (height // rows, width // columns))
    strips = [pool(x[:, :, first:end], (end - first, 1)) for first, end in _windows(height, rows)]
    x = torch.cat(strips, 2)
    return torch.cat([pool(x[..., first:end], (1, end - first)) for first, end in _windows(width, columns)], 3)


class Cascade(nn.Module):
    """Adds ``V l`` to an exit's logits, ``l`` the logits of the exit before (Wolczyk et al., "Zero Time Waste", 2021).

    The paper concatenates ``l`` to the pooled features ``f`` before the last linear layer, which is the same function:
    ``[W V] [f; l] + b = (W f + b) + V l``. Here V is a separate matrix because it grows in both directions. Every entry
    starts at zero, so that

    - a cascading head starts equal to the head without the cascade, with the same random draws, and
    - growing leaves all logits unchanged, also those of new classes in the previous exit.

    V still receives a gradient. (The paper initializes it like W.) With ``norm``, ``l`` first passes a LayerNorm with
    gain and shift; its mean and variance are over all P classes, so logits of old classes change when a trained head
    grows. Heads per experience have a fixed P and do not change.

    ``l`` never receives a gradient, and a class whose logit is ``-inf`` counts as 0.

    Args:
        norm: Whether to normalize ``l``.

    Attributes:
        inputs: class_P, the classes of the previous exit, in the order in which they were met.

    >>> cascade = Cascade(norm=True)
    >>> cascade.grow(3, inputs=[0, 1, 2]), tuple(cascade.weight.shape)
    (True, (3, 3))
    """

    weight: nn.Parameter
    inputs: Tensor

    def __init__(self, *, norm: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0, 0))
        self.gain = nn.Parameter(torch.empty(0)) if norm else None
        self.shift = nn.Parameter(torch.empty(0)) if norm else None
        self.register_buffer("inputs", torch.empty(0, dtype=torch.long))
        self._remember(())

    def grow(self, outputs: int, *, inputs: Iterable[int]) -> bool:
        """Grow to ``outputs`` logits and to the classes ``inputs`` of the previous exit.

        Returns:
            Whether parameters were replaced.

        Raises:
            DataError: A negative class.
        """
        known = (*self._known, *(c for c in sort_classes(inputs) if c not in self._known))
        outputs = max(outputs, len(self.weight))
        if self.weight.shape == (outputs, len(known)):
            return False
        self._resize(outputs, len(known))
        self._remember(known)
        self.inputs = torch.tensor(known, dtype=torch.long, device=self.inputs.device)
        return True

    def forward(self, previous_BC: Tensor) -> Tensor:
        """Addend to the logits, from those of the previous exit; classes it has met later are ignored.

        Raises:
            ConfigError: The previous exit has not grown for the same classes.
        """
        if previous_BC.shape[1] < self._least:  # an index error on a GPU would abort the process
            found = f"found {previous_BC.shape[1]} logits of the previous exit, expected {self._least}"
            raise ConfigError(f"exits.cascade: {found}; grow all heads for the same classes")
        previous_BP = previous_BC.detach().index_select(1, self.inputs)
        previous_BP = previous_BP.masked_fill(previous_BP.isneginf(), 0)
        if self.gain is not None:
            previous_BP = F.layer_norm(previous_BP, self.gain.shape, self.gain, self.shift)
        return F.linear(previous_BP, self.weight)

    def extra_repr(self) -> str:
        """Sizes for ``print``."""
        return f"outputs={len(self.weight)}, inputs={len(self._known)}, norm={self.gain is not None}"

    def _remember(self, known: Iterable[int]) -> None:
        """Copy ``inputs`` to Python, so that growing and ``forward`` need not synchronize with the device."""
        self._known = tuple(known)
        self._least = max(self._known, default=-1) + 1

    @torch.no_grad()
    def _resize(self, outputs: int, inputs: int) -> None:
        """Resize; new entries of the matrix are 0, new gains 1 and new shifts 0."""
        old = self.weight
        added = (0, inputs - old.shape[1], 0, outputs - old.shape[0])  # columns, then rows; F.pad crops by negatives
        self.weight = nn.Parameter(F.pad(old, added), requires_grad=old.requires_grad)
        if self.gain is not None and self.shift is not None:
            gain, shift = self.gain, self.shift
            self.gain = nn.Parameter(F.pad(gain, added[:2], value=1.0), requires_grad=gain.requires_grad)
            self.shift = nn.Parameter(F.pad(shift, added[:2]), requires_grad=shift.requires_grad)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Resize to the saved state, then load it."""
        saved = state_dict.get(f"{prefix}weight")
        if saved is not None and saved.shape != self.weight.shape:
            self._resize(*saved.shape)
            self.inputs = self.inputs.new_zeros(saved.shape[1])
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._remember(self.inputs.tolist())
