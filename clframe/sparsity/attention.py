"""Projections of self-attentions inside any module, found by class name and shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from clframe.sparsity.ffn import shape_of


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionLayers:
    """Projections of one self-attention.

    Attributes:
        name: Of the attention, inside the model.
        inputs: Projections of its input to queries, keys and values: three layers, or one for all.
        output: Projection of the heads' outputs, which are its input.
    """

    name: str
    inputs: tuple[nn.Module, ...]
    output: nn.Module


def find_attentions(model: nn.Module) -> tuple[AttentionLayers, ...]:
    """Find the attentions of a model: modules whose class is named so, with four projections, or two of them fused.

    An attention reads tokens of width d with layers from d, and writes with the last layer, to d. Keys and values may
    be narrower than queries (grouped-query attention). ``nn.MultiheadAttention``, whose projections are not modules, is
    left out.

    >>> layer = nn.TransformerEncoderLayer(8, 2)
    >>> find_attentions(layer)
    ()
    """
    found: list[AttentionLayers] = []
    taken: set[int] = set()
    for name, owner in reversed(list(model.named_modules())):  # the innermost first
        if "attention" not in type(owner).__name__.lower() and "attn" not in type(owner).__name__.lower():
            continue
        layers = [part for part in owner.modules() if shape_of(part) is not None and id(part) not in taken]
        split = _split(layers)
        if split is not None:
            taken |= {id(part) for part in layers}
            found.append(AttentionLayers(name=name, inputs=split[0], output=split[1]))
    return tuple(reversed(found))


def _split(layers: Sequence[nn.Module]) -> tuple[tuple[nn.Module, ...], nn.Module] | None:
    """Divide linear layers into those of the input and that of the output; None if they are not an attention's."""
    shapes = [shape_of(part) or (0, 0) for part in layers]
    inputs: tuple[int, ...]
    if len(layers) == 2:
        fused = max((0, 1), key=lambda at: shapes[at][1] / shapes[at][0])
        inputs, output = (fused,), 1 - fused
    elif len(layers) == 4:
        inputs, output = (0, 1, 2), 3
    else:
        return None
    width = shapes[inputs[0]][0]
    if any(shapes[at][0] != width for at in inputs) or shapes[output][1] != width:
        return None
    return tuple(layers[at] for at in inputs), layers[output]
