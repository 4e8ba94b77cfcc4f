"""Attention projections as small networks, which become experts like any other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from clframe.errors import UnsupportedError
from clframe.moe.convert import Call, plain_call
from clframe.moe.routed import routed_layers
from clframe.seeding import generator_for
from clframe.sparsity.ffn import shape_of, weight_of


class OpenAttention(nn.Module):
    """What ``nn.MultiheadAttention`` computes, by four linear layers that can be seen and replaced.

    Torch keeps the weights of three of them in one tensor and calls none of them as a module. The fast path of
    torch's encoder layers, which would look for that tensor, does not run with this module.

    Args:
        attention: The module whose place it takes; its weights are copied.

    Attributes:
        query: Projection of the queries; likewise ``key``, ``value`` and ``out``.

    Raises:
        UnsupportedError: Keys or values of another width, or extra keys (``add_bias_kv``, ``add_zero_attn``).
    """

    in_proj_bias = None  # torch's encoder layers ask for these three before they take the fast path
    in_proj_weight = None
    _qkv_same_embed_dim = False

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
            raise UnsupportedError(
                "moe: found an attention with keys or values of another width, or with keys added; leave projections "
                "as they are"
            )
        self.embed_dim = attention.embed_dim
        self.num_heads = attention.num_heads
        self.dropout = attention.dropout
        self.batch_first = attention.batch_first
        biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        weights = attention.in_proj_weight.chunk(3)
        self.query, self.key, self.value = (_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True))
        self.out: nn.Module = _linear(attention.out_proj.weight, attention.out_proj.bias)
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's; see there."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0 if self.batch_first else 1) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (self._heads(x) for x in (self.query(query), self.key(key), self.value(value)))
        bias = self._bias(attn_mask, key_padding_mask, like=q)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
            weights = (scores if bias is None else scores + bias).softmax(-1)
            mixed = F.dropout(weights, dropout, self.training) @ v
        else:
            mixed, weights = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout), None
        y: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        y = y if self.batch_first else y.transpose(0, 1)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        return (y if batched else y.squeeze(0 if self.batch_first else 1)), weights

    def _heads(self, x_BTD: Tensor) -> Tensor:
        x_BHTD: Tensor = x_BTD.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return x_BHTD

    def _bias(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, *, like: Tensor) -> Tensor | None:
        """What is added to scores_BHTS. ``is_causal`` is a hint only: torch wants the mask beside it."""
        bias = None
        if attn_mask is not None:
            bias = _added(attn_mask, like)
            bias = bias if bias.dim() == 2 else bias.unflatten(0, (-1, self.num_heads))
        if key_padding_mask is not None:
            padding = _added(key_padding_mask, like)[:, None, None, :]
            bias = padding if bias is None else bias + padding
        return bias


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as numbers to add: of booleans, True is left out."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -torch.inf)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return made


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
