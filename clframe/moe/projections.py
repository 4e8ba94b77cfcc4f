"""Attention projections as two-layer networks, which can be converted to experts.

Shape suffixes: B batch, T and S tokens, H heads, D width.
"""

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
from clframe.moe.convert import Call, plain_call, require_finite_weights
from clframe.moe.routed import routed_layers
from clframe.nn.frozen import evaluating
from clframe.seeding import generator_for
from clframe.sparsity.ffn import shape_of, weight_of


class UnpackedAttention(nn.Module):
    """Equivalent of ``nn.MultiheadAttention`` with four linear layers as replaceable submodules.

    ``nn.MultiheadAttention`` stores three projections in one tensor and calls none of the four as a module. The fast
    path of PyTorch's encoder layers, which reads that tensor, does not run with this module.

    Args:
        attention: Module to copy the weights of.

    Attributes:
        query: Projection of the queries; correspondingly ``key``, ``value`` and ``out``.

    Raises:
        UnsupportedError: Keys or values of another width, or additional keys (``add_bias_kv``, ``add_zero_attn``).
    """

    in_proj_bias = None  # PyTorch's encoder layers read these three before they choose the fast path
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
        """Same signature and result as ``nn.MultiheadAttention.forward``."""
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
        """Additive mask of scores_BHTS. ``is_causal`` is only a hint: PyTorch requires the mask as well."""
        bias = None
        if attn_mask is not None:
            bias = _additive_mask(attn_mask, like)
            bias = bias if bias.dim() == 2 else bias.unflatten(0, (-1, self.num_heads))
        if key_padding_mask is not None:
            padding = _additive_mask(key_padding_mask, like)[:, None, None, :]
            bias = padding if bias is None else bias + padding
        return bias


def _additive_mask(mask: Tensor, like: Tensor) -> Tensor:
    """Convert a mask to additive form; True in a boolean mask excludes a position."""
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
    """Hidden neurons of a projection's network for about as many parameters as the layer.

    ``round((d o + o) / (d + o + 1))``; ``(d^2 + d) / (2 d + 1)`` for equal widths, as in the paper.

    >>> hidden_width(768, 768)
    384
    """
    return max(1, round((inputs * outputs + outputs) / (inputs + outputs + 1)))


class Projection(nn.Module):
    """``Linear, ReLU, Dropout, Linear`` as a replacement of one linear layer.

    Args:
        inputs: D.
        outputs: O.
        dropout: Dropout probability of the hidden neurons in training.
        generator: CPU generator for the weights, which follow PyTorch's initialization of linear layers.
    """

    def __init__(self, inputs: int, outputs: int, *, dropout: float = 0.05, generator: Generator | None = None) -> None:
        super().__init__()
        width = hidden_width(inputs, outputs)
        self.up = _random_linear(inputs, width, generator)
        self.activation = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.down = _random_linear(width, outputs, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Any number of leading dimensions."""
        y: Tensor = self.down(self.dropout(self.activation(self.up(x))))
        return y


class ConcatenatedProjections(nn.Module):
    """Replacement of a fused projection: concatenates the outputs of several projections."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """Any number of leading dimensions."""
        return torch.cat([part(x) for part in self.parts], dim=-1)


@dataclass(frozen=True, kw_only=True)
class ProjectionSite:
    """A projection layer of an attention.

    Attributes:
        name: Name inside the model, after :func:`unpack_attentions`.
        inputs: Width of its tokens.
        outputs: Output widths: one, or three for a fused query, key and value projection.
    """

    name: str
    inputs: int
    outputs: tuple[int, ...]


def rebuild_projections(model: nn.Module, sites: Sequence[ProjectionSite], *, dropout: float = 0.05) -> None:
    """Replace the projections at ``sites`` by untrained networks, to load trained weights into.

    Raises:
        UnsupportedError: The model does not have these layers.
    """
    check_dense(model)
    unpack_attentions(model)
    layers = dict(model.named_modules())
    for site in sites:
        found = shape_of(layers[site.name]) if site.name in layers else None
        if found != (site.inputs, sum(site.outputs)):
            raise UnsupportedError(
                f"moe: {type(model).__name__} has no projection {site.name} of {site.inputs} to "
                f"{sum(site.outputs)}; give the model that was converted"
            )
    install_projections(model, sites, make_projections(model, sites, dropout=dropout, seed=0))


def find_projections(model: nn.Module, batch: Any, *, call: Call = plain_call) -> tuple[ProjectionSite, ...]:
    """Find the projections of a model's self-attentions, in the order in which they run on one batch.

    Torch attentions have to be unpacked first.

    Raises:
        UnsupportedError: None found.
    """
    names = {id(part): name for name, part in model.named_modules()}
    calls: list[tuple[nn.Module, bool]] = []
    before: list[Tensor] = []

    def see(layer: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        calls.append((layer, bool(before) and _same_storage(before[0], inputs[0])))
        before[:] = [inputs[0]]  # referenced, so that its storage address is not reused

    with forward_hooks([part for part in model.modules() if shape_of(part)], see), evaluating(model):
        call(model, batch)
    found: dict[int, ProjectionSite] = {}
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
                found[id(part)] = ProjectionSite(name=names[id(part)], inputs=width, outputs=widths)
    if not found:
        raise UnsupportedError(
            f"moe: found no attention in {type(model).__name__} that projects its tokens to their own width; leave its "
            f"projections as they are"
        )
    return tuple(found.values())


def check_dense(model: nn.Module, *, where: str = "moe") -> None:
    """Refuse a converted model, or one whose weights cannot be trained.

    Raises:
        DivergenceError: Weights that are not finite.
        UnsupportedError: Experts, weights on the meta device, or half precision.
    """
    kind = type(model).__name__
    if routed_layers(model) or any(isinstance(part, Projection) for part in model.modules()):
        raise UnsupportedError(f"{where}: found {kind} with experts; give the dense model it was made from")
    parameters = list(model.parameters())
    if any(p.is_meta for p in parameters):
        raise UnsupportedError(f"{where}: found {kind} on the meta device, without weights; load them first")
    half = next((p.dtype for p in parameters if p.dtype in (torch.float16, torch.bfloat16)), None)
    if half is not None:
        raise UnsupportedError(
            f"{where}: found weights in {str(half).removeprefix('torch.')}, too coarse for training; convert the model "
            f"in float32, then cast the result"
        )
    require_finite_weights(model, where=where)


def unpack_attentions(model: nn.Module) -> dict[str, nn.Module]:
    """Replace all ``nn.MultiheadAttention`` modules by :class:`UnpackedAttention`; returns the originals by name."""
    found = {name: part for name, part in model.named_modules() if isinstance(part, nn.MultiheadAttention)}
    opened = {name: UnpackedAttention(part) for name, part in found.items()}
    for name, part in opened.items():
        replace_module(model, found[name], part)
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(part in opened.values() for part in encoder.modules()):
            encoder.use_nested_tensor = False  # the nested-tensor path reads the packed weights
    return dict(found)


def make_projections(
    model: nn.Module, sites: Sequence[ProjectionSite], *, dropout: float, seed: int
) -> list[list[Projection]]:
    """Create the networks of each site."""
    made = []
    for number, site in enumerate(sites):
        weight, generator = weight_of(model.get_submodule(site.name)), generator_for(seed, "moe", "projection", number)
        own = [Projection(site.inputs, o, dropout=dropout, generator=generator) for o in site.outputs]
        made.append([part.to(weight.device, weight.dtype) for part in own])
    return made


def install_projections(
    model: nn.Module, sites: Sequence[ProjectionSite], made: Sequence[Sequence[Projection]]
) -> dict[str, Projection]:
    """Replace the layers at ``sites`` by the given networks; returns these by name."""
    for site, own in zip(sites, made, strict=True):
        layer = model.get_submodule(site.name)
        part = own[0] if len(own) == 1 else ConcatenatedProjections(own)
        replace_module(model, layer, part.train(layer.training))
    return {name: part for name, part in model.named_modules() if isinstance(part, Projection)}


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace ``old`` under all its names; layers may be shared."""
    for name in [name for name, part in model.named_modules(remove_duplicate=False) if part is old]:
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, new)


def _random_linear(inputs: int, outputs: int, generator: Generator | None) -> nn.Linear:
    made = nn.Linear(inputs, outputs, device="meta")
    draw = partial(nn.init.uniform_, a=-(inputs**-0.5), b=inputs**-0.5, generator=generator)
    made.weight = nn.Parameter(draw(torch.empty(outputs, inputs)))
    made.bias = nn.Parameter(draw(torch.empty(outputs)))
    return made


def _same_storage(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()


@contextmanager
def forward_hooks(layers: Sequence[nn.Module], see: Any) -> Iterator[None]:
    """Context with a forward hook on all layers."""
    hooks = [layer.register_forward_hook(see) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
