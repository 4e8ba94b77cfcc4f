"""What a module does, found by trying it: is it an elementwise nonlinearity, does it treat every token alike."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Function = Callable[[Tensor], Tensor]

KNOWN: tuple[Function, ...] = (
    F.relu,
    F.gelu,
    lambda x: F.gelu(x, approximate="tanh"),
    F.silu,
    torch.sigmoid,
    torch.tanh,
    lambda x: F.relu(x).square(),
)
"""Functions tried where a model calls its activation without keeping it."""


def is_activation(part: object) -> bool:
    """Whether ``part`` maps every number by itself and not in a straight line.

    Dropout, identity and scaling are none; neither are softmax and normalization, which look at their neighbors.

    >>> is_activation(nn.GELU()), is_activation(F.relu), is_activation(nn.Dropout()), is_activation(nn.Softmax(-1))
    (True, True, False, False)
    """
    points = _values(part, (-4.0, -2.0, -0.5, 0.0, 0.5, 2.0, 4.0))
    if points is None:
        return False
    alone = _values(part, (-2.0, 0.5))
    slopes = (points[1:] - points[:-1]) / torch.tensor([2.0, 1.5, 0.5, 0.5, 1.5, 2.0])
    same = alone is not None and torch.equal(alone, points[[1, 4]])
    return same and bool(torch.isfinite(points).all()) and float(slopes.max() - slopes.min()) > 1e-3


def rectifies(part: object) -> bool:
    """Whether ``part`` is an activation that lets large values through: ReLU and GELU, neither sigmoid nor tanh.

    >>> rectifies(nn.SiLU()), rectifies(nn.ReLU6()), rectifies(nn.Sigmoid())
    (True, True, False)
    """
    if not is_activation(part):
        return False
    points = _values(part, (-4.0, -2.0, 2.0, 4.0))
    return points is not None and float(points[3] - points[2]) > 0.5 > float((points[1] - points[0]).abs())


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients or warnings; every part gets its own mode back."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def _values(part: object, points: tuple[float, ...]) -> Tensor | None:
    """What ``part`` makes of a few numbers, in float32 on the CPU; None where it fails or changes their shape."""
    if not callable(part):
        return None
    own = next(iter(part.parameters()), None) if isinstance(part, nn.Module) else None
    x = torch.tensor(points) if own is None else torch.tensor(points, device=own.device, dtype=own.dtype)
    if x.is_meta:
        return None
    try:
        with evaluating(part) if isinstance(part, nn.Module) else torch.no_grad():
            y = part(x)
    except Exception:  # a module of any library, given what it may not expect: then it is no activation
        return None
    return y.float().cpu() if isinstance(y, Tensor) and y.shape == x.shape else None
