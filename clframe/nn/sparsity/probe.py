"""Which layer of a feed-forward network does what, told by running its owner on a few tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clframe.nn.sparsity.elementwise import KNOWN, Function, evaluating
from clframe.nn.sparsity.ffn import FFN, shape_of, weight_of

_TOKENS = 16
"""Enough that no layer's outputs are all positive, where ReLU would look like nothing at all."""

Named = tuple[str, nn.Module]
Activation = tuple[str | None, Function]


def roles(
    name: str, owner: nn.Module, ups: Sequence[Named], down: Named, activations: Sequence[tuple[str, Function]]
) -> FFN | None:
    """The FFN that these layers make, or None where what reaches ``down`` is not the activation of what left ``ups``.

    An owner that cannot be run on tokens alone (it wants a mask, or is on the meta device) is believed if it has
    an activation and layers registered in their order; of two layers up, the gate is then the one whose name says
    so, else the first.
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
    """The activation and the place of its input among ``outputs`` that together make ``hidden``."""
    candidates: Iterator[Activation] = chain(activations, ((None, function) for function in KNOWN))
    for candidate in candidates:
        with evaluating(owner):
            for at, output in enumerate(outputs):
                made = candidate[1](output.clone())
                made = made * outputs[1 - at] if len(outputs) == 2 else made
                if made.shape == hidden.shape and torch.allclose(made, hidden, rtol=1e-2, atol=1e-6):
                    return candidate, at
    return None


def _trial(owner: nn.Module, layers: Sequence[nn.Module], width: int) -> Mapping[int, tuple[Tensor, Tensor]] | None:
    """What goes into and comes out of each layer when the owner sees a few tokens; None where it does not run."""
    weight = weight_of(layers[0])
    if weight.is_meta:
        return None
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def see(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        seen[id(layer)] = (inputs[0].clone(), output.clone())  # an activation may write in place

    hooks = [layer.register_forward_hook(see) for layer in layers]
    # Fixed numbers: finding out must not move anybody's random generator.
    x = torch.arange(_TOKENS * width, dtype=torch.float32).mul(1.7).sin().mul(2).reshape(1, _TOKENS, width).to(weight)
    try:
        with evaluating(owner):
            owner(x)
    except Exception:  # the owner wants something else than tokens
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
