"""Hook points of feed-forward networks: recording, masking and counting of activations by role."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clframe.errors import ConfigError, UnsupportedError
from clframe.sparsity.attention import AttentionLayers, find_attentions
from clframe.sparsity.ffn import FFN
from clframe.sparsity.functional import MaskKind, effective_rank, keep
from clframe.sparsity.sites import Site, find_sites

Role = Literal["input", "up", "gate", "intermediate", "attention", "heads"]
ROLES: tuple[Role, ...] = ("input", "up", "gate", "intermediate")
"""Roles in a feed-forward network."""
ATTENTION_ROLES: tuple[Role, ...] = ("attention", "heads")
"""Input of an attention's projections to queries, keys and values; outputs of its heads, before their projection."""
Change = Callable[[Tensor], Tensor]
"""Maps x, neurons last, to its replacement."""


@dataclass(frozen=True, eq=False)
class HookPoint:
    """One role in one layer, where activations are read or replaced."""

    layer: str
    role: Role
    site: Site | AttentionLayers


def find_hook_points(model: nn.Module) -> tuple[HookPoint, ...]:
    """Find all hook points of a model in order of depth; the gate only where its activation is a module.

    Raises:
        UnsupportedError: The model has neither an FFN nor an activation.
    """
    found: list[HookPoint] = []
    for site in find_sites(model):
        ffn, roles = site.ffn, list[Role](["intermediate"])
        if ffn is not None:
            gated: list[Role] = ["up"] if ffn.gated else []
            gated += ["gate"] if ffn.gated and isinstance(ffn.activation, nn.Module) else []
            roles = ["input", *gated, "intermediate"]
        found += [HookPoint(site.name, role, site) for role in roles]
    return tuple(found)


def find_attention_points(model: nn.Module) -> tuple[HookPoint, ...]:
    """Find the hook points of a model's attentions in order of depth; none in a model without."""
    return tuple(HookPoint(one.name, role, one) for one in find_attentions(model) for role in ATTENTION_ROLES)


def require_weights(model: nn.Module) -> None:
    """Raise :class:`UnsupportedError` for a model on the meta device."""
    if any(weight.is_meta for weight in model.parameters()):
        raise UnsupportedError("sparsity: found a model on the meta device, without weights; load it first")


@contextmanager
def replacing(changes: Sequence[tuple[HookPoint, Change]]) -> Iterator[None]:
    """While active, replace the activations at each hook point by the result of its function."""
    with ExitStack() as stack:
        for point, change in changes:
            for hook in _hooks(point, change):
                stack.callback(hook.remove)
        yield


def select_tokens(x: Tensor, mask: Tensor | None, *, layer: str) -> Tensor:
    """Select x_TN of the tokens in ``mask``, whose shape is that of x without the neurons, flattened or not.

    Raises:
        ConfigError: A mask with a different number of tokens.
    """
    x_TN = x.reshape(-1, x.shape[-1])
    if mask is None:
        return x_TN
    if mask.numel() != len(x_TN):
        raise ConfigError(
            f"sparsity.mask: found {tuple(mask.shape)} for {tuple(x.shape[:-1])} tokens at '{layer}'; "
            f"give a mask of the shape of the tokens"
        )
    return x_TN[mask.reshape(-1).to(x.device, torch.bool)]


def _hooks(point: HookPoint, change: Change) -> Iterator[Any]:
    def before(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (change(inputs[0]), *inputs[1:])

    site = point.site
    if isinstance(site, AttentionLayers):
        if point.role == "heads":
            yield site.output.register_forward_pre_hook(before)
        else:
            yield from _shared_input(site.inputs, change)
        return
    ffn = site.ffn
    if ffn is None:
        assert site.module is not None
        yield site.module.register_forward_hook(lambda _, __, output: _on_maps(change, output))
    elif point.role == "input":
        yield from _shared_input([ffn.up] if ffn.gate is None else [ffn.up, ffn.gate], change)
    elif point.role == "up":
        yield ffn.up.register_forward_hook(lambda _, __, output: _on_value_half(ffn, change, output))
    elif point.role == "gate":
        yield from _after_gate(ffn, change)
    else:
        yield ffn.down.register_forward_pre_hook(before)


def _after_gate(ffn: FFN, change: Change) -> Iterator[Any]:
    """Hook the activation for its call after the gate's layer: other networks may share the module."""
    assert isinstance(ffn.activation, nn.Module)
    due = False

    def begin(*_: Any) -> None:
        nonlocal due
        due = True

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        nonlocal due
        own, due = due, False
        return change(output) if own else output

    yield (ffn.gate or ffn.up).register_forward_hook(begin)
    yield ffn.activation.register_forward_hook(after)


def _shared_input(layers: Sequence[nn.Module], change: Change) -> Iterator[Any]:
    """Hook layers with the same input: all get the same mask, which is counted once."""
    apply = getattr(change, "apply", change)
    for function, layer in zip((change, *[apply] * (len(layers) - 1)), layers, strict=True):
        yield layer.register_forward_pre_hook(lambda _, inputs, function=function: (function(inputs[0]), *inputs[1:]))


def _on_maps(change: Change, output: Tensor) -> Tensor:
    if output.ndim != 4:
        return change(output)
    return change(output.movedim(1, -1)).movedim(-1, 1)


def _on_value_half(ffn: FFN, change: Change, output: Tensor) -> Tensor:
    if ffn.fused is None:
        return change(output)
    first, second = output.chunk(2, dim=-1)
    return torch.cat((first, change(second)) if ffn.fused == "first" else (change(first), second), dim=-1)


class Recorder:
    """Records the first unmasked tokens of a hook point and leaves them unchanged.

    Args:
        point: The hook point.
        limit: Largest number of tokens.
    """

    def __init__(self, point: HookPoint, *, limit: int) -> None:
        self.point, self.limit, self.tokens = point, limit, 0
        self.masks: Mapping[str, Tensor | None] = {}
        self._rows: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        """Record x and return it."""
        for mask in self.masks.values():
            rows = select_tokens(x, mask, layer=self.point.layer)[: self.limit - self.tokens]
            self._rows.append(rows.float().cpu())
            self.tokens += len(rows)
        return x

    def apply(self, x: Tensor) -> Tensor:
        """Return x without recording it."""
        return x

    @cached_property
    def rows(self) -> Tensor:
        """x_TN of all recorded tokens."""
        return torch.cat(self._rows)

    @property
    def neurons(self) -> int:
        """Number of neurons, N."""
        return self.rows.shape[-1]

    @cached_property
    def scale(self) -> float:
        """Root mean square of the activations."""
        return float(self.rows.square().mean().sqrt())

    @cached_property
    def rank(self) -> float:
        """Effective rank of the activations."""
        return effective_rank(self.rows)


class Masker:
    """Masks a hook point token by token and counts the zeros afterwards, by the names of the token masks.

    Args:
        point: The hook point.
        kind: See :func:`~clframe.sparsity.functional.keep`.
        value: p, the threshold or, for top-k, the share of neurons to keep.
        power: Of magnitudes, in top-p.
    """

    def __init__(self, point: HookPoint, *, kind: MaskKind, value: float, power: float = 1.0) -> None:
        self.point, self.kind, self.value, self.power = point, kind, value, power
        self.masks: Mapping[str, Tensor | None] = {}
        self._zeros_N: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """Return x masked, and count its zeros."""
        masked = self.apply(x)
        for name, mask in self.masks.items():
            rows = select_tokens(masked, mask, layer=self.point.layer)
            zeros_N = (rows == 0).sum(0)
            self._zeros_N[name] = self._zeros_N[name] + zeros_N if name in self._zeros_N else zeros_N
            self._tokens[name] = self._tokens.get(name, 0) + len(rows)
        return masked

    def apply(self, x: Tensor) -> Tensor:
        """Return x masked, without counting."""
        value = round(self.value * x.shape[-1]) if self.kind == "top_k" else self.value
        return x * keep(x, value, kind=self.kind, power=self.power)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the token masks so far."""
        return tuple(self._tokens)

    @property
    def active_N(self) -> Tensor:
        """Share of tokens in which each neuron is not zero, over all token masks."""
        zeros_N = torch.stack(list(self._zeros_N.values())).sum(0)
        return 1 - zeros_N.double().cpu() / max(sum(self._tokens.values()), 1)

    def sparsity(self, part: str | None = None) -> float:
        """Return the share of zeros under one token mask, or under all; 0 without tokens."""
        parts = self.parts if part is None else (part,)
        tokens = sum(self._tokens[name] for name in parts)
        zeros = sum(float(self._zeros_N[name].sum()) for name in parts)
        neurons = len(self._zeros_N[parts[0]]) if parts else 0
        return zeros / (tokens * neurons) if tokens * neurons else 0.0
