"""Where the feed-forward networks of a model are, and how another module takes their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clframe.errors import UnsupportedError
from clframe.moe.executors import Activation
from clframe.moe.experts import Linear
from clframe.nn.backbones.base import Backbone
from clframe.nn.network import Network
from clframe.sparsity.ffn import FFN, evaluating, weight_of
from clframe.sparsity.sites import ends_in_relu, find_ffns


@dataclass(frozen=True, eq=False, kw_only=True)
class Dense:
    """A feed-forward network's weights and the way to put something in its place.

    Attributes:
        name: Inside the model.
        up: weight_FD and bias_F; ``gate`` likewise, where there is one.
        down: weight_OF and bias_O.
        activation: On the hidden neurons, or on the gate.
        put: Replaces it in the model.
        inner_dropout: Of the hidden neurons.
        outer_dropout: Of the outputs, where what is replaced holds it.
    """

    name: str
    up: Linear
    down: Linear
    activation: Activation
    put: Callable[[nn.Module], None]
    gate: Linear | None = None
    inner_dropout: float = 0.0
    outer_dropout: float = 0.0


class Passed(nn.Module):
    """Returns what it is given: stands where a layer has moved into the experts behind it."""

    def forward(self, x: Tensor) -> Tensor:
        """The input."""
        return x


def dense_networks(model: nn.Module) -> tuple[Dense, ...]:
    """All feed-forward networks of a model, ready to be replaced.

    Pairs of neighboring layers of our ``mlp`` count, of which the second ends in an activation, too.

    Raises:
        UnsupportedError: There is none, or one cannot be replaced.
    """
    pairs = tuple(_stage_pairs(model))
    if pairs:
        return pairs
    try:
        ffns = find_ffns(model.backbone if isinstance(model, Network) else model)
    except UnsupportedError:
        kind = type(model).__name__
        raise UnsupportedError(
            f"moe: found no feed-forward network in {kind}, nothing to make experts of; choose a transformer or mlp"
        ) from None
    if isinstance(model, Network):
        ffns = tuple(_inside(ffn, "backbone") for ffn in ffns)
    return tuple(_dense(model, ffn) for ffn in ffns)


def _inside(ffn: FFN, parent: str) -> FFN:
    """The same by its names in the parent."""

    def full(name: str) -> str:
        return f"{parent}.{name}" if name else parent

    act = ffn.activation_name
    return replace(
        ffn,
        name=full(ffn.name),
        up_name=full(ffn.up_name),
        down_name=full(ffn.down_name),
        activation_name=None if act is None else full(act),
    )


def _dense(model: nn.Module, ffn: FFN) -> Dense:
    name = ffn.name or type(model).__name__
    activation = _as_module(ffn.activation)
    up, gate = _split_fused(ffn)
    whole = ffn.owner is not model and _is_whole(ffn, up, gate)
    inner, outer = _dropouts(ffn)

    def replace_owner(part: nn.Module) -> None:
        _put(model, ffn.name.split("#")[0], part)

    def replace_parts(part: nn.Module) -> None:
        _put(model, ffn.up_name, Passed())
        _put(model, ffn.down_name, part)
        if ffn.activation_name is not None:
            _put(model, ffn.activation_name, Passed())
        for layer in model.modules():  # its fast path would look for the two layers' weights
            if isinstance(layer, nn.TransformerEncoderLayer) and layer is ffn.owner:
                layer.activation_relu_or_gelu = 0

    if not whole and ffn.gated:
        raise UnsupportedError(
            f"moe: {name} is gated and does more than a feed-forward network; give its network a module of its own"
        )
    if not whole and ffn.activation_name is None:
        raise UnsupportedError(f"moe: {name} keeps its activation out of sight; keep it as a module")
    return Dense(
        name=name,
        up=up,
        gate=gate,
        down=_linear(ffn.down),
        activation=activation,
        put=replace_owner if whole else replace_parts,
        inner_dropout=inner,
        outer_dropout=outer if whole else 0.0,
    )


def _as_module(activation: Activation) -> Activation:
    """Where a network keeps a function of torch's, a module in its place: what watches activations finds it."""
    if activation in (F.relu, torch.relu):
        return nn.ReLU()
    return nn.GELU() if activation is F.gelu else activation


def _split_fused(ffn: FFN) -> tuple[Linear, Linear | None]:
    """Up and gate, the two halves of one layer parted."""
    if ffn.fused is None:
        return _linear(ffn.up), None if ffn.gate is None else _linear(ffn.gate)
    weight, bias = _linear(ffn.up)
    weights = weight.chunk(2)
    biases: tuple[Tensor | None, ...] = (None, None) if bias is None else bias.chunk(2)
    halves = [(weights[0], biases[0]), (weights[1], biases[1])]
    return (halves[1], halves[0]) if ffn.fused == "first" else (halves[0], halves[1])


def _linear(part: nn.Module) -> Linear:
    bias = getattr(part, "bias", None)
    return weight_of(part), bias if isinstance(bias, Tensor) else None


def _is_whole(ffn: FFN, up: Linear, gate: Linear | None) -> bool:
    """Whether the owner computes the network and nothing else: tried on three tokens."""
    weight, bias = up
    down, down_bias = _linear(ffn.down)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, ffn.d_model, generator=generator).to(weight.device, weight.dtype)
    try:
        with evaluating(ffn.owner):
            hidden = nn.functional.linear(x, weight, bias)
            gates = hidden if gate is None else nn.functional.linear(x, *gate)
            hidden = ffn.activation(gates) if gate is None else hidden * ffn.activation(gates)
            plain = nn.functional.linear(hidden, down, down_bias)
            answer = ffn.owner(x)
    except Exception:  # a block that wants more than tokens
        return False
    if not isinstance(answer, Tensor) or answer.shape != plain.shape:
        return False
    tolerance = 1e-4 if plain.dtype in (torch.float32, torch.float64) else 5e-2
    return torch.allclose(answer, plain, rtol=tolerance, atol=tolerance * float(plain.abs().amax()))


def _dropouts(ffn: FFN) -> tuple[float, float]:
    """Probabilities of dropout before and after the output layer, within the owner and in the order of its parts."""
    between: list[float] = []
    after: list[float] = []
    here = None
    for part in ffn.owner.modules():
        if part is ffn.up:
            here = between
        elif part is ffn.down:
            here = after
        elif isinstance(part, nn.Dropout) and here is not None:
            here.append(part.p)
    return max(between, default=0.0), max(after, default=0.0)


def _put(model: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, key = name.rpartition(".")
    setattr(model.get_submodule(parent), key, part)


def _stage_pairs(model: nn.Module) -> Iterator[Dense]:
    """Neighbors among a backbone's stages that are linear layers with an activation of their own, two by two."""
    network = next((part for part in model.modules() if isinstance(part, Network)), None)
    taps = () if network is None else network.exit_taps[:-1]
    for path, backbone in model.named_modules():
        if not isinstance(backbone, Backbone):
            continue
        at = 0
        while at + 1 < len(backbone.stages):
            first, second = backbone.stages[at], backbone.stages[at + 1]
            if not (ends_in_relu(first) and ends_in_relu(second)):
                at += 1
                continue
            if backbone.names[at] in taps:
                raise UnsupportedError(
                    f"moe: found an exit on '{backbone.names[at]}', whose neurons become experts; put it elsewhere"
                )
            yield Dense(
                name=f"{path}.{backbone.names[at]}".lstrip("."),
                up=_linear(first),
                down=_linear(second),
                activation=nn.ReLU(),
                put=_put_pair(backbone, at),
            )
            at += 2


def _put_pair(backbone: Backbone, at: int) -> Callable[[nn.Module], None]:
    def put(part: nn.Module) -> None:
        width = weight_of(backbone.stages[at]).shape[1]
        backbone.tap_shapes[backbone.names[at]] = (width,)
        backbone.stages[at] = nn.Flatten()
        backbone.stages[at + 1] = nn.Sequential(part, nn.ReLU())

    return put
