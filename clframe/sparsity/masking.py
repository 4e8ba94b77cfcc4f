"""Activations of feed-forward networks by role: recorded, or masked and counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clframe.errors import ConfigError, UnsupportedError
from clframe.sparsity.ffn import FFN
from clframe.sparsity.functional import MaskKind, effective_rank, keep
from clframe.sparsity.sites import Site, find_sites

Role = Literal["input", "up", "gate", "intermediate"]
ROLES: tuple[Role, ...] = ("input", "up", "gate", "intermediate")
Change = Callable[[Tensor], Tensor]
"""From x with the neurons last to what takes its place."""


@dataclass(frozen=True, eq=False)
class Place:
    """One role in one layer."""

    layer: str
    role: Role
    site: Site


def places_of(model: nn.Module) -> tuple[Place, ...]:
    """All places of a model, in order of depth; the gate only where its activation is a module.

    Raises:
        UnsupportedError: The model has neither an FFN nor an activation.
    """
    found: list[Place] = []
    for site in find_sites(model):
        ffn, roles = site.ffn, list[Role](["intermediate"])
        if ffn is not None:
            gated: list[Role] = ["up"] if ffn.gated else []
            gated += ["gate"] if ffn.gated and site.module is not None else []
            roles = ["input", *gated, "intermediate"]
        found += [Place(site.name, role, site) for role in roles]
    return tuple(found)


def require_weights(model: nn.Module) -> None:
    """Refuse a model without numbers.

    Raises:
        UnsupportedError: It is on the meta device.
    """
    if any(weight.is_meta for weight in model.parameters()):
        raise UnsupportedError("sparsity: found a model on the meta device, without weights; load it first")


@contextmanager
def changing(changes: Sequence[tuple[Place, Change]]) -> Iterator[None]:
    """While active, what passes each place is replaced by what its function returns."""
    with ExitStack() as stack:
        for place, change in changes:
            for hook in _hooks(place, change):
                stack.callback(hook.remove)
        yield


def tokens_of(x: Tensor, mask: Tensor | None, *, layer: str) -> Tensor:
    """x_TN of the tokens that ``mask`` counts: its shape is that of x without the neurons, flattened or not.

    Raises:
        ConfigError: A mask of another number of tokens.
    """
    x_TN = x.reshape(-1, x.shape[-1])
    if mask is None:
        return x_TN
    if mask.numel() != len(x_TN):
        raise ConfigError(
            f"sparsity.mask: found {tuple(mask.shape)} for {tuple(x.shape[:-1])} tokens at '{layer}'; "
            f"give one of the shape of the tokens"
        )
    return x_TN[mask.reshape(-1).to(x.device, torch.bool)]


def _hooks(place: Place, change: Change) -> Iterator[Any]:
    site, ffn = place.site, place.site.ffn

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (change(inputs[0]), *inputs[1:])

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return change(output)

    if ffn is None:
        assert site.module is not None
        yield site.module.register_forward_hook(lambda _, __, output: _on_maps(change, output))
    elif place.role == "input":
        yield ffn.up.register_forward_pre_hook(before)
        if ffn.gate is not None:
            # It sees the same, so the same is kept; but only one of them is to count.
            silent = getattr(change, "silent", change)
            yield ffn.gate.register_forward_pre_hook(lambda _, inputs: (silent(inputs[0]), *inputs[1:]))
    elif place.role == "up":
        yield ffn.up.register_forward_hook(lambda _, __, output: _on_value_half(ffn, change, output))
    elif place.role == "gate":
        assert site.module is not None
        yield site.module.register_forward_hook(after)
    else:
        yield ffn.down.register_forward_pre_hook(before)


def _on_maps(change: Change, output: Tensor) -> Tensor:
    if output.ndim != 4:
        return change(output)
    return change(output.movedim(1, -1)).movedim(-1, 1)


def _on_value_half(ffn: FFN, change: Change, output: Tensor) -> Tensor:
    if ffn.fused is None:
        return change(output)
    first, second = output.chunk(2, dim=-1)
    return torch.cat((first, change(second)) if ffn.fused == "first" else (change(first), second), dim=-1)


class Seen:
    """Keeps the first tokens that count of a place, and changes nothing.

    Args:
        place: Where.
        limit: How many to keep.
    """

    def __init__(self, place: Place, *, limit: int) -> None:
        self.place, self.limit, self.tokens = place, limit, 0
        self.masks: Mapping[str, Tensor | None] = {}
        self._rows: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        """The same x."""
        for mask in self.masks.values():
            rows = tokens_of(x, mask, layer=self.place.layer)[: self.limit - self.tokens]
            self._rows.append(rows.float().cpu())
            self.tokens += len(rows)
        return x

    def silent(self, x: Tensor) -> Tensor:
        """The same x, not kept."""
        return x

    @cached_property
    def rows(self) -> Tensor:
        """x_TN, once all have been seen."""
        return torch.cat(self._rows)

    @property
    def neurons(self) -> int:
        """N."""
        return self.rows.shape[-1]

    @cached_property
    def scale(self) -> float:
        """Root mean square."""
        return float(self.rows.square().mean().sqrt())

    @cached_property
    def rank(self) -> float:
        """Effective rank."""
        return effective_rank(self.rows)


class Masking:
    """Masks a place token by token, and counts by the names of the masks of tokens what is zero afterwards.

    Args:
        place: Where.
        kind: See :func:`~clframe.sparsity.functional.keep`.
        value: p, the threshold or, of top-k, the share of neurons kept.
    """

    def __init__(self, place: Place, *, kind: MaskKind, value: float) -> None:
        self.place, self.kind, self.value = place, kind, value
        self.masks: Mapping[str, Tensor | None] = {}
        self._zeros_N: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """X masked."""
        masked = self.silent(x)
        for name, mask in self.masks.items():
            rows = tokens_of(masked, mask, layer=self.place.layer)
            zeros_N = (rows == 0).sum(0)
            self._zeros_N[name] = self._zeros_N[name] + zeros_N if name in self._zeros_N else zeros_N
            self._tokens[name] = self._tokens.get(name, 0) + len(rows)
        return masked

    def silent(self, x: Tensor) -> Tensor:
        """X masked, not counted."""
        value = round(self.value * x.shape[-1]) if self.kind == "top_k" else self.value
        return x * keep(x, value, kind=self.kind)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the masks of tokens met so far."""
        return tuple(self._tokens)

    @property
    def active_N(self) -> Tensor:
        """Share of tokens in which each neuron is not zero, all parts together."""
        zeros_N = torch.stack(list(self._zeros_N.values())).sum(0)
        return 1 - zeros_N.double().cpu() / max(sum(self._tokens.values()), 1)

    def sparsity(self, part: str | None = None) -> float:
        """Share of zeros in one part, or in all together; 0 where there are no tokens."""
        parts = self.parts if part is None else (part,)
        tokens = sum(self._tokens[name] for name in parts)
        zeros = sum(float(self._zeros_N[name].sum()) for name in parts)
        neurons = len(self._zeros_N[parts[0]]) if parts else 0
        return zeros / (tokens * neurons) if tokens * neurons else 0.0
