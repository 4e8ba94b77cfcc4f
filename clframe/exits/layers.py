"""Layers between a tap and the classifier of its exit: pooling, and the cascade from the exit before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clframe.errors import ConfigError
from clframe.nn.heads import ordered

Pair = tuple[Tensor, Tensor]
"""A map after max pooling, and after average pooling."""


class MaxAverage(nn.Module):
    """Max pooling and average pooling of a map, side by side; no parameters.

    Args:
        size: None pools windows of 2x2 and drops the last row or column of an odd side, as torch does; a
            side of 1 is not pooled. A number n pools to n x n with the windows of adaptive pooling, [floor(i
            H / n), ceil((i + 1) H / n)) for row i; a side that is no longer than n stays.

    >>> [tuple(pooled.shape) for pooled in MaxAverage()(torch.zeros(2, 3, 7, 1))]
    [(2, 3, 3, 1), (2, 3, 3, 1)]
    >>> [tuple(pooled.shape) for pooled in MaxAverage(size=4)(torch.zeros(2, 3, 7, 3))]
    [(2, 3, 4, 3), (2, 3, 4, 3)]
    """

    def __init__(self, *, size: int | None = None) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Pair:
        """x_BCHW pooled by the maximum, and by the average."""
        if self.size is None:
            kernel = (min(2, x.shape[2]), min(2, x.shape[3]))
            return F.max_pool2d(x, kernel), F.avg_pool2d(x, kernel)
        return _pooled_to(self.size, F.max_pool2d, x), _pooled_to(self.size, F.avg_pool2d, x)

    def extra_repr(self) -> str:
        """The size, as ``print`` shows it."""
        return "2x2 windows" if self.size is None else f"size={self.size}"


class Blend(nn.Module):
    """``a * max + (1 - a) * average`` of two pooled maps.

    Attributes:
        a: One learnable scalar, drawn from U[0, 1) and not held there; at 0 the blend is the average, at 1 the
            maximum, bit for bit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.rand(()))

    def forward(self, pooled: Pair) -> Tensor:
        """The blended map, of the shape of both."""
        maximum, average = pooled
        return torch.lerp(average, maximum, self.a.to(average.dtype))  # maps may be bfloat16 under autocast


def blend_all(blends: Sequence[Blend], pooled: Pair) -> Tensor:
    """What each of T ``blends`` makes of the same two maps, stacked: the same numbers, in one operation."""
    maximum, average = pooled
    a_T = torch.stack([blend.a for blend in blends]).to(average.dtype)
    return torch.lerp(average, maximum, a_T.reshape(-1, *(1,) * average.dim()))


class SDNPool(nn.Module):
    """Learnable mix of max and average pooling (Kaya et al., "Shallow-Deep Networks", 2019).

    ``a * max_pool(x) + (1 - a) * average_pool(x)``, ``a`` one learnable scalar for all channels.

    Args:
        size: None for windows of 2x2, n for a map of n x n; see :class:`MaxAverage`.

    >>> tuple(SDNPool(size=4)(torch.zeros(2, 16, 32, 32)).shape)
    (2, 16, 4, 4)
    """

    def __init__(self, *, size: int | None = None) -> None:
        super().__init__()
        self.pools = MaxAverage(size=size)
        self.blend = Blend()

    @property
    def a(self) -> nn.Parameter:
        """The share of the maximum."""
        return self.blend.a

    def forward(self, x: Tensor) -> Tensor:
        """x_BCHW pooled."""
        blended: Tensor = self.blend(self.pools(x))
        return blended


class FlattenTo(nn.Module):
    """Flatten, then bring to exactly F features by adaptive average pooling; no parameters.

    Feature i is the mean of the flat features [floor(i N / F), ceil((i + 1) N / F)) of N: neighbours are averaged
    where N is larger, features are repeated where F is (and averaged with a neighbour where F is no multiple).

    Args:
        features: Width F wanted.
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
        """The width, as ``print`` shows it."""
        return f"features={self.features}"


def _windows(side: int, size: int) -> list[tuple[int, int]]:
    """First and end of each of the ``size`` windows that adaptive pooling lays over ``side``."""
    return [(i * side // size, -(-(i + 1) * side // size)) for i in range(size)]


def _pooled_to(size: int, pool: Callable[..., Tensor], x: Tensor) -> Tensor:
    """x_BCHW pooled to ``size`` rows and columns: in one go where they divide, else side by side in strips."""
    height, width = x.shape[2:]
    rows, columns = min(size, height), min(size, width)
    if height % rows == 0 and width % columns == 0:
        return pool(x, (height // rows, width // columns))
    strips = [pool(x[:, :, first:end], (end - first, 1)) for first, end in _windows(height, rows)]
    x = torch.cat(strips, 2)
    return torch.cat([pool(x[..., first:end], (1, end - first)) for first, end in _windows(width, columns)], 3)


class Cascade(nn.Module):
    """Adds ``V l`` to an exit's logits, ``l`` the logits of the exit before (Wolczyk et al., "Zero Time Waste", 2021).

    The paper concatenates ``l`` to the pooled features ``f`` before the last linear layer. That is the same
    function: ``[W V] [f; l] + b = (W f + b) + V l``; here V is a matrix of its own because it grows in both
    directions. Every entry starts at zero, so that

    - a cascading head starts as the same head without the cascade, with the same random draws, and
    - growing leaves all logits as they were, those of new classes in the exit before included.

    V still has a gradient. (The paper draws it as it draws W.) With ``norm``, ``l`` goes through a LayerNorm with
    gain and shift first; its mean and variance are over all P classes, so old logits do move when a head that
    already learned grows. A head for each experience keeps its P and does not move.

    ``l`` never receives a gradient, and a class whose logit is ``-inf`` counts as 0.

    Args:
        norm: Whether to normalize ``l``.

    Attributes:
        inputs: class_P, the classes of the exit before, in the order they were met.

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
        """Make room for ``outputs`` logits and for the classes ``inputs`` of the exit before.

        Returns:
            Whether there are new parameters now.

        Raises:
            DataError: A negative class.
        """
        known = (*self._known, *(c for c in ordered(inputs) if c not in self._known))
        outputs = max(outputs, len(self.weight))
        if self.weight.shape == (outputs, len(known)):
            return False
        self._resize(outputs, len(known))
        self._remember(known)
        self.inputs = torch.tensor(known, dtype=torch.long, device=self.inputs.device)
        return True

    def forward(self, previous_BC: Tensor) -> Tensor:
        """What to add to the logits, from those of the exit before; its later classes are ignored.

        Raises:
            ConfigError: An exit before that has not grown for the same classes.
        """
        if previous_BC.shape[1] < self._least:  # on a GPU the gather would end the process
            found = f"found {previous_BC.shape[1]} logits of the exit before, not {self._least}"
            raise ConfigError(f"exits.cascade: {found}; grow all heads for the same classes")
        previous_BP = previous_BC.detach().index_select(1, self.inputs)
        previous_BP = previous_BP.masked_fill(previous_BP.isneginf(), 0)
        if self.gain is not None:
            previous_BP = F.layer_norm(previous_BP, self.gain.shape, self.gain, self.shift)
        return F.linear(previous_BP, self.weight)

    def extra_repr(self) -> str:
        """Sizes, as ``print`` shows them."""
        return f"outputs={len(self.weight)}, inputs={len(self._known)}, norm={self.gain is not None}"

    def _remember(self, known: Iterable[int]) -> None:
        """Keep ``inputs`` in Python too, so that neither growing nor ``forward`` need ask the device."""
        self._known = tuple(known)
        self._least = max(self._known, default=-1) + 1

    @torch.no_grad()
    def _resize(self, outputs: int, inputs: int) -> None:
        """Keep what fits; new entries of the matrix are 0, new gains 1 and shifts 0."""
        old = self.weight
        added = (0, inputs - old.shape[1], 0, outputs - old.shape[0])  # columns, then rows; negative ones go
        self.weight = nn.Parameter(F.pad(old, added), requires_grad=old.requires_grad)
        if self.gain is not None and self.shift is not None:
            gain, shift = self.gain, self.shift
            self.gain = nn.Parameter(F.pad(gain, added[:2], value=1.0), requires_grad=gain.requires_grad)
            self.shift = nn.Parameter(F.pad(shift, added[:2]), requires_grad=shift.requires_grad)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take the sizes of the saved state first, then load it as any module does."""
        saved = state_dict.get(f"{prefix}weight")
        if saved is not None and saved.shape != self.weight.shape:
            self._resize(*saved.shape)
            self.inputs = self.inputs.new_zeros(saved.shape[1])
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._remember(self.inputs.tolist())
