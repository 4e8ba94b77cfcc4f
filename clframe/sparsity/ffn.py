"""Feed-forward networks inside a model: their layers and the role of each layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clframe.nn.frozen import evaluating

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
"""Functions to try where a model calls its activation as a function instead of as a module."""


def is_activation(part: object) -> bool:
    """Return whether ``part`` is an elementwise nonlinear function.

    Dropout, identity and scaling are linear; softmax and normalization are not elementwise.

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


def is_rectifier(part: object) -> bool:
    """Return whether ``part`` is an activation that passes large values: ReLU and GELU, not sigmoid or tanh.

    >>> is_rectifier(nn.SiLU()), is_rectifier(nn.ReLU6()), is_rectifier(nn.Sigmoid())
    (True, True, False)
    """
    if not is_activation(part):
        return False
    points = _values(part, (-4.0, -2.0, 2.0, 4.0))
    return points is not None and float(points[3] - points[2]) > 0.5 > float((points[1] - points[0]).abs())


@contextmanager
def quiet_evaluation(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients and warnings; every module returns to its own mode at the end."""
    with evaluating(module), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _values(part: object, points: tuple[float, ...]) -> Tensor | None:
    """Apply ``part`` to a few numbers, in float32 on the CPU; None where it fails or changes the shape."""
    if not callable(part):
        return None
    own = next(iter(part.parameters()), None) if isinstance(part, nn.Module) else None
    x = torch.tensor(points) if own is None else torch.tensor(points, device=own.device, dtype=own.dtype)
    if x.is_meta:
        return None
    try:
        with quiet_evaluation(part) if isinstance(part, nn.Module) else torch.no_grad():
            y = part(x)
    except Exception:  # a module of any library may reject a plain tensor: then it is not an activation
        return None
    return y.float().cpu() if isinstance(y, Tensor) and y.shape == x.shape else None


@dataclass(frozen=True, eq=False, kw_only=True)
class FFN:
    """One feed-forward network inside a model.

    Attributes:
        name: Of the owner inside the model, numbered (``#2``) where an owner has several; empty for the model itself.
        owner: The smallest module that contains all its parts.
        up: Linear layer (or transformers' Conv1D) from ``d_model`` to ``d_ff``; where ``fused``, to ``2 d_ff``.
        down: Linear layer from ``d_ff`` to ``d_model``.
        activation: Module or function.
        up_name: Name of ``up`` inside the model; also ``down_name`` and ``gate_name``.
        activation_name: Name of the activation inside the model; None where ``forward`` calls a function.
        d_model: Width of input and output.
        d_ff: Number of hidden neurons.
        gate: Linear layer whose output passes the activation, in a gated FFN of three layers; else None.
        fused: In a gated FFN whose ``up`` holds both matrices: which half of its output is the gate.
    """

    name: str
    owner: nn.Module
    up: nn.Module
    down: nn.Module
    activation: nn.Module | Function
    up_name: str
    down_name: str
    activation_name: str | None
    d_model: int
    d_ff: int
    gate: nn.Module | None = None
    gate_name: str | None = None
    fused: Literal["first", "second"] | None = None

    @property
    def gated(self) -> bool:
        """Whether the activation of one projection is multiplied by another projection."""
        return self.gate is not None or self.fused is not None


def shape_of(part: nn.Module) -> tuple[int, int] | None:
    """Return (inputs, outputs) of a linear layer or transformers' Conv1D, whose weight is transposed; else None."""
    if isinstance(part, nn.Linear):
        return part.in_features, part.out_features
    weight = getattr(part, "weight", None)
    if type(part).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.ndim == 2:
        return weight.shape[0], weight.shape[1]
    return None


def weight_of(part: nn.Module) -> Tensor:
    """Return weight_OI of a linear layer or transformers' Conv1D: outputs first, a view."""
    weight = part.weight
    assert isinstance(weight, Tensor)
    return weight if isinstance(part, nn.Linear) else weight.T


_TOKENS = 16
"""Tokens of a trial run: enough that some output of every layer is negative, or ReLU would look like the identity."""

Named = tuple[str, nn.Module]
Activation = tuple[str | None, Function]


def assign_roles(
    name: str, owner: nn.Module, ups: Sequence[Named], down: Named, activations: Sequence[tuple[str, Function]]
) -> FFN | None:
    """Return the FFN of these layers, or None where ``down`` does not receive the activation of the output of ``ups``.

    An owner that cannot run on tokens alone (it requires a mask, or is on the meta device) is accepted if it has an
    activation and its layers are registered in order; of two layers up, the gate is then the one with "gate" in its
    name, else the first.
    """
    d_model, d_ff = _sizes(ups, down)
    near = sorted(activations, key=lambda act: _parent(act[0]) != _parent(ups[0][0]))
    trial = _trial(owner, [part for _, part in (*ups, down)], d_model)
    found: tuple[Activation, int, Literal["first", "second"] | None] | None
    fused = shape_of(ups[0][1]) == (d_model, 2 * d_ff)
    if trial is None:
        if list(owner.modules()).index(ups[0][1]) > list(owner.modules()).index(down[1]):
            return None
        by_name = len(ups) == 2 and "gate" in ups[1][0].rpartition(".")[2]
        found = (near[0], int(by_name), "first" if fused else None) if near else None
    else:
        hidden = trial[id(down[1])][0]
        halves = trial[id(ups[0][1])][1].chunk(2, dim=-1) if fused else [trial[id(part)][1] for _, part in ups]
        place = _match(owner, list(halves), hidden, near)
        found = None if place is None else (place[0], place[1] * (not fused), _half(place[1]) if fused else None)
    if found is None:
        return None
    (activation_name, activation), at, half = found
    gate = ups[at] if len(ups) == 2 else None
    up = ups[1 - at] if len(ups) == 2 else ups[0]
    return FFN(
        name=name, owner=owner, up=up[1], down=down[1], activation=activation, up_name=up[0], down_name=down[0],
        activation_name=activation_name, d_model=d_model, d_ff=d_ff, gate=gate[1] if gate else None,
        gate_name=gate[0] if gate else None, fused=half,
    )  # fmt: skip


def _match(
    owner: nn.Module, outputs: Sequence[Tensor], hidden: Tensor, activations: Sequence[tuple[str, Function]]
) -> tuple[Activation, int] | None:
    """Find the activation, and the index of its input among ``outputs``, that reproduce ``hidden``."""
    candidates: Iterator[Activation] = chain(activations, ((None, function) for function in KNOWN))
    for candidate in candidates:
        with quiet_evaluation(owner):
            for at, output in enumerate(outputs):
                found = candidate[1](output.clone())
                found = found * outputs[1 - at] if len(outputs) == 2 else found
                if found.shape == hidden.shape and torch.allclose(found, hidden, rtol=1e-2, atol=1e-6):
                    return candidate, at
    return None


def _trial(owner: nn.Module, layers: Sequence[nn.Module], width: int) -> Mapping[int, tuple[Tensor, Tensor]] | None:
    """Record input and output of each layer on a few tokens; None where the owner does not run on them."""
    weight = weight_of(layers[0])
    if weight.is_meta:
        return None
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def see(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        seen[id(layer)] = (inputs[0].clone(), output.clone())  # an activation may write in place

    hooks = [layer.register_forward_hook(see) for layer in layers]
    # Fixed numbers, because this must not advance a random generator.
    x = torch.arange(_TOKENS * width, dtype=torch.float32).mul(1.7).sin().mul(2).reshape(1, _TOKENS, width).to(weight)
    try:
        with quiet_evaluation(owner):
            owner(x)
    except Exception:  # the owner needs other inputs than tokens
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return seen if len(seen) == len(layers) else None


def _sizes(ups: Sequence[Named], down: Named) -> tuple[int, int]:
    shape = shape_of(down[1])
    assert shape is not None
    return shape[1], shape[0]


def _half(at: int) -> Literal["first", "second"]:
    return "second" if at else "first"


def _parent(path: str | None) -> str:
    return (path or "").rpartition(".")[0]
