"""Attention projections as small networks, which can then become experts like any other.

Szatkowski et al., "Exploiting Activation Sparsity with Dense to Dynamic-k Mixture-of-Experts Conversion" (2024). A
linear layer has no hidden neurons to choose from. A network of two layers with about as many parameters is
trained to answer what the layer answers, on what reaches the layer in the dense model. Where projections are is told by
running the model: three layers (or one of three times the width) that are given the same tokens, and the layer behind.

Shape suffixes: N tokens, D inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from clframe.errors import UnsupportedError
from clframe.functional.seeding import generator_for
from clframe.nn.moe.attention import OpenAttention
from clframe.nn.moe.convert import Call, plain_call
from clframe.nn.moe.routed import routed_layers
from clframe.nn.sparsity.ffn import shape_of, weight_of


def hidden_width(inputs: int, outputs: int) -> int:
    """Hidden neurons with which a projection's network has about the layer's parameters; of d to d the paper's.

    ``round((d o + o) / (d + o + 1))``, which is ``(d^2 + d) / (2 d + 1)`` for equal widths.

    >>> hidden_width(768, 768)
    384
    """
    return max(1, round((inputs * outputs + outputs) / (inputs + outputs + 1)))


class Projection(nn.Module):
    """``Linear, ReLU, Dropout, Linear`` in place of a linear layer.

    Args:
        inputs: D.
        outputs: O.
        dropout: Of the hidden neurons, in training.
        generator: Draws the weights as torch draws those of linear layers; on the CPU.
    """

    def __init__(self, inputs: int, outputs: int, *, dropout: float = 0.05, generator: Generator | None = None) -> None:
        super().__init__()
        width = hidden_width(inputs, outputs)
        self.up = _drawn(inputs, width, generator)
        self.activation = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.down = _drawn(width, outputs, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Any number of leading dimensions."""
        y: Tensor = self.down(self.dropout(self.activation(self.up(x))))
        return y


class SideBySide(nn.Module):
    """Projections in place of one layer that computes several: their outputs behind one another."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """Any number of leading dimensions."""
        return torch.cat([part(x) for part in self.parts], dim=-1)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A layer of an attention that projects.

    Attributes:
        name: Inside the model, with attentions opened.
        inputs: Width of its tokens.
        outputs: Widths of what it computes: one, or three where it is query, key and value at once.
    """

    name: str
    inputs: int
    outputs: tuple[int, ...]


def put_projections(model: nn.Module, places: Sequence[Place], *, dropout: float = 0.05) -> None:
    """The shapes of a model whose projections were replaced, for weights that are to be loaded: nothing is trained.

    Raises:
        UnsupportedError: A model whose layers are others.
    """
    check_dense(model)
    open_attentions(model)
    layers = dict(model.named_modules())
    for place in places:
        found = shape_of(layers[place.name]) if place.name in layers else None
        if found != (place.inputs, sum(place.outputs)):
            raise UnsupportedError(
                f"moe: {type(model).__name__} has no projection {place.name} of {place.inputs} to "
                f"{sum(place.outputs)}; give the model that was converted"
            )
    put_all(model, places, drawn_projections(model, places, dropout=dropout, seed=0))


def find_projections(model: nn.Module, batch: Any, *, call: Call = plain_call) -> tuple[Place, ...]:
    """The projections of a model's self-attentions, in the order in which they run on one batch.

    Attentions of torch have to be opened before.

    Raises:
        UnsupportedError: There are none.
    """
    names = {id(part): name for name, part in model.named_modules()}
    calls: list[tuple[nn.Module, bool]] = []
    before: list[Tensor] = []

    def see(layer: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        calls.append((layer, bool(before) and _same(before[0], inputs[0])))
        before[:] = [inputs[0]]  # kept, so that no later tensor lies at its address

    with hooked([part for part in model.modules() if shape_of(part)], see), as_teacher(model):
        call(model, batch)
    found: dict[int, Place] = {}
    for at, (layer, _) in enumerate(calls):
        width = (shape_of(layer) or (0, 0))[0]
        together = [other for other, same in calls[at + 1 : at + 3] if same]
        fused = shape_of(layer) == (width, 3 * width)
        group = [layer] if fused else [layer, *together]
        behind = calls[at + len(group)][0] if at + len(group) < len(calls) else layer
        if len(group) != (1 if fused else 3) or shape_of(behind) != (width, width) or behind in group:
            continue
        if not fused and shape_of(layer) != (width, width):
            continue
        for part in (*group, behind):
            widths = (width,) * 3 if fused and part is layer else (width,)
            if shape_of(part) == (width, sum(widths)):
                found[id(part)] = Place(name=names[id(part)], inputs=width, outputs=widths)
    if not found:
        raise UnsupportedError(
            f"moe: found no attention in {type(model).__name__} that projects its tokens to their own width; leave its "
            f"projections as they are"
        )
    return tuple(found.values())


def check_dense(model: nn.Module) -> None:
    """Refuse a model that was converted, or whose weights cannot be trained.

    Raises:
        UnsupportedError: As said.
    """
    if routed_layers(model) or any(isinstance(part, Projection) for part in model.modules()):
        raise UnsupportedError(f"moe: found {type(model).__name__} converted already; give a dense model")
    parameters = list(model.parameters())
    if any(p.is_meta for p in parameters):
        raise UnsupportedError(
            f"moe: found {type(model).__name__} on the meta device, without weights; load them first"
        )
    half = next((p.dtype for p in parameters if p.dtype in (torch.float16, torch.bfloat16)), None)
    if half is not None:
        raise UnsupportedError(f"moe: found weights in {half}, in which nothing can be trained; use model.float()")


def open_attentions(model: nn.Module) -> dict[str, nn.Module]:
    """Open all attentions of torch; returns what stood there, by name."""
    found = {name: part for name, part in model.named_modules() if isinstance(part, nn.MultiheadAttention)}
    opened = {name: OpenAttention(part) for name, part in found.items()}
    for name, part in opened.items():
        put_everywhere(model, found[name], part)
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(part in opened.values() for part in encoder.modules()):
            encoder.use_nested_tensor = False  # it would look for the packed weights
    return dict(found)


def drawn_projections(
    model: nn.Module, places: Sequence[Place], *, dropout: float, seed: int
) -> list[list[Projection]]:
    """The networks of each place, drawn."""
    made = []
    for number, place in enumerate(places):
        weight, generator = weight_of(model.get_submodule(place.name)), generator_for(seed, "moe", "projection", number)
        own = [Projection(place.inputs, o, dropout=dropout, generator=generator) for o in place.outputs]
        made.append([part.to(weight.device, weight.dtype) for part in own])
    return made


def put_all(model: nn.Module, places: Sequence[Place], made: Sequence[Sequence[Projection]]) -> dict[str, Projection]:
    """Put the networks in their places; returns them by name."""
    for place, own in zip(places, made, strict=True):
        layer = model.get_submodule(place.name)
        part = own[0] if len(own) == 1 else SideBySide(own)
        put_everywhere(model, layer, part.train(layer.training))
    return {name: part for name, part in model.named_modules() if isinstance(part, Projection)}


def put_everywhere(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """In every place where ``old`` stands: layers may be shared."""
    for name in [name for name, part in model.named_modules(remove_duplicate=False) if part is old]:
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, new)


def _drawn(inputs: int, outputs: int, generator: Generator | None) -> nn.Linear:
    made = nn.Linear(inputs, outputs, device="meta")
    draw = partial(nn.init.uniform_, a=-(inputs**-0.5), b=inputs**-0.5, generator=generator)
    made.weight = nn.Parameter(draw(torch.empty(outputs, inputs)))
    made.bias = nn.Parameter(draw(torch.empty(outputs)))
    return made


def _same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()


@contextmanager
def hooked(layers: Sequence[nn.Module], see: Any) -> Iterator[None]:
    """Forward hooks on all layers for a while."""
    hooks = [layer.register_forward_hook(see) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def as_teacher(model: nn.Module) -> Iterator[None]:
    """The teacher: in evaluation mode, without gradients; every part gets its own mode back."""
    training = {part: part.training for part in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for part, flag in training.items():
            part.training = flag
