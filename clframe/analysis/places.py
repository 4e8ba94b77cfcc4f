"""Where in a feed-forward network activations are looked at and masked, and the passes that do so.

Roles: ``input``, what enters it; ``up`` and ``gate``, the two factors of a gated one; ``intermediate``, what enters its
last layer. Of an activation that belongs to no FFN there is ``intermediate`` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clframe.errors import ConfigError, UnsupportedError
from clframe.nn.sparsity.sites import FFN, Site, find_sites

Role = Literal["input", "up", "gate", "intermediate"]
ROLES: tuple[Role, ...] = ("input", "up", "gate", "intermediate")
Change = Callable[[Tensor], Tensor]
"""From x with the neurons last to what takes its place."""

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""What a model is called with: one tensor, positional arguments, or named ones."""


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


@contextmanager
def answering(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every part gets its own mode back."""
    modes = [(part, part.training) for part in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def called(model: nn.Module, inputs: Inputs) -> Any:
    """The model's output for inputs of any of the three kinds."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


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
