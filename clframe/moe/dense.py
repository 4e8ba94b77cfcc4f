"""Feed-forward networks of a model: their weights, and replacement of the modules that hold them."""

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
from clframe.sparsity.ffn import FFN, quiet_evaluation, weight_of
from clframe.sparsity.sites import ends_in_relu, find_ffns


@dataclass(frozen=True, eq=False, kw_only=True)
class DenseFFN:
    """Weights of one feed-forward network, and a function that replaces it.

    Attributes:
        name: Name inside the model.
        up: weight_FD and bias_F of the input layer.
        down: weight_OF and bias_O of the output layer.
        activation: Applied to the hidden neurons, or to the gate.
        install: Replaces the network in the model by the given module.
        gate: weight_FD and bias_F of the gate in a gated network.
        inner_dropout: Dropout probability of the hidden neurons.
        outer_dropout: Dropout probability of the outputs, if the replaced module applies it.
    """

    name: str
    up: Linear
    down: Linear
    activation: Activation
    install: Callable[[nn.Module], None]
    gate: Linear | None = None
    inner_dropout: float = 0.0
    outer_dropout: float = 0.0


def find_dense_ffns(model: nn.Module) -> tuple[DenseFFN, ...]:
    """Find all feed-forward networks of a model, ready to be replaced.

    Includes pairs of neighboring ``mlp`` layers, whose second layer ends in an activation.

    Raises:
        UnsupportedError: None found, or one that cannot be replaced.
    """
    pairs = tuple(_find_stage_pairs(model))
    if pairs:
        return pairs
    try:
        ffns = find_ffns(model.backbone if isinstance(model, Network) else model)
    except UnsupportedError:
        kind = type(model).__name__
        raise UnsupportedError(
            f"moe: found no feed-forward network in {kind}; choose a transformer or mlp"
        ) from None
    if isinstance(model, Network):
        ffns = tuple(_with_prefix(ffn, "backbone") for ffn in ffns)
    return tuple(_describe(model, ffn) for ffn in ffns)


def _with_prefix(ffn: FFN, parent: str) -> FFN:
    """Copy of ``ffn`` with all names prefixed by ``parent``."""

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


def _describe(model: nn.Module, ffn: FFN) -> DenseFFN:
    name = ffn.name or type(model).__name__
    activation = _as_module(ffn.activation)
    up, gate = _split_fused(ffn)
    whole = ffn.owner is not model and _is_plain_ffn(ffn, up, gate)
    inner, outer = _dropouts(ffn)

    def replace_owner(part: nn.Module) -> None:
        _replace_submodule(model, ffn.name.split("#")[0], part)

    def replace_parts(part: nn.Module) -> None:
        _replace_submodule(model, ffn.up_name, nn.Identity())
        _replace_submodule(model, ffn.down_name, part)
        if ffn.activation_name is not None:
            _replace_submodule(model, ffn.activation_name, nn.Identity())
        # 0 disables the fast path, which reads the weights of the two replaced layers.
        if isinstance(ffn.owner, nn.TransformerEncoderLayer):
            ffn.owner.activation_relu_or_gelu = 0

    if not whole and ffn.gated:
        raise UnsupportedError(
            f"moe: {name} is gated and computes more than a feed-forward network; move the network to a separate module"
        )
    if not whole and ffn.activation_name is None:
        raise UnsupportedError(f"moe: {name} has an activation that is not a module; store it as a module")
    return DenseFFN(
        name=name,
        up=up,
        gate=gate,
        down=_linear(ffn.down),
        activation=activation,
        install=replace_owner if whole else replace_parts,
        inner_dropout=inner,
        outer_dropout=outer if whole else 0.0,
    )


def _as_module(activation: Activation) -> Activation:
    """Convert functional ReLU and GELU to modules, so that hooks on activations work."""
    if activation in (F.relu, torch.relu):
        return nn.ReLU()
    return nn.GELU() if activation is F.gelu else activation


def _split_fused(ffn: FFN) -> tuple[Linear, Linear | None]:
    """Up and gate layers, split where one linear layer computes both."""
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


def _is_plain_ffn(ffn: FFN, up: Linear, gate: Linear | None) -> bool:
    """Whether the owner module computes exactly the network and nothing else, tested on three random tokens."""
    # By values: the code of an owner may add a residual, normalization or dropout that its modules do not show.
    weight, bias = up
    down, down_bias = _linear(ffn.down)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, ffn.d_model, generator=generator).to(weight.device, weight.dtype)
    try:
        with quiet_evaluation(ffn.owner):
            hidden = nn.functional.linear(x, weight, bias)
            gates = hidden if gate is None else nn.functional.linear(x, *gate)
            hidden = ffn.activation(gates) if gate is None else hidden * ffn.activation(gates)
            plain = nn.functional.linear(hidden, down, down_bias)
            output = ffn.owner(x)
    except Exception:  # the owner needs other inputs than tokens, such as an attention mask
        return False
    if not isinstance(output, Tensor) or output.shape != plain.shape:
        return False
    # Half precision rounds at 1e-3 to 1e-2, and kernels of other shapes sum in another order.
    tolerance = 1e-4 if plain.dtype in (torch.float32, torch.float64) else 5e-2
    return torch.allclose(output, plain, rtol=tolerance, atol=tolerance * float(plain.abs().amax()))


def _dropouts(ffn: FFN) -> tuple[float, float]:
    """Dropout probabilities before and after the output layer, by the order of modules in the owner."""
    between: list[float] = []
    after: list[float] = []
    current = None
    for part in ffn.owner.modules():
        if part is ffn.up:
            current = between
        elif part is ffn.down:
            current = after
        elif isinstance(part, nn.Dropout) and current is not None:
            current.append(part.p)
    return max(between, default=0.0), max(after, default=0.0)


def _replace_submodule(model: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, key = name.rpartition(".")
    setattr(model.get_submodule(parent), key, part)


def _find_stage_pairs(model: nn.Module) -> Iterator[DenseFFN]:
    """Pairs of consecutive backbone stages that are linear layers with an activation."""
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
                    f"moe: found an exit on '{backbone.names[at]}', whose neurons become experts; attach it to another "
                    f"stage"
                )
            yield DenseFFN(
                name=f"{path}.{backbone.names[at]}".lstrip("."),
                up=_linear(first),
                down=_linear(second),
                activation=nn.ReLU(),
                install=_pair_installer(backbone, at),
            )
            at += 2


def _pair_installer(backbone: Backbone, at: int) -> Callable[[nn.Module], None]:
    def install(part: nn.Module) -> None:
        # The first stage becomes the identity, so that names and number of stages do not change.
        width = weight_of(backbone.stages[at]).shape[1]
        backbone.tap_shapes[backbone.names[at]] = (width,)
        backbone.stages[at] = nn.Flatten()
        backbone.stages[at + 1] = nn.Sequential(part, nn.ReLU())

    return install
